"""Each native tier's AdamW steps against the reference, the formula written out, and torch's fused kernel."""

from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import Tensor

from halfbyte import kernels
from halfbyte.kernels import AdamwStep, native, reference
from halfbyte.quant import codebook

DTYPES = [torch.float32, torch.bfloat16, torch.float16]
# Nothing, less than a block or a register, whole blocks, a short last one.
SIZES = [0, 1, 15, 16, 33, 255, 256, 1024, 4099]
OPTIONS: dict[str, Any] = {"lr": 1e-2, "betas": (0.9, 0.99), "eps": 1e-8, "weight_decay": 0.1}
MARGIN = 64
# Beside the dynamic maps, whose ranks are computed, tables whose ranks have to be searched: with other distances on
# either side of zero, with a different distance everywhere, and with equal values.
TABLES = {
    "dynamic": codebook("dynamic"),
    "dynamic_unsigned": codebook("dynamic_unsigned"),
    "int8": codebook("int8"),
    "quadratic": torch.linspace(0, 1, 256) ** 2,
    "steps": (torch.linspace(-1, 1, 256) * 8).round() / 8,
    "negative": torch.linspace(-1, -0.5, 256),
    "midpoint at 1": torch.cat([codebook("dynamic")[:-1], 2 - codebook("dynamic")[-2:-1]]),
}


@pytest.fixture(params=native.tiers())
def tier(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HALFBYTE_ISA", request.param)


@pytest.fixture
def threads() -> Iterator[Callable[[int], None]]:
    before = torch.get_num_threads()
    yield torch.set_num_threads
    torch.set_num_threads(before)


def seeded(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def same(got: Tensor, expected: Tensor) -> bool:
    """Equal bit for bit, except that one NaN is as good as another."""
    if got.is_floating_point():
        bits = torch.int32 if got.dtype == torch.float32 else torch.int16
        got, expected = (torch.where(x.isnan(), torch.full_like(x, torch.nan), x).view(bits) for x in (got, expected))
    return torch.equal(got, expected)


class Run:
    """Parameters of all dtypes and their state, each with a margin around it that no step may touch."""

    def __init__(self, sizes: list[int], state_bits: int, blocksize: int = 256) -> None:
        self.rooms: list[Tensor] = []
        generator = seeded(0)
        self.params = [self.roomy(torch.randn(n, generator=generator).to(DTYPES[i % 3])) for i, n in enumerate(sizes)]
        blocks = [-(-n // blocksize) for n in sizes]
        self.state: list[list[Any]]
        if state_bits == 32:
            self.state = [[self.roomy(torch.zeros(n)) for n in sizes] for _ in range(2)]
        else:
            self.state = [
                [
                    (self.roomy(torch.full((n,), zero, dtype=torch.uint8)), self.roomy(torch.zeros(b)))
                    for n, b in zip(sizes, blocks, strict=True)
                ]
                for zero in (127, 0)
            ]

    def roomy(self, x: Tensor) -> Tensor:
        room = torch.full((len(x) + 2 * MARGIN,), 77, dtype=x.dtype)
        self.rooms.append(room)
        room[MARGIN : MARGIN + len(x)] = x
        return room[MARGIN : MARGIN + len(x)]

    def is_like(self, other: "Run") -> bool:
        return all(same(a, b) for a, b in zip(self.rooms, other.rooms, strict=True))


def gradients(params: list[Tensor], step: int) -> list[Tensor]:
    """Of all sizes; from the second step on some are zero, infinite, NaN or too large to be squared."""
    generator = seeded(100 + step)
    grads = []
    for p in params:
        grad = torch.randn(p.shape, generator=generator) * 10 ** (8 * torch.rand(p.shape, generator=generator) - 8)
        if step > 1:
            bad = torch.tensor([0.0, -0.0, torch.inf, -torch.inf, torch.nan, 1e30])
            where = torch.rand(p.shape, generator=generator) < 0.01
            grad = torch.where(where, bad[torch.randint(6, p.shape, generator=generator)], grad)
        grads.append(grad.to(p.dtype))
    return grads


@pytest.mark.parametrize("blocksize", [256, 32, 7, 2048, 4096])
def test_8_bit_steps_are_the_reference_s(tier: str, blocksize: int) -> None:
    ours, theirs = (Run(SIZES, 8, blocksize) for _ in range(2))
    for step in range(1, 5):
        grads = gradients(ours.params, step)
        if step in (1, 3):
            grads = [torch.zeros_like(grad) for grad in grads]
        for module, run in ((native, ours), (reference, theirs)):
            module.adamw_8bit(
                run.params, grads, *run.state, TABLES["dynamic"], TABLES["dynamic_unsigned"], blocksize,
                AdamwStep(step, **OPTIONS),
            )  # fmt: skip
        assert ours.is_like(theirs)


def near_midpoints(code: Tensor, generator: torch.Generator) -> Tensor:
    """The midpoints of a table, with either sign, their next fp32 values, and values at random: blocks of 256."""
    middle = (code[:-1] + code[1:]) / 2
    near = [middle, torch.nextafter(middle, torch.tensor(2.0)), torch.nextafter(middle, torch.tensor(-2.0))]
    x = torch.cat([*near, *(-x for x in near), torch.rand(2000, generator=generator) * 2 - 1]).clamp(-1, 1)
    x = x[torch.randperm(len(x), generator=generator)][: len(x) // 255 * 255].view(-1, 255)
    x = torch.cat([torch.ones(len(x), 1), x], dim=1)  # the first makes a block's scale 1
    # The reciprocals of their squares are subnormal, so inexact that scaled values exceed 1.
    huge = 1.8e19 * (1 - torch.rand(64, 1, generator=generator) / 4).expand(64, 256)
    return torch.cat([x, huge]).view(-1)


@pytest.mark.parametrize("name", TABLES)
def test_moments_take_the_nearest_code_of_any_table(tier: str, name: str) -> None:
    code = TABLES[name]
    grad = near_midpoints(code, seeded(5))
    n = len(grad)
    state = [(torch.zeros(n, dtype=torch.uint8), torch.zeros(n // 256)) for _ in range(2)]
    native.adamw_8bit(
        [torch.zeros(n)], [grad], state[:1], state[1:], code, code, 256,
        AdamwStep(1, lr=0.0, betas=(0.0, 0.0), eps=1.0, weight_decay=0.0),
    )  # fmt: skip
    # Without memory the moments are the gradient and its square.
    for (codes, absmax), moment in zip(state, (grad, grad * grad), strict=True):
        expected = reference.quantize_coded(moment, code, 256)
        assert same(codes, expected[0]) and same(absmax, expected[1])


def fused(a: Tensor, b: Tensor, c: Tensor) -> Tensor:
    """``a b + c`` rounded once. In fp64 the product is exact, and that the sum rounds twice spoils one in 2^29."""
    return (a.double() * b.double() + c.double()).float()


def formula_32bit(
    p: Tensor,
    grad: Tensor,
    m: Tensor,
    v: Tensor,
    step: int,
    lr: float,
    betas: tuple[float, float],
    eps: float,
    weight_decay: float,
) -> None:
    def number(x: float) -> Tensor:
        return torch.tensor(x, dtype=torch.float32)

    g, rest1, rest2 = grad.float(), number(1 - betas[0]), number(1 - betas[1])
    m.copy_(fused(rest1, g - m, m) if rest1 < 0.5 else fused(rest1 - 1, g - m, g))
    v.copy_(fused(rest2 * g, g, number(betas[1]) * v))
    root = v.double().sqrt().float()
    denominator = root / number((1 - betas[1] ** step) ** 0.5) + number(eps)
    rate = number(-lr / (1 - betas[0] ** step))
    p.copy_(number(1 - lr * weight_decay) * p.float() + rate * m / denominator)


@pytest.mark.parametrize("betas", [(0.9, 0.999), (0.5, 0.9), (0.2, 0.95), (0.0, 0.0)])
def test_32_bit_steps_are_the_formula_s(tier: str, betas: tuple[float, float]) -> None:
    ours, theirs = (Run(SIZES, 32) for _ in range(2))
    options = OPTIONS | {"betas": betas}
    for step in range(1, 5):
        grads = gradients(ours.params, step)
        native.adamw_32bit(ours.params, grads, *ours.state, AdamwStep(step, **options))
        for tensors in zip(theirs.params, grads, *theirs.state, strict=True):
            formula_32bit(*tensors, step, **options)
        assert ours.is_like(theirs)


fuses = pytest.mark.skipif(
    torch.backends.cpu.get_cpu_capability() == "DEFAULT", reason="torch multiplies and adds in two roundings here"
)


@fuses
@pytest.mark.parametrize("weight_decay", [0.0, 0.1])
def test_32_bit_steps_are_those_of_torch_s_fused_optimizer(tier: str, weight_decay: float) -> None:
    # Whole registers: torch rounds otherwise in what is left over at the end.
    options = OPTIONS | {"weight_decay": weight_decay}
    params = [torch.randn(n, generator=seeded(n)) for n in (16, 4096, 48)]
    state = [[torch.zeros_like(p) for p in params] for _ in range(2)]
    theirs = [torch.nn.Parameter(p.clone()) for p in params]
    optimizer = torch.optim.AdamW(theirs, **options, fused=True)
    for step in range(1, 9):
        grads = gradients(params, 1)
        for p, grad in zip(theirs, grads, strict=True):
            p.grad = grad.clone()
        optimizer.step()
        native.adamw_32bit(params, grads, *state, AdamwStep(step, **options))
    for i, p in enumerate(theirs):
        its = optimizer.state[p]
        assert same(params[i], p.detach())
        assert same(state[0][i], its["exp_avg"]) and same(state[1][i], its["exp_avg_sq"])


@fuses
@pytest.mark.parametrize("dtype", DTYPES)
def test_32_bit_moments_are_the_reference_s_and_parameters_within_the_bound(tier: str, dtype: torch.dtype) -> None:
    p = torch.randn(5003, generator=seeded(1)).to(dtype)
    ours, theirs = ([p.clone(), torch.zeros(5003), torch.zeros(5003)] for _ in range(2))
    for step in range(1, 9):
        before = ours[0].float().clone()
        (grad,) = gradients([p], 1)
        for module, (param, m, v) in ((native, ours), (reference, theirs)):
            module.adamw_32bit([param], [grad], [m], [v], AdamwStep(step, **OPTIONS))
        assert same(ours[1], theirs[1]) and same(ours[2], theirs[2])
        got, expected = ours[0].float(), theirs[0].float()
        update = (expected - before).abs() + OPTIONS["lr"] * OPTIONS["weight_decay"] * before.abs()
        assert ((got - expected).abs() <= 2**-21 * update + torch.finfo(dtype).eps * expected.abs()).all()
        theirs[0].copy_(ours[0])


def test_the_number_of_threads_and_the_company_change_nothing(tier: str, threads: Callable[[int], None]) -> None:
    sizes = [70_001, 5, 300_000, 0, 256, 4096]
    grads = gradients(Run(sizes, 8).params, 2)
    runs = []
    for count in (1, 2, 3, 5):
        threads(count)
        both = Run(sizes, 8), Run(sizes, 32)
        native.adamw_8bit(
            both[0].params, grads, *both[0].state, TABLES["dynamic"], TABLES["dynamic_unsigned"], 256,
            AdamwStep(1, **OPTIONS),
        )  # fmt: skip
        native.adamw_32bit(both[1].params, grads, *both[1].state, AdamwStep(1, **OPTIONS))
        runs.append(both)
    assert all(a.is_like(b) for run in runs[1:] for a, b in zip(run, runs[0], strict=True))
    alone = Run(sizes, 8)
    for i, grad in enumerate(grads):
        native.adamw_8bit(
            alone.params[i : i + 1], [grad], *(s[i : i + 1] for s in alone.state),
            TABLES["dynamic"], TABLES["dynamic_unsigned"], 256, AdamwStep(1, **OPTIONS),
        )  # fmt: skip
    assert alone.is_like(runs[0][0])


@pytest.mark.parametrize("shift", [1, 2])
def test_parameters_and_gradients_may_lie_at_any_address(tier: str, shift: int) -> None:
    def moved(x: Tensor) -> Tensor:
        room = bytearray(x.nbytes + 64)
        start = -torch.frombuffer(room, dtype=torch.uint8).data_ptr() % 16 + shift
        copy = torch.frombuffer(room, dtype=x.dtype, count=x.numel(), offset=start)
        copy.view(torch.uint8).copy_(x.view(torch.uint8))
        return copy

    for dtype in DTYPES:
        p = torch.randn(1003, generator=seeded(3)).to(dtype)
        (grad,) = gradients([p], 1)
        results = []
        for place in (torch.clone, moved):
            param, m, v = place(p), torch.zeros(1003), torch.zeros(1003)
            eight = [(place(torch.zeros(1003, dtype=torch.uint8)), torch.zeros(4)) for _ in range(2)]
            native.adamw_32bit([param], [place(grad)], [m], [v], AdamwStep(1, **OPTIONS))
            native.adamw_8bit(
                [param], [place(grad)], eight[:1], eight[1:], TABLES["dynamic"], TABLES["dynamic_unsigned"], 256,
                AdamwStep(1, **OPTIONS),
            )  # fmt: skip
            results.append([param, m, v, *eight[0], *eight[1]])
        assert all(same(a.clone(), b) for a, b in zip(results[1], results[0], strict=True))


@pytest.mark.skipif(not native.available(), reason="the package was installed without its extension")
@pytest.mark.parametrize("state_bits", [32, 8])
def test_autograd_notices_that_a_parameter_was_stepped(state_bits: int) -> None:
    p = torch.ones(300, requires_grad=True)
    loss = (p * p).sum()  # keeps p for the backward
    if state_bits == 32:
        kernels.adamw_32bit([p], [torch.ones(300)], [torch.zeros(300)], [torch.zeros(300)], AdamwStep(1, **OPTIONS))
    else:
        state = [[(torch.zeros(300, dtype=torch.uint8), torch.zeros(2))] for _ in range(2)]
        tables = TABLES["dynamic"], TABLES["dynamic_unsigned"]
        kernels.adamw_8bit([p], [torch.ones(300)], *state, *tables, 256, AdamwStep(1, **OPTIONS))
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


@pytest.mark.parametrize(
    ("param", "grad", "message"),
    [
        (torch.zeros(3, device="meta"), torch.zeros(3, device="meta"), r"params\[1\] is torch.float32 on meta"),
        (torch.zeros(3), torch.zeros(3, device="meta"), r"grads\[1\] is torch.float32 on meta"),
        (
            torch.zeros(3),
            torch.zeros(3, dtype=torch.bfloat16),
            r"grads\[1\] is torch.bfloat16 .* must be torch.float32",
        ),
        (torch.zeros(3), torch.zeros(4), r"grads\[1\] has shape \(4,\); its parameter has \(3,\)"),
        (torch.zeros(6)[::2], torch.zeros(3), r"params\[1\] is torch.float32 on cpu with strides \(2,\)"),
    ],
)
def test_no_address_is_taken_of_a_tensor_that_does_not_fit(param: Tensor, grad: Tensor, message: str) -> None:
    good = torch.zeros(3)
    state = [torch.zeros_like(good), torch.zeros(3, device=param.device)]
    with pytest.raises((TypeError, ValueError), match=message):
        kernels.adamw_32bit([good, param], [good, grad], state, state, AdamwStep(1, **OPTIONS))

"""AdamW against torch's, against its formula written out over numpy, and against bitsandbytes' library."""

import copy
import json
from operator import itemgetter
from pathlib import Path
from typing import Any

import bitsandbytes
import numpy as np
import pytest
import torch
from bitsandbytes.functional import create_dynamic_map
from safetensors.torch import load_file, save_file
from torch import Tensor
from torch.nn import Parameter
from transformers.training_args import OptimizerNames

from halfbyte import kernels, optim
from halfbyte.errors import InputError

# Under and over the 4096 elements from which state takes 8 bits; whole blocks of 256, a short last one, one short one.
SHAPES = [(64, 96), (65, 71), (4096,), (5, 3, 277), (4095,), (7,), ()]
# bitsandbytes' CPU library does not take the nearest 8-bit code: tests/kernels/test_bitsandbytes.py says how far it is.
EXACT = [name for name in kernels.providers() if name != "bitsandbytes"]
DTYPES = [torch.float32, torch.bfloat16, torch.float16]


def parameters(shapes: list[tuple[int, ...]], dtype: torch.dtype = torch.float32, seed: int = 0) -> list[Parameter]:
    generator = torch.Generator().manual_seed(seed)
    return [Parameter(torch.randn(shape, generator=generator).to(dtype)) for shape in shapes]


def set_gradients(params: list[Parameter], seed: int) -> None:
    """Gradients of every size: each row of a parameter has its own scale, over four decades."""
    generator = torch.Generator().manual_seed(seed)
    for p in params:
        scale = 10 ** (4 * torch.rand(p.shape[:1] + (1,) * (p.dim() - 1), generator=generator) - 4)
        p.grad = (torch.randn(p.shape, generator=generator) * scale).to(p.dtype)


def train(optimizer: torch.optim.Optimizer, steps: range) -> None:
    params = [p for group in optimizer.param_groups for p in group["params"]]
    for step in steps:
        set_gradients(params, seed=step)
        optimizer.step()


def tensors(optimizer: torch.optim.Optimizer) -> list[Tensor]:
    """The parameters, then everything in the state but the step counts."""
    states = optimizer.state_dict()["state"].values()
    params = [p.detach() for group in optimizer.param_groups for p in group["params"]]
    return params + [state[name] for state in states for name in sorted(state) if name != "step"]


def all_equal(these: list[Tensor], those: list[Tensor]) -> bool:
    return len(these) == len(those) and all(
        a.dtype == b.dtype and torch.equal(a, b) for a, b in zip(these, those, strict=True)
    )


def create(name: str, params: list[Parameter], **options: Any) -> optim.AdamW:
    return optim.create(name, params, **{"lr": 1e-2, "betas": (0.9, 0.99), "eps": 1e-8, "weight_decay": 0.1} | options)


@pytest.mark.parametrize("provider", kernels.providers())
@pytest.mark.parametrize("weight_decay", [0.0, 0.1])
@pytest.mark.parametrize("foreach", [True, False])
def test_32_bit_steps_are_bitwise_those_of_torch(weight_decay: float, foreach: bool, provider: str) -> None:
    runs = []
    for make in (optim.AdamW, lambda *a, **k: torch.optim.AdamW(*a, **k, foreach=foreach)):
        params = parameters(SHAPES)
        groups = [{"params": params[:3], "lr": 3e-2}, {"params": params[3:], "betas": (0.8, 0.95)}]
        optimizer = make(groups, lr=1e-2, weight_decay=weight_decay)
        schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 1 / (1 + step))
        for step in range(25):
            set_gradients(params, seed=step)
            if step % 3 == 0:
                params[1].grad = None  # its step count falls behind the others'
            with kernels.use_provider(provider):
                optimizer.step()
            schedule.step()
        runs.append(tensors(optimizer))
    assert all_equal(*runs)


@pytest.mark.parametrize("provider", kernels.providers())
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_32_bit_steps_over_half_precision_are_fp32_steps_rounded_once(dtype: torch.dtype, provider: str) -> None:
    params = parameters(SHAPES, dtype)
    plain = [Parameter(p.detach().float()) for p in params]
    ours, theirs = optim.AdamW(params, lr=1e-2), torch.optim.AdamW(plain, lr=1e-2)
    for step in range(10):
        set_gradients(params, seed=step)
        for p, q in zip(params, plain, strict=True):
            q.grad = p.grad.float()
        with kernels.use_provider(provider):
            ours.step()
            theirs.step()
        for q in plain:
            q.data = q.data.to(dtype).float()
    assert all_equal([p.detach().float() for p in params], [q.detach() for q in plain])
    assert all(
        state[name].dtype == torch.float32 for state in ours.state.values() for name in ("exp_avg", "exp_avg_sq")
    )


class Formula8bit:
    """8-bit AdamW of one tensor, step by step over numpy's fp32, block by block.

    The nearest code is the number of midpoints between neighbouring codes, themselves fp32, that lie below a value.
    """

    def __init__(self, p: Tensor) -> None:
        self.p, self.dtype, self.t = p.detach().float().numpy().ravel().copy(), p.dtype, 0
        self.tables = [create_dynamic_map(signed=True).numpy(), create_dynamic_map(signed=False).numpy()]
        self.moments = [np.zeros_like(self.p), np.zeros_like(self.p)]

    def step(self, grad: Tensor, lr: float, betas: tuple[float, float], eps: float, weight_decay: float) -> None:
        f = np.float32
        self.t += 1
        g = grad.float().numpy().ravel()
        m = f(betas[0]) * self.moments[0] + f(1 - betas[0]) * g
        v = f(betas[1]) * self.moments[1] + f(1 - betas[1]) * (g * g)
        denominator = np.sqrt(v) / f((1 - betas[1] ** self.t) ** 0.5) + f(eps)
        p = f(1 - lr * weight_decay) * self.p - f(lr / (1 - betas[0] ** self.t)) * m / denominator
        self.p = torch.from_numpy(p).to(self.dtype).float().numpy()
        self.moments = [self.round(x, table) for x, table in zip((m, v), self.tables, strict=True)]

    @staticmethod
    def round(x: np.ndarray, table: np.ndarray) -> np.ndarray:
        out = np.empty_like(x)
        for start in range(0, len(x), 256):
            block = x[start : start + 256]
            absmax = np.abs(block).max()
            scaled = block * (np.float32(1) / absmax) if len(block) == 256 else block / absmax
            midpoints = (table[1:] + table[:-1]) / np.float32(2)
            out[start : start + 256] = table[(scaled[:, None] > midpoints).sum(axis=1)] * absmax
        return out


@pytest.mark.parametrize("provider", EXACT)
@pytest.mark.parametrize("dtype", DTYPES)
def test_8_bit_steps_are_bitwise_the_formula_with_moments_rounded_to_the_nearest_code(
    dtype: torch.dtype, provider: str
) -> None:
    options = {"lr": 1e-2, "betas": (0.9, 0.99), "eps": 1e-8, "weight_decay": 0.1}
    params = parameters(SHAPES[:4], dtype)
    oracles = [Formula8bit(p) for p in params]
    optimizer = optim.AdamW(params, **options, state_bits=8)
    with kernels.use_provider(provider):
        for step in range(5):
            set_gradients(params, seed=step)
            optimizer.step()
            for p, oracle in zip(params, oracles, strict=True):
                oracle.step(p.grad, **options)
                assert np.array_equal(p.detach().float().numpy().ravel(), oracle.p)


def test_state_takes_8_bits_from_4096_elements_on_and_32_below() -> None:
    params = parameters(SHAPES)
    optimizer = optim.AdamW(params, state_bits=8)
    train(optimizer, range(1))
    for p in params:
        state = optimizer.state[p]
        large = p.numel() >= 4096
        assert state["exp_avg"].dtype == state["exp_avg_sq"].dtype == (torch.uint8 if large else torch.float32)
        assert state["exp_avg"].shape == state["exp_avg_sq"].shape == p.shape
        assert ("exp_avg_absmax" in state) == ("exp_avg_sq_absmax" in state) == large
    large = optimizer.state[params[2]]
    assert sum(x.nbytes for x in large.values() if isinstance(x, Tensor)) / 4096 == 2 + 2 * 4 / 256


def test_an_8_bit_step_is_that_of_bitsandbytes_but_for_its_library_missing_the_nearest_code() -> None:
    options = {"lr": 1e-2, "betas": (0.9, 0.99), "eps": 1e-8, "weight_decay": 0.1}
    (p,) = parameters([(96, 256)])
    (q,) = parameters([(96, 256)])
    ours, theirs = optim.AdamW([p], **options, state_bits=8), bitsandbytes.optim.AdamW8bit([q], **options)
    train(ours, range(20))
    train(theirs, range(1))
    q.data.copy_(p.data)
    names = {"exp_avg": "state1", "exp_avg_sq": "state2", "exp_avg_absmax": "absmax1", "exp_avg_sq_absmax": "absmax2"}
    for mine, its in names.items():
        theirs.state[q][its].copy_(ours.state[p][mine])
    theirs.state[q]["step"] = ours.state[p]["step"]

    before = p.detach().clone()
    for optimizer in (ours, theirs):
        train(optimizer, range(20, 21))

    # Both round each fp32 operation, in another order: a few units in the last place of parameter and update.
    torch.testing.assert_close(p, q, rtol=2**-22, atol=2**-22 * (p - before).abs().max().item())
    for mine, its in names.items():
        if mine.endswith("absmax"):
            torch.testing.assert_close(ours.state[p][mine], theirs.state[q][its], rtol=2**-22, atol=0)
        else:
            departures = (ours.state[p][mine].int() - theirs.state[q][its].int()).abs()
            assert departures.max() == 1
            assert 0 < departures.float().mean() < 0.004


def test_a_parameter_without_gradient_signal_stays_where_it_is_unlike_in_bitsandbytes_library() -> None:
    moved = []
    for make in (lambda params: optim.AdamW(params, state_bits=8), bitsandbytes.optim.AdamW8bit):
        (p,) = parameters([(64, 64)])
        before = p.detach().clone()
        optimizer = make([p])
        optimizer.param_groups[0]["weight_decay"] = 0.0
        for step in range(5):
            set_gradients([p], seed=step)
            p.grad[:, ::2] = 0
            optimizer.step()
        moved.append(int((p != before)[:, ::2].sum()))
    assert moved[0] == 0
    assert moved[1] == 64 * 32  # its table turns a moment of zero into 2e-5 of its block's largest


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), float("-inf"), 1e30])
def test_a_gradient_that_is_not_finite_skips_one_element_and_spares_its_block(bad: float) -> None:
    runs = {}
    for value in (bad, 0.0):  # over fresh state a gradient of zero leaves moments of zero, too, but lets decay
        (p,) = parameters([(65, 71)])
        before = p[3, 5].item()
        runs[value] = optim.AdamW([p], weight_decay=0.1, state_bits=8)
        set_gradients([p], seed=0)
        p.grad[3, 5] = value
        runs[value].step()
        assert (p[3, 5] == before) == (value != 0)
        p.data[3, 5] = before
        train(runs[value], range(1, 3))
    assert all_equal(tensors(runs[bad]), tensors(runs[0.0]))


def test_8_bit_state_trains_as_well_as_32_bit_state() -> None:
    x = torch.randn(256, 64, generator=torch.Generator().manual_seed(1))
    y = torch.tanh(x @ torch.randn(64, 64, generator=torch.Generator().manual_seed(2)) / 8)
    losses = {}
    for bits in (32, 8):
        first, second = parameters([(64, 128), (128, 64)], seed=3)
        optimizer = optim.AdamW([first, second], lr=3e-2, state_bits=bits)
        for _ in range(100):
            loss = torch.nn.functional.mse_loss(torch.tanh(x @ first / 8) @ second / 8, y)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
        losses[bits] = loss.item()
    assert losses[32] < 0.02
    assert losses[8] < 1.1 * losses[32]


def through_files(state_dict: dict[str, Any], folder: Path) -> dict[str, Any]:
    """Write the state as safetensors and JSON, as a checkpoint does, and read it again."""
    flat = {
        f"{index}.{name}": value
        for index, state in state_dict["state"].items()
        for name, value in state.items()
        if name != "step"
    }
    save_file(flat, folder / "state.safetensors")
    steps = {index: state["step"] for index, state in state_dict["state"].items()}
    text = json.dumps({"steps": steps, "param_groups": state_dict["param_groups"]})
    numbers = json.loads(text)
    state: dict[int, dict[str, Any]] = {int(index): {"step": step} for index, step in numbers["steps"].items()}
    for key, value in load_file(folder / "state.safetensors").items():
        index, name = key.split(".")
        state[int(index)][name] = value
    return {"state": state, "param_groups": numbers["param_groups"]}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("name", optim.KINDS)
def test_training_resumes_bit_for_bit_through_files(name: str, dtype: torch.dtype, tmp_path: Path) -> None:
    straight = create(name, parameters(SHAPES, dtype))
    train(straight, range(12))

    stopped = create(name, parameters(SHAPES, dtype))
    train(stopped, range(6))
    saved = through_files(stopped.state_dict(), tmp_path)
    params = [Parameter(p.detach().clone()) for p in stopped.param_groups[0]["params"]]
    resumed = create(name, params, lr=1.0, weight_decay=0.0)
    resumed.load_state_dict(saved)
    assert all_equal(tensors(resumed), tensors(stopped))
    train(resumed, range(6, 12))
    assert all_equal(tensors(resumed), tensors(straight))
    assert resumed.state_dict()["param_groups"] == [
        group | {"betas": list(group["betas"])} for group in straight.state_dict()["param_groups"]
    ]


def test_a_loaded_state_is_a_copy() -> None:
    first, second = (optim.AdamW(parameters([(65, 71)]), state_bits=8) for _ in range(2))
    train(first, range(2))
    second.load_state_dict(first.state_dict())
    before = [x.clone() for x in tensors(first)]
    train(second, range(2, 4))
    assert all_equal(tensors(first), before)


@pytest.mark.parametrize("provider", kernels.providers())
def test_32_bit_state_goes_to_torch_and_back(provider: str) -> None:
    ours, theirs = optim.AdamW(parameters(SHAPES), lr=1e-2), torch.optim.AdamW(parameters(SHAPES), lr=1e-2)
    with kernels.use_provider(provider):
        train(ours, range(4))
        for p, q in zip(theirs.param_groups[0]["params"], ours.param_groups[0]["params"], strict=True):
            p.data.copy_(q)
        theirs.load_state_dict(copy.deepcopy(ours.state_dict()))  # torch takes tensors over as they are
        for optimizer in (ours, theirs):
            train(optimizer, range(4, 8))
        assert all_equal(tensors(ours), tensors(theirs))
        ours.load_state_dict(theirs.state_dict())
        for optimizer in (ours, theirs):
            train(optimizer, range(8, 12))
        assert all_equal(tensors(ours), tensors(theirs))


@pytest.mark.parametrize(
    ("bits", "shapes", "needed"),
    [
        (32, [(7,), (64, 96)], r"parameter 1 is exp_avg float32 \(64, 96\).* needs exp_avg uint8 \(64, 96\)"),
        (8, [(7,), (64, 97)], r"parameter 1 is exp_avg uint8 \(64, 97\).* needs exp_avg uint8 \(64, 96\)"),
        (8, [(8,), (64, 96)], r"parameter 0 is exp_avg float32 \(8,\).* needs exp_avg float32 \(7,\)"),
        (8, [(7,)], r"groups of \[1\] parameters, and this optimizer has \[2\]"),
    ],
)
def test_state_of_another_kind_or_shape_is_refused_and_changes_nothing(
    bits: int, shapes: list[tuple[int, ...]], needed: str
) -> None:
    other = optim.AdamW(parameters(shapes), lr=0.5, state_bits=bits)
    train(other, range(1))
    optimizer = optim.AdamW(parameters([(7,), (64, 96)]), state_bits=8)
    train(optimizer, range(2))
    before = [x.clone() for x in tensors(optimizer)]
    with pytest.raises(InputError, match=needed):
        optimizer.load_state_dict(other.state_dict())
    assert all_equal(tensors(optimizer), before)
    assert optimizer.param_groups[0]["lr"] == 1e-3


def test_parameters_without_gradient_are_left_alone_and_have_no_state() -> None:
    params = parameters([(64, 96), (7,)])
    before = params[0].detach().clone()
    optimizer = optim.AdamW(params, state_bits=8)
    set_gradients(params[1:], seed=0)
    optimizer.step()
    assert torch.equal(params[0], before)
    assert list(optimizer.state_dict()["state"]) == [1]


def test_a_closure_is_evaluated_with_gradients_and_its_loss_returned() -> None:
    (p,) = parameters([(7,)])
    optimizer = optim.AdamW([p])

    def closure() -> float:
        loss = (p**2).sum()
        loss.backward()
        return loss.item()

    expected = (p.detach() ** 2).sum().item()
    assert optimizer.step(closure) == expected
    assert p.grad is not None


def test_a_sparse_gradient_is_refused() -> None:
    embedding = torch.nn.Embedding(5, 3, sparse=True)
    other = torch.nn.Parameter(torch.ones(2))
    optimizer = optim.AdamW([other, embedding.weight])
    embedding(torch.tensor([1, 2])).sum().backward()
    with pytest.raises(InputError, match="gradient of parameter 1 is sparse"):
        optimizer.step()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"lr": -1.0}, "lr is -1.0"),
        ({"lr": float("nan")}, "lr is nan"),
        ({"eps": -1e-8}, "eps is -1e-08"),
        ({"weight_decay": -0.1}, "weight_decay is -0.1"),
        ({"betas": (0.9, 1.0)}, r"betas are \(0.9, 1.0\)"),
        ({"state_bits": 16}, "state_bits is 16; it must be 8 or 32"),
    ],
)
def test_an_option_out_of_range_is_refused(options: dict[str, Any], message: str) -> None:
    with pytest.raises(InputError, match=message):
        optim.AdamW(parameters([(7,)]), **options)


@pytest.mark.parametrize(
    ("bad", "message"),
    [
        (torch.zeros(3, dtype=torch.float64), r"Parameter 2 is torch.float64 \(3,\)"),
        (torch.zeros(4, 3).t(), r"Parameter 2 is torch.float32 \(3, 4\) with strides \(1, 3\)"),
    ],
)
def test_a_parameter_that_cannot_be_stepped_is_refused_by_its_index(bad: Tensor, message: str) -> None:
    with pytest.raises(InputError, match=message):
        optim.AdamW([{"params": parameters([(7,), (8,)])}, {"params": [Parameter(bad)]}])


@pytest.mark.parametrize("state_bits", [8, 32])
def test_frozen_parameters_of_any_kind_are_left_alone(state_bits: int) -> None:
    (trained,) = parameters([(4096,)])
    frozen = Parameter(torch.arange(7, dtype=torch.uint8), requires_grad=False)
    optimizer = optim.AdamW([frozen, trained], state_bits=state_bits)
    trained.grad = torch.ones_like(trained)
    before = trained.detach().clone()
    optimizer.step()
    assert torch.equal(frozen, torch.arange(7, dtype=torch.uint8)) and not torch.equal(trained, before)


def test_optimizers_go_by_transformers_names_and_a_near_miss_is_told() -> None:
    own = {"adamw_32bit"}  # bitsandbytes' name, which transformers leaves out
    assert {*optim.KINDS, *optim.LIONS} - own <= {name.value for name in OptimizerNames}
    with pytest.raises(InputError, match=r"no optimizer 'paged_adamw_8bits' \(did you mean 'paged_adamw_8bit'\?\)"):
        create("paged_adamw_8bits", parameters([(7,)]))


@pytest.mark.parametrize("wrong", ["dtype", "shape", "absmax", "code"])
def test_the_kernels_say_which_argument_of_an_8_bit_step_is_wrong(wrong: str) -> None:
    p, code = torch.zeros(300), create_dynamic_map()
    codes, absmax = torch.zeros(300, dtype=torch.uint8), torch.zeros(2)
    good = (codes, absmax)
    first, expected = {
        "dtype": ((codes.float(), absmax), r"exp_avgs\[0\] is torch.float32"),
        "shape": ((codes[:299], absmax), r"exp_avgs\[0\] has shape \(299,\); its parameter has \(300,\)"),
        "absmax": ((codes, absmax[:1]), r"300 values in blocks of 256 need torch.float32 \(2,\)"),
        "code": (good, r"code is torch.float32 \(16,\) on cpu; it must be float32 \(256,\)"),
    }[wrong]
    tables = (code[:16], code) if wrong == "code" else (code, code)
    with pytest.raises((TypeError, ValueError), match=expected):
        step = kernels.AdamwStep(1, lr=1e-3, betas=(0.9, 0.99), eps=1e-8, weight_decay=0.0)
        kernels.adamw_8bit([p], [p], [first], [good], *tables, 256, step)


def lora(count: int = 9) -> list[Parameter]:
    return parameters([(192, 16), (16, 192), (16, 257), (3,)] * count, seed=5)


@pytest.mark.parametrize("state_bits", [32, 8])
def test_steps_of_small_tensors_joined_into_one_are_bitwise_those_of_torch(state_bits: int) -> None:
    runs = []
    for make in (optim.AdamW, torch.optim.AdamW):
        params = lora(15)
        small = [p for p in params if p.numel() < 4096]
        optimizer = make(params, lr=1e-2, **({"state_bits": state_bits} if make is optim.AdamW else {}))
        train(optimizer, range(6))
        runs.append([x for p in small for x in (p.detach(), *itemgetter("exp_avg", "exp_avg_sq")(optimizer.state[p]))])
    assert all_equal(*runs)


@pytest.mark.parametrize("state_bits", [32, 8])
@pytest.mark.parametrize("change", ["data", "state", "memory of state", "gradient missing", "step count"])
def test_tensors_that_are_replaced_between_steps_are_noticed(change: str, state_bits: int) -> None:
    runs = []
    for fresh in (False, True):  # the second run meets every step with an optimizer that has checked nothing yet
        params = lora(2)
        optimizer = optim.AdamW(params, lr=1e-2, state_bits=state_bits)
        for step in range(5):
            set_gradients(params, seed=step)
            if step == 3:
                for p in params[::2]:
                    state = optimizer.state[p]
                    if change == "data":
                        p.data = p.data.clone() + 1
                    elif change == "state":
                        optimizer.state[p] = {n: x.clone() if n != "step" else x for n, x in state.items()}
                    elif change == "memory of state":
                        state["exp_avg"].data = state["exp_avg"].data.clone()
                    elif change == "step count":
                        state["step"] += 7
                    else:
                        p.grad = None
            if fresh:
                saved = copy.deepcopy(optimizer.state_dict())
                optimizer = optim.AdamW(params, lr=1e-2, state_bits=state_bits)
                optimizer.load_state_dict(saved)
            optimizer.step()
        runs.append(tensors(optimizer))
    assert all_equal(*runs)


@pytest.mark.parametrize("state_bits", [32, 8])
@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda p, state: setattr(p, "data", p.data.T), r"params\[1\] is torch.float32 on cpu with strides"),
        (lambda p, state: setattr(p, "data", p.data[:-1].clone()), r"grads\[1\] has shape"),
        (lambda p, state: state.update(exp_avg=state["exp_avg"].double()), r"exp_avgs\[1\] is torch.float64"),
        (lambda p, state: setattr(state["exp_avg"], "data", state["exp_avg"][1:].clone()), r"exp_avgs\[1\] has shape"),
    ],
)
def test_a_tensor_that_no_longer_fits_is_refused_before_anything_is_stepped(change, message, state_bits: int) -> None:
    params = parameters([(64, 96), (96, 65)])
    optimizer = optim.AdamW(params, state_bits=state_bits)
    train(optimizer, range(2))
    set_gradients(params, seed=2)
    change(params[1], optimizer.state[params[1]])
    before = [p.detach().clone() for p in params]
    with pytest.raises((TypeError, ValueError), match=message):
        optimizer.step()
    assert all_equal([p.detach() for p in params], before)

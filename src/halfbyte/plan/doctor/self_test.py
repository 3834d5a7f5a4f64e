"""Whether kernels are right: each operation on small odd shapes against the reference.

An extension that is there can still compute wrongly: built by a compiler with an error, for a chip that is not quite
this one, on memory that is damaged. What numbers in 4 and 8 bits become is bit for bit the reference's; products,
norms and attention are within a bound for their dtype, ``‖y − y'‖ ≤ bound ‖y'‖``.
"""

import contextlib
import os
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from halfbyte import kernels, quant
from halfbyte.kernels import native, providers, reference, use_provider
from halfbyte.plan.doctor.finding import Finding, told

BOUNDS = {torch.float32: 1e-5, torch.bfloat16: 2e-2}
"""How far a result may be off, in parts of it: sums in another order, and in bf16 what is rounded on the way."""
OTHER_CODES = 0.01
"""Share of codes that bitsandbytes may round otherwise: it does not take the nearest one everywhere (0.50)."""
ISA = "HALFBYTE_ISA"
REBUILD = "pip install --force-reinstall --no-deps ."

Results = list[Tensor]


def self_test(provider: str, tier: str | None = None, device: str = "cpu") -> Iterator[Finding]:
    """Yield each operation of a provider whose result is not the reference's.

    Args:
        provider: its name.
        tier: of instruction sets, of the native one.
        device: where it computes.
    """
    chosen: Any = {"native": native}.get(provider) or providers()[provider]
    where = f"{provider}{f' ({tier})' if tier else ''}"
    with _forced(tier):
        for case in CASES:
            for dtype in case.dtypes:
                given = case.inputs(dtype)
                want = case.run(reference, *_copied(given, "cpu"))
                said = f"{case.name} of {where}, {str(dtype).removeprefix('torch.')}"
                try:
                    got = case.run(chosen, *_copied(given, device))
                except Exception as error:  # a kernel that cannot be called is what is looked for
                    yield _wrong(said, told(error), tier)
                    break
                bound = 0.0 if case.exact and provider == "native" else BOUNDS[dtype]
                if difference := _difference(got, want, bound):
                    yield _wrong(said, difference, tier)
                    break


def _wrong(said: str, difference: str, tier: str | None) -> Finding:
    return Finding(
        "self-test",
        f"{said}: {difference}",
        "These kernels compute something else than their formula on this machine: what is trained with them is wrong.",
        f"{REBUILD}  # or for now: export {ISA}=scalar" if tier and tier != "scalar" else REBUILD,
        "fault",
    )


def _difference(got: Results, want: Results, bound: float) -> str:
    """Return how results differ, or nothing."""
    for one, other in zip(got, want, strict=True):
        one = one.cpu()
        if one.shape != other.shape or one.dtype != other.dtype:
            return f"is {one.dtype} {list(one.shape)} and not {other.dtype} {list(other.shape)}"
        if bound == 0.0 or not other.is_floating_point():
            odd = int((one != other).sum())
            if odd > (0.0 if bound == 0.0 else OTHER_CODES) * other.numel():
                return f"{odd:,} of {other.numel():,} values are others"
            continue
        off = float((one.double() - other.double()).norm()) / max(float(other.double().norm()), 1e-30)
        if not off <= bound:  # NaN too
            return f"is off by {off:.2g} of its size, where {bound:g} is the bound"
    return ""


@contextlib.contextmanager
def _forced(tier: str | None) -> Iterator[None]:
    """Have the native kernels run on one tier."""
    before = os.environ.get(ISA)
    if tier:
        os.environ[ISA] = tier
    try:
        yield
    finally:
        if before is not None:
            os.environ[ISA] = before
        elif tier:
            del os.environ[ISA]


def _copied(given: list[Any], device: str) -> list[Any]:
    """Return inputs that may be written to, on ``device``."""

    def copied(value: Any) -> Any:
        if isinstance(value, Tensor):
            return value.to(device).clone()
        if isinstance(value, kernels.Weight4bit):
            return kernels.Weight4bit(value.packed.to(device), value.statistics.to(device), value.shape)
        if isinstance(value, kernels.WeightInt8):
            return kernels.WeightInt8(value.codes.to(device), value.absmax.to(device), value.blocksize)
        return value

    return [copied(value) for value in given]


# The cases: shapes that no vector register divides, a short last block, one row and more than a panel of them.


@dataclass(frozen=True)
class Case:
    """One operation that is tried.

    Attributes:
        name: of the operation.
        inputs: for a dtype.
        run: by a provider over inputs, which it may write to; returns what came of it.
        exact: whether results have to be the same bits.
        dtypes: it is tried in.
    """

    name: str
    inputs: Callable[[torch.dtype], list[Any]]
    run: Callable[..., Results]
    exact: bool = False
    dtypes: tuple[torch.dtype, ...] = (torch.float32, torch.bfloat16)


N, K, ROWS, BLOCK = 37, 130, 35, 64


def _random(*shape: int, dtype: torch.dtype = torch.float32, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed + sum(shape))
    return torch.randn(*shape, generator=generator, dtype=torch.float32).to(dtype)


def _weight() -> kernels.Weight4bit:
    with use_provider("reference"):
        packed = quant.quantize_4bit(_random(N, K), "nf4", blocksize=BLOCK, double_quant=True)
    return kernels.Weight4bit(packed.packed, packed.statistics, (N, K))


def _code(name: str = "nf4") -> Tensor:
    return quant.codebook(name)


def _moments(p: Any, params: Tensor, grads: Tensor) -> Results:
    first, second = _random(*params.shape, seed=5) / 9, _random(*params.shape, seed=6).square() / 9
    step = kernels.AdamwStep(3, 1e-2, (0.9, 0.999), 1e-8, 0.1)
    p.adamw_32bit([params], [grads], [first.to(params.device)], [second.to(params.device)], step)
    return [params]


def _moments_8bit(p: Any, params: Tensor, grads: Tensor) -> Results:
    size = params.numel()
    moments = []
    for seed, name in ((5, "dynamic"), (6, "dynamic_unsigned")):
        codes, absmax = reference.quantize_coded(_random(size, seed=seed).abs() / 9, _code(name), BLOCK)
        moments.append((codes.view(params.shape).to(params.device), absmax.to(params.device)))
    tables = [_code(name).to(params.device) for name in ("dynamic", "dynamic_unsigned")]
    step = kernels.AdamwStep(3, 1e-2, (0.9, 0.999), 1e-8, 0.1)
    p.adamw_8bit([params], [grads], moments[:1], moments[1:], *tables, BLOCK, step)
    return [params, moments[0][1], moments[1][1]]


def _gated_gradient(p: Any, dy: Tensor, gate: Tensor, up: Tensor) -> Results:
    dgate, dup = torch.empty_like(gate), torch.empty_like(up)
    p.gated_gradient(dy, gate, up, "silu", dgate, dup)
    return [dgate, dup]


def _sums(p: Any, x: Tensor, weight: kernels.Weight4bit, low: Tensor, factor: Tensor) -> Results:
    out = torch.empty(x.shape[0], N, dtype=x.dtype, device=x.device)
    p.matmul_sums([kernels.Sum([kernels.Term(x, weight), kernels.Term(low, factor)], out)])
    return [out]


def _softmax(p: Any, logits: Tensor, labels: Tensor) -> Results:
    state = kernels.RunningSoftmax.empty(len(labels), logits.device)
    p.fold_softmax(logits, labels, 0, state, 1.0, None, True)
    return [state.log_prob(), logits]


def _ranges(length: int) -> Tensor:
    ends = torch.arange(1, length + 1, dtype=torch.int32)
    return torch.stack([(ends - 9).clamp(min=0), ends], dim=1).unsqueeze(0)


def _attention_inputs(dtype: torch.dtype) -> list[Any]:
    q = _random(1, 4, 21, 24, dtype=dtype)
    k, v = (_random(1, 2, 21, 24, dtype=dtype, seed=seed) for seed in (1, 2))
    return [q, k, v, _ranges(21)]


def _attention(p: Any, q: Tensor, k: Tensor, v: Tensor, ranges: Tensor) -> Results:
    out, lse = p.attention(q, k, v, ranges, 0.2, 0.0)
    return [out, lse]


def _attention_gradient(p: Any, q: Tensor, k: Tensor, v: Tensor, ranges: Tensor) -> Results:
    out, lse = reference.attention(q, k, v, ranges, 0.2, 0.0)
    return list(
        p.attention_backward(_random(*q.shape, dtype=q.dtype).to(q.device), q, k, v, out, lse, ranges, 0.2, 0.0)
    )


def _angles() -> list[Tensor]:
    angles = _random(1, 7, 10)
    return [angles.cos(), angles.sin()]


def _norm_gradient(p: Any, dy: Tensor, h: Tensor, weight: Tensor) -> Results:
    scale = torch.rsqrt(h.float().square().mean(dim=1) + 1e-6)
    return [p.rms_norm_gradient(dy, None, h, weight, scale, 0.0), p.rms_norm_weight_gradient(dy, h, scale)]


FLOAT32 = (torch.float32,)
CASES = (
    Case("quantize_4bit", lambda d: [_random(N * K + 1, dtype=d)],
         lambda p, x: [*p.quantize_4bit(x, _code().to(x.device), BLOCK)], True),
    Case("dequantize_4bit", lambda d: [_weight(), d], lambda p, w, d: [p.dequantize_4bit(w, d)], True),
    Case("quantize_coded", lambda d: [_random(N * K, dtype=d)],
         lambda p, x: [*p.quantize_coded(x, _code("dynamic").to(x.device), BLOCK)], True),
    Case("dequantize_coded", lambda d: [*reference.quantize_coded(_random(N * K), _code("dynamic"), BLOCK), d],
         lambda p, q, absmax, d: [p.dequantize_coded(q, absmax, _code("dynamic").to(q.device), BLOCK, d)], True),
    Case("quantize_int8", lambda d: [_random(N, K, dtype=d)], lambda p, x: [p.quantize_int8(x, K).codes], True),
    Case("dequantize_int8", lambda d: [reference.quantize_int8(_random(N, K), K), d],
         lambda p, weight, d: [p.dequantize_int8(weight, d)], True),
    Case("matmul_4bit, one row", lambda d: [_random(1, K, dtype=d), _weight()],
         lambda p, x, w: [p.matmul_4bit(x, w, None)]),
    Case("matmul_4bit", lambda d: [_random(ROWS, K, dtype=d), _weight(), _random(N, dtype=d)],
         lambda p, x, w, bias: [p.matmul_4bit(x, w, bias)]),
    Case("matmul_4bit_dx", lambda d: [_random(ROWS, N, dtype=d), _weight()], lambda p, x, w: [p.matmul_4bit_dx(x, w)]),
    Case("matmul_sums",
         lambda d: [_random(ROWS, K, dtype=d), _weight(), _random(ROWS, 5, dtype=d), _random(N, 5)], _sums),
    Case("rms_norm", lambda d: [_random(5, 67, dtype=d), _random(5, 67, dtype=d, seed=1), _random(67, dtype=d)],
         lambda p, x, r, w: [*p.rms_norm(x, r, w, 1e-6, 0.0, True)]),
    Case("rms_norm_gradient",
         lambda d: [_random(5, 67, dtype=d), _random(5, 67, dtype=d, seed=1), _random(67, dtype=d)],
         _norm_gradient),
    Case("gated", lambda d: [_random(5, 67, dtype=d), _random(5, 67, dtype=d, seed=1)],
         lambda p, g, u: [p.gated(g, u, "silu"), p.gated(g, u, "gelu_tanh")]),
    Case("gated_gradient", lambda d: [_random(5, 67, dtype=d, seed=seed) for seed in (0, 1, 2)], _gated_gradient),
    Case("rotary", lambda d: [_random(1, 7, 3, 12, dtype=d), *_angles()],
         lambda p, x, cos, sin: [p.rotary(x, cos, sin, False), p.rotary(x, cos, sin, True)]),
    Case("attention", _attention_inputs, _attention),
    Case("attention_backward", _attention_inputs, _attention_gradient),
    Case("fold_softmax", lambda d: [_random(5, 101, dtype=d), torch.tensor([0, 3, 50, 99, 100])], _softmax),
    Case("adamw_32bit", lambda d: [_random(N, 3, dtype=d), _random(N, 3, dtype=d, seed=1)], _moments),
    Case("adamw_8bit", lambda d: [_random(N, 3, dtype=d), _random(N, 3, dtype=d, seed=1)], _moments_8bit),
)  # fmt: skip
"""All operations of a training step."""

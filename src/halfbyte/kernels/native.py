"""The native kernels (``csrc/``) as torch functions: the only importer of the extension.

The instruction-set tier is the best that this chip and this build have, or the one that the environment variable
``HALFBYTE_ISA`` names; it is looked up at every call, as is torch's thread count. The kernels run on the OpenMP threads
that torch has already: this module asks the dynamic linker which ``GOMP_parallel`` torch is bound to. Without a C++
compiler the package installs without the extension; :func:`available` tells.

Formulas, shapes and dtypes are those of :mod:`halfbyte.kernels.reference`, and so are the bytes, bit for bit, on every
tier and for any number of threads (where a result is NaN, its payload is not promised; :func:`adamw_32bit` says what
it promises). Of the matrix products :func:`matmul_4bit` says what differs; the scalar tier has none: it dequantizes and
leaves the rest to torch.
"""

import ctypes
import dataclasses
import functools
import importlib.util
import os
from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor

from halfbyte.errors import InputError, nearest
from halfbyte.kernels import reference
from halfbyte.kernels.softmax import RunningSoftmax
from halfbyte.kernels.statistics import Statistics
from halfbyte.kernels.terms import Sum, Weight4bit, Weight8bit

_AVAILABLE = importlib.util.find_spec("halfbyte._native") is not None
if _AVAILABLE:
    from halfbyte import _native

_TYPES = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2}  # enum Type in csrc/contract.h
_ACTIVATIONS = {"silu": 0, "gelu_tanh": 1}  # enum Activation in csrc/rows.h


def available() -> bool:
    """Return whether this installation has the extension.

    Raises:
        InputError: it has not, but ``HALFBYTE_ISA`` asks for one of its tiers.
    """
    if not _AVAILABLE and os.environ.get("HALFBYTE_ISA"):
        raise InputError(
            "HALFBYTE_ISA is set, but this installation has no native kernels: install again with a C++ compiler, "
            "or unset it."
        )
    return _AVAILABLE


def tiers() -> list[str]:
    """Return the instruction-set tiers that this build and this chip have, best first."""
    return _native.tiers() if _AVAILABLE else []


def tier() -> str:
    """Return the tier in force.

    Raises:
        InputError: ``HALFBYTE_ISA`` names one that this build or this chip lacks.
    """
    return tiers()[_tier()]


def threads() -> int:
    """Return the number of threads that the kernels run on: torch's."""
    return torch.get_num_threads()


def probe(rounds: int) -> int:
    """Run ``rounds`` rounds of a register-only loop of the tier's fastest arithmetic for products of bf16 matrices.

    Returns:
        the additions and multiplications done, some hundreds a round: over the time taken, the tier's ceiling.
    """
    return _native.probe(_tier(), threads(), rounds)


def probe_lookups(rounds: int) -> int:
    """Run ``rounds`` rounds of a register-only loop of the tier's lookups of 4-bit values.

    Returns:
        the values looked up: over the time taken, the ceiling of a product of one row. 0 if the tier has no such loop.
    """
    return _native.probe_lookups(_tier(), threads(), rounds)


def probed_arithmetic() -> str:
    """Return what :func:`probe` runs, in words."""
    return _native.probed_arithmetic(_tier())


def quantize_8bit(x: Tensor, code: Tensor, blocksize: int) -> tuple[Tensor, Tensor]:
    """Block-wise 8-bit quantization; ``code`` must be ascending."""
    n = x.numel()
    code = code.contiguous()
    codes = torch.empty(n, dtype=torch.uint8, device="cpu")
    absmax = torch.empty(-(-n // blocksize), dtype=torch.float32, device="cpu")
    _native.quantize_8bit(
        _tier(),
        threads(),
        x.data_ptr(),
        _TYPES[x.dtype],
        n,
        blocksize,
        code.data_ptr(),
        len(code),
        codes.data_ptr(),
        absmax.data_ptr(),
    )
    return codes, absmax


def dequantize_8bit(codes: Tensor, absmax: Tensor, code: Tensor, blocksize: int, dtype: torch.dtype) -> Tensor:
    """Inverse of :func:`quantize_8bit`."""
    code = code.contiguous()
    out = torch.empty(codes.numel(), dtype=dtype, device="cpu")
    _native.dequantize_8bit(
        _tier(),
        threads(),
        codes.data_ptr(),
        code.data_ptr(),
        len(code),
        absmax.data_ptr(),
        codes.numel(),
        blocksize,
        out.data_ptr(),
        _TYPES[dtype],
    )
    return out


def quantize_4bit(x: Tensor, code: Tensor, blocksize: int) -> tuple[Tensor, Tensor]:
    """Block-wise 4-bit quantization."""
    n = x.numel()
    code = code.contiguous()
    packed = torch.empty(-(-n // 2), dtype=torch.uint8, device="cpu")
    absmax = torch.empty(-(-n // blocksize), dtype=torch.float32, device="cpu")
    _native.quantize_4bit(
        _tier(),
        threads(),
        x.data_ptr(),
        _TYPES[x.dtype],
        n,
        blocksize,
        code.data_ptr(),
        packed.data_ptr(),
        absmax.data_ptr(),
    )
    return packed, absmax


def dequantize_4bit(packed: Tensor, statistics: Statistics, n: int, dtype: torch.dtype) -> Tensor:
    """Inverse of :func:`quantize_4bit`."""
    code, nested_code = _tables(statistics)
    out = torch.empty(n, dtype=dtype, device="cpu")
    _native.dequantize_4bit(
        _tier(),
        threads(),
        packed.data_ptr(),
        code.data_ptr(),
        *_scales(statistics, nested_code),
        n,
        statistics.blocksize,
        out.data_ptr(),
        _TYPES[dtype],
    )
    return out


def quantize_int8(x: Tensor, blocksize: int) -> Weight8bit:
    """Block-wise quantization to int8, by torch: it is done once."""
    return reference.quantize_int8(x, blocksize)


def dequantize_int8(weight: Weight8bit, dtype: torch.dtype) -> Tensor:
    """Inverse of :func:`quantize_int8`, by torch: products read the codes themselves."""
    return reference.dequantize_int8(weight, dtype)


def matmul_4bit(
    x: Tensor, packed: Tensor, statistics: Statistics, shape: tuple[int, int], bias: Tensor | None
) -> Tensor:
    """The 4-bit linear product ``y = x Wᵀ + bias``.

    Sums are fp32 and rounded once, with the bias. On a vector tier each row of the result is bitwise the same for any
    number of threads and whatever the other rows are, except that up to 16 rows are summed in another order than more
    (csrc/matmul.h), where block size and depth are multiples of 64.
    """
    return _matmul(x, packed, statistics, shape, bias, gradient=False)


def matmul_4bit_dx(dy: Tensor, packed: Tensor, statistics: Statistics, shape: tuple[int, int]) -> Tensor:
    """The gradient of :func:`matmul_4bit` with respect to ``x``; of any number of rows in one order."""
    return _matmul(dy, packed, statistics, shape, None, gradient=True)


def matmul_sums(sums: Sequence[Sum]) -> None:
    """Sums of products, each value rounded once, all in one parallel region.

    As :func:`matmul_4bit`, bitwise the same for any number of threads and whatever the other rows are; up to 8 rows
    are summed in another order than more where the first term is a 4-bit weight, no gradient.
    """
    isa = _tier()
    if not _native.multiplies(isa):
        return reference.matmul_sums(sums)
    gathered, kept = [], []
    for terms, out, bias in sums:
        rows, width = out.shape
        types = _TYPES[terms[0].x.dtype], _TYPES[out.dtype]
        addresses = 0 if bias is None else bias.data_ptr(), out.data_ptr()
        gathered.append(_native.Sum(isa, rows, width, *types, *addresses, out.stride(0)))
        for x, factor, gradient in terms:
            step = x.stride(1) if x.shape[1] > 1 else 1
            if isinstance(factor, Weight4bit):
                code, nested_code = _tables(factor.statistics)
                kept.append((code, nested_code))
                gathered[-1].add_weight(
                    x.data_ptr(),
                    x.stride(0),
                    step,
                    gradient,
                    factor.packed.data_ptr(),
                    code.data_ptr(),
                    *_scales(factor.statistics, nested_code),
                    factor.statistics.blocksize,
                    *factor.shape,
                )
                continue
            rows, columns = factor.shape
            if isinstance(factor, Weight8bit):
                gathered[-1].add_bytes(
                    x.data_ptr(),
                    x.stride(0),
                    step,
                    gradient,
                    factor.codes.data_ptr(),
                    factor.absmax.data_ptr(),
                    factor.blocksize,
                    rows,
                    columns,
                )
            else:
                gathered[-1].add_dense(
                    x.data_ptr(),
                    x.stride(0),
                    step,
                    gradient,
                    factor.data_ptr(),
                    _TYPES[factor.dtype],
                    rows,
                    columns,
                    factor.stride(0),
                )
    _native.matmul_sums(threads(), gathered)


def attention(q: Tensor, k: Tensor, v: Tensor, ranges: Tensor, scale: float, softcap: float) -> tuple[Tensor, Tensor]:
    """Softmax attention of each query over its range of keys, tile by tile; nothing on tiles that no range meets.

    Any strides do as long as the values of a head follow each other. Sums are fp32; where the chip multiplies bf16,
    the weights are rounded to it (csrc/attention.h). Results are bitwise the same for any number of threads.

    Returns:
        ``out``, which lies in memory as ``[B, L, H, D]``, and ``lse``.
    """
    isa = _tier()
    if not _native.attends(isa):
        return reference.attention(q, k, v, ranges, scale, softcap)
    q, k, v = _dense_rows(q), _dense_rows(k), _dense_rows(v)
    out = _heads_last(q.shape, q.dtype)
    lse = torch.empty(*q.shape[:3], dtype=torch.float32, device="cpu")
    _native.attention(
        isa,
        threads(),
        *_attention(q, k, ranges, scale, softcap),
        _head_strides(q),
        _head_strides(k),
        _head_strides(v),
        _head_strides(out),
        lse.data_ptr(),
    )
    return out, lse


def attention_backward(
    dout: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor,
    lse: Tensor,
    ranges: Tensor,
    scale: float,
    softcap: float,
) -> tuple[Tensor, Tensor, Tensor]:
    """The gradients of :func:`attention`, which lie in memory as ``[B, L, H, D]``."""
    isa = _tier()
    if not _native.attends(isa):
        return reference.attention_backward(dout, q, k, v, out, lse, ranges, scale, softcap)
    dout, q, k, v, out = map(_dense_rows, (dout, q, k, v, out))
    dq, dk, dv = (_heads_last(x.shape, q.dtype) for x in (q, k, v))
    _native.attention_backward(
        isa,
        threads(),
        *_attention(q, k, ranges, scale, softcap),
        _head_strides(q),
        _head_strides(k),
        _head_strides(v),
        _head_strides(out),
        lse.data_ptr(),
        _head_strides(dout),
        _head_strides(dq),
        _head_strides(dk),
        _head_strides(dv),
    )
    return dq, dk, dv


def adamw_32bit(
    params: list[Tensor],
    grads: list[Tensor],
    exp_avgs: list[Tensor],
    exp_avg_sqs: list[Tensor],
    *,
    step: int,
    lr: float,
    betas: tuple[float, float],
    eps: float,
    weight_decay: float,
) -> None:
    """One AdamW step over many tensors with fp32 moments; gradients are of their parameter's dtype.

    The same on every tier: what torch fuses (``lerp``, ``addcmul``) is fused, and the square root is rounded correctly.
    So the moments are bitwise the reference's where torch does fuse (on x86 from AVX2 on), and a whole step is bitwise
    that of ``torch.optim.AdamW(fused=True)``, but for what is left over at the end of its vectors. The reference's root
    is torch's, that is MKL's, which misses the nearest fp32 value in a sixth of cases; therefore a parameter may be off
    by 2⁻²¹ of the update and one unit in its own last place.
    """
    _native.adamw_32bit(
        _tier(),
        threads(),
        _constants(step, lr, betas, eps, weight_decay),
        *_parameters(params, grads),
        [m.data_ptr() for m in exp_avgs],
        [v.data_ptr() for v in exp_avg_sqs],
    )


def adamw_8bit(
    params: list[Tensor],
    grads: list[Tensor],
    exp_avgs: list[tuple[Tensor, Tensor]],
    exp_avg_sqs: list[tuple[Tensor, Tensor]],
    code: Tensor,
    code_unsigned: Tensor,
    blocksize: int,
    *,
    step: int,
    lr: float,
    betas: tuple[float, float],
    eps: float,
    weight_decay: float,
) -> None:
    """One AdamW step over many tensors with block-wise 8-bit moments; gradients are of their parameter's dtype.

    Both tables must be ascending. Those whose values have few different distances, as dynamic maps do, are fast.
    """
    code, code_unsigned = code.contiguous(), code_unsigned.contiguous()
    _native.adamw_8bit(
        _tier(),
        threads(),
        _constants(step, lr, betas, eps, weight_decay),
        *_parameters(params, grads),
        [codes.data_ptr() for codes, _ in exp_avgs],
        [absmax.data_ptr() for _, absmax in exp_avgs],
        [codes.data_ptr() for codes, _ in exp_avg_sqs],
        [absmax.data_ptr() for _, absmax in exp_avg_sqs],
        code.data_ptr(),
        code_unsigned.data_ptr(),
        blocksize,
    )


def rms_norm(
    x: Tensor, residual: Tensor | None, weight: Tensor, eps: float, offset: float, rounded: bool
) -> tuple[Tensor, Tensor, Tensor]:
    """RMSNorm; sums in the tier's order, for any number of threads."""
    x, weight = _dense_rows(x), weight.contiguous()
    residual = None if residual is None else _dense_rows(residual)
    h = x if residual is None else torch.empty(x.shape, dtype=x.dtype, device="cpu")
    y = torch.empty(x.shape, dtype=x.dtype, device="cpu")
    scale = torch.empty(len(x), dtype=torch.float32, device="cpu")
    _native.rms_norm(
        *_rows(x),
        _strided(x),
        _strided(residual),
        weight.data_ptr(),
        eps,
        offset,
        rounded,
        h.data_ptr(),
        y.data_ptr(),
        scale.data_ptr(),
    )
    return h, y, scale


def rms_norm_gradient(dy: Tensor, dh: Tensor | None, h: Tensor, weight: Tensor, scale: Tensor, offset: float) -> Tensor:
    """The gradient of :func:`rms_norm` with respect to what it normalizes."""
    dy, h, weight = _dense_rows(dy), _dense_rows(h), weight.contiguous()
    dh = None if dh is None else _dense_rows(dh)
    dx = torch.empty(h.shape, dtype=h.dtype, device="cpu")
    _native.rms_norm_gradient(
        *_rows(h),
        _strided(dy),
        _strided(h),
        _strided(dh),
        weight.data_ptr(),
        scale.data_ptr(),
        offset,
        dx.data_ptr(),
    )
    return dx


def rms_norm_weight_gradient(dy: Tensor, h: Tensor, scale: Tensor) -> Tensor:
    """The gradient of :func:`rms_norm` with respect to the weight; rows are added in their order."""
    dy, h = _dense_rows(dy), _dense_rows(h)
    dweight = torch.empty(h.shape[1], dtype=torch.float32, device="cpu")
    _native.rms_norm_weight_gradient(*_rows(h), _strided(dy), _strided(h), scale.data_ptr(), dweight.data_ptr())
    return dweight


def gated(gate: Tensor, up: Tensor, name: str) -> Tensor:
    """A gated linear unit."""
    gate, up = _dense_rows(gate), _dense_rows(up)
    y = torch.empty(gate.shape, dtype=gate.dtype, device="cpu")
    _native.gated(*_rows(gate), _ACTIVATIONS[name], _strided(gate), _strided(up), y.data_ptr())
    return y


def gated_gradient(dy: Tensor, gate: Tensor, up: Tensor, name: str, dgate: Tensor, dup: Tensor) -> None:
    """The gradients of :func:`gated`, into tensors of equal strides."""
    dy, gate, up = _dense_rows(dy), _dense_rows(gate), _dense_rows(up)
    _native.gated_gradient(
        *_rows(gate),
        _ACTIVATIONS[name],
        _strided(dy),
        _strided(gate),
        _strided(up),
        dgate.data_ptr(),
        dup.data_ptr(),
        dgate.stride(0),
    )


def rotary(x: Tensor, cos: Tensor, sin: Tensor, inverse: bool) -> Tensor:
    """Rotary position embedding; without fused multiply-adds on any tier."""
    x = x if x.stride(-1) == 1 else x.contiguous()
    sin = sin.to(cos.dtype)
    if cos.stride(-1) != 1 or cos.stride() != sin.stride():
        cos, sin = cos.contiguous(), sin.contiguous()
    y = torch.empty(x.shape, dtype=x.dtype, device="cpu")
    _native.rotary(
        _tier(),
        threads(),
        _TYPES[x.dtype],
        cos.dtype == torch.float32,
        inverse,
        x.shape,
        x.stride(),
        x.data_ptr(),
        cos.data_ptr(),
        sin.data_ptr(),
        cos.shape[-1],
        cos.stride()[:2],
        y.data_ptr(),
    )
    return y


def fold_softmax(
    logits: Tensor, labels: Tensor, first: int, softmax: RunningSoftmax, scale: float, cap: float | None, gradient: bool
) -> None:
    """Take a chunk of the vocabulary into the softmax of each row; tiers differ in the last places of fp32."""
    rows, width = logits.shape
    _native.fold_softmax(
        _tier(),
        threads(),
        logits.data_ptr(),
        _TYPES[logits.dtype],
        rows,
        width,
        labels.data_ptr(),
        first,
        scale,
        0.0 if cap is None else cap,
        gradient,
        [getattr(softmax, field.name).data_ptr() for field in dataclasses.fields(softmax)],
    )


def elementary(name: str, x: Tensor) -> Tensor:
    """Return ``exp``, ``sigmoid`` or ``tanh`` of fp32 values as the tier's element-wise kernels have it.

    Within 2 units in the last place for ``exp``, 3 for the others; csrc/lanes.inl.
    """
    y = torch.empty(x.numel(), dtype=torch.float32, device="cpu")
    getattr(_native, name)(_tier(), x.contiguous().data_ptr(), x.numel(), y.data_ptr())
    return y.view(x.shape)


def _matmul(
    x: Tensor, packed: Tensor, statistics: Statistics, shape: tuple[int, int], bias: Tensor | None, *, gradient: bool
) -> Tensor:
    isa = _tier()
    if 0 in shape or not _native.multiplies(isa):
        weight = dequantize_4bit(packed, statistics, shape[0] * shape[1], x.dtype).view(shape)
        return x @ weight if gradient else torch.nn.functional.linear(x, weight, bias)
    x = x.contiguous()
    bias = None if bias is None else bias.contiguous()
    code, nested_code = _tables(statistics)
    y = torch.empty(*x.shape[:-1], shape[1] if gradient else shape[0], dtype=x.dtype, device="cpu")
    _native.matmul_4bit(
        isa,
        threads(),
        gradient,
        x.data_ptr(),
        x.shape[:-1].numel(),
        _TYPES[x.dtype],
        packed.data_ptr(),
        code.data_ptr(),
        *_scales(statistics, nested_code),
        statistics.blocksize,
        *shape,
        0 if bias is None else bias.data_ptr(),
        y.data_ptr(),
    )
    return y


def _attention(
    q: Tensor, k: Tensor, ranges: Tensor, scale: float, softcap: float
) -> tuple[tuple[int, int, int, int, int, int], int, int, float, float]:
    """Return sizes, type, ranges, scale and cap as the extension takes them."""
    batches, heads, queries, size = q.shape
    sizes = (batches, heads, k.shape[1], queries, k.shape[2], size)
    return sizes, _TYPES[q.dtype], ranges.data_ptr(), scale, softcap


def _head_strides(x: Tensor) -> tuple[int, int, int, int]:
    """Return the address of ``x`` and the strides of batch, head and row."""
    batch, head, row, _ = x.stride()
    return x.data_ptr(), batch, head, row


def _heads_last(shape: torch.Size, dtype: torch.dtype) -> Tensor:
    """Return a tensor to fill, ``[B, H, L, D]``, that lies in memory as ``[B, L, H, D]``."""
    batches, heads, rows, size = shape
    return torch.empty(batches, rows, heads, size, dtype=dtype, device="cpu").transpose(1, 2)


def _dense_rows(x: Tensor) -> Tensor:
    """Return ``x``, copied unless the values of a row lie side by side."""
    return x if x.stride(-1) == 1 else x.contiguous()


def _rows(x: Tensor) -> tuple[int, int, int, int, int]:
    """Return what each call over rows begins with: tier, threads, type, rows and width."""
    return _tier(), threads(), _TYPES[x.dtype], *x.shape


def _strided(x: Tensor | None) -> tuple[int, int]:
    """Return the address and the distance of rows, as the extension takes them; zeros for none."""
    return (0, 0) if x is None else (x.data_ptr(), x.stride(0))


def _tables(statistics: Statistics) -> tuple[Tensor, Tensor | None]:
    """Return the codebooks of a 4-bit weight and of its statistics, contiguous."""
    nested = statistics.nested
    return statistics.code.contiguous(), None if nested is None else nested.code.contiguous()


def _scales(statistics: Statistics, nested_code: Tensor | None) -> tuple[int, int, int, int, float]:
    """Return the statistics as the extension takes them."""
    nested = statistics.nested
    if nested is None or nested_code is None:
        return statistics.absmax.data_ptr(), 0, 0, 0, 0.0
    return (
        statistics.absmax.data_ptr(),
        nested.absmax.data_ptr(),
        nested_code.data_ptr(),
        nested.blocksize,
        nested.offset,
    )


def _parameters(params: list[Tensor], grads: list[Tensor]) -> tuple[list[int], list[int], list[int], list[int]]:
    """Return the parameters' types and sizes, their addresses, and those of their gradients.

    Autograd is told that the parameters change.
    """
    torch.autograd.graph.increment_version(params)
    return (
        [_TYPES[p.dtype] for p in params],
        [p.numel() for p in params],
        [p.data_ptr() for p in params],
        [g.data_ptr() for g in grads],
    )


def _constants(
    step: int, lr: float, betas: tuple[float, float], eps: float, weight_decay: float
) -> tuple[float, float, float, float, float, float, float, float]:
    """Return the members of ``struct Adamw`` in csrc/adamw.h, as the reference computes them."""
    beta1, beta2 = betas
    return (
        1 - lr * weight_decay,
        beta1,
        1 - beta1,
        beta2,
        1 - beta2,
        (1 - beta2**step) ** 0.5,
        eps,
        -(lr / (1 - beta1**step)),
    )


def _tier() -> int:
    return _tier_named(os.environ.get("HALFBYTE_ISA"))


@functools.cache
def _tier_named(name: str | None) -> int:
    """Return the index among :func:`tiers` of the one called ``name``, or of the best."""
    known = tiers()
    if not name:
        return 0
    if name not in known:
        raise InputError(
            f"HALFBYTE_ISA is {name!r}, a tier that this chip or this build lacks{nearest(name, known)}; "
            f"set it to {' or '.join(known)}, or unset it."
        )
    return known.index(name)


def _gomp_parallel() -> int:
    """Return the address of the ``GOMP_parallel`` that torch is bound to, or 0 if there is none.

    The dynamic linker's own order: first what every library shares, then what torch's depends on.
    """
    for library in (None, str(Path(torch.__file__).parent / "lib" / "libtorch_cpu.so")):
        try:
            function = ctypes.CDLL(library, mode=os.RTLD_NOLOAD | os.RTLD_LAZY).GOMP_parallel
        except (OSError, AttributeError):
            continue
        return ctypes.cast(function, ctypes.c_void_p).value or 0
    return 0


if _AVAILABLE:
    _native.use_openmp(_gomp_parallel())

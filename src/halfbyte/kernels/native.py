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
import functools
import importlib.util
import os
from pathlib import Path

import torch
from torch import Tensor

from halfbyte.errors import InputError, nearest
from halfbyte.kernels.statistics import Statistics

_AVAILABLE = importlib.util.find_spec("halfbyte._native") is not None
if _AVAILABLE:
    from halfbyte import _native

_TYPES = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2}  # enum Type in csrc/contract.h


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

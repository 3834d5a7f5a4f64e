"""Block-wise quantization to 4 bits, coded bytes and int8, and back: arguments checked, then handed to a provider.

Formulas, shapes and dtypes are those of :mod:`halfbyte.kernels.reference`; errors as in :mod:`halfbyte.kernels.checks`.
"""

import torch
from torch import Tensor

from halfbyte.kernels.checks import (
    check_4bit,
    check_absmax,
    check_blocksize,
    check_bytes,
    check_code,
    check_floating,
    check_int8,
)
from halfbyte.kernels.provider import provider_for
from halfbyte.kernels.weights import Weight4bit, WeightInt8


def quantize_coded(x: Tensor, code: Tensor, blocksize: int) -> tuple[Tensor, Tensor]:
    """Quantize block-wise to indices of ``code``, uint8 in the shape of ``x``, and ``absmax``, fp32 ``[blocks]``."""
    check_floating("x", x.dtype)
    check_code(code, range(2, 257), x.device)
    check_blocksize(blocksize)
    codes, absmax = provider_for(x.device).quantize_coded(x.contiguous(), code, blocksize)
    return codes.view(x.shape), absmax


def dequantize_coded(
    codes: Tensor, absmax: Tensor, code: Tensor, blocksize: int, dtype: torch.dtype = torch.float32
) -> Tensor:
    """Inverse of :func:`quantize_coded`, as ``dtype`` in the shape of ``codes``."""
    check_bytes("codes", codes, codes.numel())
    check_blocksize(blocksize)
    check_floating("dtype", dtype)
    check_code(code, range(2, 257), codes.device)
    check_absmax(absmax, torch.float32, codes.numel(), blocksize, codes.device)
    flat = provider_for(codes.device).dequantize_coded(codes, absmax, code, blocksize, dtype)
    return flat.view(codes.shape)


def quantize_4bit(x: Tensor, code: Tensor, blocksize: int) -> tuple[Tensor, Tensor]:
    """Quantize block-wise to 4 bits: ``packed`` uint8 ``[ceil(n / 2)]`` and ``absmax`` fp32 ``[blocks]``."""
    check_floating("x", x.dtype)
    check_code(code, range(16, 17), x.device)
    check_blocksize(blocksize)
    return provider_for(x.device).quantize_4bit(x.contiguous(), code, blocksize)


def dequantize_4bit(weight: Weight4bit, dtype: torch.dtype) -> Tensor:
    """Inverse of :func:`quantize_4bit`, as ``dtype`` in the shape of ``weight``."""
    check_floating("dtype", dtype)
    check_4bit(weight)
    return provider_for(weight.packed.device).dequantize_4bit(weight, dtype)


def quantize_int8(x: Tensor, blocksize: int) -> WeightInt8:
    """Quantize a matrix block-wise to int8; see :func:`halfbyte.kernels.reference.quantize_int8`."""
    check_floating("x", x.dtype)
    check_blocksize(blocksize)
    if x.ndim != 2:
        raise ValueError(f"x has shape {tuple(x.shape)}; it must be a matrix")
    return provider_for(x.device).quantize_int8(x, blocksize)


def dequantize_int8(weight: WeightInt8, dtype: torch.dtype = torch.float32) -> Tensor:
    """Inverse of :func:`quantize_int8`, as ``dtype`` ``[N, K]``."""
    check_int8(weight)
    check_floating("dtype", dtype)
    return provider_for(weight.codes.device).dequantize_int8(weight, dtype)

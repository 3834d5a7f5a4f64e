"""Block-wise quantization to 4 bits, coded bytes and int8, and back.

Also how the extension takes the statistics of a 4-bit weight.
"""

import functools

import torch
from torch import Tensor

from halfbyte.kernels import reference
from halfbyte.kernels.native.runtime import TYPES, extension, threads, tier_index
from halfbyte.kernels.weights import Statistics, Weight4bit, WeightInt8

PIECE = 1 << 16
"""Values that are quantized to int8 at a time."""


def quantize_coded(x: Tensor, code: Tensor, blocksize: int) -> tuple[Tensor, Tensor]:
    """Block-wise quantization to a table; ``code`` must be ascending."""
    n = x.numel()
    code = code.contiguous()
    codes = torch.empty(n, dtype=torch.uint8, device="cpu")
    absmax = torch.empty(-(-n // blocksize), dtype=torch.float32, device="cpu")
    extension.quantize_8bit(
        tier_index(),
        threads(),
        x.data_ptr(),
        TYPES[x.dtype],
        n,
        blocksize,
        code.data_ptr(),
        len(code),
        codes.data_ptr(),
        absmax.data_ptr(),
    )
    return codes, absmax


def dequantize_coded(codes: Tensor, absmax: Tensor, code: Tensor, blocksize: int, dtype: torch.dtype) -> Tensor:
    """Inverse of :func:`quantize_coded`."""
    code = code.contiguous()
    out = torch.empty(codes.numel(), dtype=dtype, device="cpu")
    extension.dequantize_8bit(
        tier_index(),
        threads(),
        codes.data_ptr(),
        code.data_ptr(),
        len(code),
        absmax.data_ptr(),
        codes.numel(),
        blocksize,
        out.data_ptr(),
        TYPES[dtype],
    )
    return out


def quantize_4bit(x: Tensor, code: Tensor, blocksize: int) -> tuple[Tensor, Tensor]:
    """Block-wise 4-bit quantization."""
    n = x.numel()
    code = code.contiguous()
    packed = torch.empty(-(-n // 2), dtype=torch.uint8, device="cpu")
    absmax = torch.empty(-(-n // blocksize), dtype=torch.float32, device="cpu")
    extension.quantize_4bit(
        tier_index(),
        threads(),
        x.data_ptr(),
        TYPES[x.dtype],
        n,
        blocksize,
        code.data_ptr(),
        packed.data_ptr(),
        absmax.data_ptr(),
    )
    return packed, absmax


def dequantize_4bit(weight: Weight4bit, dtype: torch.dtype) -> Tensor:
    """Inverse of :func:`quantize_4bit`."""
    statistics = weight.statistics
    code, nested_code = code_tables(statistics)
    out = torch.empty(weight.shape, dtype=dtype, device="cpu")
    extension.dequantize_4bit(
        tier_index(),
        threads(),
        weight.packed.data_ptr(),
        code.data_ptr(),
        *scale_arguments(statistics, nested_code),
        out.numel(),
        statistics.blocksize,
        out.data_ptr(),
        TYPES[dtype],
    )
    return out


def quantize_int8(x: Tensor, blocksize: int) -> WeightInt8:
    """Block-wise quantization to int8, by torch, some blocks at a time: what lies between takes little memory."""
    flat, n = x.reshape(-1), x.numel()
    codes = torch.empty(n, dtype=torch.int8, device="cpu")
    absmax = torch.empty(-(-n // blocksize), dtype=torch.float32, device="cpu")
    blocks = max(PIECE // blocksize, 1)
    for first in range(0, len(absmax), blocks):
        values = slice(first * blocksize, (first + blocks) * blocksize)
        part = reference.quantize_int8(flat[values].unsqueeze(0), blocksize)
        codes[values], absmax[first : first + blocks] = part.codes[0], part.absmax
    return WeightInt8(codes.view(x.shape), absmax, blocksize)


def dequantize_int8(weight: WeightInt8, dtype: torch.dtype) -> Tensor:
    """Inverse of :func:`quantize_int8`: as coded bytes, whose table has the integer that each byte is."""
    absmax = weight.absmax / 127.0
    flat = dequantize_coded(weight.codes.view(torch.uint8), absmax, _integers(), weight.blocksize, dtype)
    return flat.view(weight.shape)


@functools.cache
def _integers() -> Tensor:
    return torch.arange(256, dtype=torch.uint8, device="cpu").view(torch.int8).float()


def code_tables(statistics: Statistics) -> tuple[Tensor, Tensor | None]:
    """Return the codebooks of a 4-bit weight and of its statistics, contiguous."""
    nested = statistics.nested
    return statistics.code.contiguous(), None if nested is None else nested.code.contiguous()


def scale_arguments(statistics: Statistics, nested_code: Tensor | None) -> tuple[int, int, int, int, float]:
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

"""Matrices in GGUF's number formats (gguf 0.19, quants.py): blocks of 32 values of a row.

    f32, f16, bf16
    q8_0    int8 codes and an fp16 scale: 8.5 bits a value
    q5_0    5-bit codes and an fp16 scale: 5.5 bits; q5_1 with an fp16 minimum too: 6
    q4_0    4-bit codes and an fp16 scale: 4.5 bits; q4_1 with an fp16 minimum too: 5

The bytes are those of ``gguf.quants.quantize``, several times as fast in torch.
"""

from collections.abc import Sequence
from math import prod
from typing import Any

import torch
from gguf import GGML_QUANT_SIZES, GGMLQuantizationType
from torch import Tensor

BLOCK = 32
AT_ONCE = 1 << 20
"""Values that are quantized at once."""
HALF = 65504.0
"""The largest fp16."""
FLOATS = {"f32": torch.float32, "f16": torch.float16, "bf16": torch.bfloat16}
CODES = ("q8_0", "q5_1", "q5_0", "q4_1", "q4_0")


def packed(x: Tensor, kind: str) -> Any:
    """Return a matrix ``[rows, columns]``, or a vector, as GGUF's bytes, uint8 ``[rows, bytes]``; floats as they are.

    Rows of codes are whole blocks.
    """
    if kind in ("f32", "f16"):
        return x.to(FLOATS[kind]).contiguous().numpy()
    if kind == "bf16":
        return x.bfloat16().contiguous().view(torch.uint8).numpy()
    out = torch.empty(packed_shape(x.shape, kind), dtype=torch.uint8)
    rows = max(1, AT_ONCE // x.shape[-1])
    for part, values in zip(torch.split(out, rows), torch.split(x, rows), strict=True):
        part.copy_(_blocks(values.float().reshape(-1, BLOCK), kind).view_as(part))
    return out.numpy()


def packed_shape(shape: Sequence[int], kind: str) -> tuple[int, ...]:
    """Return the shape of what :func:`packed` returns."""
    if kind in ("f32", "f16"):
        return tuple(shape)
    values, size = GGML_QUANT_SIZES[kind_of(kind)]
    return (*shape[:-1], shape[-1] // values * size)


def packed_bytes(shape: Sequence[int], kind: str) -> int:
    """Return the bytes that a tensor takes."""
    values, size = GGML_QUANT_SIZES[kind_of(kind)]
    return int(prod(shape) // values * size)


def kind_of(kind: str) -> GGMLQuantizationType:
    """Return gguf's word for a format."""
    return GGMLQuantizationType[kind.upper()]


def _blocks(x: Tensor, kind: str) -> Tensor:
    """Return the bytes of blocks ``[n, 32]``."""
    if kind == "q8_0":
        scale = x.abs().amax(-1, keepdim=True) / 127
        scaled = x * _inverse(scale)
        codes = (torch.trunc(scaled.abs() + 0.5) * scaled.sign()).to(torch.int8).view(torch.uint8)
        return torch.cat([_halves(scale), codes], -1)
    most = 31 if kind.startswith("q5") else 15
    if kind.endswith("_0"):
        scale = x.gather(-1, x.abs().argmax(-1, keepdim=True)) / (-(most + 1) / 2)
        codes = (x * _inverse(scale) + ((most + 1) / 2 + 0.5)).trunc().clamp(0, most).to(torch.uint8)
        constants = [_halves(scale)]
    else:
        low = x.amin(-1, keepdim=True)
        scale = (x.amax(-1, keepdim=True) - low) / most
        codes = ((x - low) * _inverse(scale) + 0.5).trunc().clamp(0, most).to(torch.uint8)
        constants = [_halves(scale), _halves(low)]
    nibbles = (codes[:, : BLOCK // 2] & 15) | (codes[:, BLOCK // 2 :] << 4)
    if most == 31:
        bits = (codes >> 4).view(-1, BLOCK // 8, 8) << torch.arange(8, dtype=torch.uint8)
        constants.append(bits.sum(-1, dtype=torch.uint8))
    return torch.cat([*constants, nibbles], -1)


def _halves(constant: Tensor) -> Tensor:
    return constant.half().view(torch.uint8)


def _inverse(scale: Tensor) -> Tensor:
    return torch.where(scale == 0, 0.0, 1 / scale)

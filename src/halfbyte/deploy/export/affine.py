"""MLX's affine quantization, as ``mx.quantize(w, group_size, bits)`` makes it.

Each row of a weight ``[N, K]`` is cut into groups of ``group_size`` values w, which share a scale s and a bias b:

    lo, hi = min w, max w
    s = max((hi - lo) / (2^bits - 1), 1e-7), with its sign turned where |hi| >= |lo|
    e = the one of lo and hi that is farther from 0;    q0 = round(e / s)
    s, b = e / q0, e    where q0 is not 0, so that both e and 0 are represented exactly;    or else s, 0
    q = clamp(round((w - b) / s), 0, 2^bits - 1)

and w is then about s q + b. All in fp32, rounding half to even; s and b are rounded to the weight's dtype at the end,
after the codes were made with them. Codes of 4 or 8 bits lie in uint32, the first value in the lowest bits:
``[N, K bits / 32]``; scales and biases are ``[N, K / group_size]``.

Source: MLX (0.32), ``mlx/backend/cpu/quantized.cpp``, ``quantize``; the same bits as its CPU library's (tests).
"""

from typing import NamedTuple

import torch
from torch import Tensor

GROUP_SIZE = 64
SMALLEST = 1e-7
AT_ONCE = 1 << 20
"""Values that are worked on at a time."""


class Affine(NamedTuple):
    """A quantized weight: ``codes`` uint32, ``scales`` and ``biases`` in the weight's dtype."""

    codes: Tensor
    scales: Tensor
    biases: Tensor


def quantize(weight: Tensor, bits: int = 4, group_size: int = GROUP_SIZE) -> Affine:
    """Quantize a weight.

    Args:
        weight: bf16, fp16 or fp32 ``[N, K]``; K is a multiple of the group size.
        bits: 4 or 8.
        group_size: values that share scale and bias.

    Raises:
        ValueError: bits or shape are others.
    """
    if bits not in (4, 8):
        raise ValueError(f"{bits} bits; 4 or 8")
    if weight.ndim != 2 or weight.shape[1] % group_size:
        raise ValueError(f"a weight {list(weight.shape)} has no groups of {group_size}")
    rows, columns = weight.shape
    made = Affine(
        torch.empty(rows, columns * bits // 32, dtype=torch.uint32),
        *(torch.empty(rows, columns // group_size, dtype=weight.dtype) for _ in range(2)),
    )
    at_once = max(1, AT_ONCE // columns)
    for w, *parts in zip(*(torch.split(x, at_once) for x in (weight, *made)), strict=True):
        for part, found in zip(parts, _quantize(w, bits, group_size), strict=True):
            part.copy_(found)
    return made


def _quantize(weight: Tensor, bits: int, group_size: int) -> Affine:
    most = 2**bits - 1
    w = weight.float().reshape(len(weight), -1, group_size)
    lo, hi = w.amin(-1, keepdim=True), w.amax(-1, keepdim=True)
    is_lo = lo.abs() > hi.abs()
    scale = ((hi - lo) / most).clamp_min(SMALLEST)
    scale = torch.where(is_lo, scale, -scale)
    edge = torch.where(is_lo, lo, hi)
    q0 = (edge / scale).round()
    scale = torch.where(q0 != 0, edge / q0, scale)
    bias = torch.where(q0 != 0, edge, 0)
    codes = ((w - bias) / scale).round().clamp(0, most).to(torch.uint8).flatten(-2)
    if bits == 4:
        codes = codes[:, 0::2] | codes[:, 1::2] << 4
    return Affine(
        codes.contiguous().view(torch.uint32), scale.squeeze(-1).to(weight.dtype), bias.squeeze(-1).to(weight.dtype)
    )


def dequantize(quantized: Affine, bits: int = 4, group_size: int = GROUP_SIZE) -> Tensor:
    """Return what a quantized weight stands for, ``s q + b``, fp32 ``[N, K]``."""
    codes = quantized.codes.view(torch.uint8)
    if bits == 4:
        codes = torch.stack([codes & 15, codes >> 4], -1).flatten(-2)
    q = codes.float().view(len(codes), -1, group_size)
    weight: Tensor = q * quantized.scales.float()[..., None] + quantized.biases.float()[..., None]
    return weight.flatten(-2)

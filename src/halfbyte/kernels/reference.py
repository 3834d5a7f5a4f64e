"""Every operation of the contract once, plainly, in torch: the oracle that each provider is tested against.

Notation: a tensor is flattened row-major into ``n`` values and cut into ``ceil(n / blocksize)`` blocks
(the last may be short; blocks cross rows). ``code`` is the table of values that the codes stand for,
``code[q]`` being the value of code ``q``; 4-bit tables have 16 entries in any order, 8-bit tables 256 in
ascending order. Arithmetic is fp32 with each product and sum rounded on its own.

The rounding rule is "nearest code, a tie to the lower": the values are scaled by their block's largest
magnitude (QLoRA, arXiv 2305.14314, equation 1) and placed among the midpoints of neighbouring codes. To
the last bit it is that of bitsandbytes' torch backend (0.50.2, ``backends/default/ops.py``), including its
two oddities: full blocks are multiplied by the reciprocal of ``absmax`` while a short last block is
divided by it, and only the short block's ``absmax`` is raised to 1e-38 in the result.
"""

import torch
from torch import Tensor

from halfbyte.kernels.statistics import Statistics

SMALLEST_ABSMAX = 1e-38


def scale_blocks(x: Tensor, blocksize: int) -> tuple[Tensor, Tensor]:
    """Scale each block of ``x`` by its largest magnitude.

    Args:
        x: any shape and floating dtype, ``n`` values.
        blocksize: values per block.

    Returns:
        The scaled values, fp32 ``[n]`` in [-1, 1], and ``absmax``, fp32 ``[ceil(n / blocksize)]``.
    """
    flat = x.reshape(-1).float()
    whole = flat.numel() // blocksize * blocksize
    blocks = flat[:whole].view(-1, blocksize)
    absmax = blocks.abs().amax(dim=1) if len(blocks) else flat.new_empty(0)
    scaled = (blocks * (1.0 / absmax.clamp(min=SMALLEST_ABSMAX)).unsqueeze(1)).clamp(-1, 1).view(-1)
    if whole < flat.numel():
        rest = flat[whole:]
        rest_absmax = rest.abs().amax().clamp(min=SMALLEST_ABSMAX)
        absmax = torch.cat([absmax, rest_absmax.unsqueeze(0)])
        scaled = torch.cat([scaled, (rest / rest_absmax).clamp(-1, 1)])
    return scaled, absmax


def nearest_code(scaled: Tensor, code: Tensor) -> Tensor:
    """Return the code whose value is nearest to each of ``scaled`` (NaN gets the largest value's).

    Args:
        scaled: fp32 ``[n]``.
        code: fp32 ``[c]``, the table of values, in any order.

    Returns:
        int64 ``[n]``, indices into ``code``.
    """
    values, order = torch.sort(code, stable=True)
    midpoints = (values[:-1] + values[1:]) / 2
    return order[torch.bucketize(scaled, midpoints)]


def unscale_blocks(values: Tensor, absmax: Tensor, blocksize: int) -> Tensor:
    """Multiply each block of ``values`` (fp32 ``[n]``) by its ``absmax`` (fp32); inverse of :func:`scale_blocks`."""
    return values * absmax.repeat_interleave(blocksize)[: values.numel()]


def quantize_8bit(x: Tensor, code: Tensor, blocksize: int) -> tuple[Tensor, Tensor]:
    """Block-wise 8-bit quantization: codes uint8 ``[n]`` and ``absmax`` fp32 (see the module's notation)."""
    scaled, absmax = scale_blocks(x, blocksize)
    return nearest_code(scaled, code).to(torch.uint8), absmax


def dequantize_8bit(codes: Tensor, absmax: Tensor, code: Tensor, blocksize: int, dtype: torch.dtype) -> Tensor:
    """Inverse of :func:`quantize_8bit`: ``code[codes] * absmax`` as ``dtype`` ``[n]``."""
    return unscale_blocks(code[codes.reshape(-1).long()], absmax, blocksize).to(dtype)


def quantize_4bit(x: Tensor, code: Tensor, blocksize: int) -> tuple[Tensor, Tensor]:
    """Block-wise 4-bit quantization, two codes to a byte, the first in the high half.

    An odd count is filled up with a zero value before it is packed.

    Returns:
        ``packed``, uint8 ``[ceil(n / 2)]``, and ``absmax``, fp32 ``[ceil(n / blocksize)]``.
    """
    scaled, absmax = scale_blocks(x, blocksize)
    if scaled.numel() % 2:
        scaled = torch.cat([scaled, scaled.new_zeros(1)])
    q = nearest_code(scaled, code).to(torch.uint8)
    return (q[::2] << 4) | q[1::2], absmax


def expand_absmax(statistics: Statistics) -> Tensor:
    """Return the fp32 ``absmax`` ``[blocks]``, undoing double quantization (paper, section 3) where it was used."""
    if statistics.nested is None:
        return statistics.absmax
    nested = statistics.nested
    return (
        dequantize_8bit(statistics.absmax, nested.absmax, nested.code, nested.blocksize, torch.float32) + nested.offset
    )


def dequantize_4bit(packed: Tensor, statistics: Statistics, n: int, dtype: torch.dtype) -> Tensor:
    """Inverse of :func:`quantize_4bit`: the ``n`` values ``code[q] * absmax`` as ``dtype`` ``[n]``."""
    packed = packed.reshape(-1)
    q = torch.stack([packed >> 4, packed & 15], dim=1).view(-1)[:n]
    return unscale_blocks(statistics.code[q.long()], expand_absmax(statistics), statistics.blocksize).to(dtype)


def matmul_4bit(
    x: Tensor, packed: Tensor, statistics: Statistics, shape: tuple[int, int], bias: Tensor | None
) -> Tensor:
    """The 4-bit linear product ``y = x Wᵀ + bias`` with ``W`` dequantized to the dtype of ``x``.

    Args:
        x: ``[..., K]``, floating.
        packed: uint8, ``ceil(N K / 2)`` bytes.
        statistics: those of ``W``.
        shape: ``(N, K)``, that of ``W``.
        bias: ``[N]`` in the dtype of ``x``, or None.

    Returns:
        ``[..., N]`` in the dtype of ``x``.
    """
    rows, columns = shape
    weight = dequantize_4bit(packed, statistics, rows * columns, x.dtype).view(shape)
    return torch.nn.functional.linear(x, weight, bias)


def matmul_4bit_dx(dy: Tensor, packed: Tensor, statistics: Statistics, shape: tuple[int, int]) -> Tensor:
    """The gradient of :func:`matmul_4bit` with respect to ``x``: ``dx = dy W``, ``[..., N]`` to ``[..., K]``."""
    rows, columns = shape
    return dy @ dequantize_4bit(packed, statistics, rows * columns, dy.dtype).view(shape)

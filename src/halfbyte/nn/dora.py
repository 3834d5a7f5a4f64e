"""DoRA over a frozen weight (arXiv 2402.09353): of each row the direction is LoRA's, the length ``m`` a parameter.

    y = (m / n) ∘ z + b        z = x dequant(W)ᵀ + s x Aᵀ Bᵀ        n = ‖dequant(W) + s B A‖, of each row

``n`` follows A and B but is a constant in the gradient (section 4.3). Nothing dense is made for it:

    n² = ‖W‖² + 2 s Σ_rank (W Aᵀ) ∘ B + s² Σ_rank (B (A Aᵀ)) ∘ B                               sums over a row, [out]

``‖W‖²`` is computed once, tile by tile; ``W Aᵀ`` is a product with ``rank`` rows. Gradients, with ``g = (m / n) dy``:

    dz = g        dm = Σ_rows dy ∘ z / n        db = Σ_rows dy

where ``dz`` goes on as in :mod:`halfbyte.nn.lora`. Kept for the backward beside what that keeps: ``z``.
"""

import math
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from halfbyte import kernels
from halfbyte.kernels import Sum, Term, pool
from halfbyte.nn.lora import LowRank
from halfbyte.quant import QuantizedInt8, QuantizedWeight

Weight = QuantizedWeight | QuantizedInt8 | Tensor
TILE = 2**20
"""Values of a weight that are dense at once, where its blocks allow it."""
ROWS = 256
"""Rows whose products are summed at once."""


def squared_lengths(weight: Weight) -> Tensor:
    """Return ``‖W‖²`` of each row, fp32 ``[out]``; at most some ``TILE`` values are dense at once."""
    out, width = weight.shape
    unit = math.lcm(width, _shared(weight)) // width
    step = unit * max(1, TILE // (unit * width))
    return torch.cat([_rows(weight, first, min(first + step, out)).square().sum(1) for first in range(0, out, step)])


def _shared(weight: Weight) -> int:
    """Return how many values, one behind the other, share a constant or a byte."""
    if isinstance(weight, Tensor):
        return 1
    if isinstance(weight, QuantizedInt8):
        return weight.blocksize
    nested = weight.statistics.nested
    return 2 * weight.statistics.blocksize * (nested.blocksize if nested else 1)


def _rows(weight: Weight, first: int, last: int) -> Tensor:
    if isinstance(weight, Tensor):
        return weight[first:last].detach().float()
    part = weight if last - first == weight.shape[0] else weight.rows(first, last)
    return part.dequantize(torch.float32)


@torch.no_grad()
def lengths(weight: Weight, squared: Tensor, adapter: LowRank) -> Tensor:
    """Return ``n``, the lengths of the rows of ``dequant(W) + s B A``, fp32 ``[out]``.

    Args:
        weight: ``[out, in]``.
        squared: what :func:`squared_lengths` returns of it.
        adapter: fp32 or narrower.
    """
    a, b = adapter.a.float().contiguous(), adapter.b.float()
    wa = a.new_empty(a.shape[0], weight.shape[0])
    kernels.matmul_sums([Sum([Term(a, weight)], wa)])
    s = adapter.scaling
    together = torch.addmm(2 * s * wa.T, b, a @ a.T, beta=1, alpha=s * s)
    return (squared + (together * b).sum(1)).clamp_(min=0).sqrt_()


def rescale(z: Tensor, factors: Tensor, bias: Tensor | None) -> Tensor:
    """Return ``factors ∘ z + bias``, differentiable in all three.

    Args:
        z: ``[..., out]``, fp32, bf16 or fp16.
        factors: fp32 ``[out]``.
        bias: ``[out]``, or None.

    Returns:
        in shape and dtype of ``z``.
    """
    rows = z.reshape(-1, z.shape[-1])
    y: Tensor = _Rescale.apply(rows, factors, bias)  # type: ignore[no-untyped-call]
    return y.view(z.shape)


class _Rescale(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, z: Tensor, factors: Tensor, bias: Tensor | None) -> Tensor:
        ctx.save_for_backward(z if ctx.needs_input_grad[1] else None, factors)
        # in fp32, rounded once: bf16 would round m / n itself to steps of 0.4 %
        y = torch.mul(z, factors, out=pool.empty(z.shape, z.dtype, z.device))
        return y if bias is None else y.add_(bias.to(z.dtype))

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
        z, factors = ctx.saved_tensors
        need_z, need_factors, need_bias = ctx.needs_input_grad
        dz = dfactors = None
        if need_factors:
            dfactors = torch.zeros_like(factors)
            for first in range(0, len(dy), ROWS):
                part = slice(first, first + ROWS)
                dfactors += (dy[part].float() * z[part]).sum(0)
        if need_z:
            dz = torch.mul(dy, factors, out=pool.empty(dy.shape, dy.dtype, dy.device))
        return dz, dfactors, dy.sum(0) if need_bias else None

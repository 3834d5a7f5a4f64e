"""Rotary position embedding (arXiv 2104.09864) of queries and keys as their projections leave them.

In place of transformers' ``rotate_half`` and its five passes; the backward turns the other way. Nothing but the angles
is kept.
"""

from typing import Any

from torch import Tensor
from torch.autograd import Function
from torch.autograd.function import once_differentiable

from halfbyte import kernels


def rotary(query: Tensor, key: Tensor, cos: Tensor, sin: Tensor) -> tuple[Tensor, Tensor]:
    """Return both turned, in new contiguous memory.

    Args:
        query: ``[batch, length, heads, size]``, fp32, bf16 or fp16, any strides.
        key: as ``query``, perhaps with fewer heads.
        cos: ``[batch or 1, length, turned]``, fp32 or as ``query``; what a head has beyond ``turned`` stays.
        sin: as ``cos``.
    """
    query, key = _Rotary.apply(query, key, cos, sin)  # type: ignore[no-untyped-call]
    return query, key


class _Rotary(Function):
    @staticmethod
    def forward(ctx: Any, query: Tensor, key: Tensor, cos: Tensor, sin: Tensor) -> tuple[Tensor, Tensor]:
        ctx.save_for_backward(cos, sin)
        ctx.set_materialize_grads(False)
        return kernels.rotary(query, cos, sin), kernels.rotary(key, cos, sin)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *gradients: Tensor | None) -> tuple[Tensor | None, ...]:
        cos, sin = ctx.saved_tensors
        return *(None if dy is None else kernels.rotary(dy, cos, sin, inverse=True) for dy in gradients), None, None

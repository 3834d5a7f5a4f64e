"""RMSNorm (arXiv 1910.07467), with the residual added before it, and its gradient in one pass over memory each.

    h = x + residual,    y = h / sqrt(mean(h²) + eps) (offset + weight)

Families differ in ``offset`` (1 for Gemma) and in whether the normalized value is rounded before the weight multiplies
it (Llama: yes). ``h`` and one number a row are kept for the backward; ``y`` is computed again for a projection that
reads it (:mod:`halfbyte.nn.recomputed`). The gradient of a weight that is not trained is not computed.
"""

from typing import Any

from torch import Tensor
from torch.autograd import Function
from torch.autograd.function import once_differentiable

from halfbyte import kernels
from halfbyte.nn.recomputed import recomputed


def rms_norm(
    x: Tensor,
    weight: Tensor,
    residual: Tensor | None = None,
    *,
    eps: float,
    offset: float = 0.0,
    rounded: bool = True,
) -> tuple[Tensor, Tensor]:
    """Return ``h`` and ``y``.

    Using the returned ``h``, rather than ``x``, further on lets the backward add its gradient in the same pass.

    Args:
        x: ``[..., width]``, fp32, bf16 or fp16.
        weight: ``[width]`` in the dtype of ``x``.
        residual: as ``x``, or None: ``h`` is ``x``.
        eps: added to the mean square.
        offset: what is added to the weight.
        rounded: whether ``h / sqrt(...)`` is rounded to the dtype of ``x``.
    """

    def again(h: Tensor, weight: Tensor) -> Tensor:
        return kernels.rms_norm(h, None, weight, eps=eps, offset=offset, rounded=rounded)[1]

    h, y = _RmsNorm.apply(x, residual, weight, eps, offset, rounded)  # type: ignore[no-untyped-call]
    return h, recomputed(y, again, h, weight)


class _RmsNorm(Function):
    @staticmethod
    def forward(
        ctx: Any, x: Tensor, residual: Tensor | None, weight: Tensor, eps: float, offset: float, rounded: bool
    ) -> tuple[Tensor, Tensor]:
        h, y, scale = kernels.rms_norm(x, residual, weight, eps=eps, offset=offset, rounded=rounded)
        ctx.save_for_backward(h, weight, scale)
        ctx.offset = offset
        ctx.set_materialize_grads(False)
        return h, y

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dh: Tensor | None, dy: Tensor | None) -> tuple[Tensor | None, ...]:
        h, weight, scale = ctx.saved_tensors
        dx, dweight = dh, None
        if dy is not None:
            if ctx.needs_input_grad[0] or ctx.needs_input_grad[1]:
                dx = kernels.rms_norm_gradient(dy, dh, h, weight, scale, offset=ctx.offset)
            if ctx.needs_input_grad[2]:
                dweight = kernels.rms_norm_weight_gradient(dy, h, scale).to(weight.dtype)
        return dx, dx if ctx.needs_input_grad[1] else None, dweight, None, None, None

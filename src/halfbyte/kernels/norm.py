"""RMSNorm and its gradients: arguments checked, then handed to a provider.

Formulas, shapes and dtypes are those of :mod:`halfbyte.kernels.reference`; errors as in :mod:`halfbyte.kernels.checks`.
"""

import torch
from torch import Tensor

from halfbyte.kernels.checks import as_rows, check_as, check_floating
from halfbyte.kernels.provider import provider_for


def rms_norm(
    x: Tensor,
    residual: Tensor | None,
    weight: Tensor,
    *,
    eps: float,
    offset: float = 0.0,
    rounded: bool = True,
) -> tuple[Tensor, Tensor, Tensor]:
    """RMSNorm of ``x + residual``, all ``[..., width]``; see :func:`halfbyte.kernels.reference.rms_norm`.

    Returns:
        The sum and its norm in the shape of ``x``, and what :func:`rms_norm_gradient` needs, fp32 ``[rows]``.
    """
    check_floating("x", x.dtype)
    _check_weight(weight, x)
    if residual is not None:
        check_as("residual", residual, "x", x)
    flat = None if residual is None else as_rows(residual)
    h, y, scale = provider_for(x.device).rms_norm(as_rows(x), flat, weight, eps, offset, rounded)
    return (x if residual is None else h.view(x.shape)), y.view(x.shape), scale


def rms_norm_gradient(
    dy: Tensor, dh: Tensor | None, h: Tensor, weight: Tensor, scale: Tensor, *, offset: float = 0.0
) -> Tensor:
    """Gradient of :func:`rms_norm` with respect to ``x`` and to ``residual``, in the shape of ``h``."""
    check_floating("h", h.dtype)
    _check_weight(weight, h)
    _check_scale(scale, h)
    check_as("dy", dy, "h", h)
    if dh is not None:
        check_as("dh", dh, "h", h)
    flat = None if dh is None else as_rows(dh)
    dx = provider_for(h.device).rms_norm_gradient(as_rows(dy), flat, as_rows(h), weight, scale, offset)
    return dx.view(h.shape)


def rms_norm_weight_gradient(dy: Tensor, h: Tensor, scale: Tensor) -> Tensor:
    """Gradient of :func:`rms_norm` with respect to ``weight``, fp32 ``[width]``."""
    check_floating("h", h.dtype)
    _check_scale(scale, h)
    check_as("dy", dy, "h", h)
    return provider_for(h.device).rms_norm_weight_gradient(as_rows(dy), as_rows(h), scale)


def _check_weight(weight: Tensor, x: Tensor) -> None:
    if weight.dtype != x.dtype or weight.device != x.device:
        raise TypeError(f"weight is {weight.dtype} on {weight.device}; it must be {x.dtype} on {x.device}, as x")
    if x.ndim == 0 or weight.shape != x.shape[-1:]:
        raise ValueError(f"weight has shape {tuple(weight.shape)}; x of shape {tuple(x.shape)} needs its last size")


def _check_scale(scale: Tensor, h: Tensor) -> None:
    rows = h.shape[:-1].numel()
    if scale.dtype != torch.float32 or scale.shape != (rows,) or scale.device != h.device or not scale.is_contiguous():
        raise ValueError(
            f"scale is {scale.dtype} {tuple(scale.shape)} on {scale.device}; {rows} rows need torch.float32 "
            f"({rows},) on {h.device}"
        )

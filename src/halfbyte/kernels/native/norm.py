"""RMSNorm and its gradients (csrc/norm.inl)."""

import torch
from torch import Tensor

from halfbyte.kernels import pool
from halfbyte.kernels.native.rows import dense_rows, row_address, row_arguments
from halfbyte.kernels.native.runtime import extension


def rms_norm(
    x: Tensor, residual: Tensor | None, weight: Tensor, eps: float, offset: float, rounded: bool
) -> tuple[Tensor, Tensor, Tensor]:
    """RMSNorm; sums in the tier's order, for any number of threads."""
    x, weight = dense_rows(x), weight.contiguous()
    residual = None if residual is None else dense_rows(residual)
    h = x if residual is None else pool.empty(x.shape, x.dtype)
    y = pool.empty(x.shape, x.dtype)
    scale = torch.empty(len(x), dtype=torch.float32, device="cpu")
    extension.rms_norm(
        *row_arguments(x),
        row_address(x),
        row_address(residual),
        weight.data_ptr(),
        eps,
        offset,
        rounded,
        h.data_ptr(),
        y.data_ptr(),
        scale.data_ptr(),
    )
    return h, y, scale


def rms_norm_gradient(dy: Tensor, dh: Tensor | None, h: Tensor, weight: Tensor, scale: Tensor, offset: float) -> Tensor:
    """The gradient of :func:`rms_norm` with respect to what it normalizes."""
    dy, h, weight = dense_rows(dy), dense_rows(h), weight.contiguous()
    dh = None if dh is None else dense_rows(dh)
    dx = pool.empty(h.shape, h.dtype)
    extension.rms_norm_gradient(
        *row_arguments(h),
        row_address(dy),
        row_address(h),
        row_address(dh),
        weight.data_ptr(),
        scale.data_ptr(),
        offset,
        dx.data_ptr(),
    )
    return dx


def rms_norm_weight_gradient(dy: Tensor, h: Tensor, scale: Tensor) -> Tensor:
    """The gradient of :func:`rms_norm` with respect to the weight; rows are added in their order."""
    dy, h = dense_rows(dy), dense_rows(h)
    dweight = torch.empty(h.shape[1], dtype=torch.float32, device="cpu")
    extension.rms_norm_weight_gradient(
        *row_arguments(h), row_address(dy), row_address(h), scale.data_ptr(), dweight.data_ptr()
    )
    return dweight

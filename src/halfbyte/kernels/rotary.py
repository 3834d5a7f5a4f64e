"""Rotary position embedding: arguments checked, then handed to a provider.

Formula, shapes and dtypes are those of :mod:`halfbyte.kernels.reference`; errors as in :mod:`halfbyte.kernels.checks`.
"""

import torch
from torch import Tensor

from halfbyte.kernels.checks import check_floating
from halfbyte.kernels.provider import provider_for


def rotary(x: Tensor, cos: Tensor, sin: Tensor, *, inverse: bool = False) -> Tensor:
    """Rotary position embedding of ``[batch, length, heads, size]``; see :func:`halfbyte.kernels.reference.rotary`.

    Args:
        x: any strides.
        cos: ``[batch or 1, length, turned]``, fp32 or as ``x``; ``turned`` is even and at most ``size``.
        sin: as ``cos``.
        inverse: the gradient instead.

    Returns:
        A new contiguous tensor in the shape of ``x``.
    """
    check_floating("x", x.dtype)
    for name, table in (("cos", cos), ("sin", sin)):
        if table.dtype not in (torch.float32, x.dtype) or table.device != x.device:
            raise TypeError(
                f"{name} is {table.dtype} on {table.device}; x needs {x.dtype} or torch.float32 on {x.device}"
            )
    turned = cos.shape[-1] if cos.ndim == 3 else 1
    fits = x.ndim == 4 and turned % 2 == 0 and turned <= x.shape[-1]
    if not fits or cos.shape[0] not in (1, x.shape[0]) or cos.shape[1] != x.shape[1] or sin.shape != cos.shape:
        raise ValueError(
            f"cos is {tuple(cos.shape)} and sin {tuple(sin.shape)}; x of shape {tuple(x.shape)} needs both as "
            "(batch or 1, length, turned), where x is (batch, length, heads, size) and turned even, at most size"
        )
    shape = (x.shape[0], *cos.shape[1:])
    return provider_for(x.device).rotary(x, cos.expand(shape), sin.expand(shape), inverse)

"""Rotary position embedding (csrc/rotary.inl)."""

import torch
from torch import Tensor

from halfbyte.kernels import pool
from halfbyte.kernels.native.rows import dense_rows
from halfbyte.kernels.native.runtime import TYPES, extension, threads, tier_index


def rotary(x: Tensor, cos: Tensor, sin: Tensor, inverse: bool) -> Tensor:
    """Rotary position embedding; without fused multiply-adds on any tier."""
    x = dense_rows(x)
    sin = sin.to(cos.dtype)
    if cos.stride(-1) != 1 or cos.stride() != sin.stride():
        cos, sin = cos.contiguous(), sin.contiguous()
    y = pool.empty(x.shape, x.dtype)
    extension.rotary(
        tier_index(),
        threads(),
        TYPES[x.dtype],
        cos.dtype == torch.float32,
        inverse,
        x.shape,
        x.stride(),
        x.data_ptr(),
        cos.data_ptr(),
        sin.data_ptr(),
        cos.shape[-1],
        cos.stride()[:2],
        y.data_ptr(),
    )
    return y

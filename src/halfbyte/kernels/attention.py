"""Softmax attention over key ranges: arguments checked, then handed to a provider.

Formulas, shapes and dtypes are those of :mod:`halfbyte.kernels.reference`; errors as in :mod:`halfbyte.kernels.checks`.
"""

import torch
from torch import Tensor

from halfbyte.kernels.checks import check_floating
from halfbyte.kernels.provider import provider_for

LARGEST_HEAD = 512  # values of a head: as many as a panel is deep (csrc/matmul.h)
MOST_KEYS = 2**24  # keys are counted in fp32 (csrc/attention.h)


def attention(
    q: Tensor, k: Tensor, v: Tensor, ranges: Tensor, *, scale: float, softcap: float = 0.0
) -> tuple[Tensor, Tensor]:
    """Softmax attention over key ranges: ``out`` and ``lse``. See :func:`halfbyte.kernels.reference.attention`.

    The gradient is :func:`attention_backward`; :func:`halfbyte.nn.attention` joins the two.
    """
    _check_attention(q, k, v, ranges, softcap)
    return provider_for(q.device).attention(q, k, v, ranges.contiguous(), scale, softcap)


def attention_backward(
    dout: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor,
    lse: Tensor,
    ranges: Tensor,
    *,
    scale: float,
    softcap: float = 0.0,
) -> tuple[Tensor, Tensor, Tensor]:
    """The gradients ``dq``, ``dk`` and ``dv`` of :func:`attention`, whose results ``out`` and ``lse`` are."""
    _check_attention(q, k, v, ranges, softcap)
    for name, x in (("dout", dout), ("out", out)):
        _check_heads(name, x, q, q.shape)
    if lse.dtype != torch.float32 or lse.shape != q.shape[:3] or not lse.is_contiguous() or lse.device != q.device:
        raise ValueError(
            f"lse is {lse.dtype} {tuple(lse.shape)} on {lse.device}; it must be float32 {tuple(q.shape[:3])}, "
            f"contiguous, on {q.device}"
        )
    return provider_for(q.device).attention_backward(dout, q, k, v, out, lse, ranges.contiguous(), scale, softcap)


def _check_attention(q: Tensor, k: Tensor, v: Tensor, ranges: Tensor, softcap: float) -> None:
    check_floating("q", q.dtype)
    if q.ndim != 4 or k.ndim != 4 or 0 in (q.shape[1], k.shape[1]) or q.shape[1] % k.shape[1]:
        raise ValueError(
            f"q has shape {tuple(q.shape)} and k {tuple(k.shape)}; they must be [B, H, L, D] and [B, G, S, D] with H a "
            "multiple of G"
        )
    batches, _, queries, size = q.shape
    for name, x in (("k", k), ("v", v)):
        _check_heads(name, x, q, torch.Size([batches, *k.shape[1:3], size]))
    if not 0 < size <= LARGEST_HEAD:
        raise ValueError(f"the head size is {size}; it must be from 1 to {LARGEST_HEAD}")
    if k.shape[2] >= MOST_KEYS:
        raise ValueError(f"there are {k.shape[2]} keys; there must be fewer than {MOST_KEYS}")
    if softcap < 0:
        raise ValueError(f"softcap is {softcap}; it must be positive, or 0 for none")
    if ranges.dtype != torch.int32 or ranges.shape != (batches, queries, 2) or ranges.device != q.device:
        raise ValueError(
            f"ranges is {ranges.dtype} {tuple(ranges.shape)} on {ranges.device}; it must be int32 "
            f"{(batches, queries, 2)} on {q.device}"
        )
    if ranges.numel() and (int(ranges.min()) < 0 or int(ranges.max()) > k.shape[2]):
        raise ValueError(f"ranges holds {int(ranges.min())} to {int(ranges.max())}; the keys are 0 to {k.shape[2]}")


def _check_heads(name: str, x: Tensor, q: Tensor, shape: torch.Size) -> None:
    if x.dtype != q.dtype or x.device != q.device:
        raise TypeError(f"{name} is {x.dtype} on {x.device}, but q is {q.dtype} on {q.device}")
    if x.shape != shape:
        raise ValueError(f"{name} has shape {tuple(x.shape)}; with q {tuple(q.shape)} it must be {tuple(shape)}")

"""Softmax attention over key ranges (csrc/attention.h)."""

import torch
from torch import Tensor

from halfbyte.kernels import pool, reference
from halfbyte.kernels.native.rows import dense_rows
from halfbyte.kernels.native.runtime import TYPES, extension, threads, tier_index


def attention(q: Tensor, k: Tensor, v: Tensor, ranges: Tensor, scale: float, softcap: float) -> tuple[Tensor, Tensor]:
    """Softmax attention of each query over its range of keys, tile by tile; nothing on tiles that no range meets.

    Any strides do as long as the values of a head follow each other. Sums are fp32; where the chip multiplies bf16,
    the weights are rounded to it (csrc/attention.h). Results are bitwise the same for any number of threads.

    Returns:
        ``out``, which lies in memory as ``[B, L, H, D]``, and ``lse``.
    """
    isa = tier_index()
    if not extension.attends(isa):
        return reference.attention(q, k, v, ranges, scale, softcap)
    q, k, v = dense_rows(q), dense_rows(k), dense_rows(v)
    out = _heads_last(q.shape, q.dtype)
    lse = torch.empty(*q.shape[:3], dtype=torch.float32, device="cpu")
    extension.attention(
        isa,
        threads(),
        *_attention(q, k, ranges, scale, softcap),
        _head_strides(q),
        _head_strides(k),
        _head_strides(v),
        _head_strides(out),
        lse.data_ptr(),
    )
    return out, lse


def attention_backward(
    dout: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor,
    lse: Tensor,
    ranges: Tensor,
    scale: float,
    softcap: float,
) -> tuple[Tensor, Tensor, Tensor]:
    """The gradients of :func:`attention`, which lie in memory as ``[B, L, H, D]``."""
    isa = tier_index()
    if not extension.attends(isa):
        return reference.attention_backward(dout, q, k, v, out, lse, ranges, scale, softcap)
    dout, q, k, v, out = map(dense_rows, (dout, q, k, v, out))
    dq, dk, dv = (_heads_last(x.shape, q.dtype) for x in (q, k, v))
    extension.attention_backward(
        isa,
        threads(),
        *_attention(q, k, ranges, scale, softcap),
        _head_strides(q),
        _head_strides(k),
        _head_strides(v),
        _head_strides(out),
        lse.data_ptr(),
        _head_strides(dout),
        _head_strides(dq),
        _head_strides(dk),
        _head_strides(dv),
    )
    return dq, dk, dv


def _attention(
    q: Tensor, k: Tensor, ranges: Tensor, scale: float, softcap: float
) -> tuple[tuple[int, int, int, int, int, int], int, int, float, float]:
    """Return sizes, type, ranges, scale and cap as the extension takes them."""
    batches, heads, queries, size = q.shape
    sizes = (batches, heads, k.shape[1], queries, k.shape[2], size)
    return sizes, TYPES[q.dtype], ranges.data_ptr(), scale, softcap


def _head_strides(x: Tensor) -> tuple[int, int, int, int]:
    """Return the address of ``x`` and the strides of batch, head and row."""
    batch, head, row, _ = x.stride()
    return x.data_ptr(), batch, head, row


def _heads_last(shape: torch.Size, dtype: torch.dtype) -> Tensor:
    """Return a tensor to fill, ``[B, H, L, D]``, that lies in memory as ``[B, L, H, D]``."""
    batches, heads, rows, size = shape
    return pool.empty((batches, rows, heads, size), dtype).transpose(1, 2)

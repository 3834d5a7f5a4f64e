"""Attention over key ranges: who may read what is two numbers a query, not a mask of ``L x S``.

Causality, sliding windows, padding at either end and the segments of a packed row each leave a query one range of
consecutive keys, and so do they together: the range from the latest begin to the earliest end. :func:`key_ranges`
builds it, :func:`attention` follows it, forward and backward; what no range meets costs nothing.

Left out: masks with holes (:func:`key_ranges` says so), dropout, biases, attention sinks.
"""

from typing import Any

import torch
from torch import Tensor

from halfbyte import kernels


def attention(
    q: Tensor, k: Tensor, v: Tensor, ranges: Tensor, *, scale: float | None = None, softcap: float | None = None
) -> Tensor:
    """Softmax attention of each query over its range of keys, differentiable in ``q``, ``k`` and ``v``.

    Kept for the backward are the arguments, the output, and one number a query (log-sum-exp). See
    :func:`halfbyte.kernels.reference.attention` for the formula.

    Args:
        q: ``[B, H, L, D]``, fp32, bf16 or fp16, any strides.
        k: ``[B, G, S, D]`` in the dtype of ``q``; ``H`` is a multiple of ``G``, whose heads are read in groups.
        v: as ``k``.
        ranges: int32 ``[B, L, 2]``, from :func:`key_ranges`.
        scale: factor of the products; ``1 / sqrt(D)`` unless given.
        softcap: bound of the logits (``softcap tanh(z / softcap)``), or None.

    Returns:
        ``[B, H, L, D]``, 0 for a query without keys; it lies in memory as ``[B, L, H, D]``.
    """
    scale = q.shape[-1] ** -0.5 if scale is None else scale
    out: Tensor = _Attention.apply(q, k, v, ranges, scale, softcap or 0.0)  # type: ignore[no-untyped-call]
    return out


def key_ranges(
    shape: tuple[int, int, int],
    *,
    offset: int | None = None,
    behind: int | None = None,
    ahead: int | None = None,
    segments: Tensor | None = None,
    real: Tensor | None = None,
    cross: bool = False,
) -> Tensor | None:
    """Return the range of keys that each query may read.

    Args:
        shape: ``(B, L, S)``: rows, queries and keys.
        offset: the position of the first query among the keys; the last query's is the last key's unless given.
        behind: how many keys before its own position a query reads at most; None: all.
        ahead: how many after it; 0 for causal attention.
        segments: int ``[B, L]``, non-decreasing: queries read keys of their own number only. Needs ``L == S``.
        real: bool ``[B, S]``, False for padding: not read, and a query there reads nothing.
        cross: whether queries may be of another sequence than keys, of whose padding ``real`` says nothing.

    Returns:
        int32 ``[B, L, 2]``, begin and end, both 0 where there are no keys; None if the keys that some row may read do
        not follow each other without a gap.
    """
    batches, queries, keys = shape
    offset = keys - queries if offset is None else offset
    position = torch.arange(offset, offset + queries)
    begin = (torch.zeros_like(position) if behind is None else position - behind).expand(batches, queries)
    end = (torch.full_like(position, keys) if ahead is None else position + ahead + 1).expand(batches, queries)
    if segments is not None:
        begin = begin.maximum(torch.searchsorted(segments, segments))
        end = end.minimum(torch.searchsorted(segments, segments, right=True))
    if real is not None:
        # argmax gives the first of the largest
        first, count = real.int().argmax(-1), real.sum(-1)
        last = keys - real.flip(-1).int().argmax(-1)
        if bool((count.bool() & (last - first != count)).any()):
            return None
        begin, end = begin.maximum(first[:, None]), end.minimum(last[:, None])
        if not cross:
            end = end.where(real[:, position.clamp(0, keys - 1)] & (position < keys), 0)
    return _ranges(begin, end, keys)


def within_segments(ranges: Tensor, bounds: Tensor) -> Tensor:
    """Keep queries and keys of a packed batch to their own segment.

    Args:
        ranges: int32 ``[B, L, 2]`` of as many keys as queries.
        bounds: int ``[n + 1]``: segment ``i`` is the tokens from ``bounds[i]`` to before ``bounds[i + 1]`` of all rows
            one after the other. Tokens outside read nothing.

    Returns:
        The narrower ranges.
    """
    batches, queries, _ = ranges.shape
    bounds = bounds.to(torch.int64)
    token = torch.arange(batches * queries)
    segment = torch.searchsorted(bounds, token, right=True)
    padded = torch.cat([bounds[:1], bounds, bounds[-1:]])  # empty segments at both ends
    row = token // queries * queries
    begin = (padded[segment] - row).view(batches, queries).maximum(ranges[..., 0])
    end = (padded[segment + 1] - row).view(batches, queries).minimum(ranges[..., 1])
    inside = (segment > 0) & (segment < len(bounds))
    return _ranges(begin, end.where(inside.view(batches, queries), 0), queries)


def mask_of(ranges: Tensor, keys: int) -> Tensor:
    """Return the boolean mask ``[B, 1, L, S]`` that says the same as ``ranges``: True where a query reads a key."""
    key = torch.arange(keys, device=ranges.device)
    begin, end = ranges.unsqueeze(1).unbind(-1)
    return (key >= begin.unsqueeze(-1)) & (key < end.unsqueeze(-1))


def _ranges(begin: Tensor, end: Tensor, keys: int) -> Tensor:
    begin, end = begin.clamp(0, keys), end.clamp(0, keys)
    ranges = torch.stack([begin, end], dim=-1)
    return ranges.where((begin < end).unsqueeze(-1), 0).int()


class _Attention(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, q: Tensor, k: Tensor, v: Tensor, ranges: Tensor, scale: float, softcap: float) -> Tensor:
        out, lse = kernels.attention(q, k, v, ranges, scale=scale, softcap=softcap)
        ctx.save_for_backward(q, k, v, out, lse, ranges)
        ctx.scale, ctx.softcap = scale, softcap
        return out

    @staticmethod
    def backward(ctx: Any, dout: Tensor) -> tuple[Tensor | None, ...]:
        q, k, v, out, lse, ranges = ctx.saved_tensors
        dq, dk, dv = kernels.attention_backward(dout, q, k, v, out, lse, ranges, scale=ctx.scale, softcap=ctx.softcap)
        return dq, dk, dv, None, None, None

"""Attention by torch's own kernels over segments: what a GPU does in the place of key ranges.

A packed row, and a padded one, is a sequence of segments that read themselves alone, each causally or wholly. So no
mask of ``L x L`` is needed: each segment, or all of them at once where they are alike, is one call of
``scaled_dot_product_attention``, which has a flash kernel for it.

Not served: sliding windows shorter than a segment, cached keys, soft caps. Where :func:`segments_of` gives None a mask
has to do.
"""

from itertools import groupby
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention


class Segment(NamedTuple):
    """Consecutive queries of the flattened rows ``[B L]``.

    Attributes:
        length: how many.
        reads: ``causal``, each from the segment's first key to its own; ``all`` keys of the segment; or ``nothing``.
    """

    length: int
    reads: str


def segments_of(ranges: Tensor) -> list[Segment] | None:
    """Return the segments that ranges of keys (:func:`halfbyte.nn.attention.key_ranges`) mean, in order.

    Args:
        ranges: int32 ``[B, L, 2]`` on the CPU, of as many keys as queries.

    Returns:
        Segments whose lengths add up to ``B L``; None if some query reads otherwise.
    """
    found: list[Segment] = []
    for row in ranges.tolist():
        place = 0
        for (begin, empty), group in groupby(row, key=lambda pair: (pair[0], pair[0] >= pair[1])):
            ends = [end for _, end in group]
            after = place + len(ends)
            if empty:
                reads = "nothing"
            elif begin != place:
                return None
            elif ends == list(range(place + 1, after + 1)):
                reads = "causal"
            elif ends == [after] * len(ends):
                reads = "all"
            else:
                return None
            found.append(Segment(len(ends), reads))
            place = after
    return found


def attention_over_segments(q: Tensor, k: Tensor, v: Tensor, segments: list[Segment], scale: float | None) -> Tensor:
    """Return attention within each segment, differentiable in ``q``, ``k`` and ``v``.

    Args:
        q: ``[B, H, L, D]``.
        k: ``[B, G, L, D]``; ``H`` is a multiple of ``G``.
        v: as ``k``.
        segments: from :func:`segments_of`.
        scale: factor of the products; ``1 / sqrt(D)`` unless given.

    Returns:
        ``[B, L, H, D]``, 0 for queries that read nothing.
    """
    batches, heads, length, size = q.shape
    grouped = heads != k.shape[1]

    def attend(q: Tensor, k: Tensor, v: Tensor, reads: str) -> Tensor:
        if reads == "nothing":
            return torch.zeros_like(q)
        return scaled_dot_product_attention(q, k, v, is_causal=reads == "causal", scale=scale, enable_gqa=grouped)

    def cut(x: Tensor, count: int) -> Tensor:
        """``[B, heads, L, D]`` to ``[count, heads, B L / count, D]``, a view where the heads lie innermost."""
        return x.transpose(1, 2).reshape(count, -1, *x.shape[1::2]).transpose(1, 2)

    if len(set(segments)) == 1:
        query, key, value = (cut(x, len(segments)) for x in (q, k, v))
        return attend(query, key, value, segments[0].reads).transpose(1, 2).reshape(batches, length, heads, size)
    lengths = [segment.length for segment in segments]
    queries, keys, values = (torch.split(cut(x, 1), lengths, dim=2) for x in (q, k, v))
    pieces = zip(queries, keys, values, segments, strict=True)
    outs = [attend(query, key, value, segment.reads) for query, key, value, segment in pieces]
    return torch.cat(outs, dim=2).transpose(1, 2).reshape(batches, length, heads, size)

"""Values that the backward computes again instead of keeping them.

What a projection reads is often one cheap pass away from what is kept anyway: a norm's result from its argument, a
gated product from its two factors. :func:`recomputed` notes that on the value; an operation that would keep the value
for its backward keeps what :func:`source_of` tells instead. Whoever does not ask keeps the value as ever, and a value
that something else was made from, or that was changed in place, carries no note.
"""

from collections.abc import Callable
from typing import NamedTuple

from torch import Tensor


class Source(NamedTuple):
    """What a value can be computed from again.

    Attributes:
        tensors: what to keep.
        compute: makes of them the value, bit for bit.
    """

    tensors: tuple[Tensor, ...]
    compute: Callable[..., Tensor]


_NOTE = "_halfbyte_source"


def recomputed(value: Tensor, compute: Callable[..., Tensor], *tensors: Tensor) -> Tensor:
    """Note on ``value`` that it is ``compute(*tensors)``, and return it."""
    if value.requires_grad:
        setattr(value, _NOTE, (Source(tuple(x.detach() for x in tensors), compute), value._version))
    return value


def source_of(value: Tensor) -> Source | None:
    """Return what ``value`` can be computed from again, if that is known."""
    source, version = getattr(value, _NOTE, (None, 0))
    return source if source is not None and value._version == version else None


def flattened(value: Tensor) -> Tensor:
    """Return ``[..., width]`` as ``[rows, width]``, with the note that is on it."""
    rows, source = value.view(-1, value.shape[-1]), source_of(value)
    if source is None:
        return rows
    compute, shape = source.compute, rows.shape
    return recomputed(rows, lambda *kept: compute(*kept).view(shape), *source.tensors)

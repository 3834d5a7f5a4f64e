"""Sums of products, their terms, and the 4-bit weight as a factor of one."""

import dataclasses
from collections.abc import Sequence
from typing import NamedTuple

from torch import Tensor

from halfbyte.kernels.statistics import Statistics


@dataclasses.dataclass(frozen=True, eq=False)
class Weight4bit:
    """A 4-bit weight ``W``.

    Attributes:
        packed: uint8, ``ceil(N K / 2)`` bytes, any address.
        statistics: those of ``W``.
        shape: ``(N, K)``.
    """

    packed: Tensor
    statistics: Statistics
    shape: tuple[int, int]


class Term(NamedTuple):
    """One product: ``x factorᵀ``, or ``x factor`` where it is a ``gradient`` (``dx = dy W``).

    Attributes:
        x: ``[rows, depth]``, of any strides.
        factor: a 4-bit weight, or a dense matrix of any floating dtype: ``[width, depth]``, or ``[depth, width]`` of a
            ``gradient``; contiguous rows.
        gradient: which of the two.
    """

    x: Tensor
    factor: Weight4bit | Tensor
    gradient: bool = False


class Sum(NamedTuple):
    """A sum of products ``y = Σ x Rᵀ + bias``.

    Attributes:
        terms: one or more, whose ``x`` have one dtype.
        out: where to write ``y``, ``[rows, width]`` of any floating dtype; contiguous rows.
        bias: ``[width]`` in the dtype of ``out``, contiguous, or None.
    """

    terms: Sequence[Term]
    out: Tensor
    bias: Tensor | None = None

"""Sums of products, their terms, and quantized weights as factors of one."""

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


@dataclasses.dataclass(frozen=True, eq=False)
class Weight8bit:
    """An 8-bit weight ``W``: each value is ``code * (absmax / 127)``.

    Attributes:
        codes: int8 ``[N, K]``, any address.
        absmax: fp32, one per block of the flattened weight.
        blocksize: values per block. With K it is bitsandbytes' row-wise LLM.int8 weight.
    """

    codes: Tensor
    absmax: Tensor
    blocksize: int

    @property
    def shape(self) -> tuple[int, int]:
        """``(N, K)``."""
        rows, columns = self.codes.shape
        return rows, columns


class Term(NamedTuple):
    """One product: ``x factorᵀ``, or ``x factor`` where it is a ``gradient`` (``dx = dy W``).

    Attributes:
        x: ``[rows, depth]``, of any strides.
        factor: a 4-bit or 8-bit weight, or a dense matrix of any floating dtype with contiguous rows:
            ``[width, depth]``, or ``[depth, width]`` of a ``gradient``.
        gradient: which of the two.
    """

    x: Tensor
    factor: Weight4bit | Weight8bit | Tensor
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

"""Sums of products and their terms."""

from collections.abc import Sequence
from typing import NamedTuple

from torch import Tensor

from halfbyte.kernels.weights import Weight4bit, WeightInt8

FEW = 16
"""Rows up to which a product sums in another order (csrc/matmul.h; on Arm 8)."""


class Term(NamedTuple):
    """One product: ``x factorᵀ`` (``y = x Wᵀ``), or ``x factor`` where that is not ``transposed`` (``dx = dy W``).

    Attributes:
        x: ``[rows, depth]``, of any strides.
        factor: a 4-bit or int8 weight, or a dense matrix of any floating dtype with contiguous rows:
            ``[width, depth]``, or ``[depth, width]`` where it is not ``transposed``.
        transposed: which of the two.
    """

    x: Tensor
    factor: Weight4bit | WeightInt8 | Tensor
    transposed: bool = True


class Sum(NamedTuple):
    """A sum of products ``y = Σ x factorᵀ + bias``.

    Attributes:
        terms: one or more, whose ``x`` have one dtype.
        out: where to write ``y``, ``[rows, width]`` of any floating dtype; contiguous rows.
        bias: ``[width]`` in the dtype of ``out``, contiguous, or None.
        as_many: whether few rows are summed in the order of many, so that no row depends on how many there are.
    """

    terms: Sequence[Term]
    out: Tensor
    bias: Tensor | None = None
    as_many: bool = False

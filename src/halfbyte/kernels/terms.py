"""The terms of a sum of products, and the 4-bit weight as a factor of one."""

import dataclasses
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
        x: ``[rows, depth]``, rows contiguous in themselves.
        factor: a 4-bit weight, or a dense matrix of any floating dtype: ``[width, depth]``, or ``[depth, width]`` of a
            ``gradient``.
        gradient: which of the two.
    """

    x: Tensor
    factor: Weight4bit | Tensor
    gradient: bool = False

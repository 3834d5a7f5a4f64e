"""What a metric comes to over rows, its standard error, and that of the difference of two models on the same rows.

    r = Σ s_i / Σ n_i             a mean (n_i = 1), or a ratio such as nats over tokens
    ψ_i = √(k/(k−1)) (s_i − r n_i) / Σ n_i    what row i of k adds to the error of r (the delta method)
    SE² = Σ ψ_i²                  of a mean this is s²/k, s the deviation of a sample
    e^r                           has ψ_i e^r: a perplexity
    (1/G) Σ_g r_g                 over groups has ψ_i / G, each within its own: MMLU's mean over subjects
    r′ − r                        on the same rows has ψ′_i − ψ_i, so what makes a row hard for both cancels
                                  (a paired difference; Miller 2024, arXiv 2411.00640, section 4.2)

The rows are taken for a sample of what could have been asked.
"""

import dataclasses
import math
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

Numbers = NDArray[np.float64]


class Estimate(NamedTuple):
    """A value and its standard error, None where that cannot be told, such as for a single row."""

    value: float
    stderr: float | None


@dataclasses.dataclass(frozen=True)
class Rows:
    """What each row adds to a metric.

    Attributes:
        sums: s, one a row.
        counts: n; None: ones.
        groups: the group of each row; None: all are one.
        is_exponent: whether the metric is e to the power of r.
    """

    sums: Numbers
    counts: Numbers | None = None
    groups: Sequence[str] | None = None
    is_exponent: bool = False

    def __len__(self) -> int:
        return len(self.sums)

    def only(self, mask: NDArray[np.bool_]) -> "Rows":
        """Return the rows where ``mask`` is true."""
        groups = None if self.groups is None else [group for group, kept in zip(self.groups, mask, strict=True) if kept]
        counts = None if self.counts is None else self.counts[mask]
        return dataclasses.replace(self, sums=self.sums[mask], counts=counts, groups=groups)

    def estimate(self) -> Estimate:
        """Return the metric over the rows, of which there is one at least."""
        value, errors = self._solved()
        return Estimate(value, _length(errors))

    def _solved(self) -> tuple[float, Numbers]:
        """Return the value, and what each row adds to its error."""
        counts = np.ones_like(self.sums) if self.counts is None else self.counts
        names = np.unique(np.asarray(self.groups)) if self.groups is not None else [None]
        value, errors = 0.0, np.zeros_like(self.sums)
        for name in names:
            own = np.ones(len(self), bool) if name is None else np.asarray(self.groups) == name
            sums, n, k = self.sums[own], counts[own], int(own.sum())
            ratio = float(sums.sum() / n.sum())
            spread = math.sqrt(k / (k - 1)) if k > 1 else math.nan
            value += ratio / len(names)
            errors[own] = spread * (sums - ratio * n) / n.sum() / len(names)
        if self.is_exponent:
            value = math.exp(value) if value < 700 else math.inf
            errors = errors * value
        return value, errors


def difference(one: Rows, other: Rows) -> Estimate:
    """Return ``other`` less ``one``, of the same rows in the same order."""
    (before, errors), (after, others) = one._solved(), other._solved()
    return Estimate(after - before, _length(others - errors))


def _length(errors: Numbers) -> float | None:
    stderr = float(np.sqrt((errors**2).sum()))
    return stderr if math.isfinite(stderr) else None

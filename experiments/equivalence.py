"""Two one-sided tests: whether paired differences have a mean that is nearer to zero than a margin.

    t₁ = (d̄ + m) / (s/√n)    t₂ = (m − d̄) / (s/√n)    p = max(P(T > t₁), P(T > t₂)), T of n − 1 degrees of freedom

p < α exactly when the 1 − 2α interval of the mean lies within ±m (Schuirmann 1987).
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from scipy.stats import t


@dataclass(frozen=True)
class Equivalence:
    """What paired differences say.

    Attributes:
        mean: of the differences.
        half: half the width of its 1 − 2α interval.
        p: of the test.
        margin, alpha: as given.
    """

    mean: float
    half: float
    p: float
    margin: float
    alpha: float

    @property
    def shown(self) -> bool:
        """Whether the mean is shown to lie within the margin."""
        return self.p < self.alpha

    def __str__(self) -> str:
        low, high = self.mean - self.half, self.mean + self.half
        verdict = "equivalent" if self.shown else "not shown to be equivalent"
        interval = f"{1 - 2 * self.alpha:.0%} interval {low:+.2f} to {high:+.2f}"
        return f"{self.mean:+.2f}, {interval}, margin ±{self.margin:g}, p = {self.p:.2g}: {verdict}"


def tost(differences: Sequence[float], margin: float, alpha: float = 0.05) -> Equivalence:
    """Test whether the mean of two or more differences lies within ±``margin``."""
    values = np.asarray(differences, float)
    free = len(values) - 1
    error = values.std(ddof=1) / len(values) ** 0.5
    mean = float(values.mean())
    with np.errstate(divide="ignore"):
        p = float(t.sf((margin - abs(mean)) / error, free)) if error else float(abs(mean) >= margin)
    return Equivalence(mean, float(t.ppf(1 - alpha, free) * error), p, margin, alpha)

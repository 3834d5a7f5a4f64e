"""Scales of a chart: where a value lies, and the numbers that stand beside it. Pure functions of numbers.

Ticks are multiples of 1, 2 or 5 times a power of ten (Heckbert, "Nice numbers for graph labels", Graphics Gems, 1990);
on a logarithmic scale they are powers of ten. A scale begins and ends where its values do, a little further out, or at
zero where that is near.
"""

import itertools
import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

LARGEST = 1e300
"""Values beyond are drawn as those that are not finite: differences of such ones may overflow."""
NEAR_ZERO = 0.6
"""A scale of values that are not negative begins at zero if the least is under this share of the greatest."""
LOGARITHMIC = 100.0
"""A scale that may be is logarithmic if the greatest value is so many times the median."""
MARGIN = 0.06
POWERS = "⁰¹²³⁴⁵⁶⁷⁸⁹"


@dataclass(frozen=True)
class Scale:
    """Maps values from ``low`` to ``high`` linearly, or their logarithms, to lengths from ``begin`` to ``end``."""

    low: float
    high: float
    begin: float
    end: float
    logarithmic: bool = False

    def place(self, value: float) -> float:
        """Return where ``value`` lies."""
        low, high, value = (self._on_line(number) for number in (self.low, self.high, value))
        return self.begin + (value - low) / (high - low) * (self.end - self.begin)

    def _on_line(self, value: float) -> float:
        return math.log10(value) if self.logarithmic else value

    def ticks(self, most: int) -> list[float]:
        """Return the values at which ticks stand, about ``most`` of them."""
        if not self.logarithmic:
            step = nice_step(self.high - self.low, most)
            first, last = math.ceil(self.low / step - 1e-9), math.floor(self.high / step + 1e-9)
            return [number * step for number in range(first, last + 1)]
        first, last = math.ceil(math.log10(self.low) - 1e-9), math.floor(math.log10(self.high) + 1e-9)
        every = max(1, -(-(last - first + 1) // most))
        return [10.0**power for power in range(first, last + 1, every)]


def is_drawn(value: float) -> bool:
    """Tell whether ``value`` has a place on a scale."""
    return math.isfinite(value) and abs(value) <= LARGEST


def nice_step(span: float, most: int) -> float:
    """Return the least of 1, 2 and 5 times a power of ten of which ``most`` or fewer fill ``span``."""
    power = 10.0 ** math.floor(math.log10(span / most))
    return next(factor * power for factor in (1, 2, 5, 10, 20) if factor * power * most >= span * (1 - 1e-9))


def linear(values: Iterable[float], begin: float, end: float, *, zero: bool = True, tight: bool = False) -> Scale:
    """Return a scale for ``values``.

    Args:
        values: that have to lie on it; those that are not finite do not.
        begin: the length at which it begins, in the drawing's units; ``end``: at which it ends.
        zero: whether it begins at zero where that is near.
        tight: whether it begins and ends with the values themselves.
    """
    drawn = [value for value in values if is_drawn(value)]
    low, high = (min(drawn), max(drawn)) if drawn else (0.0, 1.0)
    if zero and 0 <= low <= NEAR_ZERO * high:
        low = 0.0
    if high - low <= 1e-9 * max(abs(low), abs(high)) or high - low < 1e-290:
        around = max(abs(high) * 0.1, 1e-280) if high else 1.0
        low, high = 0.0 if zero and low == 0 else low - around, high + around
    elif not tight:
        margin = MARGIN * (high - low)
        low, high = low if zero and low == 0 else low - margin, high + margin
    return Scale(low, high, begin, end)


def fitting(values: Sequence[float], begin: float, end: float, *, zero: bool = True) -> Scale:
    """Return a linear scale, or a logarithmic one where few values would leave the others no height."""
    drawn = sorted(value for value in values if is_drawn(value))
    if not drawn or drawn[0] <= 1e-290 or drawn[-1] < LOGARITHMIC * drawn[len(drawn) // 2]:
        return linear(values, begin, end, zero=zero)
    low, high = math.log10(drawn[0]), math.log10(drawn[-1])
    margin = MARGIN * (high - low)
    return Scale(10 ** max(low - margin, -300.0), 10 ** min(high + margin, 300.0), begin, end, logarithmic=True)


def labels(ticks: Sequence[float], *, logarithmic: bool = False) -> list[str]:
    """Return ``ticks`` as they are written beside an axis, all with as many digits as the finest needs."""
    if logarithmic:
        return [_power(round(math.log10(tick))) for tick in ticks]
    greatest = max((abs(tick) for tick in ticks), default=0.0)
    if greatest and (greatest < 1e-3 or greatest >= 1e7):
        return ["0" if tick == 0 else _scientific(tick) for tick in ticks]
    step = min((b - a for a, b in itertools.pairwise(ticks)), default=greatest)
    digits = max(0, -math.floor(math.log10(step) + 1e-9)) if step else 0
    return [f"{tick + 0.0:,.{min(digits, 12)}f}" for tick in ticks]


def _scientific(value: float) -> str:
    mantissa, _, exponent = f"{value:.2e}".partition("e")
    mantissa = mantissa.rstrip("0").rstrip(".")
    return f"{mantissa}e{int(exponent)}"


def _power(exponent: int) -> str:
    if -3 <= exponent <= 4:
        return f"{10.0**exponent:,.{max(0, -exponent)}f}"
    return "10" + "⁻" * (exponent < 0) + "".join(POWERS[int(digit)] for digit in str(abs(exponent)))


def number(value: float) -> str:
    """Return a value as a reader wants it: four digits, or a power of ten where that is shorter."""
    if not math.isfinite(value):
        return "not a number" if math.isnan(value) else "infinite"
    if value == 0 or 1e-3 <= abs(value) < 1e6:
        return f"{value:,.4g}" if abs(value) < 1e4 else f"{value:,.0f}"
    return _scientific(value)

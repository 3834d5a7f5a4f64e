"""The roofline picture (Williams, Waterman, Patterson: Roofline, CACM 52(4), 2009).

Across: operational intensity, flop per byte that a work has to move. Up: flop/s. No work lies above the roof: the
bandwidth of memory times the intensity, up to the peak of arithmetic; the roofs are those of the measured tier. A work
that looks values up may have a lower one, the rate of lookups, which is not drawn.

On a machine whose speed varies a time and a roof from different minutes do not belong together. So a point stands at
the fraction of the roof over it that was reached in its own rounds.
"""

import cmath
import math
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

from matplotlib.axes import Axes
from matplotlib.figure import Figure

MARKERS = "osD^vP*Xh<>"
DPI = 120


class Point(NamedTuple):
    """One work: what it is, its flop per byte, the fraction of the ceiling that was reached, its own lower roof."""

    operation: str
    size: str
    intensity: float
    fraction: float
    roof: float = math.inf


def draw(points: Sequence[Point], peak_flops: float, bandwidth: float, title: str, file: Path) -> None:
    """Draw ``points`` under the roofs ``peak_flops`` (flop/s) and ``bandwidth`` (bytes/s), as PNG.

    Points are numbered; the key beside the picture names them.
    """
    figure = Figure(figsize=(13, 7.5), layout="constrained")
    axes = figure.subplots()
    ridge = peak_flops / bandwidth
    intensities = [ridge, *(point.intensity for point in points)]
    left, right = min(intensities) / 2, max(intensities) * 3
    roof = [left * bandwidth / 1e9, peak_flops / 1e9, peak_flops / 1e9]
    ceilings = f"{bandwidth / 1e9:.1f} GB/s, {peak_flops / 1e9:,.0f} GFLOP/s"
    axes.plot([left, ridge, right], roof, color="black", label=ceilings)
    operations = list(dict.fromkeys(point.operation for point in points))
    roofs = [min(point.intensity * bandwidth, peak_flops, point.roof) for point in points]
    places = [(point.intensity, point.fraction * top / 1e9) for point, top in zip(points, roofs, strict=True)]
    for number, (point, place) in enumerate(zip(points, places, strict=True), 1):
        i = operations.index(point.operation)
        name = f"{number}  {point.operation} {point.size}"
        axes.scatter(*place, color=f"C{i % 10}", marker=MARKERS[i % len(MARKERS)], label=name)
    axes.set(xscale="log", yscale="log", title=title, xlabel="flop per byte", ylabel="GFLOP/s", xlim=(left, right))
    axes.set_ylim(top=1.6 * max([peak_flops / 1e9, *(y for _, y in places)]))
    axes.grid(which="both", alpha=0.2)
    figure.legend(loc="outside right upper", fontsize=8)
    figure.draw_without_rendering()  # fixes the layout, which decides which numbers would overlap
    _number(axes, places)
    figure.savefig(file, format="png", dpi=DPI)


def _number(axes: Axes, places: Sequence[tuple[float, float]]) -> None:
    """Write each point's number beside it, as near as the other points and numbers leave room."""
    taken = [complex(*axes.transData.transform(place)) * 72 / axes.figure.dpi for place in places]
    for number, place in enumerate(places, 1):
        point = taken[number - 1]
        offsets = [cmath.rect(distance, angle * cmath.pi / 4) for distance in range(10, 60, 10) for angle in range(8)]
        offset = next((o for o in offsets if all(abs(point + o - other) > 9 for other in taken)), offsets[0])
        taken.append(point + offset)
        leader = {"arrowstyle": "-", "color": "grey", "linewidth": 0.5, "shrinkA": 0} if abs(offset) > 10 else None
        axes.annotate(
            str(number),
            place,
            (offset.real, offset.imag),
            textcoords="offset points",
            ha="center",
            va="center",
            fontsize=8,
            arrowprops=leader,
        )

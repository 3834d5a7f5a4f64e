"""Curves as SVG: pure functions from numbers to text. Colours come from the page's style, by classes.

Every finite point lies where the axes say. Of more points than there are places the first, the last, the lowest and the
highest of each place are drawn (M4: Jugel et al., "M4: a visualization-oriented time series data aggregation", PVLDB
7(10), 2014), so that no spike is lost. A point that is not finite breaks the line and is marked at the upper edge.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from html import escape

from halfbyte.runs.report.axes import Scale, fitting, is_drawn, labels, linear, number

Point = tuple[float, float]
LEFT, RIGHT, TOP, BOTTOM = 52, 10, 12, 38
"""Margins in the drawing's units."""
FONT, LETTER = 12, 6.6
"""Height of letters, and about how wide a digit is."""
DOTS = 120
"""A series of at most so many points shows them as dots."""
WINDOW, WINDOW_SHARE = 5, 20
"""A moving mean is over so many points, a quarter of few ones, or so many-th part of many."""


@dataclass(frozen=True)
class Series:
    """A curve.

    Attributes:
        name: what the legend calls it.
        points: of x and y, x rising.
        style: its class in the style sheet: ``a`` to ``f`` are colours.
        faint: whether it stands behind others.
        dots: whether each point is a dot on a line.
    """

    name: str
    points: Sequence[Point]
    style: str = "a"
    faint: bool = False
    dots: bool = False


@dataclass(frozen=True)
class Chart:
    """Curves over one pair of axes.

    Attributes:
        title: what is drawn, for those who cannot see it.
        x, y: what stands beside the axes, with units.
        series: from the one behind to the one in front.
    """

    title: str
    x: str
    y: str
    series: Sequence[Series]


def moving_mean(values: Sequence[float], window: int) -> list[float]:
    """Return the mean of each ``window`` neighbours, ``N - window + 1`` numbers, from additions alone.

    A running sum that is subtracted from would carry the rounding of one large value into all later means. Here each
    window is the end of one block and the beginning of the next (van Herk 1992). Values that are not finite are no part
    of a mean; of nothing else it is NaN.
    """
    pairs = [(value, 1) if is_drawn(value) else (0.0, 0) for value in values]
    count = len(pairs)
    forward, backward = [(0.0, 0)] * count, [(0.0, 0)] * count
    for at in range(count):
        forward[at] = pairs[at] if at % window == 0 else _add(forward[at - 1], pairs[at])
        back = count - 1 - at
        ends = back % window == window - 1 or back == count - 1
        backward[back] = pairs[back] if ends else _add(pairs[back], backward[back + 1])
    means = []
    for at in range(count - window + 1):
        last = at + window - 1
        total, of = forward[last] if at % window == 0 else _add(backward[at], forward[last])
        means.append(total / of if of else math.nan)
    return means


def _add(one: tuple[float, int], other: tuple[float, int]) -> tuple[float, int]:
    return one[0] + other[0], one[1] + other[1]


def mean_of(points: Sequence[Point]) -> tuple[int, list[Point]]:
    """Return the window of a curve's moving mean, and the means, each at the middle of its window."""
    window = max(1, min(WINDOW, len(points) // 4), len(points) // WINDOW_SHARE)
    means = moving_mean([y for _, y in points], window)
    middles = [x for x, _ in points][(window - 1) // 2 :]
    return window, list(zip(middles, means, strict=False))


def reduced(points: Sequence[Point], places: int) -> list[Point]:
    """Return ``points``, x rising, or of each of ``places`` equal parts of x the first, lowest, highest and last."""
    if len(points) <= 4 * places:
        return list(points)
    begin, width = points[0][0], (points[-1][0] - points[0][0]) / places or 1.0
    parts: dict[int, list[int]] = {}
    for at, (x, _) in enumerate(points):
        parts.setdefault(min(int((x - begin) / width), places - 1), []).append(at)
    kept = []
    for part in parts.values():
        drawn = [at for at in part if is_drawn(points[at][1])]
        extremes = [min(drawn, key=lambda at: points[at][1]), max(drawn, key=lambda at: points[at][1])] if drawn else []
        odd = [at for at in part if not is_drawn(points[at][1])][:1]
        kept += sorted({part[0], part[-1], *extremes, *odd})
    return [points[at] for at in kept]


def draw(chart: Chart, width: int, height: int) -> str:
    """Return ``chart`` as an ``<svg>`` element, ``width`` by ``height`` units."""
    points = [point for series in chart.series for point in series.points]
    y_scale = fitting([y for _, y in points], height - BOTTOM, TOP)
    ticks = y_scale.ticks(5)
    texts = labels(ticks, logarithmic=y_scale.logarithmic)
    left = max(LEFT, math.ceil(max((len(text) for text in texts), default=0) * LETTER) + 26)
    x_scale = linear([x for x, _ in points], left, width - RIGHT, zero=False, tight=True)
    name = chart.y + (" (logarithmic)" if y_scale.logarithmic else "")
    parts = [
        f'<svg class="chart" viewBox="0 0 {width} {height}" role="img" aria-label="{_text(chart.title)}" '
        f'data-x="{_text(chart.x)}" data-scales="{_scales(x_scale, y_scale)}">',
        f"<title>{_text(chart.title)}</title>",
        *_y_axis(y_scale, ticks, texts, left, width - RIGHT),
        *_x_axis(x_scale, height, chart.x),
        f'<text class="name" transform="translate(12 {(height - BOTTOM + TOP) / 2:g}) rotate(-90)" '
        f'text-anchor="middle">{_text(name)}</text>',
    ]
    if not any(is_drawn(y) for _, y in points):
        parts.append(f'<text x="{(left + width) / 2:g}" y="{height / 2:g}" text-anchor="middle">nothing yet</text>')
    for series in chart.series:
        parts += _curve(series, x_scale, y_scale, width - RIGHT - left)
    parts.append("</svg>")
    return "".join(parts)


def _scales(*scales: Scale) -> str:
    """Return what a script needs to read values off a drawing."""
    numbers = (f"{s.low!r} {s.high!r} {s.begin:g} {s.end:g} {int(s.logarithmic)}" for s in scales)
    return " ".join(numbers)


def _y_axis(scale: Scale, ticks: Sequence[float], texts: Sequence[str], left: int, right: int) -> list[str]:
    parts = []
    for tick, text in zip(ticks, texts, strict=True):
        place = f"{scale.place(tick):.2f}"
        parts.append(f'<line class="grid" x1="{left}" x2="{right}" y1="{place}" y2="{place}"/>')
        parts.append(
            f'<text class="tick y" x="{left - 6}" y="{place}" dy=".35em" text-anchor="end" '
            f'data-value="{tick!r}">{text}</text>'
        )
    return parts


def _x_axis(scale: Scale, height: int, name: str) -> list[str]:
    bottom = height - BOTTOM
    parts = [f'<line class="axis" x1="{scale.begin:g}" x2="{scale.end:g}" y1="{bottom}" y2="{bottom}"/>']
    most = max(2, int((scale.end - scale.begin) / 76))
    ticks = [tick for tick in scale.ticks(most) if tick == round(tick) and tick >= 0]
    for tick, text in zip(ticks, labels(ticks), strict=True):
        place = scale.place(tick)
        parts.append(f'<line class="axis" x1="{place:.2f}" x2="{place:.2f}" y1="{bottom}" y2="{bottom + 4}"/>')
        inside = min(place, scale.end + RIGHT - len(text) * LETTER / 2)
        parts.append(
            f'<text class="tick x" x="{inside:.2f}" y="{bottom + 16}" text-anchor="middle" '
            f'data-value="{tick!r}">{text}</text>'
        )
    middle = (scale.begin + scale.end) / 2
    parts.append(f'<text class="name" x="{middle:g}" y="{height - 5}" text-anchor="middle">{_text(name)}</text>')
    return parts


def _curve(series: Series, x: Scale, y: Scale, places: float) -> list[str]:
    points = reduced(series.points, max(1, int(places)))
    classes = f"curve {series.style}{' faint' if series.faint else ''}"
    line: list[str] = []
    dots: list[str] = []
    odd: list[str] = []
    is_begin = True
    for step, value in points:
        across = x.place(step)
        if not is_drawn(value):
            odd.append(
                f'<path class="odd" d="M{across - 3:.2f} {TOP - 3}l6 6m0 -6l-6 6"><title>{_text(series.name)}: '
                f"{number(value)} at {step:,.10g}</title></path>"
            )
            is_begin = True
            continue
        up = y.place(value)
        line.append(f"{'M' if is_begin else 'L'}{across:.2f} {up:.2f}")
        dots.append(f'<circle cx="{across:.2f}" cy="{up:.2f}" r="{2.8 if series.dots or len(points) == 1 else 1.8}"/>')
        is_begin = False
    parts = [f'<path class="{classes}" data-name="{_text(series.name)}" d="{"".join(line)}"/>'] if line else []
    if series.dots or (len(points) <= DOTS and (series.faint or len(points) == 1)):
        parts.append(f'<g class="dots {series.style}{" faint" if series.faint else ""}">{"".join(dots)}</g>')
    return parts + odd


def _text(text: str) -> str:
    """Return ``text`` for HTML; characters that do not show are written out."""
    return escape("".join(one if one.isprintable() else ascii(one)[1:-1] for one in text))


def legend(series: Sequence[Series]) -> str:
    """Return an HTML list of the names of curves beside their colours."""
    entries = (
        f'<li><span class="key {one.style}{" faint" if one.faint else ""}{" dotted" if one.dots else ""}"></span>'
        f"{_text(one.name)}</li>"
        for one in series
    )
    return f'<ul class="legend">{"".join(entries)}</ul>'

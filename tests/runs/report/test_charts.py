"""Curves: every point lies where the axis beside it says, whatever the numbers, and no spike is lost."""

import math
import re
import statistics
import xml.etree.ElementTree as ElementTree
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as some

from halfbyte.runs.report.axes import Scale, fitting, labels, linear, nice_step, number
from halfbyte.runs.report.charts import BOTTOM, TOP, Chart, Point, Series, draw, legend, mean_of, moving_mean, reduced

SIZE = (880, 320)
NASTY = "</title></svg><script>alert(1)</script>\" onload='x' & \u202e \x1b[31m"


def drawn(points: list[Point], **options: Any) -> ElementTree.Element:
    return parsed(draw(Chart("A title", "step", "loss", [Series("s", points, **options)]), *SIZE))


def parsed(svg: str) -> ElementTree.Element:
    return ElementTree.fromstring(svg)


def places(svg: ElementTree.Element) -> list[Point]:
    """What the drawn curve goes through, in the drawing's units."""
    [path] = [path for path in svg.iter("path") if "curve" in str(path.get("class"))]
    numbers = re.findall(r"[ML](-?[\d.]+) (-?[\d.]+)", str(path.get("d")))
    return [(float(x), float(y)) for x, y in numbers]


def read_off(svg: ElementTree.Element, axis: str, place: float, *, logarithmic: bool = False) -> float:
    """The value at ``place``, from two ticks as a reader takes it: their written numbers and where their lines lie."""
    ticks = [text for text in svg.iter("text") if text.get("class") == f"tick {axis}"]
    first, last = ticks[0], ticks[-1]
    if axis == "y":
        one, other = (float(str(tick.get("y"))) for tick in (first, last))
    else:
        marks = [line for line in svg.iter("line") if line.get("class") == "axis" and line.get("x1") == line.get("x2")]
        one, other = (float(str(mark.get("x1"))) for mark in (marks[0], marks[-1]))
    low, high = (float(str(tick.get("data-value"))) for tick in (first, last))
    share = (place - one) / (other - one)
    if logarithmic:
        return float(low * (high / low) ** share)
    return low + share * (high - low)


SHAPES: dict[str, list[Point]] = {
    "a fall": [(step, 3 / step) for step in range(1, 41)],
    "negative": [(step, -0.5 + step / 10) for step in range(0, 50, 7)],
    "a learning rate": [(step, 5e-4 * (1 - step / 100)) for step in range(100)],
    "bytes": [(step, 2.03e9 + step * 1e6) for step in range(9)],
    "far from zero": [(step, 1000 + step / 1000) for step in range(30)],
    "huge": [(1, 1e299), (2, -1e299), (3, 5.0)],
    "minute": [(1, 1e-250), (2, 3e-250), (3, 2e-250)],
    "late steps": [(step, step % 7) for step in range(99_000, 99_020)],
}


@pytest.mark.parametrize("points", SHAPES.values(), ids=SHAPES.keys())
def test_each_point_lies_where_the_ticks_say(points: list[Point]) -> None:
    svg = drawn(points)
    found = places(svg)
    assert len(found) == len(points)
    across = points[-1][0] - points[0][0]
    up = max(y for _, y in points) - min(y for _, y in points)
    for (x, y), (place_x, place_y) in zip(points, found, strict=True):
        assert read_off(svg, "y", place_y) == pytest.approx(y, abs=up / 500)
        assert read_off(svg, "x", place_x) == pytest.approx(x, abs=across / 500)
        assert TOP <= place_y <= SIZE[1] - BOTTOM and 0 <= place_x <= SIZE[0]


def test_where_few_values_would_flatten_the_others_the_axis_is_logarithmic_and_says_so() -> None:
    points = [(step, 0.1 * (1 + step % 3)) for step in range(40)] + [(40, 5e4)]
    svg = drawn(points)
    assert any(text.text == "loss (logarithmic)" for text in svg.iter("text"))
    for (_, y), (_, place) in zip(points, places(svg), strict=True):
        assert read_off(svg, "y", place, logarithmic=True) == pytest.approx(y, rel=0.02)
    assert not fitting([0.0, *[0.1] * 9, 5e4], 0, 1).logarithmic  # zero has no logarithm


finite = some.floats(min_value=-1e300, max_value=1e300)


@settings(max_examples=150)
@given(some.lists(some.one_of(finite, some.floats()), min_size=1, max_size=40))
def test_any_numbers_make_a_drawing_within_its_borders(values: list[float]) -> None:
    svg = drawn([(step, value) for step, value in enumerate(values)])
    there = [value for value in values if math.isfinite(value) and abs(value) <= 1e300]
    if there:
        assert len(places(svg)) == len(there)
        assert all(TOP <= y <= SIZE[1] - BOTTOM for _, y in places(svg))
    odd = [path for path in svg.iter("path") if path.get("class") == "odd"]
    assert len(odd) == len(values) - len(there)
    ticks = [text for text in svg.iter("text") if text.get("class") == "tick y"]
    assert 1 <= len(ticks) <= 9
    assert "nan" not in ElementTree.tostring(svg, encoding="unicode").replace('data-value="nan"', "")


def test_a_single_point_is_a_dot_between_two_ticks_at_least() -> None:
    svg = drawn([(7, 0.25)])
    [dot] = svg.iter("circle")
    assert read_off(svg, "y", float(str(dot.get("cy")))) == pytest.approx(0.25, abs=1e-3)
    [x] = [text.text for text in svg.iter("text") if text.get("class") == "tick x"]
    assert x == "7"


def test_no_point_at_all_is_said() -> None:
    for points in ([], [(1.0, math.nan)]):
        assert any(text.text == "nothing yet" for text in drawn(points).iter("text"))


def test_what_is_not_finite_breaks_the_line_and_is_marked_with_its_step() -> None:
    svg = drawn([(1, 1.0), (2, 2.0), (3, math.inf), (4, math.nan), (5, 3.0), (6, 1.0)])
    [path] = [path for path in svg.iter("path") if "curve" in str(path.get("class"))]
    assert str(path.get("d")).count("M") == 2
    titles = [mark[0].text for mark in svg.iter("path") if mark.get("class") == "odd"]
    assert titles == ["s: infinite at 3", "s: not a number at 4"]


def test_a_hundred_thousand_steps_keep_every_extreme_of_every_place() -> None:
    points: list[Point] = [(step, math.sin(step / 9000) + 0.1 * math.sin(step * 12.9898)) for step in range(100_000)]
    points[31_416] = (31_416, 9.0)
    points[77_777] = (77_777, -9.0)
    kept = reduced(points, 800)
    assert len(kept) <= 4 * 800 + 800 and kept[0] == points[0] and kept[-1] == points[-1]
    assert set(kept) <= set(points) and [x for x, _ in kept] == sorted(x for x, _ in kept)
    width = points[-1][0] / 800
    for place in range(800):
        here = [y for x, y in points[int(place * width) + 2 : int((place + 1) * width) - 1]]
        told = [y for x, y in kept if place * width <= x < (place + 1) * width]
        assert max(told) >= max(here) and min(told) <= min(here)
    svg = draw(Chart("t", "step", "loss", [Series("s", points)]), *SIZE)
    assert len(svg) < 100_000
    ys = [y for _, y in places(parsed(svg))]
    assert read_off(parsed(svg), "y", min(ys)) == pytest.approx(9, abs=0.1)
    assert read_off(parsed(svg), "y", max(ys)) == pytest.approx(-9, abs=0.1)


def test_one_step_that_is_not_finite_among_many_is_not_lost() -> None:
    points: list[Point] = [(step, 1.0) for step in range(50_000)]
    points[12_345] = (12_345, math.nan)
    svg = drawn(points)
    assert [mark[0].text for mark in svg.iter("path") if mark.get("class") == "odd"] == ["s: not a number at 12,345"]


@pytest.mark.parametrize("window", [1, 2, 3, 7, 10, 11])
def test_the_moving_mean_is_that_of_each_window(window: int) -> None:
    values = [math.sin(at) * 10 ** (at % 5) for at in range(43)]
    expected = [statistics.fmean(values[at : at + window]) for at in range(len(values) - window + 1)]
    assert moving_mean(values, window) == pytest.approx(expected, rel=1e-12)


def test_one_large_value_leaves_no_trace_in_later_means_and_what_is_not_finite_none_at_all() -> None:
    values = [0.1, 0.2, 1e20, *[0.1, 0.2] * 20]
    assert moving_mean(values, 4)[3:] == pytest.approx([0.15] * 37, rel=1e-12)
    assert moving_mean([1.0, math.inf, 3.0, math.nan], 2) == [1.0, 3.0, 3.0]
    assert all(math.isnan(mean) for mean in moving_mean([math.nan] * 4, 2))


def test_a_curves_mean_is_over_a_twentieth_of_it_and_stands_in_the_middle() -> None:
    window, means = mean_of([(step, step) for step in range(1, 101)])
    assert window == 5
    assert means == [(step, step) for step in range(3, 99)]
    assert mean_of([]) == (1, [])


def test_texts_do_nothing_in_a_page() -> None:
    series = [Series(NASTY, [(1, 1.0), (2, math.nan)], dots=True), Series("b", [(1, 2.0)])]
    svg = draw(Chart(NASTY, NASTY, NASTY, series), *SIZE) + legend(series)
    root = ElementTree.fromstring(f"<div>{svg}</div>")
    assert {element.tag for element in root.iter()} == {
        "div", "svg", "title", "text", "line", "path", "g", "circle", "ul", "li", "span",
    }  # fmt: skip
    assert not [name for element in root.iter() for name in element.attrib if name.startswith("on") or name == "style"]
    assert "\u202e" not in svg and "\x1b" not in svg and "\\u202e" in svg


@pytest.mark.parametrize(
    ("ticks", "written"),
    [
        ([0.0, 0.5, 1.0], ["0.0", "0.5", "1.0"]),
        ([0, 2000, 4000], ["0", "2,000", "4,000"]),
        ([0, 1e-4, 2e-4], ["0", "1e-4", "2e-4"]),
        ([0, 2.5e7, 5e7], ["0", "2.5e7", "5e7"]),
        ([-0.02, -0.01, 0.0], ["-0.02", "-0.01", "0.00"]),
    ],
)
def test_ticks_are_written_with_the_digits_they_need(ticks: list[float], written: list[str]) -> None:
    assert labels(ticks) == written


@given(some.floats(min_value=1e-290, max_value=1e300), some.integers(2, 12))
def test_steps_are_1_2_or_5_times_a_power_of_ten_and_the_least_that_fit(span: float, most: int) -> None:
    step = nice_step(span, most)
    assert f"{step:.0e}"[0] in "125" and float(f"{step:.0e}") == pytest.approx(step, rel=1e-9)
    assert step * most >= span * (1 - 1e-6)
    assert step * 0.5 * most < span * (1 + 1e-6) or step * 0.4 * most < span * (1 + 1e-6)


def test_a_scale_begins_at_zero_where_that_is_near() -> None:
    assert linear([1, 2, 10], 0, 1).low == 0
    assert 8 < linear([9, 10], 0, 1).low < 9
    assert Scale(0, 10, 100, 0).place(2.5) == 75


@pytest.mark.parametrize(
    ("value", "written"),
    [(0.0, "0"), (2.52849, "2.528"), (0.0005, "5e-4"), (26.7, "26.7"), (1234.5, "1,234"), (31416.0, "31,416"),
     (3.2e7, "3.2e7"), (math.nan, "not a number"), (math.inf, "infinite"), (-0.25, "-0.25")],
)  # fmt: skip
def test_numbers_are_written_shortly(value: float, written: str) -> None:
    assert number(value) == written

"""The charts of a run, and of several runs in one."""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from halfbyte.runs.events import StepMetrics
from halfbyte.runs.history import Run
from halfbyte.runs.report import words
from halfbyte.runs.report.axes import LARGEST
from halfbyte.runs.report.charts import Chart, Point, Series, draw, legend, mean_of

WIDE, NARROW, SMALL = (880, 320), (400, 270), (400, 220)
"""Sizes of a drawing: over the whole page, the same on a telephone, and one of several."""
STYLES = "abcdef"
X = "optimizer step"
FIGURES = 12
"""Figures beside the loss that are drawn, at most."""


@dataclass(frozen=True)
class Drawing:
    """A chart ready for a page: its heading, one or two ``<svg>`` elements, its legend."""

    heading: str
    svg: str
    legend: str
    large: bool = False


def drawings(run: Run) -> list[Drawing]:
    """Return the charts of a run: its loss first, large."""
    steps = run.steps
    found = [_large("Loss", _loss(run))]
    for name in _names(run):
        series = _curve_and_mean([(step.step, step.figures[name]) for step in steps if name in step.figures])
        evaluated = _evaluated(run, name)
        series = [one for one in series if one.points] + [Series("evaluation", evaluated, "b", dots=True)] * bool(
            evaluated
        )
        alone = len(series) == 1 and bool(evaluated)
        found.append(_small(f"{'Evaluation: ' * alone}{words.figure(name)}", words.figure(name), series))
    rates = [Series("learning rate", _points(steps, lambda step: step.learning_rate))]
    found.append(_small("Learning rate", "learning rate", rates))
    found.append(_small("Gradient norm before clipping", "L2 norm", [*_clipping(run), *_smoothed(run, _norm)]))
    found.append(_small("Speed", f"{words.rate_unit(run)} a second", _curve_and_mean(_speeds(steps))))
    for heading, of in (("Memory of the process", _resident), ("Memory of the GPU", _on_gpu)):
        if most := max((of(step) for step in steps), default=0):
            unit, size = _unit(most)
            points = [(step.step, of(step) / size) for step in steps if of(step)]
            found.append(_small(heading, unit, [Series(heading, points)]))
    return found


def _names(run: Run) -> list[str]:
    """Return the figures beside the loss: those of evaluations, and of the method's steps."""
    evaluated = [name for one in run.evaluations for name in one.figures if name != "loss"]
    return list(dict.fromkeys([*evaluated, *(name for step in run.steps for name in step.figures)]))[:FIGURES]


def compared(runs: Sequence[tuple[str, Run]]) -> list[Drawing]:
    """Return charts with a curve for each of several runs, under their names: moving means where steps differ much."""
    found = []
    loss = [
        Series(name, mean_of(_points(run.steps, lambda s: s.loss))[1], _style(at)) for at, (name, run) in _each(runs)
    ]
    found.append(_large("Training loss, moving mean", Chart("Training loss of the runs", X, "loss (nats)", loss)))
    names = dict.fromkeys(name for _, run in runs for one in run.evaluations for name in one.figures)
    for name in names:
        curves = [
            Series(label, _evaluated(run, name), _style(at), dots=True)
            for at, (label, run) in _each(runs)
        ]  # fmt: skip
        found.append(_small(f"Evaluation: {words.figure(name)}", words.figure(name), curves))
    for heading, y, take, smooth in (
        ("Learning rate", "learning rate", lambda s: s.learning_rate, False),
        ("Gradient norm before clipping, moving mean", "L2 norm", _norm, True),
        ("Speed, moving mean", "trained tokens a second", _speed, True),
    ):
        curves = []
        for at, (label, run) in _each(runs):
            points = _speeds(run.steps) if take is _speed else _points(run.steps, take)
            curves.append(Series(label, mean_of(points)[1] if smooth else points, _style(at)))
        found.append(_small(heading, y, curves))
    for heading, of in (("Memory of the process", _resident), ("Memory of the GPU", _on_gpu)):
        if most := max((of(step) for _, run in runs for step in run.steps), default=0):
            unit, size = _unit(most)
            curves = [
                Series(label, [(s.step, of(s) / size) for s in run.steps if of(s)], _style(at))
                for at, (label, run) in _each(runs)
            ]
            found.append(_small(heading, unit, curves))
    return found


def _evaluated(run: Run, name: str) -> list[Point]:
    """Return a figure of the evaluations by their steps; NaN where it was not finite."""
    known = (one for one in run.evaluations if name in one.figures or name in one.not_finite)
    return [(one.step, one.figures.get(name, math.nan)) for one in known]


def _each(runs: Sequence[tuple[str, Run]]) -> list[tuple[int, tuple[str, Run]]]:
    return list(enumerate(runs))


def _style(at: int) -> str:
    return STYLES[at % len(STYLES)]


def _points(steps: Sequence[StepMetrics], take: Callable[[StepMetrics], float]) -> list[Point]:
    return [(step.step, take(step)) for step in steps]


def _norm(step: StepMetrics) -> float:
    return step.grad_norm


def _speed(step: StepMetrics) -> float:
    return step.tokens_per_second


def _speeds(steps: Sequence[StepMetrics]) -> list[Point]:
    return [(step.step, step.tokens_per_second) for step in steps if step.tokens_per_second]


def _resident(step: StepMetrics) -> int:
    return step.memory_bytes


def _on_gpu(step: StepMetrics) -> int:
    return step.gpu_memory_bytes


def _curve_and_mean(points: list[Point]) -> list[Series]:
    window, means = mean_of(points)
    if window == 1:
        return [Series("each step", points)]
    return [Series("each step", points, faint=True), Series(f"mean of {window:,} steps", means)]


def _smoothed(run: Run, take: Callable[[StepMetrics], float]) -> list[Series]:
    return _curve_and_mean(_points(run.steps, take))


def _clipping(run: Run) -> list[Series]:
    most = run.options.get("max_grad_norm")
    if not isinstance(most, (int, float)) or not 0 < most <= LARGEST or not run.steps:
        return []
    ends = sorted({run.steps[0].step, run.steps[-1].step})
    return [Series(f"clipped to {most:g}", [(step, float(most)) for step in ends], "limit")]


def _loss(run: Run) -> Chart:
    unit = " (nats per trained token)"
    if run.options.get("task") == "classify":
        unit = " (nats per label)"
    elif run.options.get("method", "sft") not in ("sft", "text"):
        unit = ""  # of pairs and judgements, which methods weigh by themselves
    series = _smoothed(run, lambda step: step.loss)
    evaluated = _evaluated(run, "loss")
    if evaluated:
        series.append(Series("evaluation", evaluated, "b", dots=True))
    return Chart("Loss of each optimizer step", X, f"loss{unit}", series)


def _unit(most: float) -> tuple[str, float]:
    return ("GiB", 2.0**30) if most >= 2**30 else ("MiB", 2.0**20)


def _large(heading: str, chart: Chart) -> Drawing:
    svg = f'<div class="wide">{draw(chart, *WIDE)}</div><div class="narrow">{draw(chart, *NARROW)}</div>'
    return Drawing(heading, svg, legend(chart.series), large=True)


def _small(heading: str, y: str, series: list[Series]) -> Drawing:
    names = legend(series) if len(series) > 1 else ""
    heading = heading[:1].upper() + heading[1:]
    return Drawing(heading, draw(Chart(heading, X, y, series), *SMALL), names)

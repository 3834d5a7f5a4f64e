"""What a run is told to begin with and what it came to: its data in numbers, its summary, the picture of its loss."""

import resource
import sys
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

import torch
from matplotlib.figure import Figure

from halfbyte.data.duplicates import duplicates, nearly_equal
from halfbyte.data.measure import measure
from halfbyte.data.prepared import Prepared
from halfbyte.data.table import Counts
from halfbyte.runs.events import DataSummary, Evaluation, StepMetrics
from halfbyte.runs.history import LOSS_STEPS, rate
from halfbyte.train.best import best_of

COUNTED_TOKENS = 20_000_000
"""Of data with more tokens equal rows are not counted: that takes seconds, and ``halfbyte data`` does it."""


@dataclass(frozen=True)
class Summary:
    """What a run came to; the content of ``summary.json``.

    Attributes:
        steps: optimizer steps.
        examples: rows of the data file.
        truncated: those of them that were cut to ``max_length``.
        trained_parameters: numbers in the adapter.
        trained_tokens: tokens with a label, each counted as often as it was trained on.
        loss: mean negative log-likelihood per trained token over the last ten steps, in nats.
        seconds: of training, loading apart.
        trained_tokens_per_second: while steps were made: without evaluations, samples and saving.
        peak_memory_bytes: the largest resident set of this process so far, mapped files included.
        peak_gpu_memory_bytes: the most that a step left this process with of its GPU; 0: it uses none.
        figures: what the method tells beside the loss, likewise means over the last ten steps.
        evaluation: what the last evaluation has measured, such as ``loss`` and ``accuracy``; empty without one.
        evaluation_before: what the one before the first step has measured.
        evaluation_best: what the best one has measured, by ``metric_for_best``, of those after the first step.
        best_step: the step of the best one; 0 without one.
        adapter_step: the step whose adapter lies in the run folder.
        foretold: what was foretold before loading, beside what the run took: bytes at the peak and seconds of a step
            (:mod:`halfbyte.train.prediction`); empty where nothing was.
    """

    steps: int
    examples: int
    truncated: int
    trained_parameters: int
    trained_tokens: int
    loss: float
    seconds: float
    trained_tokens_per_second: float
    peak_memory_bytes: int
    figures: dict[str, float] = field(default_factory=dict)
    evaluation: dict[str, float] = field(default_factory=dict)
    evaluation_before: dict[str, float] = field(default_factory=dict)
    evaluation_best: dict[str, float] = field(default_factory=dict)
    best_step: int = 0
    adapter_step: int = 0
    peak_gpu_memory_bytes: int = 0
    foretold: dict[str, float] = field(default_factory=dict)


def describe_data(rows: Prepared, seed: int = 0) -> DataSummary:
    """Return what is trained on, in numbers; ``seed`` is that of the sample in which nearly equal rows are sought."""
    counts = rows.train.counts
    repeated, near = None, None
    if rows.task == "lm" and counts.tokens <= COUNTED_TOKENS and counts.rows:
        measured = measure(rows.train.rows, counts.longest)
        repeated = duplicates(measured).rows
        near, _ = nearly_equal(rows.train.rows, measured, counts.longest, seed)
    return DataSummary(
        examples=counts.examples,
        rows=counts.rows,
        tokens=counts.tokens,
        trained_tokens=counts.trained_tokens,
        truncated=counts.truncated,
        longest=counts.longest,
        repeated=repeated,
        near=near.rows if near else None,
        near_of=near.sampled if near else 0,
        evaluation=rows.evaluation.counts.examples if rows.evaluation else 0,
        left_out=rows.bad.counts,
        notes=counts.notes,
    )


def summarize(
    steps: Sequence[StepMetrics],
    rows: Counts,
    trained_parameters: int,
    evaluations: Sequence[Evaluation] = (),
    metric: str = "loss",
    adapter_step: int | None = None,
    foretold: dict[str, float] | None = None,
) -> Summary:
    """Return the summary of a run.

    Args:
        steps: that it made, one or more.
        rows: that it trained on.
        trained_parameters: numbers in the adapter.
        evaluations: of the run, in order.
        metric: by which the best of them is told.
        adapter_step: the step whose adapter is kept; None: the last one.
        foretold: what was foretold, beside what the run took.
    """
    last, ending = steps[-1], steps[-LOSS_STEPS:]
    best = best_of(evaluations, metric)
    return Summary(
        steps=last.step,
        examples=rows.examples,
        truncated=rows.truncated,
        trained_parameters=trained_parameters,
        trained_tokens=last.trained_tokens,
        loss=sum(step.loss for step in ending) / len(ending),
        seconds=last.elapsed,
        trained_tokens_per_second=rate(steps) or 0.0,
        peak_memory_bytes=_peak_memory(),
        figures={name: _mean(ending, name) for name in dict.fromkeys(name for step in ending for name in step.figures)},
        evaluation=dict(evaluations[-1].figures) if evaluations else {},
        evaluation_before=next((dict(event.figures) for event in evaluations if event.step == 0), {}),
        evaluation_best=dict(best.figures) if best else {},
        best_step=best.step if best else 0,
        adapter_step=last.step if adapter_step is None else adapter_step,
        peak_gpu_memory_bytes=max(step.gpu_memory_bytes for step in steps),
        foretold=foretold or {},
    )


def _mean(steps: Sequence[StepMetrics], name: str) -> float:
    values = [step.figures[name] for step in steps if name in step.figures]
    return sum(values) / len(values)


def plot_loss(steps: Sequence[StepMetrics], path: Path, unit: str = "trained token") -> None:
    """Draw the loss of each step, and its running mean over a twentieth of them, as a PNG."""
    window = max(1, len(steps) // 20)
    losses = torch.tensor([step.loss for step in steps], dtype=torch.float64)
    means = losses.unfold(0, window, 1).mean(1)
    numbers = [step.step for step in steps]
    middles = numbers[(window - 1) // 2 :][: len(means)]
    figure = Figure(figsize=(7, 4), layout="constrained")
    axes = figure.subplots()
    axes.plot(numbers, losses, color="tab:blue", alpha=0.3, marker=".", label="step")
    axes.plot(middles, means, color="tab:blue", label=f"mean of {window} steps")
    axes.set(xlabel="optimizer step", ylabel=f"loss (nats per {unit})", title="Training loss")
    axes.grid(alpha=0.3)
    axes.legend()
    figure.savefig(path, format="png", dpi=150)


def _peak_memory() -> int:
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit

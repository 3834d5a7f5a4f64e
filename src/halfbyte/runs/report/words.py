"""Numbers and names as the pages and tables of runs write them."""

import datetime
import math
from typing import Any

import yaml

from halfbyte.errors import size_text
from halfbyte.runs.history import Run, rate
from halfbyte.runs.report.axes import number

FIGURES = {
    "loss": "loss", "accuracy": "accuracy", "f1": "F1", "matthews": "Matthews correlation", "rouge_l": "ROUGE-L",
    "exact_match": "exact match", "token_accuracy": "token accuracy",
    "rewards/accuracies": "accuracy of the rewards", "rewards/margins": "reward margin",
    "expert_load": "load of the busiest expert",
}  # fmt: skip
"""What figures are called; others by their own names."""
STATES = {
    "running": "running",
    "finished": "finished",
    "interrupted": "interrupted",
    "failed": "failed",
    "killed": "broken off",
}


def figure(name: str) -> str:
    """Return what a figure is called."""
    return FIGURES.get(name, name.replace("_", " "))


def duration(seconds: float) -> str:
    """Return a time as a person says it: ``8.2 s``, ``1 min 07 s``, ``2 h 05 min``."""
    if not math.isfinite(seconds) or seconds < 0:
        return "unknown"
    if seconds < 59.95:
        return f"{seconds:.1f} s"
    whole = round(seconds)
    if whole < 3600:
        return f"{whole // 60} min {whole % 60:02d} s"
    minutes = round(seconds / 60)
    return f"{minutes // 60:,} h {minutes % 60:02d} min"


def moment(time: datetime.datetime | None) -> str:
    """Return a date and time to the minute."""
    return "" if time is None else time.strftime("%Y-%m-%d %H:%M")


def value(given: Any) -> str:
    """Return an option's value on one line as YAML writes it."""
    if isinstance(given, str) and given.isprintable():
        return given
    return (
        str(yaml.safe_dump(given, default_flow_style=True, width=math.inf, allow_unicode=True))
        .removesuffix("\n")
        .removesuffix("\n...")
    )


def model_name(run: Run) -> str:
    """Return the model's name without the folder it lies in."""
    name = str(run.options.get("model", "")).rstrip("/")
    return name.rpartition("/")[2] if name.startswith(("/", "~", ".")) else name


def progress(run: Run) -> str:
    """Return how far a run has come: ``40 of 40``."""
    return f"{run.step:,} of {run.total_steps:,}" if run.total_steps else f"{run.step:,}"


def rate_unit(run: Run) -> str:
    """Return what the trained tokens of a run are; of a classifier they are labels."""
    return "labels" if run.options.get("task") == "classify" else "trained tokens"


def changes(run: Run) -> list[tuple[str, float, float]]:
    """Return figures with their values before and after training: what was evaluated, and pairs in the summary."""
    found = []
    if run.kept and run.evaluations[0].step < run.kept.step:
        first, last = run.evaluations[0].figures, run.kept.figures
        found += [(f"{figure(name)}", first[name], last[name]) for name in first if name in last]
    for name, before in run.summary.items():
        after = run.summary.get(f"{name.removesuffix('_before')}_after")
        if name.endswith("_before") and isinstance(before, (int, float)) and isinstance(after, (int, float)):
            found.append((f"{figure(name.removesuffix('_before'))}, measured apart", float(before), float(after)))
    return found


def change_heads(run: Run) -> tuple[str, str]:
    """Return what stands over the two values of :func:`changes`."""
    if run.kept is None:
        return "before", "after"
    first, is_last = run.evaluations[0].step, run.kept is run.evaluations[-1]
    if first == 0 and is_last:
        return "before", "after"
    kept = f"after step {run.kept.step:,}{'' if is_last else ', whose adapter is kept'}"
    return f"after step {first:,}" if first else "before", kept


def cards(run: Run) -> list[tuple[str, str, str]]:
    """Return what a run comes to: names, numbers, and what they are of."""
    found = []
    if run.loss is not None:
        found.append(("training loss", number(run.loss), "mean of the last 10 steps"))
    if run.kept:
        first, last = run.evaluations[0], run.kept
        if "loss" in last.figures:
            after = f"after step {last.step:,}{'' if last is run.evaluations[-1] else ', whose adapter is kept'}"
            before = f"{number(first.figures['loss'])} → " if first.step < last.step and "loss" in first.figures else ""
            found.append(("evaluation loss", before + number(last.figures["loss"]), after))
    if run.steps:
        last_step = run.steps[-1]
        found.append(("steps", progress(run), f"{last_step.epoch:.3g} passes over the data"))
        if run.adapter_step != run.step:
            found.append(("adapter", f"that of step {run.adapter_step:,}", "the best evaluation"))
        found.append((rate_unit(run), f"{last_step.trained_tokens:,}", "counted each time"))
        found.append(("training time", duration(last_step.elapsed), "without loading"))
        if speed := rate(run.steps):
            found.append((f"{rate_unit(run)} a second", number(speed), "while steps were made"))
    if run.peak_memory:
        found.append(("peak memory", size_text(run.peak_memory), "mapped files included"))
    if run.peak_gpu_memory:
        found.append(("peak GPU memory", size_text(run.peak_gpu_memory), "after a step, CUDA's context apart"))
    return found

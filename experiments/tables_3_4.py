"""Tables 3 and 4 in small: full fine-tuning, LoRA in 16 bits and QLoRA come to the same; see training.md.

python experiments/tables_3_4.py
"""

import functools
import itertools
import statistics
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import lab
import tasks
import torch
from equivalence import Equivalence, tost
from lab import Book
from tasks import Recipe, Task

from halfbyte.quiet import quiet

RATES: dict[str, dict[str, tuple[float, ...]]] = {
    "reviews": {"full": (1e-4, 2e-4), "LoRA bf16": (1e-3, 2e-3)},
    "synopses": {"full": (2e-4, 1e-3), "LoRA bf16": (2e-3, 8e-3)},
    "instructions": {"full": (2e-5, 1e-4), "LoRA bf16": (5e-4, 2e-3)},
}
SEEDS = range(5)
CHOSEN_WITH = {"reviews": (100, 101), "synopses": (100, 101), "instructions": (100,)}
"""Seeds by task; runs of the chat model take longest."""
MARGIN = 1.0
"""Points."""
METRICS = {"reviews": "accuracy", "synopses": "rouge_l", "instructions": "rouge_l"}
NAMES = {"accuracy": "accuracy", "rouge_l": "ROUGE-L"}


def do(book: Book, made: Mapping[str, Callable[[], Task]], seeds: Sequence[int] = SEEDS) -> None:
    """Do what is missing; a task is made when it is first needed."""
    for name, task in made.items():
        for way, rates in RATES.get(name, RATES["reviews"]).items():
            for rate, seed in itertools.product(rates, CHOSEN_WITH.get(name, (100,))):
                key = {"part": "choice", "task": name, "way": way, "rate": rate, "seed": seed}
                book.trial(key, functools.partial(_choice, task, way, rate, seed))
        book.trial({"part": "before", "task": name}, functools.partial(_before, task))
    for seed, (name, task), way in itertools.product(seeds, made.items(), tasks.WAYS):
        key = {"part": "test", "task": name, "seed": seed, "way": way}
        book.trial(key, functools.partial(_test, book, task, seed, way))


def _choice(task: Callable[[], Task], way: str, rate: float, seed: int) -> dict[str, float]:
    return tasks.fit(task(), Recipe(way, rate), seed).loss(task().choice)


def _before(task: Callable[[], Task]) -> dict[str, float]:
    return tasks.untrained(task(), Recipe("full", 0.0)).measure(task().test)


def _test(book: Book, task: Callable[[], Task], seed: int, way: str) -> dict[str, float | int | str]:
    rate = chosen_rate(book, task().name, way)
    trained = tasks.fit(task(), Recipe(way, rate), seed)
    facts = {"rate": rate, "parameters": trained.parameters, "rows": task().digest}
    return trained.measure(task().test) | facts


def tried(book: Book, task: str, way: str) -> dict[float, list[dict[str, Any]]]:
    """Return what the rows of choice gave, by rate."""
    found: dict[float, list[dict[str, Any]]] = {}
    for line in tasks.lines(book, part="choice", task=task, way=way):
        found.setdefault(line["rate"], []).append(line)
    return found


def chosen_rate(book: Book, task: str, way: str) -> float:
    """Return the best rate on the rows of choice, of full fine-tuning or of LoRA bf16: by accuracy, or else by loss."""
    found = tried(book, task, way if way == "full" else "LoRA bf16")
    return max(found, key=lambda rate: statistics.mean(line.get("accuracy", -line["loss"]) for line in found[rate]))


def measured(book: Book, task: str, metric: str, way: str) -> dict[int, float]:
    """Return a figure by seed."""
    return {line["seed"]: line[metric] for line in tasks.lines(book, part="test", task=task, way=way)}


def differences(book: Book, metrics: Mapping[str, str], way: str, other: str) -> list[float]:
    """Return ``way`` less ``other`` for each task and seed that both have."""
    found = []
    for task, metric in metrics.items():
        ours, theirs = measured(book, task, metric, way), measured(book, task, metric, other)
        found += [ours[seed] - theirs[seed] for seed in sorted(ours.keys() & theirs.keys())]
    return found


def compared(book: Book, metrics: Mapping[str, str], way: str, other: str) -> Equivalence | None:
    """Test ``way`` against ``other`` over the tasks and seeds that both have; None of less than two."""
    pairs = differences(book, metrics, way, other)
    return tost(pairs, MARGIN) if len(pairs) > 1 else None


def table(book: Book, metrics: Mapping[str, str] = METRICS) -> str:
    """Return the table, the tests, and the rates that were chosen."""
    rows = []
    for task, metric in metrics.items():
        cells = ["".join(f"{line[metric]:.2f}" for line in tasks.lines(book, part="before", task=task))]
        for way in tasks.WAYS:
            values = measured(book, task, metric, way)
            cells.append(tasks.told(values.values(), 2) if values else "")
        rows.append([f"{task}, {NAMES[metric]}", *cells])
    parts = [lab.markdown(["points (seeds)", "untrained", *tasks.WAYS], rows)]
    for other in ("LoRA bf16", "full"):
        found = {way: compared(book, metrics, way, other) for way in tasks.WAYS[1:] if way != other}
        lines = [[way, str(test)] for way, test in found.items() if test]
        parts.append(lab.markdown([f"less {other}, all tasks and seeds", "points"], lines))
    each = [
        [task, other, f"{test.mean:+.2f} ± {test.half:.2f}"]
        for task, metric in metrics.items()
        for other in ("LoRA bf16", "full")
        if (test := compared(book, {task: metric}, "QLoRA NF4 + DQ", other))
    ]
    parts.append(lab.markdown(["NF4 + DQ in", "less", "points, with half of the 90 % interval"], each))
    chosen = [
        [task, way, f"{rate:g}", ", ".join(_chosen_by(line) for line in found), mark]
        for task, way in itertools.product(metrics, ("full", "LoRA bf16"))
        for rate, found in tried(book, task, way).items()
        for mark in ["chosen" if rate == chosen_rate(book, task, way) else ""]
    ]
    parts.append(lab.markdown(["task", "way", "rate", "on the rows of choice", ""], chosen))
    return "\n\n".join(parts)


def _chosen_by(line: dict[str, Any]) -> str:
    return f"{line['accuracy']:.1f} %" if "accuracy" in line else f"loss {line['loss']:.4f}"


def draw(book: Book, metrics: Mapping[str, str]) -> None:
    """Draw NF4 + DQ less each way of 16 bits: pairs as points, the mean with its 90 % interval, the margin."""
    from matplotlib.figure import Figure

    figure = Figure((8, 3), layout="constrained")
    for axes, other in zip(figure.subplots(1, 2, sharey=True), ("LoRA bf16", "full"), strict=True):
        axes.axvspan(-MARGIN, MARGIN, color="C2", alpha=0.15, label=f"margin, ±{MARGIN:g} point")
        for place, chosen in enumerate([metrics, *({task: metric} for task, metric in metrics.items())]):
            pairs = differences(book, chosen, "QLoRA NF4 + DQ", other)
            axes.plot(pairs, [place] * len(pairs), "o", color="C0", alpha=0.4)
            if found := compared(book, chosen, "QLoRA NF4 + DQ", other):
                axes.errorbar(found.mean, place, xerr=found.half, fmt="|", color="C3", capsize=4, markersize=12)
        axes.set_yticks(range(len(metrics) + 1), ["all", *metrics])
        axes.margins(y=0.15)
        axes.set_xlabel(f"points, NF4 + DQ less {other}")
        axes.grid(axis="x", alpha=0.3)
    axes.legend(fontsize="small")
    figure.savefig(book.folder / "differences.png", dpi=110)


def main() -> None:
    torch.set_num_threads(1)
    book, small = lab.book("tables_3_4", __doc__)
    metrics = METRICS
    with quiet():
        if small:
            tiny = {task.name: task for task in tasks.tiny_tasks(book.folder / "models")}
            metrics = {name: task.metric for name, task in tiny.items()}
            do(book, {name: functools.partial(tiny.__getitem__, name) for name in tiny}, range(2))
        elif not book.tables_only:
            made = tasks.reviews_task, tasks.synopses_task, tasks.instructions_task
            do(book, dict(zip(METRICS, made, strict=True)))
    book.write("table.md", table(book, metrics))
    draw(book, metrics)


if __name__ == "__main__":
    main()

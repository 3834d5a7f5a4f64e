"""Figure 2 in small: adapters on all layers come nearer to full fine-tuning than as many parameters on a few.

    python experiments/figure_2.py

Full fine-tuning is that of tables_3_4.py, whose raw results are read.
"""

import functools
import itertools
from collections.abc import Collection, Sequence
from dataclasses import dataclass

import lab
import tables_3_4
import tasks
import torch
from lab import Book
from tasks import Recipe, Task

from halfbyte.quiet import quiet

WAY = "QLoRA NF4 + DQ"
SEEDS = range(3)
METRICS = ("loss", "rouge_l")
Found = dict[int, float]
"""A figure by seed."""


@dataclass(frozen=True)
class Place:
    """Where LoRA is, and its rank."""

    name: str
    rank: int
    targets: str | list[str]


ALL = Place("all linear layers", 8, "all-linear")
FEW = Place("q and v", 42, ["q_proj", "v_proj"])
PLACES = (
    Place("q and v", 8, ["q_proj", "v_proj"]),
    FEW,
    Place("attention", 21, ["q_proj", "k_proj", "v_proj", "o_proj"]),
    Place("feed-forward", 13, ["gate_proj", "up_proj", "down_proj"]),
    ALL,
)


def do(book: Book, task: Task, rate: float, seeds: Sequence[int] = SEEDS) -> None:
    """Do what is missing."""
    for seed, place in itertools.product(seeds, PLACES):
        key = {"place": place.name, "rank": place.rank, "seed": seed}
        book.trial(key, functools.partial(_measure, task, place, rate, seed))


def _measure(task: Task, place: Place, rate: float, seed: int) -> dict[str, float | int]:
    recipe = Recipe(WAY, rate, place.rank, 2 * place.rank, targets=place.targets)
    trained = tasks.fit(task, recipe, seed)
    return trained.measure(task.test) | {"rate": rate, "parameters": trained.parameters}


def found(book: Book, place: Place, metric: str) -> Found:
    """Return what was measured of a place."""
    return {line["seed"]: line[metric] for line in tasks.lines(book, place=place.name, rank=place.rank)}


def of_full(tables: Book, seeds: Collection[int]) -> dict[str, Found]:
    """Return the figures of full fine-tuning with these seeds, out of tables 3 and 4."""
    found = {metric: tables_3_4.measured(tables, "instructions", metric, "full") for metric in METRICS}
    return {metric: {seed: value for seed, value in by.items() if seed in seeds} for metric, by in found.items()}


def table(book: Book, full: dict[str, Found]) -> str:
    """Return the table, and whether the claims hold."""
    rows = []
    for place in PLACES:
        if losses := found(book, place, "loss"):
            parameters = tasks.lines(book, place=place.name, rank=place.rank)[0]["parameters"]
            scores = found(book, place, "rouge_l")
            rows.append(
                [
                    place.name,
                    f"{place.rank}",
                    f"{parameters:,}",
                    tasks.told(losses.values(), 4),
                    tasks.told(scores.values(), 2),
                ]
            )
    if full["loss"]:
        figures = tasks.told(full["loss"].values(), 4), tasks.told(full["rouge_l"].values(), 2)
        rows.append(["full fine-tuning", "", "", *figures])
    return "\n\n".join(
        [lab.markdown(["LoRA on", "rank", "parameters", "loss (seeds)", "ROUGE-L (seeds)"], rows), *claims(book, full)]
    )


def claims(book: Book, full: dict[str, Found]) -> list[str]:
    """Return what became of the claims of training.md."""
    every, few = found(book, ALL, "loss"), found(book, FEW, "loss")
    seeds = sorted(every.keys() & few.keys())
    if not seeds:
        return []
    better = [few[seed] - every[seed] for seed in seeds]
    differences = ", ".join(f"{value:+.4f}" for value in better)
    claim = tasks.holds(all(value > 0 for value in better))
    parts = [f"Claim 1 {claim}: q and v less all layers, as many parameters: {differences}."]
    seeds = [seed for seed in seeds if seed in full["loss"]]
    if seeds:
        near, far = (sum(values[seed] - full["loss"][seed] for seed in seeds) / len(seeds) for values in (every, few))
        claim = tasks.holds(near < far / 2)
        parts.append(f"Claim 2 {claim}: all layers are {near:+.4f} from full fine-tuning, q and v {far:+.4f}.")
    return parts


def draw(book: Book, full: dict[str, Found]) -> None:
    """Draw each run as a point, with full fine-tuning as lines."""
    from matplotlib.figure import Figure

    figure = Figure((8, 3.2), layout="constrained")
    names = [f"{place.name}\nr = {place.rank}" for place in PLACES]
    for axes, metric, name in zip(figure.subplots(1, 2), METRICS, ("loss on the test rows", "ROUGE-L"), strict=True):
        for number, place in enumerate(PLACES):
            values = list(found(book, place, metric).values())
            axes.plot(values, [number] * len(values), "o", color="C0", alpha=0.6)
            if values:
                axes.plot(sum(values) / len(values), number, "|", color="C0", markersize=18)
        for number, value in enumerate(full[metric].values()):
            axes.axvline(value, color="C1", linewidth=1, label="full fine-tuning" if not number else None)
        axes.set_xlabel(name)
        axes.set_yticks(range(len(PLACES)), names if metric == "loss" else [""] * len(PLACES))
        axes.margins(y=0.15)
        axes.grid(axis="x", alpha=0.3)
    if full["loss"]:
        axes.legend(loc="lower right", fontsize="small")
    figure.savefig(book.folder / "figure_2.png", dpi=110)


def main() -> None:
    torch.set_num_threads(1)
    book, small = lab.book("figure_2", __doc__)
    tables = Book(book.folder.parent / "tables_3_4")
    with quiet():
        if small:
            do(book, tasks.tiny_tasks(book.folder / "models")[-1], 1e-3, range(1))
        elif not book.tables_only:
            task = tasks.instructions_task()
            do(book, task, tables_3_4.chosen_rate(tables, task.name, WAY))
    full = of_full(tables, {line["seed"] for line in book.lines()})
    book.write("table.md", table(book, full))
    draw(book, full)


if __name__ == "__main__":
    main()

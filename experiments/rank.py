"""Figure 4 in small, and whether one run's effective ranks tell which rank would have done.

python experiments/rank.py
"""

import functools
import itertools
import statistics
import tempfile
from collections.abc import Sequence
from typing import Any

import lab
import tables_3_4
import tasks
import torch
from lab import Book
from tasks import Recipe, Task

from halfbyte.deploy.adapters import info
from halfbyte.quiet import quiet

WAY = "QLoRA NF4 + DQ"
RANKS, SEEDS = (1, 2, 4, 8, 16, 32, 64), range(3)
SAME, LESS = 0.05, 0.01
"""Parts of the gain: how near ranks from 8 on are claimed to be, and what advice may cost or has to bring."""


def do(book: Book, task: Task, rate: float, ranks: Sequence[int] = RANKS, seeds: Sequence[int] = SEEDS) -> None:
    """Do what is missing."""
    book.trial({"part": "before"}, lambda: tasks.untrained(task, Recipe(WAY, rate)).loss(task.test))
    for seed, rank in itertools.product(seeds, ranks):
        book.trial({"part": "test", "rank": rank, "seed": seed}, functools.partial(_measure, task, rate, rank, seed))


def _measure(task: Task, rate: float, rank: int, seed: int) -> dict[str, Any]:
    trained = tasks.fit(task, Recipe(WAY, rate, rank, 2 * rank), seed)
    with tempfile.TemporaryDirectory() as folder:
        trained.model.save_pretrained(folder)
        about = info(folder)
    effective = sorted(module.effective for module in about.modules)
    middle = effective[len(effective) // 2]
    return trained.loss(task.test) | {
        "rate": rate, "effective_least": effective[0], "effective_median": middle, "effective_most": effective[-1],
        "advice": "lower" if _says_lower(about.advice) else "higher" if about.advice else "none",
    }  # fmt: skip


def _says_lower(advice: str | None) -> bool:
    return advice is not None and "would do next time" in advice


def losses(book: Book) -> dict[int, dict[int, float]]:
    """Return the loss by rank and seed."""
    found: dict[int, dict[int, float]] = {}
    for line in tasks.lines(book, part="test"):
        found.setdefault(line["rank"], {})[line["seed"]] = line["loss"]
    return dict(sorted(found.items()))


def gain(book: Book) -> float:
    """Return the fall of the loss from before training to the highest rank, in the mean over seeds."""
    [before] = tasks.lines(book, part="before")
    *_, highest = losses(book).values()
    return float(before["loss"] - statistics.mean(highest.values()))


def advised(book: Book) -> list[dict[str, Any]]:
    """Return for each run what it was advised, and what following that brought: a part of the gain."""
    found, whole = losses(book), gain(book)
    rows = []
    for line in tasks.lines(book, part="test"):
        lower = line["advice"] == "lower"
        wanted = line["effective_most"] if lower else 2 * line["rank"]
        other = next((rank for rank in found if rank >= wanted and line["seed"] in found[rank]), None)
        if line["advice"] == "none" or other is None:
            continue
        brought = (line["loss"] - found[other][line["seed"]]) / whole
        holds = brought > -LESS if lower else brought >= LESS
        rows.append({"rank": line["rank"], "advice": line["advice"], "to": other, "part": brought, "holds": holds})
    return rows


def table(book: Book) -> str:
    """Return the table, and whether the claims hold."""
    found, whole = losses(book), gain(book)
    rows = []
    for rank, by_seed in found.items():
        lines = tasks.lines(book, part="test", rank=rank)
        least, most = min(line["effective_least"] for line in lines), max(line["effective_most"] for line in lines)
        middle = statistics.median(line["effective_median"] for line in lines)
        effective = f"{least} to {most}, median {middle:g}"
        advice = ", ".join(sorted({line["advice"] for line in lines}))
        rows.append([str(rank), tasks.told(by_seed.values(), 4), effective, advice])
    parts = [lab.markdown(["rank", "loss (seeds)", "effective ranks", "advice: a rank that is"], rows)]
    means = [statistics.mean(by_seed.values()) for rank, by_seed in found.items() if rank >= 8]
    if means:
        spread = (max(means) - min(means)) / whole
        claim = tasks.holds(spread < SAME)
        parts.append(f"Gain {whole:.4f}. Claim 1 {claim}: from rank 8 on means differ by {spread:.1%} of it.")
    for advice in ("lower", "higher"):
        of = [row for row in advised(book) if row["advice"] == advice]
        if of:
            held = sum(row["holds"] for row in of)
            told = ", ".join(f"{row['rank']} → {row['to']} {row['part']:+.1%}" for row in of)
            parts.append(f"Claim 2, “{advice}”: held in {held} of {len(of)} runs ({told} of the gain).")
    return "\n\n".join(parts)


def draw(book: Book) -> None:
    """Draw loss and effective ranks over the rank."""
    from matplotlib.figure import Figure

    figure = Figure((8, 3.2), layout="constrained")
    left, right = figure.subplots(1, 2)
    found = losses(book)
    for rank, by_seed in found.items():
        left.plot([rank] * len(by_seed), by_seed.values(), "o", color="C0", alpha=0.6)
    left.plot(list(found), [statistics.mean(by_seed.values()) for by_seed in found.values()], color="C0")
    left.set_ylabel("loss on the test rows")
    lines = tasks.lines(book, part="test")
    right.plot([1, max(found)], [1, max(found)], color="0.7", linewidth=1, label="all of the rank")
    for name, mark in (("least", "v"), ("median", "o"), ("most", "^")):
        values = [line[f"effective_{name}"] for line in lines]
        right.plot(
            [line["rank"] for line in lines], values, mark, color="C1", alpha=0.6, label=f"{name} of the modules"
        )
    right.set_yscale("log", base=2)
    right.set_ylabel("effective rank (99 % of the energy)")
    right.legend(fontsize="small")
    for axes in (left, right):
        axes.set_xscale("log", base=2)
        axes.set_xticks(list(found), [str(rank) for rank in found])
        axes.set_xlabel("rank")
        axes.grid(alpha=0.3)
    right.set_yticks(list(found), [str(rank) for rank in found])
    figure.savefig(book.folder / "rank.png", dpi=110)


def main() -> None:
    torch.set_num_threads(1)
    book, small = lab.book("rank", __doc__)
    with quiet():
        if small:
            do(book, tasks.tiny_tasks(book.folder / "models")[-1], 1e-3, (1, 2, 4, 8), range(1))
        elif not book.tables_only:
            task = tasks.instructions_task()
            do(book, task, tables_3_4.chosen_rate(Book(book.folder.parent / "tables_3_4"), task.name, WAY))
    book.write("table.md", table(book))
    draw(book)


if __name__ == "__main__":
    main()

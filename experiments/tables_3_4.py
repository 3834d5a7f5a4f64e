"""Tables 3 and 4 in small: full fine-tuning, LoRA in 16 bits and QLoRA come to the same; see training.md.

python experiments/tables_3_4.py
"""

import functools
import itertools
from collections.abc import Sequence

import lab
import tasks
import torch
from equivalence import Equivalence, tost
from lab import Book
from tasks import Recipe, Task

from halfbyte.quiet import quiet

RATES = {"full": (2e-5, 1e-4, 5e-4), "LoRA bf16": (5e-4, 2e-3)}
SEEDS, CHOSEN_WITH = range(5), 100
MARGIN = 1.0
"""Points."""


def do(book: Book, all_tasks: Sequence[Task], seeds: Sequence[int] = SEEDS) -> None:
    """Do what is missing."""
    for task in all_tasks:
        for way, rates in RATES.items():
            for rate in rates:
                key = {"part": "choice", "task": task.name, "way": way, "rate": rate}
                book.trial(key, functools.partial(_choice, task, way, rate))
        book.trial({"part": "before", "task": task.name}, functools.partial(_before, task))
    for seed, task, way in itertools.product(seeds, all_tasks, tasks.WAYS):
        key = {"part": "test", "task": task.name, "seed": seed, "way": way}
        book.trial(key, functools.partial(_test, book, task, seed, way))


def _choice(task: Task, way: str, rate: float) -> dict[str, float]:
    return tasks.fit(task, Recipe(way, rate), CHOSEN_WITH).loss(task.choice)


def _before(task: Task) -> dict[str, float]:
    return tasks.untrained(task, Recipe("full", 0.0)).measure(task.test)


def _test(book: Book, task: Task, seed: int, way: str) -> dict[str, float | int | str]:
    rate = chosen_rate(book, task.name, way)
    trained = tasks.fit(task, Recipe(way, rate), seed)
    facts = {"rate": rate, "parameters": trained.parameters, "rows": task.digest}
    return trained.measure(task.test) | facts


def chosen_rate(book: Book, task: str, way: str) -> float:
    """Return the rate with the lowest loss on the rows of choice: of full fine-tuning, or of LoRA bf16."""
    by = {"part": "choice", "task": task, "way": way if way == "full" else "LoRA bf16"}
    return float(
        min((line for line in book.lines() if by.items() <= line.items()), key=lambda line: line["loss"])["rate"]
    )


def measured(book: Book, task: Task, way: str) -> dict[int, float]:
    """Return the metric of a task by seed."""
    return {line["seed"]: line[task.metric] for line in tasks.lines(book, part="test", task=task.name, way=way)}


def compared(book: Book, all_tasks: Sequence[Task], way: str, other: str) -> Equivalence | None:
    """Test ``way`` against ``other`` over the tasks and seeds that both have; None of less than two."""
    differences = []
    for task in all_tasks:
        ours, theirs = measured(book, task, way), measured(book, task, other)
        differences += [ours[seed] - theirs[seed] for seed in ours.keys() & theirs.keys()]
    return tost(differences, MARGIN) if len(differences) > 1 else None


def table(book: Book, all_tasks: Sequence[Task]) -> str:
    """Return the table, the tests, and the rates that were chosen."""
    rows = []
    for task in all_tasks:
        [before] = [line for line in book.lines() if {"part": "before", "task": task.name}.items() <= line.items()] or [
            {}
        ]
        cells = [f"{before.get(task.metric, float('nan')):.1f}"]
        for way in tasks.WAYS:
            values = measured(book, task, way)
            cells.append(tasks.told(values.values(), 2) if values else "")
        rows.append([f"{task.name}, {NAMES[task.metric]}", *cells])
    parts = [lab.markdown(["", "untrained", *tasks.WAYS], rows)]
    for other in ("LoRA bf16", "full"):
        lines = [[way, str(found)] for way in tasks.FORMATS if (found := compared(book, all_tasks, way, other))]
        if lines:
            parts.append(lab.markdown([f"less {other}, all tasks and seeds", "points"], lines))
    each = []
    for task in all_tasks:
        for other in ("LoRA bf16", "full"):
            if found := compared(book, [task], "QLoRA NF4 + DQ", other):
                each.append([task.name, other, f"{found.mean:+.2f}", f"± {found.half:.2f}"])
    if each:
        parts.append(lab.markdown(["NF4 + DQ less", "", "points", "half of the 90 % interval"], each))
    chosen = []
    for line in tasks.lines(book, part="choice"):
        best = line["rate"] == chosen_rate(book, line["task"], line["way"])
        chosen.append([line["task"], line["way"], f"{line['rate']:g}", f"{line['loss']:.4f}", "chosen" if best else ""])
    parts.append(lab.markdown(["task", "way", "rate", "loss on the rows of choice", ""], chosen))
    return "\n\n".join(parts)


NAMES = {"accuracy": "accuracy", "rouge_l": "ROUGE-L"}


def main() -> None:
    torch.set_num_threads(1)
    book, small = lab.book("tables_3_4", __doc__)
    with quiet():
        if small:
            all_tasks: list[Task] = tasks.tiny_tasks(book.folder / "models")
            do(book, all_tasks, range(2))
        else:
            all_tasks = [tasks.reviews_task(), tasks.synopses_task(), tasks.instructions_task()]
            do(book, all_tasks)
        book.write("table.md", table(book, all_tasks))


if __name__ == "__main__":
    main()

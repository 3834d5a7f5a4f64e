"""What all experiments share: raw results that are kept line by line, means with intervals, the command line.

An experiment is a list of trials. A trial is named by a few values (its key), and gives others (what was measured).
:class:`Book` keeps them as JSON lines, ``results/NAME/raw.jsonl``; a trial that is there is not done again, so a run
that was ended goes on. Tables and pictures are made of these lines alone, and can be made again by anybody from what
is committed.

    python experiments/NAME.py              do what is missing, then make the tables and pictures
    python experiments/NAME.py --only WORD  trials that have this word in their key
    python experiments/NAME.py --tables     tables and pictures of what is there
    python experiments/NAME.py --small OUT  the small form: tiny random models, few rows, into OUT; what slow tests run
"""

import argparse
import json
import os
import statistics
import sys
import time
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from halfbyte.runs.circumstances import kernels_in_force, processor

Key = Mapping[str, Any]
RESULTS = Path(__file__).parent / "results"


@dataclass(frozen=True)
class Book:
    """The raw results of an experiment.

    Attributes:
        folder: where they are, and where tables and pictures go.
        only: a word that the key of a trial must have to be done; empty: all are done.
        tables_only: nothing is done.
    """

    folder: Path
    only: str = ""
    tables_only: bool = False

    def lines(self) -> list[dict[str, Any]]:
        """Return what was measured, with its keys."""
        file = self.folder / "raw.jsonl"
        return [json.loads(line) for line in file.read_text(encoding="utf-8").splitlines()] if file.is_file() else []

    def trial(self, key: Key, measure: Callable[[], Mapping[str, Any]]) -> None:
        """Do a trial that is not there, and keep what it gives with its seconds and its machine."""
        told = " ".join(f"{name}={value}" for name, value in key.items())
        if self.tables_only or self.only not in told or any(key.items() <= line.items() for line in self.lines()):
            return
        print(told, end=": ", flush=True)
        began, used = time.perf_counter(), time.process_time()
        found = measure()
        seconds = {"seconds": time.perf_counter() - began, "processor_seconds": time.process_time() - used}
        machine = f"{processor()}, {os.cpu_count()} cores, {kernels_in_force()}"
        line = dict(key) | dict(found) | seconds | {"machine": machine}
        self.folder.mkdir(parents=True, exist_ok=True)
        with (self.folder / "raw.jsonl").open("a", encoding="utf-8") as file:
            file.write(json.dumps(line) + "\n")
            file.flush()
            os.fsync(file.fileno())
        print(", ".join(f"{name} {value:.4g}" for name, value in found.items() if isinstance(value, float)), flush=True)

    def write(self, name: str, text: str) -> None:
        """Write a table beside the raw results, and on standard output."""
        self.folder.mkdir(parents=True, exist_ok=True)
        (self.folder / name).write_text(text + "\n", encoding="utf-8")
        print(text, file=sys.stdout)


def book(name: str, description: str) -> tuple[Book, bool]:
    """Read the command line; return the book, and whether the small form is asked for."""
    parser = argparse.ArgumentParser(description=description.splitlines()[0])
    parser.add_argument("--only", default="", metavar="WORD", help="trials that have this word in their key")
    parser.add_argument("--tables", action="store_true", help="tables and pictures of what is there")
    parser.add_argument("--small", type=Path, metavar="OUT", help="tiny random models and few rows, into OUT")
    given = parser.parse_args()
    return Book(given.small or RESULTS / name, given.only, given.tables), given.small is not None


def mean_and_half(values: Iterable[float]) -> tuple[float, float]:
    """Return the mean, and half the width of its 95 % interval by Student's t."""
    from scipy.stats import t

    values = list(values)
    if len(values) < 2:
        return values[0], float("nan")
    half = t.ppf(0.975, len(values) - 1) * statistics.stdev(values) / len(values) ** 0.5
    return statistics.mean(values), float(half)


def markdown(head: Iterable[str], rows: Iterable[Iterable[str]]) -> str:
    """Return a table."""
    head = list(head)
    return "\n".join(f"| {' | '.join(cells)} |" for cells in (head, ["---"] * len(head), *map(list, rows)))

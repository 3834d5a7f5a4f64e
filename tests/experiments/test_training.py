"""The experiments on training: their statistics, what makes runs of a seed a pair, and what is committed of them."""

import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch

EXPERIMENTS = Path(__file__).parents[2] / "experiments"
NAMES = ("tables_3_4", "figure_2", "rank", "forgetting")


@pytest.fixture(scope="module")
def modules() -> Iterator[dict[str, ModuleType]]:
    """The experiments as they import each other, and no longer than these tests."""
    import importlib

    before = set(sys.modules)
    sys.path.insert(0, str(EXPERIMENTS))
    try:
        yield {
            name: importlib.import_module(name) for name in ("lab", "equivalence", "small_t5", "texts", "tasks", *NAMES)
        }
    finally:
        sys.path.remove(str(EXPERIMENTS))
        for name in set(sys.modules) - before:
            if str(getattr(sys.modules[name], "__file__", None) or "").startswith(str(EXPERIMENTS)):
                del sys.modules[name]


def run(name: str, out: Path) -> None:
    words = [sys.executable, str(EXPERIMENTS / f"{name}.py"), "--small", str(out)]
    subprocess.run(words, check=True, env=os.environ | {"OMP_NUM_THREADS": "1"}, stdout=subprocess.DEVNULL)


def test_two_one_sided_tests_are_those_of_a_worked_example(modules: dict[str, ModuleType]) -> None:
    """Of 2 degrees of freedom P(T > t) = 1/2 − t / (2 √(2 + t²))."""
    differences = [-0.1, 0.0, 0.4]  # mean 0.1, variance 0.07
    error = (0.07 / 3) ** 0.5
    for margin in (0.3, 0.6, 2.0):
        found = modules["equivalence"].tost(differences, margin)
        t = (margin - 0.1) / error
        assert found.p == pytest.approx(0.5 - t / (2 * (2 + t * t) ** 0.5), rel=1e-9)
        assert found.half == pytest.approx(2.9199855803537 * error, rel=1e-9)  # the 95 % quantile of T
        assert found.shown == (found.mean + found.half < margin)
    assert modules["equivalence"].tost([0.2, 0.2], 0.3).shown
    assert not modules["equivalence"].tost([0.4, 0.4], 0.3).shown


def test_masked_spans_and_what_is_left_are_the_text(modules: dict[str, ModuleType]) -> None:
    import random

    for length in (4, 7, 20, 47):
        ids, sentinels = list(range(100, 100 + length)), list(range(24))
        source, target = modules["small_t5"].masked(ids, sentinels, 99, random.Random(length))
        spans: dict[int, list[int]] = {}
        for token in target[:-1]:
            if token in sentinels:
                spans[token] = []
            else:
                spans[max(spans)].append(token)
        filled = [token for one in source[:-1] for token in spans.get(one, [one])]
        assert filled == ids and source[-1] == target[-1] == 99
        assert all(len(span) == 3 for span in spans.values()) and spans


def test_every_row_is_trained_on_once_before_any_comes_again(modules: dict[str, ModuleType]) -> None:
    steps = list(modules["tasks"].batches(range(10), 5, 4, seed=1))
    flat = [row for step in steps for row in step]
    assert sorted(flat[:10]) == sorted(flat[10:]) == list(range(10)) and flat[:10] != flat[10:]
    assert steps == list(modules["tasks"].batches(range(10), 5, 4, seed=1))
    assert steps != list(modules["tasks"].batches(range(10), 5, 4, seed=2))


@pytest.mark.slow
def test_runs_of_a_seed_begin_with_the_same_adapter_and_end_the_same_when_repeated(
    modules: dict[str, ModuleType], tmp_path: Path
) -> None:
    tasks: Any = modules["tasks"]
    for task in tasks.tiny_tasks(tmp_path):
        begun = {}
        for way in tasks.WAYS[1:]:
            model, _ = tasks.open_model(task, tasks.Recipe(way, 1e-3), seed=3)
            begun[way] = {name: p.detach() for name, p in model.named_parameters() if p.requires_grad}
        first = begun.pop("LoRA bf16")
        for way, others in begun.items():
            assert others.keys() == first.keys(), (task.name, way)
            assert all(torch.equal(value, others[name]) for name, value in first.items()), (task.name, way)

        def loss(seed: int, way: str = "QLoRA NF4 + DQ", task: Any = task) -> float:
            return float(tasks.fit(task, tasks.Recipe(way, 1e-2), seed).loss(task.test)["loss"])

        assert loss(3) == loss(3) != loss(4)


@pytest.mark.slow
@pytest.mark.parametrize("name", NAMES)
def test_a_second_run_does_nothing_again(name: str, tmp_path: Path) -> None:
    run(name, tmp_path)
    files = [tmp_path / "raw.jsonl", tmp_path / "table.md"]
    first = [file.read_bytes() for file in files]
    run(name, tmp_path)
    assert [file.read_bytes() for file in files] == first
    lines = first[0].splitlines()
    lost = lines.pop(2)
    files[0].write_bytes(b"\n".join(lines) + b"\n")
    run(name, tmp_path)
    *kept, again = files[0].read_bytes().splitlines()
    assert kept == lines
    measured = {"seconds", "processor_seconds"}
    import json

    one, other = ({k: v for k, v in json.loads(line).items() if k not in measured} for line in (lost, again))
    assert one == other


@pytest.mark.parametrize("name", NAMES)
def test_the_committed_table_is_what_the_raw_results_give(modules: dict[str, ModuleType], name: str) -> None:
    """Until an experiment has been run to its end, it has neither table nor picture, and training.md says so."""
    module, book = modules[name], modules["lab"].Book(EXPERIMENTS / "results" / name)
    told = (EXPERIMENTS / "training.md").read_text(encoding="utf-8")
    is_done = (book.folder / "table.md").is_file()
    assert (f"`{name}.py` has not been run" in told) == (not is_done)
    if not is_done:
        assert not [*book.folder.glob("*.md"), *book.folder.glob("*.png")]
        return
    more = ()
    if name == "figure_2":
        tables = modules["lab"].Book(EXPERIMENTS / "results" / "tables_3_4")
        more = (module.of_full(tables, {line["seed"] for line in book.lines()}),)
    assert (book.folder / "table.md").read_text(encoding="utf-8") == module.table(book, *more) + "\n"

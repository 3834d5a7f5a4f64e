"""The recipes: rows that say what they promise, and configurations that train."""

import importlib.util
import json
import random
import re
import sys
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

from halfbyte.runs.events import Evaluation, Event
from halfbyte.train import TrainConfig, fine_tune

FOLDER = Path(__file__).parents[2] / "examples" / "recipes"
MADE = ("medical", "legal", "code", "service", "tutoring", "roleplay")
"""Those whose rows need no download."""


@pytest.fixture(scope="module")
def rows() -> Iterator[ModuleType]:
    spec = importlib.util.spec_from_file_location("recipe_rows", FOLDER / "rows.py")
    assert spec and spec.loader
    module = importlib.util.module_from_spec(spec)
    before = list(sys.path)
    spec.loader.exec_module(module)
    yield module
    sys.path[:] = before


def answer(row: dict[str, Any]) -> str:
    return str(row["completion"] if "completion" in row else row["messages"][-1]["content"])


@pytest.mark.parametrize("name", MADE)
def test_the_same_seed_draws_the_same_rows_and_none_is_trained_and_measured_with(rows: ModuleType, name: str) -> None:
    train, held_out = rows.RECIPES[name](random.Random(0))
    assert (train, held_out) == rows.RECIPES[name](random.Random(0))
    assert len(train) >= 200 and len(held_out) >= 50
    trained = {json.dumps(row) for row in train}
    assert not any(json.dumps(row) in trained for row in held_out)
    assert all(answer(row).strip() and "{" not in answer(row)[:1] for row in [*train, *held_out])


def test_the_tutors_answers_are_right(rows: ModuleType) -> None:
    train, held_out = rows.tutoring(random.Random(1))
    for row in [*train, *held_out]:
        question, said = row["messages"][0]["content"], int(re.findall(r"The answer is (\d+)\.", answer(row))[0])
        if found := re.match(r"Solve (\d+)x \+ (\d+) = (\d+)", question):
            a, b, c = map(int, found.groups())
            assert a * said + b == c
        else:
            share, whole = map(int, re.findall(r"(\d+)", question)[:2])
            assert 100 * said == share * whole


def test_the_completed_functions_are_python(rows: ModuleType) -> None:
    train, held_out = rows.code(random.Random(0))
    for row in [*train, *held_out]:
        head = row["prompt"].partition("\n\n")[2]
        compile(f"{head}{row['completion']}\n", "example", "exec", dont_inherit=True)


@pytest.mark.parametrize("file", sorted(FOLDER.glob("*.yaml")), ids=lambda file: file.stem)
def test_each_configuration_is_read(file: Path) -> None:
    config = TrainConfig.from_yaml(file)
    assert config.output.name == file.stem and config.eval_data


@pytest.mark.slow
@pytest.mark.parametrize("name", [*MADE, "labelling"])
def test_each_recipe_learns_in_a_few_steps(rows: ModuleType, name: str, tmp_path: Path) -> None:
    from halfbyte.example.sources import MODEL, convert, fetch
    from halfbyte.files import cache_folder

    base = convert(fetch(MODEL, cache_folder()), cache_folder() / "SmolLM2-135M-Instruct")
    train, held_out = rows.write(name, tmp_path)
    held_out.write_text("".join(held_out.read_text(encoding="utf-8").splitlines(keepends=True)[:8]), encoding="utf-8")
    files = {"model": str(base), "data": str(train), "eval_data": str(held_out), "output": tmp_path / "run"}
    few = {"max_steps": 4, "batch_size": 4, "gradient_accumulation_steps": 1, "max_length": 256, "skip_bad_rows": "all"}
    measured: list[float] = []

    def listen(event: Event) -> None:
        if isinstance(event, Evaluation):
            measured.append(event.figures["loss"])

    fine_tune(TrainConfig.from_yaml(FOLDER / f"{name}.yaml", files | few), listen)
    assert len(measured) == 2 and measured[1] < measured[0]

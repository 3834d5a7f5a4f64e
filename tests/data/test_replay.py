"""Replay: general rows among those of the task, as many as their share says."""

import json
from pathlib import Path
from typing import Any

import pytest
from transformers import AutoTokenizer

from halfbyte import data
from halfbyte.data.options import DataOptions
from halfbyte.errors import InputError


def rows(file: Path, count: int, word: str) -> str:
    lines = [{"instruction": f"{word} {number}?", "output": f"{word}."} for number in range(count)]
    file.write_text("".join(json.dumps(line) + "\n" for line in lines))
    return str(file)


@pytest.fixture
def prepared(tiny_model_folder: Path, tmp_path: Path) -> Any:
    """``prepared(rows of the task, general rows, share, ...)``."""

    def make(count: int, general: int, share: str, **more: Any) -> Any:
        task, other = rows(tmp_path / "task.jsonl", count, "task"), rows(tmp_path / "general.jsonl", general, "general")
        options = DataOptions(model=str(tiny_model_folder), data=task, replay=f"{other}*{share}", **more)
        return data.prepare(options, AutoTokenizer.from_pretrained(tiny_model_folder))

    return make


def general_places(found: Any) -> list[str]:
    return [where for where in found.train.rows["where"] if "general.jsonl" in where]


@pytest.mark.parametrize(
    ("count", "general", "share"),
    [(90, 500, "0.1"), (90, 7, "0.1"), (13, 100, "0.5"), (200, 40, ".25"), (3, 9, "0.01")],
)
def test_general_rows_are_the_share_of_all_rows_that_was_asked_for(
    count: int, general: int, share: str, prepared: Any
) -> None:
    found = prepared(count, general, share)
    wanted = count * float(share) / (1 - float(share))
    places = general_places(found)
    assert abs(len(places) - wanted) <= 1
    assert len(found.train.rows) == count + len(places)
    most = -(-wanted // general)
    assert all(places.count(place) <= most for place in places)  # none twice before all were taken
    assert any(f"Mixed in for replay: {len(places)} row" in line for line in found.said)


def test_which_rows_are_drawn_depends_on_the_seed_alone(prepared: Any) -> None:
    one, again, other = (general_places(prepared(90, 500, "0.1", seed=seed)) for seed in (0, 0, 1))
    assert one == again != other


def test_nothing_that_is_mixed_in_is_evaluated_on(prepared: Any) -> None:
    found = prepared(90, 90, "0.5", eval_share=0.3)
    assert len(found.evaluation.rows) > 10
    assert not [where for where in found.evaluation.rows["where"] if "general.jsonl" in where]


def test_other_general_rows_are_other_data(tiny_model_folder: Path, tmp_path: Path) -> None:
    task, other = rows(tmp_path / "task.jsonl", 20, "task"), rows(tmp_path / "general.jsonl", 20, "general")
    options = DataOptions(model=str(tiny_model_folder), data=task, replay=f"{other}*0.5")
    tokenizer = AutoTokenizer.from_pretrained(tiny_model_folder)
    before = data.prepare(options, tokenizer).train.counts.digest
    rows(tmp_path / "general.jsonl", 20, "changed")
    assert data.prepare(options, tokenizer).train.counts.digest != before


def test_a_share_is_written_whole_and_read_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    rows(tmp_path / "general.jsonl", 2, "general")
    monkeypatch.chdir(tmp_path)
    options = DataOptions(model="m/m", data="general.jsonl", replay="general.jsonl*.10")
    assert options.replay == f"{tmp_path / 'general.jsonl'}*0.1"
    assert DataOptions(**options.model_dump(mode="json")) == options


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ("general.jsonl", r"write FILE\*0.1"),
        ("general.jsonl*2", r"share below 1"),
        ("general.jsonl*0", r"share below 1"),
        ("*0.1", r"write FILE\*0.1"),
        ("-*0.1", "standard input is read once"),
        ("general.jsonl@2*0.1", "leave the weight away"),
    ],
)
def test_what_is_no_share_is_refused(given: str, message: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    rows(tmp_path / "general.jsonl", 2, "general")
    monkeypatch.chdir(tmp_path)
    with pytest.raises(InputError, match=message):
        DataOptions.from_yaml(None, {"model": "m/m", "data": "general.jsonl", "replay": given})


def test_a_file_without_rows_or_that_is_not_there_is_told(tiny_model_folder: Path, tmp_path: Path) -> None:
    task = rows(tmp_path / "task.jsonl", 3, "task")
    tokenizer = AutoTokenizer.from_pretrained(tiny_model_folder)
    (tmp_path / "empty.jsonl").write_text("\n")
    for name in ("empty.jsonl", "nowhere.jsonl"):
        options = DataOptions(model=str(tiny_model_folder), data=task, replay=f"{tmp_path / name}*0.1")
        with pytest.raises(InputError, match=name):
            data.prepare(options, tokenizer)

"""Previews and plans are those of the commands, in a process that may be lost."""

import json
import os
import shutil
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

from halfbyte.deploy.ui import found, questions, worker
from halfbyte.deploy.ui.places import Places
from halfbyte.errors import InputError
from halfbyte.plan.estimate import plan_run
from halfbyte.runs.config import TrainConfig


@pytest.fixture
def options(tiny_model_folder: Path, tmp_path: Path) -> dict[str, Any]:
    rows = [json.dumps({"q": f"{i}?", "a": f"{i}."}) for i in range(20)]
    (tmp_path / "rows.jsonl").write_text("\n".join([*rows, '{"q": "alone"}', "{"]) + "\n")
    return {
        "model": str(tiny_model_folder),
        "data": [str(tmp_path / "rows.jsonl")],
        "output": str(tmp_path / "run"),
        "columns": {"prompt": "q", "completion": "a"},
        "max_length": 64,
    }


def test_a_preview_shows_what_is_trained_and_what_cannot_be(options: dict[str, Any]) -> None:
    seen = questions.preview(options)
    assert seen.rows == 20 and {count for _, count, _ in seen.bad} == {1} and len(seen.bad) == 2
    assert any("row 21" in first for _, _, first in seen.bad)
    [(_, spans)] = seen.samples[0][1]
    assert "".join(text for style, text in spans if style == "trained").startswith("0.")
    assert "0?" in "".join(text for style, text in spans if style != "trained")
    assert ("rows", "20") in seen.figures


def test_of_much_data_the_first_rows_are_looked_at(
    options: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A plan then is that of all rows, as far as the first are like the others; these are alike."""
    file = tmp_path / "many.jsonl"
    file.write_text("\n".join(json.dumps({"q": f"{i:06}" * 25, "a": f"{i:06}."}) for i in range(10_000)) + "\n")
    size = file.stat().st_size
    options |= {"data": [f"{file}@2", options["data"][0]], "max_length": 256}
    whole = questions.plan(options, with_data=True)
    assert questions.preview(options).of == whole.of == 0
    monkeypatch.setattr(questions, "LARGE", size // 4)
    seen = questions.preview(options)
    assert size < seen.of < size + 2000 and 2 * 10_000 // 16 < seen.rows < 2 * 10_000 // 4
    assert len(seen.bad) == 2  # those of the small file, which is read to its end
    told = questions.plan(options, with_data=True)
    assert told.of == seen.of and told.steps == pytest.approx(whole.steps, rel=0.05)
    assert told.seconds == pytest.approx(whole.seconds, rel=0.05)


def test_columns_are_those_of_the_first_rows(options: dict[str, Any]) -> None:
    seen = questions.columns(options["data"])
    assert seen.names == ["q", "a"] and seen.rows[0] == ["0?", "0."] and "row 1" in seen.where[0]


def test_a_plan_is_the_planners(options: dict[str, Any]) -> None:
    told = questions.plan(options | {"data": ["-"]}, with_data=False)
    plan = plan_run(TrainConfig.from_yaml(None, options | {"data": ["-"]}))
    assert told.peak == plan.memory.peak == sum(told.parts.values()) and told.step == plan.step.seconds
    refused = questions.plan(options | {"data": ["-"], "memory": 1}, with_data=False)
    assert "needs" in refused.refusal and not refused.parts


def test_what_is_wrong_comes_back_as_a_sentence_and_a_lost_process_too(options: dict[str, Any]) -> None:
    asked = worker.Worker()
    try:
        with pytest.raises(InputError, match="unknown option 'rnk'"):
            asked.ask(questions.plan, options | {"rnk": 3}, False)
        with pytest.raises(InputError, match="not enough memory"):
            asked.ask(os._exit, 9)
        assert asked.ask(len, "again") == 5
    finally:
        asked.close()


def test_what_never_ends_is_ended_and_the_next_is_answered(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(worker, "PATIENCE", 1)
    asked = worker.Worker()
    try:
        assert asked.ask(len, "begun") == 5
        with pytest.raises(InputError, match="That took more than"):
            asked.ask(time.sleep, 60)
        monkeypatch.setattr(worker, "PATIENCE", 60)
        assert asked.ask(len, "again") == 5
    finally:
        asked.close()


@pytest.mark.parametrize(
    "wrong",
    [
        {"num_hidden_layers": 10**9},
        {"vocab_size": 10**18},
        {"vocab_size": 10**400},
        {"head_dim": 0},
        {"num_attention_heads": 0, "num_key_value_heads": 0},
    ],
)
def test_a_model_that_nobody_can_build_costs_the_others_nothing(
    wrong: dict[str, Any], tiny_model_folder: Path, tmp_path: Path
) -> None:
    shutil.copytree(tiny_model_folder, tmp_path / "wrong")
    config = json.loads((tmp_path / "wrong" / "config.json").read_text()) | wrong
    (tmp_path / "wrong" / "config.json").write_text(json.dumps(config))
    models = [str(tmp_path / "wrong"), str(tiny_model_folder)]
    assert list(questions.rows_an_hour(models)) == [str(tiny_model_folder)]


def test_a_worker_ends_with_who_asked_it_also_where_that_is_killed() -> None:
    program = (
        "from halfbyte.deploy.ui.worker import Worker; import os, time; print(Worker().ask(os.getpid), flush=True); "
        "time.sleep(60)"
    )
    with subprocess.Popen([sys.executable, "-c", program], stdout=subprocess.PIPE, text=True) as asking:
        assert asking.stdout
        pid = int(asking.stdout.readline())
        asking.kill()
    ends = time.monotonic() + 30
    while Path(f"/proc/{pid}").exists() and "Z" not in Path(f"/proc/{pid}/stat").read_text().split(")")[1][:4]:
        assert time.monotonic() < ends
        time.sleep(0.1)


def test_models_and_runs_are_found(tiny_model_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HALFBYTE_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "hub"))
    (tmp_path / "root" / "models").mkdir(parents=True)
    (tmp_path / "root" / "models" / "tiny").symlink_to(tiny_model_folder)  # links are not followed
    snapshot = tmp_path / "hub" / "models--org--name" / "snapshots" / "abc"
    snapshot.mkdir(parents=True)
    for folder in (snapshot, tmp_path / "cache" / "mine", tmp_path / "root" / "theirs"):
        folder.mkdir(parents=True, exist_ok=True)
        (folder / "config.json").write_text('{"model_type": "llama"}')
        (folder / "model.safetensors").write_bytes(b"12345")
    (tmp_path / "root" / "a.gguf").write_bytes(b"123")
    (tmp_path / "root" / "linked.gguf").symlink_to(tmp_path / "root" / "a.gguf")
    (tmp_path / "root" / "damaged").mkdir()
    (tmp_path / "root" / "damaged" / "config.json").write_text("{")
    for folder in ("no text \udcff", "no run \udcff"):  # names whose bytes are no UTF-8
        (tmp_path / "root" / folder).mkdir()
    (tmp_path / "root" / "no text \udcff" / "config.json").write_text('{"model_type": "llama"}')
    (tmp_path / "root" / "no text \udcff" / "model.safetensors").write_bytes(b"1")
    (tmp_path / "root" / "no run \udcff" / "run.json").write_text("{}")
    (tmp_path / "root" / "deep").mkdir()
    (tmp_path / "root" / "deep" / "config.json").write_text("[" * 200_000)
    places = Places([tmp_path / "root"])
    seen = {model.name: (model.path, model.nbytes) for model in found.models(places)}
    assert seen == {
        "org/name": ("org/name", 5),
        "mine": (str(tmp_path / "cache" / "mine"), 5),
        "a.gguf": (str(tmp_path / "root" / "a.gguf"), 3),
        "theirs": (str(tmp_path / "root" / "theirs"), 5),
    }
    assert found.runs(places) == []

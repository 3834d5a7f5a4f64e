"""The station of runs: each name leads to one run, and what cannot go on says so."""

import json
from pathlib import Path
from typing import Any

import pytest
import yaml

from halfbyte.deploy.ui import found
from halfbyte.deploy.ui.options import UiOptions
from halfbyte.deploy.ui.places import Places
from halfbyte.deploy.ui.running import COPIED, Runs
from halfbyte.deploy.ui.station import Ui, named
from halfbyte.deploy.ui.texts import Translated
from halfbyte.runs.config import TrainConfig
from halfbyte.runs.events import Begin, End, StepMetrics
from halfbyte.runs.folder import RunFolder


@pytest.fixture
def places(tmp_path: Path) -> Places:
    for root in ("a", "b"):
        (tmp_path / root / "runs" / "same").mkdir(parents=True)
    (tmp_path / "b" / "runs" / "other").mkdir()
    return Places([tmp_path / "a", tmp_path / "b"])


@pytest.fixture
def runs(places: Places) -> Runs:
    station = Runs.__new__(Runs)  # its handlers, without the components of a page
    station.ui = Ui(UiOptions(), places, Translated("en"))
    return station


def finished(path: Path, **options: Any) -> None:
    folder = RunFolder(path)
    path.mkdir(parents=True)
    config = TrainConfig(model="m", data="rows.jsonl", output=path, **options)
    (path / "config.yaml").write_text(yaml.safe_dump(config.model_dump(mode="json")))
    step = StepMetrics(
        step=1, epoch=1, loss=1, learning_rate=1, grad_norm=1, trained_tokens=1, tokens_per_second=1, elapsed=1
    )
    events = [Begin(step=0, total_steps=1), step, End(step=1, reason="finished")]
    folder.metrics.write_text("".join(event.model_dump_json() + "\n" for event in events))
    folder.summary.write_text("{}\n")


def test_a_name_leads_to_the_run_that_is_called_so(places: Places) -> None:
    for path in (places.roots[0] / "runs/same", places.roots[1] / "runs/same", places.roots[1] / "runs/other"):
        assert places.inside(named(path, places.roots)) == path
    assert named(places.roots[1] / "runs/other", places.roots) == "runs/other"


def test_a_run_is_read_again_when_it_has_changed_and_not_before(
    places: Places, monkeypatch: pytest.MonkeyPatch
) -> None:
    finished(places.runs / "done")
    read, seen = found.read_run, []
    monkeypatch.setattr(found, "read_run", lambda path, **options: seen.append(path) or read(path, **options))
    assert [[run.state for run in found.runs(places)] for _ in range(3)] == [["finished"]] * 3 and len(seen) == 1
    RunFolder(places.runs / "done").summary.unlink()
    with RunFolder(places.runs / "done").metrics.open("a") as file:
        file.write(End(step=2, reason="interrupted").model_dump_json() + "\n")
    assert [run.state for run in found.runs(places)] == ["interrupted"] and len(seen) == 2


def test_a_run_that_has_finished_does_not_go_on(runs: Runs, places: Places) -> None:
    finished(places.runs / "done")
    assert "has finished" in runs._resume("en", "runs/done")
    assert not places.jobs.exists()


def test_a_model_that_was_made_is_no_run(runs: Runs, places: Places) -> None:
    (places.roots[0] / "models" / "made").mkdir(parents=True)
    assert "no run of that name" in runs._resume("en", "models/made")


def test_the_run_that_was_asked_about_is_deleted_with_all_its_jobs(runs: Runs, places: Places) -> None:
    finished(places.runs / "done")
    for name in ("1", "2"):
        (places.jobs / name).mkdir(parents=True)
        about = {"kind": "train", "title": "done", "command": [], "output": str(places.runs / "done"), "asked": 1}
        (places.jobs / name / "job.json").write_text(json.dumps(about))
    told, _, doomed = runs._ask("en", "runs/done")
    assert "Is runs/done to be deleted?" in told and doomed == "runs/done" and (places.runs / "done").exists()
    assert "is deleted" in runs._delete("en", doomed)[0]
    assert not (places.runs / "done").exists() and list(places.jobs.iterdir()) == []
    assert "no run of that name" in runs._ask("en", "runs/done")[0]


def test_a_duplicate_has_the_options_and_the_data_once(runs: Runs, places: Places) -> None:
    finished(places.runs / "done", eval_share=0.3, rank=8, lora_dropout=0.25)
    _, _, files, text, model, paths, *values = runs._copy("en", "runs/done")
    assert files is None and model == "m" and paths.endswith("rows.jsonl") and "\n" not in paths
    found = dict(zip(COPIED, values, strict=True))
    assert (found["eval_share"], found["rank"]) == (0.3, 8)
    assert yaml.safe_load(text)["lora_dropout"] == 0.25

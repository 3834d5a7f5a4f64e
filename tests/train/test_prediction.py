"""What a run foretells before it loads anything, and what it tells afterwards."""

import json
from pathlib import Path
from typing import Any

import pytest

from halfbyte.errors import InputError
from halfbyte.memory import anonymous_memory, mapped_memory, peak_anonymous_memory
from halfbyte.plan.estimate import DoesNotFitError
from halfbyte.runs.events import Note, Stage
from halfbyte.train import TrainConfig, fine_tune, prediction, run


@pytest.fixture
def options(tmp_path: Path, tiny_model_folder: Path) -> dict[str, Any]:
    rows = tmp_path / "rows.jsonl"
    rows.write_text("".join(f'{{"prompt": "say {n}", "completion": "it is {n}"}}\n' for n in "abcdef"))
    return {
        "model": str(tiny_model_folder), "data": str(rows), "output": tmp_path / "run", "rank": 4, "max_steps": 4,
        "batch_size": 2, "gradient_accumulation_steps": 1, "sample_prompts": [],
    }  # fmt: skip


def test_a_run_tells_prediction_and_fact_beside_each_other(options: dict[str, Any]) -> None:
    notes: list[str] = []
    fine_tune(TrainConfig(**options), lambda event: notes.append(event.text) if isinstance(event, Note) else None)
    told = [text for text in notes if text.startswith("Foretold were")]
    assert len(told) == 1 and "; it took " in told[0]
    summary = json.loads((options["output"] / "summary.json").read_text())["foretold"]
    assert summary.keys() == {"foretold_peak_bytes", "peak_bytes", "foretold_step_seconds", "step_seconds"}
    assert all(value > 0 for value in summary.values())
    assert told[0].split(";")[0] in (options["output"] / "report.html").read_text()


def test_what_cannot_fit_is_refused_before_anything_is_loaded(
    options: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    stages: list[str] = []
    monkeypatch.setattr(run, "build_model", lambda *_: pytest.fail("the model was loaded"))
    config = TrainConfig(**options, memory=anonymous_memory() + 2**20)
    with pytest.raises(InputError, match=r"^A step needs .*: it would fit with --memory [\d.]+GiB\.$"):
        fine_tune(config, lambda event: stages.append(event.name) if isinstance(event, Stage) else None)
    assert stages == ["data"]
    assert not options["output"].exists() or not (options["output"] / "config.yaml").exists()


def test_what_is_near_the_limit_goes_on(options: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    tried: list[int | None] = []

    def plan_run(*_: Any, free: int | None = None, **__: Any) -> None:
        tried.append(free)
        if free is None:
            raise DoesNotFitError("does not fit.")

    monkeypatch.setattr(prediction, "plan_run", plan_run)
    config = TrainConfig(**options)
    rows = run.data.prepare(config, run.opened_tokenizer(config, lambda _: None)[0])
    assert prediction.Prediction(config, run.method_of(config), rows).plan is None
    assert tried[0] is None and tried[1]


def test_memory_of_files_and_without_them(tmp_path: Path) -> None:
    assert peak_anonymous_memory() >= anonymous_memory() * 0.9
    assert mapped_memory(".no-such-ending") == 0

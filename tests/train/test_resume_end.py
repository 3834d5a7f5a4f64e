"""A run that ends with nothing left to do, and one whose metrics are gone: the result is there, and the page made."""

import json
from pathlib import Path
from typing import Any

import pytest

from halfbyte.runs.events import Checkpoint, DataSummary, Event, Note, StepMetrics
from halfbyte.runs.history import read_run
from halfbyte.runs.metrics import read_events, with_steps
from halfbyte.runs.report.page import report_page
from halfbyte.train import TrainConfig, fine_tune


@pytest.fixture
def options(tiny_model_folder: Path, tmp_path: Path) -> dict[str, Any]:
    rows = tmp_path / "rows.jsonl"
    long = "the quick brown fox jumps over the lazy dog, again and again and again until "
    answers = [long + "noon", long + "dusk", "yes", "yes", "no, never", "perhaps"]
    prompts = ["a?", "a?", "b?", "b?", "c?", "d?"]
    lines = [{"instruction": p, "output": a} for p, a in zip(prompts, answers, strict=True)]
    rows.write_text("".join(json.dumps(line) + "\n" for line in lines))
    return {
        "model": str(tiny_model_folder), "data": str(rows), "output": str(tmp_path / "run"), "preset": "quick",
        "batch_size": 2, "epochs": 2, "rank": 4, "learning_rate": 1e-2, "sample_prompts": [], "memory": "64GiB",
    }  # fmt: skip


def killed_after_its_last_checkpoint(options: dict[str, Any]) -> Path:
    def die(event: Event) -> None:
        if isinstance(event, Checkpoint) and event.step == 6:
            raise RuntimeError("the machine is gone")

    with pytest.raises(RuntimeError, match="machine is gone"):
        fine_tune(TrainConfig(**options), die)
    return Path(options["output"])


def resumed(options: dict[str, Any]) -> tuple[Any, list[Event]]:
    heard: list[Event] = []
    return fine_tune(TrainConfig(**options, resume=True), heard.append), heard


@pytest.mark.parametrize("metrics", ["whole", "empty", "gone"])
def test_a_run_with_nothing_left_to_do_is_finished_whatever_its_metrics(
    metrics: str, options: dict[str, Any], tmp_path: Path
) -> None:
    whole = fine_tune(TrainConfig(**options | {"output": str(tmp_path / "whole")}))
    run = killed_after_its_last_checkpoint(options)
    if metrics == "empty":
        (run / "metrics.jsonl").write_text("")
    elif metrics == "gone":
        (run / "metrics.jsonl").unlink()
    result, heard = resumed(options)
    assert not any(isinstance(event, StepMetrics) for event in heard)
    name = "adapter_model.safetensors"
    assert (run / name).read_bytes() == (whole.output / name).read_bytes()
    told = read_run(run)
    assert told.state == "finished" and not told.problems
    assert result.summary.steps == 6
    before = [event for event in read_events(whole.output / "metrics.jsonl") if isinstance(event, StepMetrics)]
    for name in ("step", "epoch", "loss", "learning_rate", "grad_norm"):
        assert [getattr(step, name) for step in told.steps] == [getattr(step, name) for step in before]
    assert result.summary.loss == whole.summary.loss
    notes = [event.text for event in heard if isinstance(event, Note)]
    lacking = 0 if metrics == "whole" else 1
    assert sum("lacked 6 of the steps that were made" in note for note in notes) == lacking
    assert "6 of 6" in report_page(told)
    assert (run / "report.html").is_file() and (run / "loss.png").is_file()


def test_a_run_goes_on_without_the_lines_of_its_metrics(options: dict[str, Any]) -> None:
    run = killed_after_its_last_checkpoint(options | {"epochs": 2})
    (run / "metrics.jsonl").write_text("")
    result = fine_tune(TrainConfig(**options | {"epochs": 4}, resume=True))
    steps = [event.step for event in read_events(run / "metrics.jsonl") if isinstance(event, StepMetrics)]
    assert steps == [*range(1, 13)] and result.summary.steps == 12
    assert "12 of 12" in (run / "report.html").read_text()


def test_steps_that_the_file_lacks_stand_where_they_belong() -> None:
    def step(number: int, tokens: int) -> StepMetrics:
        return StepMetrics(
            step=number, epoch=1, loss=number, learning_rate=1, grad_norm=1, trained_tokens=tokens, elapsed=tokens,
            tokens_per_second=1,
        )  # fmt: skip

    known = [step(number, 0) for number in range(1, 7)]
    events: list[Event] = [Note(text="one"), step(2, 20), Note(text="two"), step(5, 50), Note(text="three")]
    filled = with_steps(events, known)
    assert [e.step if isinstance(e, StepMetrics) else e.text for e in filled] == [
        "one", 1, 2, "two", 3, 4, 5, "three", 6,
    ]  # fmt: skip
    assert [e.trained_tokens for e in filled if isinstance(e, StepMetrics)] == [0, 20, 20, 20, 50, 50]
    assert with_steps(events, []) == events and with_steps(filled, known) == filled


def test_nearly_equal_rows_are_told_with_the_data_and_on_the_page(options: dict[str, Any]) -> None:
    """Of the six rows one repeats another, and one is another but for its last word."""
    run = fine_tune(TrainConfig(**options | {"max_steps": 1, "epochs": 1})).output
    [data] = [event for event in read_events(run / "metrics.jsonl") if isinstance(event, DataSummary)]
    assert (data.rows, data.repeated, data.near, data.near_of) == (6, 1, 1, 5)
    page = (run / "report.html").read_text()
    assert "nearly equal to one" in page

"""Events as lines: every kind comes back as it was, and a reader of today reads the files of other days."""

import json
from pathlib import Path

import pytest

from halfbyte.runs.events import (
    VERSION,
    Begin,
    Checkpoint,
    DataSummary,
    End,
    Evaluation,
    Event,
    Header,
    Note,
    Progress,
    Sample,
    Stage,
    StepMetrics,
    from_lines,
    to_line,
)
from halfbyte.runs.metrics import MetricsFile, read_events


def step(number: int) -> StepMetrics:
    return StepMetrics(
        step=number,
        epoch=number / 4,
        loss=5.0 - number / 8,
        learning_rate=1e-3,
        grad_norm=0.1,
        trained_tokens=10 * number,
        tokens_per_second=20.5,
        elapsed=number / 2,
    )


EVENTS: list[Event] = [
    Stage(name="model", text="Loading m"),
    Progress(done=1, total=3, unit="rows"),
    Note(text="13 examples: “ü”\n第二行"),
    DataSummary(examples=13, rows=13, tokens=99, trained_tokens=20, left_out={"no answer": 1}),
    Begin(step=0, total_steps=4),
    step(1),
    Evaluation(step=1, figures={"loss": 0.25}),
    Sample(step=1, prompt="Hi", answer="Hello\n"),
    Checkpoint(step=1, folder="checkpoints/step-000001"),
    step(2),
    End(step=2, reason="interrupted"),
]


def test_there_is_an_example_of_every_kind() -> None:
    assert {type(event) for event in EVENTS} | {Header} == set(Event.__subclasses__())


@pytest.mark.parametrize("event", EVENTS, ids=lambda event: type(event).__name__)
def test_an_event_is_one_line_and_comes_back(event: Event) -> None:
    line = to_line(event)
    assert "\n" not in line
    assert list(from_lines([line])) == [event]
    assert json.loads(line)["kind"] == line.split('"')[3]  # so that a line can be told by its beginning


def test_unknown_kinds_and_fields_are_left_out() -> None:
    known = json.loads(to_line(step(1))) | {"power": 17}
    lines = [json.dumps(known), '{"kind": "weather", "step": 1}', "not JSON", "[1]"]
    assert list(from_lines(lines)) == [step(1)]


def test_a_file_of_a_newer_version_is_told() -> None:
    newer = f'{{"kind": "header", "version": {VERSION + 1}, "halfbyte": "9.0"}}'
    note, first = from_lines([newer, to_line(step(1))], "metrics.jsonl")
    assert isinstance(note, Note) and "metrics.jsonl was written by a newer halfbyte (9.0)" in note.text
    assert first == step(1)
    assert list(from_lines([to_line(Header())])) == []


def test_the_file_has_what_was_told_before_it_was_opened_and_not_what_passes_by(tmp_path: Path) -> None:
    file = MetricsFile()
    for event in EVENTS[:3]:
        file(event)
    assert file.open(tmp_path / "metrics.jsonl") == []
    for event in EVENTS[3:]:
        file(event)
    assert json.loads((tmp_path / "metrics.jsonl").read_text().splitlines()[0])["kind"] == "header"
    assert read_events(tmp_path / "metrics.jsonl") == EVENTS[2:]


def test_going_on_takes_later_steps_out_and_keeps_what_was_told_at_this_one(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    first = MetricsFile()
    first.open(path)
    for event in EVENTS[3:]:
        first(event)
    with path.open("a") as stream:
        stream.write('{"kind": "step", "step": 3, "epo')  # as a killed process may leave it
    second = MetricsFile()
    second(Note(text="Going on"))
    assert second.open(path, 1) == [step(1)]
    second(step(2))
    assert read_events(path) == [*EVENTS[3:9], Note(text="Going on"), step(2)]

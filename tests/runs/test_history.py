"""Runs as their folders tell of them: what became of them, and what is said where something is damaged or not there."""

import json
import math
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml

from halfbyte.errors import InputError
from halfbyte.locks import is_locked, lock
from halfbyte.runs.config import TrainConfig
from halfbyte.runs.differences import differing, given
from halfbyte.runs.events import Begin, Checkpoint, End, Evaluation, Event, Header, Note, Sample, StepMetrics, to_line
from halfbyte.runs.folder import VERSION, RunFolder
from halfbyte.runs.history import find_runs, is_run, rate, read_run
from halfbyte.runs.report.page import compare_page, report_page


def step(number: int, loss: float = 1.0) -> StepMetrics:
    return StepMetrics(
        step=number, epoch=number / 4, loss=loss, learning_rate=1e-3, grad_norm=0.1, trained_tokens=10 * number,
        tokens_per_second=20.5, elapsed=number / 2, memory_bytes=2**20 + number,
    )  # fmt: skip


def write(path: Path, *events: Event, **options: Any) -> RunFolder:
    """A run folder that tells ``events``."""
    folder = RunFolder(path)
    path.mkdir(parents=True)
    config = TrainConfig(**({"model": "user/m", "data": "-", "output": path} | options))
    config.save(folder.config)
    about = {"version": VERSION, "begun": "2026-01-02T03:04:05+00:00", "circumstances": {"versions": {"torch": "2"}}}
    folder.about.write_text(json.dumps(about))
    folder.metrics.write_text("".join(to_line(event) + "\n" for event in (Header(), *events)))
    return folder


MADE = [Begin(step=0, total_steps=20), *(step(number, 20 / number) for number in range(1, 13))]


def test_a_run_is_what_its_files_say(tmp_path: Path) -> None:
    samples = [Sample(step=at, prompt="q", answer=f"a{at}") for at in (12, 0)]
    write(tmp_path / "run", Note(text="one"), *MADE, Evaluation(step=12, figures={"loss": 0.5}), *samples,
          Note(text="one"), End(step=12, reason="interrupted"), rank=8)  # fmt: skip
    run = read_run(tmp_path / "run")
    assert (run.state, run.step, run.total_steps, run.seconds) == ("interrupted", 12, 20, 6.0)
    assert run.loss == pytest.approx(sum(20 / number for number in range(3, 13)) / 10)
    assert run.peak_memory == 2**20 + 12 and run.notes == ["one"]
    assert [sample.answer for sample in run.samples["q"]] == ["a0", "a12"]
    assert run.options["rank"] == 8 and run.circumstances == {"versions": {"torch": "2"}}
    assert run.begun is not None and run.begun.timestamp() == 1767323045
    assert run.problems == []


def test_the_rate_is_that_of_the_steps_alone() -> None:
    made = [step(1), step(2).model_copy(update={"tokens_per_second": 41.0}), step(3)]
    later = [one.model_copy(update={"elapsed": one.elapsed + 1000}) for one in made]  # 1000 s of evaluations
    assert rate(made) == rate(later) == pytest.approx(30 / (10 / 20.5 + 10 / 41 + 10 / 20.5))
    assert rate([]) is None


ENDS: dict[str, tuple[list[Event], str]] = {
    "an interrupt": ([*MADE, End(step=12, reason="interrupted")], "interrupted"),
    "an error": ([*MADE, End(step=12, reason="failed", error="It diverged.")], "failed"),
    "none": (MADE, "killed"),
    "none after going on": ([*MADE, End(step=12, reason="failed"), Begin(step=10, total_steps=20)], "killed"),
    "a kill between the last step and the results": ([*MADE, End(step=12, reason="finished")], "killed"),
    "nothing but its folder": ([], "killed"),
}


@pytest.mark.parametrize(("events", "state"), ENDS.values(), ids=ENDS.keys())
def test_what_became_of_a_run_is_known(events: list[Event], state: str, tmp_path: Path) -> None:
    folder = write(tmp_path / "run", *events)
    assert read_run(folder.path).state == read_run(folder.path, short=True).state == state
    with lock(folder.lock):
        assert read_run(folder.path).state == "running"
    folder.lock.write_text("123\n")  # as a killed process leaves it
    assert read_run(folder.path).state == state
    assert folder.lock.read_text() == "123\n"
    folder.summary.write_text("{}")
    assert read_run(folder.path).state == "finished"


def test_a_lock_of_another_process_is_seen_and_a_look_does_not_take_it(tmp_path: Path) -> None:
    path = tmp_path / ".lock"
    script = (
        "import sys; from pathlib import Path; from halfbyte.locks import lock\n"
        "with lock(Path(sys.argv[1])): print('held', flush=True); input()"
    )
    command = [sys.executable, "-c", script, path]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as other:
        assert other.stdout is not None and other.stdout.readline() == "held\n"
        assert is_locked(path) and is_locked(path)
        other.communicate("\n")
    assert not is_locked(path)
    assert not path.exists()


def test_a_short_reading_says_the_same_of_step_loss_and_evaluation(tmp_path: Path) -> None:
    events = [*MADE, Evaluation(step=12, figures={"loss": 0.5}), End(step=12, reason="interrupted")]
    folder = write(tmp_path / "run", *events)
    whole, short = read_run(folder.path), read_run(folder.path, short=True)
    assert len(short.steps) == 1
    for name in ("state", "step", "total_steps", "seconds", "evaluations", "options"):
        assert getattr(whole, name) == getattr(short, name)
    assert whole.loss == pytest.approx(short.loss)


def test_a_step_that_was_made_again_counts_once(tmp_path: Path) -> None:
    folder = write(tmp_path / "run", *MADE, step(12, 7.0), step(11, 8.0))
    run = read_run(folder.path)
    assert [one.step for one in run.steps] == list(range(1, 13))
    assert [one.loss for one in run.steps[-2:]] == [8.0, 7.0]


@pytest.mark.parametrize("header", [True, False])
def test_a_run_whose_metrics_have_no_lines_can_be_looked_at(header: bool, tmp_path: Path) -> None:
    write(tmp_path / "run", rank=8)
    (tmp_path / "run/metrics.jsonl").write_text(to_line(Header()) + "\n" if header else "")
    for short in (True, False):
        run = read_run(tmp_path / "run", short=short)
        assert (run.state, run.events, run.step, run.loss, run.problems) == ("killed", [], 0, None, [])
    assert "There is no step yet." in report_page(run)
    assert "broken off" in compare_page([("one", run), ("two", run)])


def test_checkpoints_are_those_that_are_there(tmp_path: Path) -> None:
    folder = write(tmp_path / "run", *(Checkpoint(step=at, folder=f"checkpoints/step-{at:06d}") for at in (5, 10, 15)))
    (folder.checkpoints / "step-000010").mkdir(parents=True)
    assert [one.step for one in read_run(folder.path).checkpoints] == [10]


def test_damaged_lines_cost_themselves_and_are_counted(tmp_path: Path) -> None:
    folder = write(tmp_path / "run", *MADE)
    lines = folder.metrics.read_bytes().split(b"\n")
    lines[4] = lines[4][:30]
    lines[6] = b"\xff\xfe\x00" + lines[6]
    lines[-1] = b'{"kind":"step","step":13,"ep'  # torn at its end
    folder.metrics.write_bytes(b"\n".join(lines))
    run = read_run(folder.path)
    assert [one.step for one in run.steps] == [1, 2, 4, 6, 7, 8, 9, 10, 11, 12]
    assert run.problems == ["metrics.jsonl is damaged: 2 lines of 14 cannot be read."]


DAMAGE = {
    "metrics.jsonl": (None, "metrics.jsonl cannot be read (No such file or directory), so there are no curves."),
    "config.yaml": ("rank: [", "config.yaml is left out: this is not YAML (line 1)."),
    "run.json": ("{", "run.json cannot be read (it is damaged) and is left out."),
    "summary.json": ("[1]", "summary.json is damaged and is left out."),
}


@pytest.mark.parametrize("name", DAMAGE)
def test_each_damaged_file_is_one_sentence_and_the_others_are_read(name: str, tmp_path: Path) -> None:
    folder = write(tmp_path / "run", *MADE)
    content, sentence = DAMAGE[name]
    (folder.path / name).unlink(missing_ok=True)
    if content is not None:
        (folder.path / name).write_text(content)
    run = read_run(folder.path)
    assert run.problems == [sentence]
    assert bool(run.steps) == (name != "metrics.jsonl") and bool(run.options) == (name != "config.yaml")


@pytest.mark.parametrize("name", ["metrics.jsonl", "config.yaml", "run.json", "summary.json"])
@pytest.mark.parametrize(
    "content", [b"[" * 200_000 + b"\n", b"\0" * 1000, b"a: 2020-99-99\n", b"!!bool x\n", b"{}\n", b"\xff\xfe{\n"]
)
def test_whatever_stands_in_a_file_the_others_are_read(name: str, content: bytes, tmp_path: Path) -> None:
    folder = write(tmp_path / "run", *MADE)
    (folder.path / name).write_bytes(content)
    for short in (False, True):
        run = read_run(folder.path, short=short)
        assert bool(run.steps) == (name != "metrics.jsonl") and (bool(run.options) == (name != "config.yaml"))
    assert report_page(run)


def test_numbers_beyond_all_counts_are_drawn_and_told(tmp_path: Path) -> None:
    folder = write(tmp_path / "run", *MADE, max_grad_norm=0.5)
    folder.config.write_text(f"max_grad_norm: {10**400}\n")
    huge = step(13).model_dump() | {"step": 10**400}
    most = step(14).model_dump() | {"memory_bytes": 10**30, "trained_tokens": 10**400}
    long = {"kind": "checkpoint", "step": 9, "folder": "x" * 5000}
    with folder.metrics.open("a") as file:
        file.write("".join(json.dumps(one) + "\n" for one in (huge, most, long)))
    folder.summary.write_text(json.dumps({"loss": 10**400, "peak_memory_bytes": 10**400, "adapter_step": 10**400}))
    run = read_run(folder.path)
    assert run.step == 12 and run.loss == math.inf and run.checkpoints == []
    assert "infinite" in report_page(run) and compare_page([("a", run), ("b", run)])


def test_what_may_not_be_looked_at_is_no_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("closed", "open"):
        write(tmp_path / name, *MADE)
    stat = os.stat

    def refused(path: Any, *args: Any, **options: Any) -> Any:
        if "/closed/" in str(path):
            raise PermissionError(13, "Permission denied", str(path))
        return stat(path, *args, **options)

    monkeypatch.setattr(os, "stat", refused)
    assert list(find_runs(tmp_path)) == [tmp_path / "open"]
    assert not is_run(tmp_path / ("x" * 5000))


def test_a_run_of_an_older_halfbyte_is_read_and_said_and_one_of_a_newer_is_not_read(tmp_path: Path) -> None:
    folder = write(tmp_path / "run", *MADE)
    folder.about.unlink()
    run = read_run(folder.path)
    assert run.problems == ["run.json is missing (of halfbyte 0.1.0 there is none)."] and run.step == 12
    folder.about.write_text(json.dumps({"version": VERSION + 1}))
    with pytest.raises(InputError, match=rf"run of a newer halfbyte \(layout {VERSION + 1}\); look at it with that"):
        read_run(folder.path)


def test_metrics_of_a_newer_halfbyte_are_read_as_far_as_they_are_known_and_said(tmp_path: Path) -> None:
    folder = write(tmp_path / "run")
    lines = [Header(version=99, halfbyte="9.0"), *MADE]
    folder.metrics.write_text("".join(f"{to_line(line)}\n" for line in lines) + '{"kind":"weather"}\n')
    for short in (False, True):
        run = read_run(folder.path, short=short)
        assert run.step == 12 and run.notes == []
        assert [problem[:54] for problem in run.problems] == ["metrics.jsonl was written by a newer halfbyte (9.0): w"]


def test_a_folder_that_is_no_run_is_told_with_what_is_in_it(tmp_path: Path) -> None:
    for path, sentence in (
        (tmp_path / "no", "is not there; name the folder of a run"),
        (tmp_path, r"is no run folder: it has no run.json and no metrics.jsonl; name a folder that halfbyte train"),
    ):
        with pytest.raises(InputError, match=sentence):
            read_run(path)
    write(tmp_path / "a/b")
    with pytest.raises(InputError, match=r"it holds 1 run: name one, such as \S+a/b"):
        read_run(tmp_path)
    with pytest.raises(InputError, match="is a file"):
        read_run(tmp_path / "a/b/config.yaml")


def test_runs_are_found_three_folders_deep_and_not_through_links(tmp_path: Path) -> None:
    for name in ("b", "a/c", "a/d/e", "a/d/f/g", ".hidden/h", "b/checkpoints/i"):
        write(tmp_path / name)
    (tmp_path / "link").symlink_to(tmp_path / "a")
    assert [str(path.relative_to(tmp_path)) for path in find_runs(tmp_path)] == ["a/c", "a/d/e", "b"]
    assert list(find_runs(tmp_path / "b")) == [tmp_path / "b"] and is_run(tmp_path / "b")


CHOICES: list[dict[str, Any]] = [
    {},
    {"preset": "quick"},
    {"preset": "paper-33b", "learning_rate": 2e-4},  # the paper's for smaller models, given
    {"preset": "quick", "method": "dpo", "beta": 0.2, "lora_dropout": 0.1},
    {"method": "kto", "rank": 8, "lora_alpha": 16},
    {"quant_type": "int8", "seed": 3, "target_modules": ["q_proj"]},
    {"quant_type": "none", "compute_dtype": "float32", "max_steps": 7, "memory": "3GiB"},
    {"quant_type": "nf4", "double_quant": False, "blocksize": 128, "eval_share": 0.1},
]


@pytest.mark.parametrize("choice", CHOICES, ids=lambda choice: " ".join(choice) or "defaults")
def test_what_was_given_alone_makes_the_same_configuration(choice: dict[str, Any], tmp_path: Path) -> None:
    config = TrainConfig(model="user/m", data="-", output=tmp_path / "o", **choice)
    config.save(tmp_path / "config.yaml")
    told = given(yaml.safe_load((tmp_path / "config.yaml").read_text()))
    assert TrainConfig(**told) == config
    usual = [("lora_alpha", 16), ("quant_type", "nf4")]
    assert set(told) - {"model", "data", "output"} == {name for name in choice if (name, choice[name]) not in usual}


def test_an_option_that_this_version_does_not_know_is_told() -> None:
    assert given({"model": "m", "rank": 64, "warp": 9}) == {"model": "m", "warp": 9}
    assert given({"quant_type": "nf9", "blocksize": 64})["quant_type"] == "nf9"


def test_options_differ_where_one_run_has_another_value_or_none() -> None:
    runs = [{"rank": 8, "seed": 0, "output": "a"}, {"rank": 16, "seed": 0, "output": "b"}, {"rank": 8, "beta": 0.1}]
    assert differing(runs) == {"rank": [8, 16, 8], "seed": [0, 0, None], "beta": [None, None, 0.1]}
    assert differing([{"a": math.pi}, {"a": math.pi}]) == {}

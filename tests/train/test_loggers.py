"""Loggers: each hears every step and evaluation, and a run that was killed and gone on with is one run there too.

Of these packages only TensorBoard is among those that the tests install; the others' tests run where they are.
"""

import json
import math
import os
import signal
import struct
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from halfbyte.errors import InputError
from halfbyte.runs.events import Checkpoint, Evaluation, Event, Note, StepMetrics
from halfbyte.runs.metrics import read_events
from halfbyte.train import Interrupted, TrainConfig, fine_tune

Curve = list[tuple[int, float]]


@pytest.fixture
def options(tiny_model_folder: Path, tmp_path: Path) -> dict[str, Any]:
    rows = tmp_path / "rows.jsonl"
    lines = [{"instruction": f"{'really ' * (i % 4)}{i}?", "output": ["yes", "no, never"][i % 2]} for i in range(12)]
    rows.write_text("".join(json.dumps(line) + "\n" for line in lines))
    return {
        "model": str(tiny_model_folder), "data": str(rows), "eval_data": str(rows), "output": tmp_path / "capitals",
        "preset": "quick", "batch_size": 2, "max_steps": 8, "eval_steps": 2, "save_steps": 3, "learning_rate": 1e-2,
        "eval_samples": 0, "sample_prompts": [],
    }  # fmt: skip


def interrupted_killed_and_gone_on_with(options: dict[str, Any]) -> Path:
    """Interrupt a run, which then makes a step more, let it die in step 8, and end it from the checkpoint of step 6."""

    def interrupt(event: Event) -> None:
        if isinstance(event, StepMetrics) and event.step == 4:
            os.kill(os.getpid(), signal.SIGINT)

    def die(event: Event) -> None:
        if isinstance(event, StepMetrics) and event.step == 8:
            raise RuntimeError("the machine is gone")

    with pytest.raises(Interrupted):
        fine_tune(TrainConfig(**options), interrupt)
    with pytest.raises(RuntimeError, match="machine is gone"):
        fine_tune(TrainConfig(**options, resume=True), die)
    run = fine_tune(TrainConfig(**options, resume=True))
    checkpoints = [e.step for e in read_events(run.output / "metrics.jsonl") if isinstance(e, Checkpoint)]
    assert checkpoints == [3, 5, 6, 8]  # so 7 and 8 were made again
    return run.output


def made(run: Path) -> tuple[Curve, Curve]:
    """The losses of a run's steps and of its evaluations, as its own file has them."""
    events = read_events(run / "metrics.jsonl")
    steps = [(event.step, event.loss) for event in events if isinstance(event, StepMetrics)]
    evaluations = [(event.step, event.figures["loss"]) for event in events if isinstance(event, Evaluation)]
    assert [step for step, _ in steps] == [*range(1, 9)] and [step for step, _ in evaluations] == [0, 2, 4, 6, 8]
    return steps, evaluations


def close(curve: Curve) -> list[Any]:
    return [(step, pytest.approx(value, rel=1e-6)) for step, value in curve]


def name_of(run: Path) -> tuple[str, str]:
    """The run's id, and the name that it reports under."""
    own = json.loads((run / "run.json").read_text())["id"]
    name = f"capitals-{own[:6]}"
    notes = [event.text for event in read_events(run / "metrics.jsonl") if isinstance(event, Note)]
    assert sum(text.endswith(f" as {name}") for text in notes) == 3  # at each of its beginnings
    return own, name


def test_tensorboard_shows_one_curve(options: dict[str, Any]) -> None:
    pytest.importorskip("tensorboard")
    from tensorboard.backend.event_processing.event_multiplexer import EventMultiplexer

    run = interrupted_killed_and_gone_on_with(options | {"report_to": "tensorboard"})
    boards = EventMultiplexer().AddRunsFromDirectory(str(run))
    boards.Reload()
    assert list(boards.Runs()) == ["tensorboard"]
    steps, evaluations = made(run)
    for tag, curve in (("train/loss", steps), ("eval/loss", evaluations)):
        assert [(e.step, e.value) for e in boards.Scalars("tensorboard", tag)] == close(curve)
    rates = [event.value for event in boards.Scalars("tensorboard", "train/learning_rate")]
    assert rates == pytest.approx([event.learning_rate for event in step_events(run)], rel=1e-6)
    assert {"train/grad_norm", "eval/token_accuracy"} <= set(boards.GetAccumulator("tensorboard").Tags()["scalars"])
    perplexities = [event.value for event in boards.Scalars("tensorboard", "eval/perplexity")]
    assert perplexities == pytest.approx([math.exp(loss) for _, loss in evaluations], rel=1e-4)


def step_events(run: Path) -> list[StepMetrics]:
    return [event for event in read_events(run / "metrics.jsonl") if isinstance(event, StepMetrics)]


def latest(heard: list[tuple[int, float]]) -> Curve:
    """A curve of which steps were told again after a kill; they are made again to the last bit."""
    by_step: dict[int, set[float]] = {}
    for step, value in heard:
        by_step.setdefault(step, set()).add(value)
    assert all(len(values) == 1 for values in by_step.values())
    return [(step, values.pop()) for step, values in sorted(by_step.items())]


@pytest.mark.filterwarnings("ignore")  # MLflow's own, of its database
def test_mlflow_has_one_run_that_ends_as_ours_did(
    options: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    mlflow = pytest.importorskip("mlflow")
    monkeypatch.setenv("MLFLOW_TRACKING_URI", f"sqlite:///{tmp_path}/mlflow.db")
    own, name = name_of(run := interrupted_killed_and_gone_on_with(options | {"report_to": "mlflow"}))
    [found] = mlflow.search_runs(search_all_experiments=True, output_format="list")
    assert (found.info.run_name, found.info.status) == (name, "FINISHED")
    assert found.data.tags["halfbyte.run"] == own
    assert found.data.params["learning_rate"] == "0.01" and found.data.params["model_type"] == "llama"
    client, (steps, evaluations) = mlflow.MlflowClient(), made(run)
    for metric, curve in (("loss", steps), ("eval_loss", evaluations)):
        heard = [(m.step, m.value) for m in client.get_metric_history(found.info.run_id, metric)]
        assert latest(heard) == close(curve)

    def die(event: Event) -> None:
        if isinstance(event, StepMetrics):
            raise RuntimeError("the machine is gone")

    def interrupt(event: Event) -> None:
        if isinstance(event, StepMetrics) and event.step == 2:
            os.kill(os.getpid(), signal.SIGTERM)

    options |= {"report_to": "mlflow", "overwrite": True}
    for listener, error, status in ((die, RuntimeError, "FAILED"), (interrupt, Interrupted, "KILLED")):
        with pytest.raises(error):
            fine_tune(TrainConfig(**options), listener)
        assert mlflow.active_run() is None
        last = mlflow.search_runs(search_all_experiments=True, output_format="list")[0]
        assert last.info.status == status and last.data.tags["halfbyte.run"] != own


@pytest.mark.filterwarnings("ignore")  # MLflow's own, of its database
def test_mlflow_without_its_server_is_one_sentence(options: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("mlflow")
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "http://127.0.0.1:9")
    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "0")
    with pytest.raises(InputError, match=r"^report_to mlflow cannot begin \(.*\): mend that, or leave mlflow out\.$"):
        fine_tune(TrainConfig(**options, report_to="mlflow"))


def test_trackio_has_one_run(options: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TRACKIO_DIR", str(tmp_path / "trackio"))
    trackio = pytest.importorskip("trackio")
    from trackio import sqlite_storage

    monkeypatch.setattr(sqlite_storage, "TRACKIO_DIR", tmp_path / "trackio")
    _, name = name_of(run := interrupted_killed_and_gone_on_with(options | {"report_to": "trackio"}))
    [found] = trackio.Api().runs("huggingface")
    assert found.name == name and found.config["learning_rate"] == 0.01
    logs = sqlite_storage.SQLiteStorage.get_logs("huggingface", name)
    steps, evaluations = made(run)
    for key, curve in (("train/loss", steps), ("eval/loss", evaluations)):
        assert latest([(log["train/global_step"], log[key]) for log in logs if key in log]) == close(curve)
    assert [log["step"] for log in logs] == [*range(len(logs))]


def records(path: Path) -> Iterator[Any]:
    """The records of a file of W&B, which lie in blocks of 32 KiB as in LevelDB's log: checksum, length, kind."""
    from wandb.proto import wandb_internal_pb2

    content, at, record = path.read_bytes(), 7, b""
    while at + 7 <= len(content):
        if (left := 2**15 - at % 2**15) < 7:
            at += left
            continue
        _, length, kind = struct.unpack_from("<IHB", content, at)
        record += content[at + 7 : at + 7 + length]
        at += 7 + length
        if kind in (1, 4):  # whole, or the last part of one
            yield wandb_internal_pb2.Record.FromString(record)
            record = b""


def test_wandb_offline_has_one_run_that_ends_as_ours_did(
    options: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    wandb = pytest.importorskip("wandb")
    monkeypatch.setenv("WANDB_MODE", "offline")
    monkeypatch.delenv("WANDB_DIR", raising=False)
    own, name = name_of(run := interrupted_killed_and_gone_on_with(options | {"report_to": "wandb"}))
    assert wandb.run is None
    files = sorted((run / "wandb").glob("offline-run-*/*.wandb"), key=lambda file: file.stat().st_mtime)
    sessions = [list(records(file)) for file in files]
    assert [r.run.run_id for s in sessions for r in s if r.WhichOneof("record_type") == "run"] == [own] * 3
    assert [r.run.display_name for s in sessions for r in s if r.WhichOneof("record_type") == "run"] == [name] * 3
    assert [r.exit.exit_code for s in sessions for r in s if r.WhichOneof("record_type") == "exit"] == [130, 1, 0]
    configured = {item.key: item.value_json for r in sessions[0] for item in r.config.update}
    assert json.loads(configured["learning_rate"]) == 0.01 and "peft_config" in configured
    heard = []
    for record in (record for session in sessions for record in session):
        if record.WhichOneof("record_type") == "history":
            heard.append({"/".join(i.nested_key) or i.key: json.loads(i.value_json) for i in record.history.item})
    steps, evaluations = made(run)
    for key, curve in (("train/loss", steps), ("eval/loss", evaluations)):
        assert latest([(log["train/global_step"], log[key]) for log in heard if key in log]) == close(curve)


def test_wandb_without_a_login_is_one_sentence_before_there_is_a_folder(
    options: dict[str, Any], tmp_path: Path
) -> None:
    """In a process of its own: W&B looks at the environment once."""
    pytest.importorskip("wandb")
    environment = {name: value for name, value in os.environ.items() if not name.startswith(("WANDB", "NETRC"))}
    arguments = [f"--{name.replace('_', '-')}={options[name]}" for name in ("model", "data", "output")]
    run = subprocess.run(
        [sys.executable, "-m", "halfbyte", "train", *arguments, "--report-to=wandb"],
        capture_output=True, text=True, env=environment | {"HOME": str(tmp_path)}, cwd=tmp_path, check=False,
    )  # fmt: skip
    assert run.returncode == 2
    assert run.stderr.splitlines()[-1].startswith("Error: report_to wandb has no login: run wandb login, or set")
    assert not options["output"].exists()


@pytest.mark.parametrize("name", ["trackio", "wandb", "mlflow", "tensorboard"])
def test_a_folder_of_that_name_is_no_package(
    name: str, options: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Such as wandb/, which W&B itself makes in the working directory."""
    (tmp_path / name).mkdir()
    monkeypatch.setattr("sys.path", [str(tmp_path)])
    for loaded in (name, "tensorboardX"):
        monkeypatch.delitem(sys.modules, loaded, raising=False)
    with pytest.raises(InputError, match=f"report_to {name} needs a package that is not installed: pip install {name}"):
        fine_tune(TrainConfig(**options, report_to=name))

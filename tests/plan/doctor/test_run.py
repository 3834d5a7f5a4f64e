"""Runs: a real one, broken one way after the other, and metrics of runs that went wrong."""

import json
import math
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
from safetensors.torch import load_file, save_file

from halfbyte.plan.doctor.finding import Finding
from halfbyte.plan.doctor.run import examine
from halfbyte.runs.config import TrainConfig
from halfbyte.runs.events import (
    Begin,
    Checkpoint,
    DataSummary,
    End,
    Evaluation,
    Event,
    Header,
    Note,
    StepMetrics,
    to_line,
)
from halfbyte.runs.folder import RunFolder
from halfbyte.train import fine_tune

MEMORY = 2**34
HERE = {"kernels": "native (avx2)", "threads": 2, "cores": 2, "processes": 1, "memory_bytes": MEMORY}


@pytest.fixture(scope="module")
def trained(tiny_model_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A finished run over the tiny model, with its checkpoints."""
    home = tmp_path_factory.mktemp("trained")
    rows = [{"instruction": f"{number}?", "output": f"the answer is {number % 3}"} for number in range(40)]
    (home / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    config = TrainConfig(
        model=str(tiny_model_folder), data=str(home / "rows.jsonl"), output=home / "run", preset="quick", max_steps=12,
        batch_size=8, learning_rate=1e-2, sample_prompts=[], eval_samples=0, eval_share=0.2, eval_steps=6, keep=2,
        save_steps=6, forgetting_data=str(home / "rows.jsonl"),
    )  # fmt: skip
    return fine_tune(config).output


@pytest.fixture
def run(trained: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(trained, tmp_path / "run"))


def bad(path: Path) -> list[tuple[str, str]]:
    return [(one.what, one.level) for one in examine(path) if one.level in ("warning", "fault")]


def test_a_run_that_learnt_is_well_and_nothing_is_written(run: Path):
    def listing() -> list[tuple[Path, int, int]]:
        return sorted((one, one.stat().st_mtime_ns, one.stat().st_size) for one in [run, *run.rglob("*")])

    before = listing()
    found = {finding.what: finding for finding in examine(run)}
    assert listing() == before
    assert [one for one in found.values() if one.level == "fault"] == []
    assert found["state"].value == "finished: 12 of 12 steps"
    assert found["learnt"].value.startswith("training loss ") or "trained tokens" in found["learnt"].value
    assert found["speed"].value.endswith("trained tokens a second while steps were made")
    assert "→" in found["held-out loss"].value and found["forgot"].value.startswith("loss on general text")


def killed(run: Path) -> None:
    (run / "summary.json").unlink()
    lines = (run / "metrics.jsonl").read_text().splitlines()
    kept = [line for line in lines if '"kind":"end"' not in line]
    (run / "metrics.jsonl").write_text("\n".join(kept) + "\n")


def torn(run: Path) -> None:
    file = run / "metrics.jsonl"
    text = file.read_text()
    file.write_text(text[: len(text) // 2] + '\n{"kind":"st\n' + text[len(text) // 2 :])


def damaged_checkpoint(run: Path) -> None:
    killed(run)
    state = run / "checkpoints" / "step-000012" / "state.json"
    state.write_text(state.read_text()[:-3])


def no_checkpoint(run: Path) -> None:
    killed(run)
    shutil.rmtree(run / "checkpoints")


def no_adapter_learnt(run: Path) -> None:
    file = run / "adapter_model.safetensors"
    tensors = {name: tensor * ("lora_B" not in name) for name, tensor in load_file(file).items()}
    save_file(tensors, file, {"format": "pt"})


def cut_adapter(run: Path) -> None:
    file = run / "adapter_model.safetensors"
    file.write_bytes(file.read_bytes()[:-10])


def no_options(run: Path) -> None:
    (run / "config.yaml").unlink()


BROKEN = {
    killed: ("state", "warning"),
    torn: ("files", "warning"),
    damaged_checkpoint: ("checkpoints", "warning"),
    no_checkpoint: ("checkpoints", "warning"),
    no_adapter_learnt: ("learnt", "fault"),
    cut_adapter: ("weights", "fault"),
    no_options: ("files", "warning"),
}


@pytest.mark.parametrize("breaks", BROKEN, ids=lambda breaks: breaks.__name__)
def test_what_was_broken_of_it_is_told(breaks: Any, run: Path):
    before = bad(run)
    breaks(run)
    assert BROKEN[breaks] in bad(run) and BROKEN[breaks] not in before


def test_a_run_that_goes_on_where_it_can_says_from_where(run: Path):
    killed(run)
    [finding] = [one for one in examine(run) if one.what == "checkpoints"]
    assert finding.level == "ok" and "step-000012 is whole" in finding.value
    [state] = [one for one in examine(run) if one.what == "state"]
    assert state.fix == f"halfbyte resume {run}"


# Metrics of runs that went wrong


def steps(losses: Sequence[float], rate: float = 1e-4, norm: float = 0.5, **more: Any) -> list[Event]:
    return [
        StepMetrics(
            step=number, epoch=number / 50, loss=loss, learning_rate=rate, grad_norm=norm, trained_tokens=500 * number,
            tokens_per_second=500.0, elapsed=float(number), **more,
        )
        for number, loss in enumerate(losses, 1)
    ]  # fmt: skip


def falling(count: int = 40) -> list[float]:
    return [3 * math.exp(-number / 20) + 0.5 for number in range(count)]


def evaluations(name: str, *figures: float) -> list[Event]:
    return [Evaluation(step=10 * number, figures={name: figure}) for number, figure in enumerate(figures)]


def look(
    tmp_path: Path, events: Sequence[Event], here: dict[str, Any] | None = None, state: str = "finished", **options: Any
) -> dict[str, Finding]:
    """Write a run's folder that tells ``events``, and look at it."""
    folder = RunFolder(tmp_path / "run")
    folder.path.mkdir()
    TrainConfig(**({"model": "user/m", "data": "-", "output": folder.path} | options)).save(folder.config)
    folder.about.write_text(json.dumps({"version": 1, "circumstances": HERE | (here or {})}))
    ending = [] if state == "killed" else [End(step=len(events), reason=state, error=options.pop("error", ""))]
    whole = [Header(), Begin(step=0, total_steps=50), *events, *ending]
    folder.metrics.write_text("".join(to_line(event) + "\n" for event in whole))
    if state == "finished":
        folder.summary.write_text("{}")
    found: dict[str, Finding] = {}
    for finding in examine(folder.path):
        if finding.what not in found or finding.level != "ok":
            found[finding.what] = finding
    return found


def test_a_run_that_went_well_has_no_warning(tmp_path: Path):
    events = [*steps(falling()), *evaluations("loss", 3.0, 2.0, 1.5), *evaluations("general_loss", 3.0, 3.05)]
    found = look(tmp_path, events)
    assert {one.level for one in found.values()} == {"ok"}


CASES: dict[str, tuple[list[Event], dict[str, Any], str, str, str]] = {
    "rises": (steps([1.0 + number / 10 for number in range(40)]), {}, "loss", "warning", "rose from"),
    "stays": (steps([2.0] * 40), {}, "learnt", "warning", "stayed as it was"),
    "no rate": (steps([2.0] * 40, rate=0.0), {}, "learnt", "fault", "learning rate was 0"),
    "no gradient": (steps(falling(), norm=0.0), {}, "learnt", "warning", "gradient's norm"),
    "few steps": (steps(falling(3)), {}, "learnt", "note", "3 steps over 1,500 trained tokens"),
    "by heart": (
        [*steps(falling()), *evaluations("loss", 3.0, 1.0, 1.2, 1.5)], {},
        "held-out loss", "warning", "best at step 10",
    ),
    "no help": ([*steps(falling()), *evaluations("loss", 1.0, 1.1)], {}, "held-out loss", "warning", "never lower"),
    "not held out": (steps(falling()), {}, "held-out loss", "note", "not measured"),
    "forgot": ([*steps(falling()), *evaluations("general_loss", 3.0, 3.4)], {}, "forgot", "warning", "rose from 3"),
    "not known": (steps(falling()), {}, "forgot", "note", "not measured"),
    "said": (
        [*steps(falling()), Note(text="It overflows.", step=3, trouble=True)], {},
        "said by the run", "warning", "overflows",
    ),
    "reference": (steps(falling()), {"kernels": "reference"}, "kernels", "warning", "reference"),
    "few threads": (steps(falling()), {"threads": 1}, "threads", "warning", "1 in 1 process, on 2 cores"),
    "many threads": (steps(falling()), {"processes": 2}, "threads", "warning", "4 threads on 2 cores"),
    "all memory": (steps(falling(), memory_bytes=MEMORY), {}, "memory", "warning", "16.0 GiB of the machine's"),
    "unfused": (
        [Note(text="Decoder layers unfused: GPTNeoXLayer is not known"), *steps(falling())], {},
        "decoder layers", "note", "GPTNeoX",
    ),
    "recomputed": (
        [Note(text="Activations of 3 of 4 layers are recomputed: 1 GiB"), *steps(falling())], {},
        "activations", "note", "3 of 4",
    ),
    "sdpa": ([Note(text="Attention sdpa: X does more"), *steps(falling())], {}, "attention", "note", "sdpa"),
    "cut rows": (
        [DataSummary(examples=10, rows=10, tokens=900, trained_tokens=90, truncated=5), *steps(falling())], {},
        "data", "warning", "5 of 10 rows were cut",
    ),
    "left out": (
        [DataSummary(examples=10, rows=9, tokens=90, trained_tokens=9, left_out={"empty": 2}), *steps(falling())], {},
        "data", "note", "2 empty",
    ),
    "evaluates": (
        [step.model_copy(update={"elapsed": 10 * step.elapsed}) for step in steps(falling())], {},
        "beside the steps", "note", "6 min",
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", CASES)
def test_what_went_wrong_is_told(name: str, tmp_path: Path):
    events, here, what, level, said = CASES[name]
    finding = look(tmp_path, events, here)[what]
    assert finding.level == level and said in finding.value, finding
    assert finding.level == "ok" or finding.why


def test_rows_of_many_lengths_in_unsorted_batches_are_told(tmp_path: Path):
    events = [DataSummary(examples=10, rows=10, tokens=900, trained_tokens=90, longest=800), *steps(falling())]
    assert look(tmp_path, events, batch_size=8, group_by_length=False)["padding"].level == "warning"
    shutil.rmtree(tmp_path / "run")
    assert "padding" not in look(tmp_path, events, batch_size=8, group_by_length=True)


def test_a_run_that_diverged_says_so_with_a_lower_rate(tmp_path: Path):
    folder_events = steps(falling())
    found = look(tmp_path, folder_events, state="failed")
    assert found["state"].level == "fault"
    shutil.rmtree(tmp_path / "run")
    events = [
        *folder_events,
        End(step=40, reason="failed", error="Training diverged: the gradient of step 41 is not finite."),
    ]
    found = look(tmp_path, events, state="killed")
    assert found["loss"].level == "fault" and "--learning-rate 2e-05" in found["loss"].fix


def test_a_process_that_had_all_memory_was_most_likely_killed_for_it(tmp_path: Path):
    found = look(
        tmp_path, [*steps(falling(), memory_bytes=MEMORY), Checkpoint(step=40, folder="checkpoints/x")], state="killed"
    )
    assert "most likely killed for it" in found["state"].why
    assert "checkpoints/x was written" in found["checkpoints"].value

"""``halfbyte train`` under torchrun: one writer, one result, and a stop and an error that all share."""

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

pytestmark = pytest.mark.slow


@pytest.fixture
def rows(tmp_path: Path) -> Path:
    file = tmp_path / "rows.jsonl"
    file.write_text("".join(f'{{"prompt": "{i} is", "completion": " {i % 3}"}}\n' for i in range(16)))
    return file


def start(processes: int, model: Path, rows: Path, output: Path, *flags: str) -> subprocess.Popen[str]:
    program = ["-c", "from halfbyte.cli import main; main()"]
    if processes > 1:
        script = output.parent / "start.py"
        script.write_text("from halfbyte.cli import main; main()")
        program = ["-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={processes}", str(script)]
    options = {
        "model": model,
        "data": rows,
        "output": output,
        "rank": 4,
        "learning-rate": 1e-2,
        "lora-dropout": 0,
        "gradient-accumulation-steps": 1,
        "compute-dtype": "float32",
    }
    arguments = [part for name, value in options.items() for part in (f"--{name}", str(value))]
    command = [sys.executable, *program, "train", *arguments, *flags]
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


def events(run: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]


def steps(run: Path) -> list[int]:
    return [event["step"] for event in events(run) if event["kind"] == "step"]


def test_two_processes_leave_what_one_with_twice_the_batch_leaves(
    tiny_model_folder: Path, rows: Path, tmp_path: Path
) -> None:
    results = {}
    for processes, batch in ((1, "4"), (2, "2")):
        output = tmp_path / f"run{processes}"
        flags = ["--batch-size", batch, "--max-steps", "4", "--optimizer", "adamw_torch"]
        run = start(processes, tiny_model_folder, rows, output, *flags)
        out, err = run.communicate()
        assert run.returncode == 0, err
        assert out.count("The adapter is in") == 1
        assert steps(output) == [1, 2, 3, 4]
        results[processes] = output
    assert {file.name for file in results[1].iterdir()} == {file.name for file in results[2].iterdir()}
    kinds = [[event["kind"] for event in events(folder) if event["kind"] != "note"] for folder in results.values()]
    assert kinds[0] == kinds[1]  # each is told once
    page = (results[2] / "report.html").read_text()
    assert page.count("<!doctype html>") == 1 and "4 of 4" in page and ">finished<" in page
    assert '<th scope="row">processes</th><td><bdi>2</bdi></td>' in page.replace("\n", "")
    one, two = (load_file(folder / "adapter_model.safetensors") for folder in results.values())
    for name in one:
        torch.testing.assert_close(one[name], two[name], rtol=1e-3, atol=1e-4)  # sums in another order
    summaries = [json.loads((folder / "summary.json").read_text()) for folder in results.values()]
    assert summaries[0]["trained_tokens"] == summaries[1]["trained_tokens"]


@pytest.mark.parametrize("count", [10, 13])
def test_two_processes_evaluate_a_classifier_as_one_does(
    count: int, task_folder: Callable[[str], Path], tmp_path: Path
) -> None:
    data = tmp_path / "labelled.jsonl"
    lines = [{"text": "very " * (i % 5) + f"word {i}", "label": "abc"[i % 3]} for i in range(count)]
    data.write_text("".join(json.dumps(line) + "\n" for line in lines))
    figures = []
    for processes, batch in ((1, "4"), (2, "2")):
        output = tmp_path / f"run{processes}"
        flags = ["--batch-size", batch, "--max-steps", "1", "--eval-data", str(data), "--task", "classify"]
        run = start(processes, task_folder("roberta"), data, output, *flags)
        _, err = run.communicate()
        assert run.returncode == 0, err
        told = [json.loads(line) for line in (output / "metrics.jsonl").read_text().splitlines()]
        figures.append(next(event["figures"] for event in told if event["kind"] == "evaluation"))
    assert figures[1] == pytest.approx(figures[0], rel=1e-4)


@pytest.mark.parametrize("count", [9, 14])  # of the last batches one is repeated in part, or as a whole
def test_evaluations_of_two_processes_have_the_figures_of_one(
    count: int, tiny_model_folder: Path, rows: Path, tmp_path: Path
) -> None:
    evaluated = tmp_path / "evaluated.jsonl"
    evaluated.write_text("".join((rows.read_text().splitlines(keepends=True) * 2)[:count]))
    figures, samples = {}, {}
    for processes in (1, 2):
        output = tmp_path / f"run{processes}"
        flags = [
            "--max-steps",
            "12",
            "--optimizer",
            "adamw_torch",
            "--eval-data",
            str(evaluated),
            "--eval-samples",
            "5",
        ]
        flags += ["--batch-size", str(4 // processes), "--forgetting-data", "builtin", "--max-new-tokens", "8"]
        run = start(processes, tiny_model_folder, rows, output, *flags)
        _, err = run.communicate()
        assert run.returncode == 0, err
        told = [json.loads(line) for line in (output / "metrics.jsonl").read_text().splitlines()]
        figures[processes] = [event["figures"] for event in told if event["kind"] == "evaluation"]
        samples[processes] = [event for event in told if event["kind"] == "sample"]
    assert len(figures[1]) == 2 and {"rouge_l", "general_loss", "token_accuracy"} <= figures[1][0].keys()
    for one, two in zip(figures[1], figures[2], strict=True):
        assert one == pytest.approx(two, rel=1e-4)
    assert samples[1][:3] == samples[2][:3] and len(samples[1]) == len(samples[2]) == 6


def test_a_signal_to_one_process_stops_both_with_one_checkpoint(
    tiny_model_folder: Path, rows: Path, tmp_path: Path
) -> None:
    output = tmp_path / "run"
    flags = ["--batch-size", "2", "--max-steps", "500", "--save-steps", "1000"]
    run = start(2, tiny_model_folder, rows, output, *flags)
    metrics = output / "metrics.jsonl"
    deadline = time.monotonic() + 120
    while not (metrics.exists() and len(steps(output)) > 1) and time.monotonic() < deadline:
        time.sleep(0.05)
    children = Path(f"/proc/{run.pid}/task/{run.pid}/children").read_text().split()
    workers = [int(pid) for pid in children]
    assert len(workers) == 2
    os.kill(workers[1], signal.SIGTERM)
    _, err = run.communicate(timeout=120)
    assert run.returncode != 0
    (checkpoint,) = (output / "checkpoints").iterdir()
    assert checkpoint.name == f"step-{steps(output)[-1]:06d}"
    assert err.count("Go on with:") == 1 and " resume " in err
    assert ">interrupted<" in (output / "report.html").read_text()


def test_an_error_is_told_once_and_nothing_is_left(tiny_model_folder: Path, tmp_path: Path) -> None:
    run = start(2, tiny_model_folder, tmp_path / "none.jsonl", tmp_path / "run")
    _, err = run.communicate()
    assert run.returncode != 0
    assert err.count("Error: The data file") == 1
    assert not (tmp_path / "run").exists()

"""``--ray``: the run of one process, by two workers of a Ray cluster on this machine."""

import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(importlib.util.find_spec("ray") is None, reason="Ray is not installed (extra ray)"),
]


def train(model: Path, data: Path, output: Path, *flags: str) -> subprocess.CompletedProcess[str]:
    options = {"model": model, "data": data, "output": output, "max-steps": 5, "compute-dtype": "float32"}
    options |= {"lora-dropout": 0, "rank": 4, "learning-rate": 1e-2, "gradient-accumulation-steps": 1}
    given = [part for name, value in options.items() for part in (f"--{name}", str(value))]
    environment = {name: value for name, value in os.environ.items() if name != "OMP_NUM_THREADS"}
    command = [sys.executable, "-m", "halfbyte", "train", *given, *flags]
    return subprocess.run(command, capture_output=True, text=True, check=False, env=environment, timeout=500)


def losses(run: Path) -> list[float]:
    events = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    return [event["loss"] for event in events if event["kind"] == "step"]


def test_two_workers_give_the_losses_of_one_process_and_an_error_is_a_sentence(
    tiny_model_folder: Path, tmp_path: Path
) -> None:
    data = tmp_path / "rows.jsonl"
    data.write_text("".join(f'{{"prompt": "{i} is", "completion": " {"yes " * (i % 4)}{i % 3}"}}\n' for i in range(13)))
    one = train(tiny_model_folder, data, tmp_path / "one", "--batch-size", "4")
    assert one.returncode == 0, one.stderr
    ray = ("--ray", "local", "--processes", "2", "--batch-size", "2")
    two = train(tiny_model_folder, data, tmp_path / "two", *ray)
    assert two.returncode == 0, two.stderr
    assert losses(tmp_path / "two") == pytest.approx(losses(tmp_path / "one"), rel=2e-5)
    assert two.stderr.count("step 5/5") == 1
    assert not list(tmp_path.glob(".ray-*"))
    again = train(tiny_model_folder, data, tmp_path / "two", *ray)
    assert again.returncode == 2
    assert "already holds a run" in again.stderr and "Traceback" not in again.stderr

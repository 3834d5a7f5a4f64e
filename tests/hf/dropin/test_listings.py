"""Listings of QLoRA tutorials (listings/), not a letter changed, on this machine's processor.

What models and data are called there are folders beside the script here. The fifth listing got a model to speak of, and
the sixth the data and the ``trainer`` that it left to its reader; there "..." among a call's arguments is left out.
"""

import json
import runpy
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

LISTINGS = sorted((Path(__file__).parent / "listings").glob("*.txt"))
MODELS = ("meta-llama/Llama-3.1-8B", "meta-llama/Llama-2-65b-hf", "meta-llama/Llama-2-7b-hf")


@pytest.fixture
def folder(tmp_path: Path, tiny_model_folder: Path) -> Path:
    """A folder with the listings as scripts, and what they open."""
    for listing in LISTINGS:
        (tmp_path / f"{listing.stem}.py").write_text(listing.read_text(encoding="utf-8"), encoding="utf-8")
    for name in MODELS:
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).symlink_to(tiny_model_folder, target_is_directory=True)
    rows = [
        {"instruction": f"What is {i}?", "input": "Really?" if i % 3 == 0 else "", "output": f"It is {i}."}
        for i in range(40)
    ]
    data = tmp_path / "tatsu-lab" / "alpaca"
    data.mkdir(parents=True)
    (data / "train.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return tmp_path


def check(folder: Path) -> None:
    """The adapter that the second listing trained is in its folder, and has been trained."""
    weights = load_file(folder / "qlora-adapter" / "adapter_model.safetensors")
    assert len(weights) == 2 * 7 * 2 and any(weights[name].any() for name in weights if "lora_B" in name)
    assert (folder / "qlora-output" / "checkpoint-3" / "adapter_model.safetensors").is_file()


@pytest.mark.filterwarnings("ignore:Merge lora module:UserWarning")
def test_the_whole_way_of_a_tutorial(installed: None, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(folder)
    with torch.random.fork_rng():
        for number in (2, 3, 4, 6):
            runpy.run_path(next(str(path) for path in folder.glob(f"{number}_*.py")), run_name="__main__")
    check(folder)
    merged = load_file(folder / "merged-model" / "model.safetensors")
    assert merged["model.layers.0.mlp.up_proj.weight"].dtype == torch.bfloat16
    assert (folder / "my-qlora-adapter" / "adapter_model.safetensors").is_file()


@pytest.mark.slow
def test_every_listing_runs_as_a_script(folder: Path) -> None:
    said: dict[str, Any] = {}
    for script in sorted(folder.glob("?_*.py")):
        done = subprocess.run(
            [sys.executable, "-m", "halfbyte", "run", script.name],
            cwd=folder, capture_output=True, text=True, timeout=600, check=False,
        )  # fmt: skip
        assert done.returncode == 0, done.stderr
        assert "halfbyte:" not in done.stdout
        said[script.name] = [line for line in done.stderr.splitlines() if line.startswith("halfbyte: ")]
        assert len(said[script.name]) == len(set(said[script.name]))
    check(folder)
    assert any("max_length" in line for line in said["2_training.py"])
    assert any("float16" in line for line in said["7_maths.py"])

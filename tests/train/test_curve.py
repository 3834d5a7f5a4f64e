"""A whole training curve on the fused native path beside the same on the plain one."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from halfbyte.hf.layers import prepare
from halfbyte.kernels import native, use_provider
from halfbyte.train import TrainConfig, fine_tune

STEPS = 60
DTYPES = ("float32", "bfloat16")


@pytest.fixture
def options(tiny_model_folder: Path, tmp_path: Path) -> dict[str, Any]:
    answers = ["yes", "no, never", "perhaps on Sunday", "ask again"]
    rows = [{"prompt": f"{'really ' * (i % 3)}{i % 4}? ", "completion": answers[i % 4]} for i in range(4 * STEPS)]
    data = tmp_path / "rows.jsonl"
    data.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return {
        "model": str(tiny_model_folder), "data": str(data), "preset": "quick", "batch_size": 4, "learning_rate": 1e-2,
        "sample_prompts": [],
    }  # fmt: skip


def curve(options: dict[str, Any], output: Path, dtype: str) -> Tensor:
    """The loss of each step."""
    run = fine_tune(TrainConfig(**options, output=output, compute_dtype=dtype)).output
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    return torch.tensor([line["loss"] for line in lines if line["kind"] == "step"])


@pytest.mark.slow
@pytest.mark.skipif(not native.available() or native.tier() == "scalar", reason="no native products here")
def test_the_fused_path_learns_along_the_curve_of_the_plain_one(
    options: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In fp32 they differ by the order of sums; in bf16 both are about as far from the fp32 curve."""
    fused, fused_bf16 = (curve(options, tmp_path / f"fused {dtype}", dtype) for dtype in DTYPES)
    monkeypatch.setattr(prepare, "fuse", lambda model: None)
    with use_provider("reference"):
        plain, plain_bf16 = (curve(options, tmp_path / f"plain {dtype}", dtype) for dtype in DTYPES)
    assert len(fused) == STEPS
    assert plain[-10:].sum() < 0.8 * plain[:10].sum()  # there is a curve
    assert not torch.equal(fused, plain)  # on two paths
    assert (fused - plain).abs().max() < 1e-3
    assert (fused_bf16 - plain).abs().mean() < 2 * (plain_bf16 - plain).abs().mean()

"""The prepared check for a GPU, in small on the CPU: every line of it that needs no GPU."""

import importlib.util
import json
import sys
import warnings
from pathlib import Path
from typing import Any

import pytest

BENCHMARKS = Path(__file__).parents[2] / "benchmarks"


@pytest.fixture
def gpu_check(monkeypatch: pytest.MonkeyPatch) -> Any:
    pytest.importorskip("bitsandbytes")
    monkeypatch.setattr(sys, "path", list(sys.path))
    spec = importlib.util.spec_from_file_location("gpu_check", BENCHMARKS / "gpu_check.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def run(gpu_check: Any, *arguments: str) -> int:
    with warnings.catch_warnings():
        code: int = gpu_check.main([*arguments, "--device", "cpu", "--tiny"])
    return code


def test_every_section_holds_on_a_cpu(gpu_check: Any, tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    code = run(gpu_check, str(tmp_path))
    report = json.loads((tmp_path / "gpu_check.json").read_text())
    assert {name: section["failed"] for name, section in report["sections"].items()} == {name: [] for name in "abcedfg"}
    assert code == 0 and (tmp_path / "gpu_check.png").stat().st_size > 10_000
    assert not [row for section in report["sections"].values() for row in section["rows"] if row.get("holds") is False]


def test_a_section_that_fails_is_named_and_stops_no_other(
    gpu_check: Any, tmp_path: Path, capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    from halfbyte.kernels import bitsandbytes

    monkeypatch.setattr(bitsandbytes, "adamw_32bit", lambda *_: None)  # kernels that do nothing
    assert run(gpu_check, str(tmp_path), "--sections", "af") == 1
    report = json.loads((tmp_path / "gpu_check.json").read_text())
    assert not report["sections"]["a"]["holds"] and report["sections"]["f"]["holds"]
    assert {name for name in report["sections"]["a"]["failed"]} == {
        f"AdamW in 32 bits, {count} values" for count in (256, 5000, 16401)
    }
    assert "Failed: a" in capfd.readouterr().out

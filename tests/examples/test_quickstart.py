"""The quick start in small, with its real model and data (which need an index on the first run)."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

import quickstart


def python(code: str, folder: Path, *arguments: str) -> str:
    """Run ``code`` in ``folder``, with the examples to import from; return what it prints."""
    code = f"import sys; sys.path.insert(0, {str(Path(quickstart.__file__).parent)!r}); {code}"
    command = [sys.executable, "-c", code, *arguments]
    return subprocess.run(command, cwd=folder, check=True, text=True, stdout=subprocess.PIPE).stdout


def run(folder: Path, train: int, held_out: int) -> str:
    code = f"from pathlib import Path; import quickstart; quickstart.main(Path('run'), {train}, {held_out})"
    return python(code, folder)


@pytest.mark.slow
def test_a_short_quick_start_learns_to_answer_and_can_be_repeated_and_talked_to(tmp_path: Path) -> None:
    run(tmp_path, train=16, held_out=8)
    output = run(tmp_path, train=160, held_out=64)
    summary = json.loads((tmp_path / "run" / "summary.json").read_text())
    assert summary["steps"] == 10
    assert summary["held_out"] == 64
    assert summary["loss_after"] < 0.5 < summary["loss_before"]
    assert f"{summary['accuracy_after']:.1%} after" in output
    page = (tmp_path / "run" / "report.html").read_text()
    assert "accuracy, measured apart" in page and page.count('<section class="sample">') == quickstart.SAMPLES
    question = json.loads((tmp_path / "run" / "data" / "held_out.jsonl").read_text().splitlines()[0])["messages"][0]
    answer = python(
        "from halfbyte.cli import main; main()", tmp_path, "generate", "run", "--prompt", question["content"]
    )
    assert answer.strip() in ("positive", "negative")

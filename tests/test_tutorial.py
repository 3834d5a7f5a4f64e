"""The lessons: a notebook is what the .py beside it says, has been run, and runs.

``docs/update_lessons.py`` runs them and writes the notebooks.
"""

import os
import re
import subprocess
import sys
from pathlib import Path

import jupytext
import nbformat
import pytest

DOCS = Path(__file__).parents[1] / "docs"
LESSONS = sorted((DOCS / "tutorial").glob("[0-9]*.py"))
ALL = [*LESSONS, *sorted((DOCS / "zh" / "tutorial").glob("[0-9]*.py"))]
PLACES = re.compile(r"(?<![\w.~])/(root|home|tmp|Users)/")


def test_there_are_lessons() -> None:
    assert len(LESSONS) == 5


@pytest.mark.parametrize("source", ALL, ids=lambda source: f"{source.parents[1].name}-{source.stem}")
def test_a_notebook_is_its_source_and_what_came_of_it(source: Path) -> None:
    written = jupytext.read(source).cells
    notebook = nbformat.read(source.with_suffix(".ipynb"), as_version=4)
    nbformat.validate(notebook)
    cells = [(cell.cell_type, cell.source) for cell in notebook.cells]
    assert cells == [(cell.cell_type, cell.source) for cell in written], f"run docs/update_lessons.py {source.stem}"
    code = [cell for cell in notebook.cells if cell.cell_type == "code"]
    assert [cell.execution_count for cell in code] == [*range(1, len(code) + 1)]
    outputs = [output for cell in code for output in cell.outputs]
    assert not [output for output in outputs if output.output_type == "error"]
    assert any("image/png" in output.get("data", {}) for output in outputs)
    assert not [text for output in outputs if PLACES.search(text := output.get("text", ""))]


@pytest.mark.slow
@pytest.mark.parametrize("source", LESSONS, ids=lambda source: source.stem)
def test_a_lesson_runs(source: Path, tmp_path: Path) -> None:
    command = [sys.executable, "-m", "pytest", "-p", "no:cacheprovider", "--nbmake", "--nbmake-timeout=900"]
    result = subprocess.run(
        [*command, str(source.with_suffix(".ipynb"))],
        env={**os.environ, "TMPDIR": str(tmp_path)},  # lessons leave there what they make
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )
    assert result.returncode == 0, result.stdout
    assert "1 passed" in result.stdout

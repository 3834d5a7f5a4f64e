"""Run the lessons of docs/tutorial and write their notebooks: what is edited is the .py; the .ipynb has outputs too.

python docs/update_lessons.py [NAME ...]    those whose names begin so, such as 1; without any, all

The Chinese lessons are the same code with other words, so their notebooks take the outputs of the English ones. Of a
path in an output that leads into a temporary folder or the caches, only what is behind these is kept.
"""

import re
import sys
import tempfile
from pathlib import Path
from typing import Any

import jupytext
import nbformat
from nbclient import NotebookClient

DOCS = Path(__file__).parent
ENGLISH, CHINESE = DOCS / "tutorial", DOCS / "zh" / "tutorial"
METADATA = {
    "jupytext": {"formats": "ipynb,py:percent"},
    "kernelspec": {"display_name": "Python 3", "language": "python", "name": "python3"},
    "language_info": {"name": "python"},
}
PLACES = re.compile(rf"({re.escape(tempfile.gettempdir())}/lesson-\w+|{re.escape(str(Path.home()))}/\.cache)/")
BLANKS = re.compile(r"[ \t\r]+$", re.MULTILINE)


def read(source: Path) -> Any:
    """Return a lesson as a notebook that was not run."""
    notebook = jupytext.read(source)
    notebook.metadata = nbformat.from_dict(METADATA)
    for number, cell in enumerate(notebook.cells, start=1):
        cell.id = f"cell-{number}"
    return notebook


def run(source: Path) -> Any:
    """Return a lesson as a notebook with its outputs.

    Raises:
        CellExecutionError: a cell has failed.
    """
    notebook = read(source)
    folder = {"metadata": {"path": source.parent}}
    NotebookClient(notebook, timeout=900, record_timing=False, resources=folder).execute()
    notebook.metadata = nbformat.from_dict(METADATA)
    for cell in notebook.cells:
        if cell.cell_type == "code":
            cell.outputs = _tidy(cell.outputs)
    return notebook


def _tidy(outputs: list[Any]) -> list[Any]:
    """Return outputs with what was printed in one piece, as a terminal shows it."""
    tidied: list[Any] = []
    for output in outputs:
        if output.output_type == "stream" and tidied and tidied[-1].output_type == "stream":
            tidied[-1].text += output.text
        else:
            tidied.append(output)
    for output in tidied:
        if output.output_type == "stream":
            output.name = "stdout"
            output.text = BLANKS.sub("", PLACES.sub("", output.text))
    return tidied


def translated(source: Path, english: Any) -> Any:
    """Return a Chinese lesson with the outputs of the English one, cell by cell."""
    notebook = read(source)
    for cell, other in zip(notebook.cells, english.cells, strict=True):
        if cell.cell_type == "code":
            cell.outputs, cell.execution_count = other.outputs, other.execution_count
    return notebook


def main(names: list[str]) -> None:
    """Run the lessons whose names begin with one of ``names``, or all, and write their notebooks."""
    for source in sorted(ENGLISH.glob("[0-9]*.py")):
        if names and not source.name.startswith(tuple(names)):
            continue
        print(source.stem, flush=True)
        notebook = run(source)
        nbformat.write(notebook, source.with_suffix(".ipynb"))
        chinese = CHINESE / source.name
        if chinese.exists():
            nbformat.write(translated(chinese, notebook), chinese.with_suffix(".ipynb"))


if __name__ == "__main__":
    main(sys.argv[1:])

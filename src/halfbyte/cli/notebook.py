"""A notebook, run from the command line as Jupyter runs it: its code cells in order, by IPython, in its own folder.

Magics and ``!commands`` are IPython's. What cells print and show goes to standard output as text, errors to standard
error. The first cell that fails ends the run with code 1, unless it is tagged ``raises-exception``; cells tagged
``skip-execution`` are left out (both tags as nbclient has them); ``sys.exit`` ends it too.
"""

import json
import os
import sys
import types
from pathlib import Path
from typing import Any

from halfbyte.errors import InputError

INSTALL = "pip install 'halfbyte[notebook]'"


def cells_of(file: Path) -> list[tuple[int, str, list[str]]]:
    """Return the number, source and tags of each code cell of a notebook.

    Raises:
        InputError: it is no notebook, or none in Python.
    """
    try:
        notebook = json.loads(file.read_text(encoding="utf-8"))
        cells = notebook["cells"] if "cells" in notebook else notebook["worksheets"][0]["cells"]
        language = notebook.get("metadata", {}).get("kernelspec", {}).get("language", "python")
        found = [
            (number, _text(cell.get("source", cell.get("input", ""))), cell.get("metadata", {}).get("tags", []))
            for number, cell in enumerate(cells, 1)
            if cell["cell_type"] == "code"
        ]
    except (OSError, ValueError, KeyError, TypeError, IndexError, AttributeError) as error:
        raise InputError(f"{file} is not a notebook ({error!r}); save it from Jupyter again.") from None
    if language.lower() != "python":
        raise InputError(f"{file} is a notebook in {language}; halfbyte run takes those in Python.")
    return found


def check(file: Path) -> None:
    """Look whether a notebook can be run.

    Raises:
        InputError: it cannot.
    """
    cells_of(file)
    try:
        import IPython  # noqa: F401
    except ImportError:
        raise InputError(f"To run a notebook, halfbyte needs IPython: {INSTALL}.") from None


def start(file: Path) -> None:
    """Run the notebook; :func:`check` has looked at it."""
    from IPython.core.interactiveshell import InteractiveShell
    from traitlets.config import Config

    config = Config()
    config.HistoryManager.enabled = False
    config.InteractiveShell.colors = "NoColor"
    main = types.ModuleType("__main__")
    sys.modules["__main__"] = main
    shell = InteractiveShell.instance(config=config, user_module=main)
    shell._showtraceback = _to_stderr
    shell.enable_gui = lambda gui=None: None  # %matplotlib: there is no event loop
    from halfbyte.hf.install import attend

    cells = cells_of(file)
    os.chdir(file.resolve().parent)
    attend(shell)
    for number, source, tags in cells:
        if "skip-execution" in tags or not source.strip():
            continue
        result = shell.run_cell(source, store_history=True)
        error = result.error_before_exec or result.error_in_exec
        sys.stdout.flush()
        if isinstance(error, SystemExit):
            raise error
        if isinstance(error, KeyboardInterrupt):
            raise error.with_traceback(None)
        if error is not None and "raises-exception" not in tags:
            print(f"halfbyte: cell {number} of {file.name} has failed; those after it were not run.", file=sys.stderr)
            raise SystemExit(1)


def _to_stderr(kind: Any, error: Any, lines: list[str]) -> None:
    if not issubclass(kind, SystemExit):
        print("\n".join(lines), file=sys.stderr)


def _text(source: str | list[str]) -> str:
    return source if isinstance(source, str) else "".join(source)

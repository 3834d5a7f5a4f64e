"""What a browser sent or pasted: kept as files under names that lead nowhere, as long as a run or a job names them."""

import hashlib
import io
import json
import os
import shutil
import time
from pathlib import Path

from halfbyte.data import csv_rows
from halfbyte.deploy.ui.places import Outside, Places, uploaded_name
from halfbyte.files import write_text
from halfbyte.runs.history import find_runs

UNUSED = 86_400.0
"""Seconds that a file is kept that nothing names: another page over the same folder may have just been given it."""
TABLE = 0.5
"""Share of a table's rows that have as many fields as the first; prose has commas too."""


def pasted(places: Places, text: str) -> Path:
    """Keep a text as a file, named by what it looks like; return it."""
    lines = [line for line in text.strip().splitlines() if line.strip()]
    ending = "txt"
    if lines[0].lstrip().startswith(("{", "[")):
        ending = "jsonl" if _is_json(lines[0]) else "json"
    elif csv_rows.is_table(io.StringIO("\n".join(lines)), share=TABLE):
        ending = "tsv" if "\t" in lines[0] else "csv"
    file = places.uploads / f"pasted-{hashlib.sha256(text.encode()).hexdigest()[:12]}.{ending}"
    if not file.exists():
        file.parent.mkdir(parents=True, exist_ok=True)
        write_text(file, text.strip() + "\n")
    return file


def kept(places: Places, file: Path) -> Path:
    """Move a file that was sent to where it stays, under a name that leads nowhere; return it.

    Raises:
        Outside: it was not sent; no page asks so.
    """
    file = file.resolve()
    if file.is_relative_to(places.uploads):
        return file
    if not file.is_relative_to(places.arriving):
        raise Outside(str(file))
    digest = hashlib.sha256(str(file.parent.name).encode()).hexdigest()[:16]  # gradio's folder is named by its content
    target = places.uploads / digest / uploaded_name(file.name)
    if not target.exists():
        target.parent.mkdir(parents=True, exist_ok=True)
        try:
            os.link(file, target)
        except OSError:  # another file system, or one without links
            part = target.with_name(f".{target.name}.part")
            shutil.copyfile(file, part)
            part.replace(target)
    return target


def tidy(places: Places) -> None:
    """Remove what no run and no job names, but what came in the last day."""
    if not places.uploads.is_dir():
        return
    named = "\n".join(_configuration(folder) for folder in _users(places))
    for entry in places.uploads.iterdir():
        try:
            if entry.name not in named and time.time() - entry.stat().st_ctime > UNUSED:
                shutil.rmtree(entry) if entry.is_dir() else entry.unlink()
        except OSError:
            continue


def _users(places: Places) -> list[Path]:
    jobs = [path for path in places.jobs.iterdir() if path.is_dir()] if places.jobs.is_dir() else []
    return [*jobs, *(run for root in places.roots for run in find_runs(root))]


def _configuration(folder: Path) -> str:
    try:
        return (folder / "config.yaml").read_text(encoding="utf-8", errors="replace")
    except OSError:
        return ""


def _is_json(text: str) -> bool:
    try:
        json.loads(text)
    except (ValueError, RecursionError):
        return False
    return True

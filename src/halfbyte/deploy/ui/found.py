"""Models and runs that are on this machine. Reads configurations, never weights; imports no torch."""

import json
import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from halfbyte.deploy.ui.places import Places
from halfbyte.errors import InputError
from halfbyte.files import cache_folder
from halfbyte.locks import is_locked
from halfbyte.runs.folder import RunFolder
from halfbyte.runs.history import DEPTH, Run, find_runs, is_run, read_run

WRITERS = ("ForCausalLM", "LMHeadModel", "ForConditionalGeneration")
"""How the architectures of models that write text end, or those that may."""
_kept: dict[Path, tuple[tuple[Any, ...], Run]] = {}
"""Runs as they were read, and the state of their files then."""
WEIGHTS = (".safetensors", ".bin", ".gguf")


@dataclass(frozen=True)
class FoundModel:
    """A model.

    Attributes:
        name: what it is called: a hub id, or where it lies.
        path: what it is opened by.
        family: its ``model_type``; ``gguf`` for such a file.
        writes: whether it writes text, by its architecture.
        nbytes: of its weights.
    """

    name: str
    path: str
    family: str
    nbytes: int
    writes: bool = True


def models(places: Places) -> list[FoundModel]:
    """Return the models in the folders of the page, in halfbyte's cache and in that of the hub, by name."""
    found = {
        model.path: model
        for model in (*_of_the_hub(), *_below([cache_folder()], places), *_below(places.roots, places))
    }
    return sorted((model for model in found.values() if _is_text(model.path)), key=lambda model: model.name.lower())


def runs(places: Places) -> list[Run]:
    """Return the runs in the page's folders in short, the newest first; folders that cannot be read are passed."""
    found: dict[Path, Run] = {}
    for root in places.roots:
        for path in find_runs(root):
            try:
                if _is_text(str(path)):
                    found[path] = _short(path)
            except InputError:
                continue
    return sorted(found.values(), key=lambda run: run.begun.timestamp() if run.begun else 0.0, reverse=True)


def _short(path: Path) -> Run:
    """Return a run in short (:func:`halfbyte.runs.history.read_run`), read again when a file of it has changed.

    Pages ask for all runs every two seconds, and their files may be large.
    """
    folder = RunFolder(path)
    files = (folder.about, folder.config, folder.metrics, folder.summary, folder.checkpoints)
    stamp = (*map(_stamp, files), is_locked(folder.lock))
    kept = _kept.get(path)
    if kept is None or kept[0] != stamp:
        kept = _kept[path] = stamp, read_run(path, short=True)
    return kept[1]


def _stamp(file: Path) -> tuple[int, int] | None:
    try:
        about = os.stat(file)
    except OSError:
        return None
    return about.st_mtime_ns, about.st_size


def _is_text(name: str) -> bool:
    """Tell whether a browser can be told a name; bytes that are no UTF-8 it cannot."""
    try:
        name.encode()
    except UnicodeEncodeError:
        return False
    return True


def _of_the_hub() -> Iterator[FoundModel]:
    """Yield what the hub's cache holds, by hub ids."""
    from huggingface_hub import constants

    try:
        folders = sorted(Path(constants.HF_HUB_CACHE).glob("models--*"))
    except OSError:
        return
    for folder in folders:
        for snapshot in sorted((folder / "snapshots").glob("*")):
            about = _about(snapshot)
            if about and (size := _size(snapshot)):
                name = "/".join(folder.name.split("--")[1:])
                yield FoundModel(name, name, about[0], size, about[1])
                break


def _below(roots: Sequence[Path], places: Places, depth: int = DEPTH) -> Iterator[FoundModel]:
    for root in roots:
        yield from _within(root, places, depth)


def _within(folder: Path, places: Places, depth: int) -> Iterator[FoundModel]:
    if is_run(folder):
        return
    about = _about(folder)
    if about:
        if size := _size(folder):
            yield FoundModel(_shown(folder, places), str(folder), about[0], size, about[1])
        return
    try:
        entries = sorted(os.scandir(folder), key=lambda entry: entry.name)
    except OSError:
        return
    for entry in entries:
        path = Path(entry.path)
        if entry.name.endswith(".gguf") and entry.is_file(follow_symlinks=False):
            yield FoundModel(_shown(path, places), str(path), "gguf", entry.stat().st_size)
        elif depth and entry.is_dir(follow_symlinks=False) and not entry.name.startswith("."):
            yield from _within(path, places, depth - 1)


def _about(folder: Path) -> tuple[str, bool] | None:
    """Return a model's family and whether it writes text; None if there is none."""
    try:
        config: Any = json.loads((folder / "config.json").read_text(encoding="utf-8"))
        family, kinds = config["model_type"], config.get("architectures") or []
        return str(family), not kinds or any(str(kind).endswith(WRITERS) for kind in kinds)
    except (OSError, ValueError, RecursionError, KeyError, TypeError, AttributeError):
        return None


def _size(folder: Path) -> int:
    try:
        return sum(entry.stat().st_size for entry in os.scandir(folder) if entry.name.endswith(WEIGHTS))
    except OSError:
        return 0


def _shown(path: Path, places: Places) -> str:
    home = cache_folder()
    return str(path.relative_to(home)) if path.is_relative_to(home) else places.shown(path)

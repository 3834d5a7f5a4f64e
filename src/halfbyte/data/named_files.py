"""The files that a name means: one file, those of a folder or of a pattern, or standard input.

Of a folder all files are taken whose names say that they hold rows, at any depth, each once, in the order of their
paths. Text without columns (a README.md) is data only where nothing else is; files without any ending are where
nothing has one and they begin like data. A split of a folder is told by the words in its files' paths, as ``datasets``
does it: ``data/train-00000.parquet``, ``dev.jsonl``.
"""

import dataclasses
import glob
import os
import re
import sys
import tempfile
from collections.abc import Iterable, Iterator
from pathlib import Path

from halfbyte.data.readers import KINDS, PLAIN, check_file, is_there, kind_of, near, shown_path
from halfbyte.errors import InputError, named, nearest

STANDARD_INPUT = "-"
ABOUT = {"dataset_info.json", "dataset_infos.json", "dataset_dict.json", "state.json"}
"""Names of files that tell about data and hold none."""
SPLITS = {
    "train": "train", "training": "train",
    "validation": "validation", "valid": "validation", "val": "validation", "dev": "validation",
    "test": "test", "testing": "test", "eval": "test", "evaluation": "test",
}  # fmt: skip
"""Words in paths, and the splits that they stand for (``data_files`` of datasets 4, ``SPLIT_KEYWORDS``)."""
BEGINNINGS = (b"{", b"[", b"PAR1", b"ARROW1", b"\xff\xff\xff\xff")
BLOCK = 1 << 22


@dataclasses.dataclass(frozen=True)
class Files:
    """The files of a source.

    Attributes:
        files: those that are read.
        said: what somebody should know of the choice, a sentence each.
        name: what they are called in messages, if not by their paths.
    """

    files: list[Path]
    said: list[str] = dataclasses.field(default_factory=list)
    name: Path | None = None


def files_of(name: str, split: str | None = None) -> Files:
    """Return the files that ``name`` means: an absolute path, a pattern, or ``-``.

    Raises:
        InputError: there are none.
    """
    if name == STANDARD_INPUT:
        return Files([_standard_input()], name=Path("standard input"))
    path = Path(name)
    if os.path.isdir(path):
        found = Files(*_in_folder(path))
        return _of_split(path, found, split)
    if split:
        raise InputError(f"{shown_path(path)} is no folder, so it has no split {split!r}; leave the split out.")
    if is_there(path) or not glob.has_magic(name):
        check_file(path)
        return Files([path])
    matches = [Path(match) for match in sorted(glob.glob(name, recursive=True))]
    files = _once(match for match in matches if match.is_file())
    if not files:
        what = "Only folders are" if matches else "No file is"
        raise InputError(f"{what} named like {name}{near(path)}; look at the folder, and quote the pattern.")
    return Files(files)


def _in_folder(folder: Path) -> tuple[list[Path], list[str]]:
    inside = _once(sorted(_walk(folder)))
    kinds = {kind_of(file) for file in inside} - {None}
    wanted = kinds - {PLAIN} or kinds  # a README.md beside tables is no data
    chosen = [file for file in inside if kind_of(file) in wanted]
    chosen = chosen or [file for file in inside if not file.suffix and _begins_like_data(file)]
    if not chosen:
        what = f"holds only {named(file.name for file in inside)}" if inside else "is empty"
        raise InputError(f"The folder {folder} {what}; data files end in {', '.join(KINDS)}.")
    taken = set(chosen)
    others = [file.name for file in inside if file not in taken]
    return chosen, [f"Not read in {folder}: {named(others)}"] if others else []


def _of_split(folder: Path, found: Files, split: str | None) -> Files:
    """Leave the files of one split, if one is asked for."""
    splits: dict[str, list[Path]] = {}
    for file in found.files:
        splits.setdefault(_split_of(file.relative_to(folder)), []).append(file)
    if split is None:
        told = [name for name in splits if name]
        if len(told) < 2:
            return found
        some = "train" if "train" in told else told[0]
        return Files(
            found.files,
            [*found.said, f"All splits in {folder} are read: {named(told)} (one alone: {folder.name}@{some})"],
        )
    word = split.casefold()
    chosen = splits.get(SPLITS[word], []) if word in SPLITS else []
    chosen = chosen or [file for file in found.files if word in _words(file.relative_to(folder))]
    if not chosen:
        told = [name for name in splits if name]
        known = f"it has {named(told)}" if told else "the names of its files tell none"
        raise InputError(f"The folder {folder} has no split {split!r}{nearest(split, told)}; {known}.")
    return Files(chosen, found.said)


def _split_of(path: Path) -> str:
    """Return the split that the last telling word of a path names, or nothing."""
    return next((SPLITS[word] for word in reversed(_words(path)) if word in SPLITS), "")


def _words(path: Path) -> list[str]:
    return re.findall(r"[a-z]+", str(path).casefold())


def _walk(folder: Path) -> Iterator[Path]:
    """Yield the files in a folder, behind links too, without what is hidden."""
    seen: set[str] = set()
    for place, folders, names in os.walk(folder, onerror=_unreadable, followlinks=True):
        real = os.path.realpath(place)
        if real in seen:  # a link that leads back
            folders.clear()
            continue
        seen.add(real)
        folders[:] = [name for name in folders if not name.startswith((".", "__"))]
        yield from (Path(place, name) for name in names if not name.startswith((".", "__")) and name not in ABOUT)


def _unreadable(error: OSError) -> None:
    raise InputError(f"The folder {error.filename} cannot be read: {error.strerror}.") from error


def _once(paths: Iterable[Path]) -> list[Path]:
    """Return the regular files among ``paths``, each once, whatever it is called."""
    files: dict[str, Path] = {}
    for path in paths:
        if path.is_file():
            files.setdefault(os.path.realpath(path), path)
    return list(files.values())


def _begins_like_data(file: Path) -> bool:
    try:
        with file.open("rb") as stream:
            return stream.read(64).lstrip(b"\xef\xbb\xbf \t\r\n").startswith(BEGINNINGS)
    except OSError:
        return False


_spooled: list[Path] = []
_folders: list[tempfile.TemporaryDirectory[str]] = []  # removed at the end of the process


def _standard_input() -> Path:
    """Return a file of what came through standard input, which can be read once only."""
    if not _spooled:
        if sys.stdin is None or sys.stdin.closed:
            raise InputError("The data is to come through standard input, but that is closed.")
        if sys.stdin.isatty():
            raise InputError(
                "The data is to come through standard input, but that is the terminal; pipe a file into it."
            )
        folder = tempfile.TemporaryDirectory(prefix="halfbyte-input-")
        _folders.append(folder)
        file = Path(folder.name) / "standard input"
        try:
            with file.open("wb") as target:
                while block := sys.stdin.buffer.read(BLOCK):
                    target.write(block)
        except OSError as error:
            folder.cleanup()
            raise InputError(
                f"Standard input cannot be kept in {file.parent} ({error.strerror}); set TMPDIR to a folder with room, "
                "or give a file."
            ) from error
        _spooled.append(file)
    return _spooled[0]

"""Files and folders that appear whole or not at all: write beside the target, sync, rename. And the full disk."""

import contextlib
import errno
import os
import shutil
import uuid
from collections.abc import Iterator
from pathlib import Path


@contextlib.contextmanager
def whole_file(path: Path) -> Iterator[Path]:
    """Yield a temporary file's path beside ``path``; on success it is synced and renamed to ``path``.

    On any error, an interrupt included, the temporary file is removed and ``path`` is as it was.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    part = _beside(path, "part")
    try:
        yield part
        _sync(part)
        os.replace(part, path)
    except BaseException:
        part.unlink(missing_ok=True)
        raise
    _sync(path.parent)


@contextlib.contextmanager
def whole_folder(path: Path) -> Iterator[Path]:
    """Yield a temporary folder beside ``path``; on success its files are synced and it becomes ``path``.

    An existing ``path`` is replaced. On any error the temporary folder is removed and ``path`` is as
    it was.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    part = _beside(path, "part")
    part.mkdir()
    try:
        yield part
        for file in part.rglob("*"):
            if file.is_file():
                _sync(file)
        if path.exists():
            old = _beside(path, "old")
            os.replace(path, old)
            os.replace(part, path)
            shutil.rmtree(old)
        else:
            os.replace(part, path)
    except BaseException:
        shutil.rmtree(part, ignore_errors=True)
        raise
    _sync(path.parent)


def write_text(path: Path, text: str) -> None:
    """Write ``text`` as UTF-8 to ``path``, whole or not at all."""
    with whole_file(path) as part:
        part.write_text(text, encoding="utf-8")


def disk_full(error: BaseException) -> bool:
    """Return whether ``error`` says that the disk, or the user's share of it, is full.

    safetensors raises errors of its own that have the operating system's number in their text alone.
    """
    numbers = (errno.ENOSPC, errno.EDQUOT)
    return getattr(error, "errno", None) in numbers or any(f"(os error {n})" in str(error) for n in numbers)


def _beside(path: Path, ending: str) -> Path:
    return path.with_name(f".{path.name}.{uuid.uuid4().hex}.{ending}")


def _sync(path: Path) -> None:
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def absolute(path: str | Path) -> Path:
    """Return ``path`` as it is meant wherever it is read: ``~`` expanded, absolute, without ``..``."""
    return Path(os.path.abspath(os.path.expanduser(path)))


def model_path(name: str) -> str:
    """Return what a user calls a model, its path absolute if it is one; a hub id stays as it is."""
    is_path = name.startswith(("~", "/", "./", "../")) or name in (".", "..") or os.path.isdir(name)
    return str(absolute(name)) if is_path else name

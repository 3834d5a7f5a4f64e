"""Files and folders that appear whole or not at all, lines that are appended whole. And the full disk.

A writer works in a hidden folder beside its target (:mod:`halfbyte.parts`).
"""

import contextlib
import errno
import hashlib
import os
import re
import uuid
from collections.abc import Iterator
from pathlib import Path

from halfbyte.locks import take
from halfbyte.parts import Part, become, make_folder, parts_of, repair_parts, settle_left, sync, take_grown


@contextlib.contextmanager
def whole_file(path: Path) -> Iterator[Path]:
    """Yield a path of the same name to write to; at the end that file is synced and renamed to ``path``.

    On any error, an interrupt included, ``path`` is as it was and what was written is removed. What comes after the
    renaming finds ``path`` new and leaves it so: a late interrupt, or a folder that cannot be synced, which is an
    error since a power failure may still undo the renaming. A link stays a link; the file that it points to is
    replaced. Begins with :func:`repair`.
    """
    with _writing(path) as part:
        yield part.new
        sync(part.new)
        os.replace(part.new, part.target)
        sync(part.target.parent)


@contextlib.contextmanager
def whole_folder(path: Path) -> Iterator[Path]:
    """Yield an empty folder of the same name to fill; at the end all in it is synced and it becomes ``path``.

    An existing folder is replaced: in one step on Linux, else by two renames, between which there is none. All else is
    as for :func:`whole_file`. If the old folder cannot be removed, the next :func:`repair` tries again; the new one is
    in its place, so that is no error.

    Raises:
        NotADirectoryError: ``path`` is a file.
    """
    with _writing(path) as part:
        if os.path.lexists(part.target) and not part.target.is_dir():
            raise NotADirectoryError(errno.ENOTDIR, os.strerror(errno.ENOTDIR), str(path))
        os.mkdir(part.new)
        yield part.new
        become(part)


@contextlib.contextmanager
def growing_folder(path: Path, key: str) -> Iterator[Path]:
    """Yield a folder that becomes ``path`` at the end, as that of :func:`whole_folder`, and may hold a part of it.

    A writer that was interrupted or killed leaves what it has, and the next one with the same ``key`` finds it there;
    one with another key removes it, a :func:`repair` does not. On an error all is removed. What is found must have
    appeared whole itself (:func:`whole_file`).

    Args:
        path: of the folder to be.
        key: what decides its content.

    Raises:
        NotADirectoryError: ``path`` is a file.
        Locked: another process is writing with the same key.
    """
    target = Path(os.path.realpath(path))
    if os.path.lexists(target) and not target.is_dir():
        raise NotADirectoryError(errno.ENOTDIR, os.strerror(errno.ENOTDIR), str(path))
    make_folder(target.parent)
    repair(target)
    digest = hashlib.sha256(key.encode()).hexdigest()[:32]
    part = Part(target, target.with_name(f".{target.name}.{digest}.grown"))
    for other in parts_of(target.parent, re.escape(target.name)):
        if other.grows and other.folder != part.folder:
            settle_left(other)
    try:
        take_grown(part)
        part.new.mkdir(exist_ok=True)
        repair_within(part.new)
        yield part.new
        repair_within(part.new)
        become(part)
    except Exception:
        part.settle(own=True)
        raise
    except BaseException:
        part.settle(own=True, keep=True)
        raise
    part.settle(own=True)


@contextlib.contextmanager
def scratch(path: Path) -> Iterator[Path]:
    """Yield an empty folder beside ``path`` that is gone at the end, or if this process is killed, at a repair."""
    with _writing(path) as part:
        os.mkdir(part.new)
        yield part.new


def remove_folder(path: Path) -> None:
    """Remove a folder and all in it; whoever looks finds it whole or not at all, also if this process is killed.

    What is left to be removed then, the next :func:`repair` removes.
    """
    with _writing(path) as part:
        os.rename(part.target, part.new)
        sync(part.target.parent)


def write_text(path: Path, text: str) -> None:
    """Write ``text`` as UTF-8 to ``path``, whole or not at all."""
    with whole_file(path) as part:
        part.write_text(text, encoding="utf-8")


def append(path: Path, line: str) -> None:
    """Append ``line`` and a newline to a file, whole and on the disk, or leave the file's lines as they were.

    The file is made if there is none. A torn last line (:func:`read_lines`) is removed first. For one process at a
    time.

    Raises:
        ValueError: ``line`` has a newline itself.
    """
    if "\n" in line:
        raise ValueError(f"more than one line: {line!r}")
    data = f"{line}\n".encode()
    path = Path(os.path.realpath(path))
    made = not path.exists()
    if made:
        make_folder(path.parent)
    handle = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o666)
    end = None
    try:
        end = size = os.fstat(handle).st_size
        if size and os.pread(handle, 1, size - 1) != b"\n":
            end = os.pread(handle, size, 0).rfind(b"\n") + 1
            os.ftruncate(handle, end)
        written = 0
        while written < len(data):
            written += os.pwrite(handle, data[written:], end + written)
        os.fsync(handle)
        if made:
            sync(path.parent)
    except BaseException:
        with contextlib.suppress(OSError):
            if made:
                os.unlink(path)
            elif end is not None:
                os.ftruncate(handle, end)
        raise
    finally:
        os.close(handle)


def read_lines(path: Path) -> list[str]:
    """Return a file's lines without their newlines.

    A last line that has no newline was torn when its writer was killed, and is left out.
    """
    data = path.read_bytes()
    return data[: data.rfind(b"\n") + 1].decode(errors="replace").split("\n")[:-1]


def repair(path: Path) -> None:
    """Put right what killed writers of ``path`` left, and touch nothing else.

    If they were killed between the two renames of a swap, the old folder gets its name back. What they had not
    finished, or not removed yet, is removed, but for what a :func:`growing_folder` has. Living writers' files stay, and
    so does all that cannot be put right now. Without locks nobody can tell who lives: then nothing is removed.
    """
    target = Path(os.path.realpath(path))
    repair_parts(target.parent, re.escape(target.name))


def repair_within(folder: Path) -> None:
    """Do what :func:`repair` does for every file and folder directly in ``folder``, which need not exist."""
    repair_parts(Path(os.path.realpath(folder)), ".+")


def disk_full(error: BaseException) -> bool:
    """Return whether ``error`` says that the disk, or the user's share of it, is full.

    safetensors and tokenizers raise errors of their own that have the operating system's number in their text alone.
    """
    numbers = (errno.ENOSPC, errno.EDQUOT)
    return getattr(error, "errno", None) in numbers or any(f"(os error {n})" in str(error) for n in numbers)


def unwritable(error: BaseException, folder: Path) -> bool:
    """Return whether ``error`` says that something in ``folder`` may not be written, or that its disk has failed."""
    numbers = (errno.EACCES, errno.EPERM, errno.EROFS, errno.EIO, errno.EFBIG)
    if isinstance(error, OSError) and error.filename is not None:
        names = (name for name in (error.filename, error.filename2) if isinstance(name, str | os.PathLike))
        return error.errno in numbers and any(Path(name).is_relative_to(folder) for name in names)
    return any(f"(os error {number})" in str(error) for number in numbers)


@contextlib.contextmanager
def _writing(path: Path) -> Iterator[Part]:
    """Yield the locked part of a new writer of ``path``; settle it at the end."""
    target = Path(os.path.realpath(path))
    make_folder(target.parent)
    repair(target)
    while True:
        part = Part(target, target.with_name(f".{target.name}.{uuid.uuid4().hex}.part"))
        try:
            os.mkdir(part.folder)
            try:
                part.lock = take(part.lock_file)
            except FileNotFoundError:
                continue  # a repair found the folder before it was locked, and removed it
            if part.lock is None:
                continue  # ... and is about to
            yield part
            return
        finally:
            part.settle(own=True)


def absolute(path: str | Path) -> Path:
    """Return ``path`` as it is meant wherever it is read: ``~`` expanded, absolute."""
    return Path(os.path.expanduser(path)).absolute()  # `..` stays: behind a link it leads elsewhere


def cache_folder() -> Path:
    """Return the folder of what can be made again: ``HALFBYTE_CACHE``, or that of the user's caches."""
    given, home = os.environ.get("HALFBYTE_CACHE"), os.environ.get("XDG_CACHE_HOME") or "~/.cache"
    return absolute(given) if given else absolute(home) / "halfbyte"


def model_path(name: str) -> str:
    """Return what a user calls a model, its path absolute if it is one; a hub id stays as it is."""
    is_path = name.startswith(("~", "/", "./", "../")) or name in (".", "..") or os.path.isdir(name)
    is_path = is_path or (name.endswith(".gguf") and os.path.isfile(name))
    return str(absolute(name)) if is_path else name


def stamp(path: Path) -> str:
    """Return a digest of what files a folder has, of which sizes and times; or of one file alone."""
    digest = hashlib.sha256(str(path).encode())
    for file in sorted(path.iterdir()) if path.is_dir() else [path]:
        about = file.stat()
        digest.update(f"{file.name} {about.st_size} {about.st_mtime_ns}\n".encode())
    return digest.hexdigest()

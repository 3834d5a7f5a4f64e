"""Files and folders that appear whole or not at all, lines that are appended whole. And the full disk.

A writer works in a hidden folder beside its target:

    .NAME.<32 hex digits>.part/
        NAME.lock    locked by the writer as long as it lives
        NAME         what is written; synced, then renamed to the target
        NAME.old     what the target was, while two renames swap folders; without it the swap is one step

The system takes a lock back when its process ends, however it ends. So a lock that can be had says that the writer is
dead, where a process id could be another process's by now, or one of another container. The lock has a file of its
own, since a writer may put another file in the place of the one it was given, and since locks on folders do not
reach other machines that share a disk.
"""

import contextlib
import ctypes
import errno
import glob
import hashlib
import os
import re
import shutil
import uuid
from collections.abc import Iterator
from pathlib import Path

from halfbyte.locks import Lock, Locked, take

NO_EXCHANGE = frozenset((errno.EINVAL, errno.ENOSYS, errno.EOPNOTSUPP, errno.EPERM))
"""What ``renameat2`` says where the kernel, a sandbox or the file system cannot exchange two names."""
NO_SYNC = frozenset((errno.EACCES, errno.EBADF, errno.EINVAL, errno.ENOTSUP, errno.EOPNOTSUPP))
"""What opening or syncing a folder says where only files can be synced."""


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
        _sync(part.new)
        os.replace(part.new, part.target)
        _sync(part.target.parent)


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
        _become(part)


@contextlib.contextmanager
def growing_folder(path: Path, key: str) -> Iterator[Path]:
    """Yield a folder that becomes ``path`` at the end, as that of :func:`whole_folder`, and may hold a part of it.

    A writer that was interrupted or killed leaves what it has, and the next one with the same ``key`` finds it there;
    one with another key removes it. On an error all is removed. What is found must have appeared whole itself.

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
    _make_folder(target.parent)
    repair(target)
    digest = hashlib.sha256(key.encode()).hexdigest()[:32]
    part = _Part(target, target.with_name(f".{target.name}.{digest}.grown"))
    for other in target.parent.glob(f".{glob.escape(target.name)}.*.grown"):
        if other != part.folder and re.fullmatch(r".*\.[0-9a-f]{32}\.grown", other.name):
            _settle_left(_Part(target, other))
    if part.old.exists():  # killed within a swap
        _settle_left(part)
    part.folder.mkdir(exist_ok=True)
    part.lock = take(part.lock_file)
    if part.lock is None:
        raise Locked(part.lock_file, None)
    try:
        part.new.mkdir(exist_ok=True)
        yield part.new
        _become(part)
    except Exception:
        part.settle(own=True)
        raise
    except BaseException:
        part.lock._close()
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
        _sync(part.target.parent)


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
        _make_folder(path.parent)
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
            _sync(path.parent)
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
    finished, or not removed yet, is removed. Living writers' files stay, and so does all that cannot be put right now.
    Without locks nobody can tell who lives: then nothing is removed.
    """
    target = Path(os.path.realpath(path))
    _repair(target.parent, re.escape(target.name))


def repair_within(folder: Path) -> None:
    """Do what :func:`repair` does for every file and folder directly in ``folder``, which need not exist."""
    _repair(Path(os.path.realpath(folder)), ".+")


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


class _Part:
    """A writer's hidden folder, as the head of this file draws it; by whatever end, it comes to :meth:`settle`."""

    def __init__(self, target: Path, folder: Path) -> None:
        self.target = target
        self.folder = folder
        self.new = folder / target.name
        self.old = folder / f"{target.name}.old"
        self.lock_file = folder / f"{target.name}.lock"
        self.lock: Lock | None = None

    @property
    def is_ours(self) -> bool:
        """Whether a writer made it: the lock comes first and goes last, and there is nothing that no writer makes."""
        if self.folder.is_symlink():
            return False
        names = set(os.listdir(self.folder))
        return names <= {self.new.name, self.old.name, self.lock_file.name} and (
            not names or self.lock_file.name in names
        )

    def settle(self, *, own: bool) -> None:
        """Undo a swap that stopped halfway and remove all that is not the target. What fails is left for a repair."""
        if self.lock is None:
            with contextlib.suppress(OSError):  # stopped before it was locked, so there is nothing in it
                self.lock_file.unlink(missing_ok=True)
                os.rmdir(self.folder)
            return
        if not self.lock.held:
            return  # a forked child leaves the block
        try:
            with contextlib.suppress(OSError):
                names = os.listdir(self.folder)
                if self.old.name in names and (self.new.name in names or not os.path.lexists(self.target)):
                    os.rename(self.old, self.target)
                    with contextlib.suppress(OSError):
                        _sync(self.target.parent)
                if own or self.lock.certain:
                    _remove(self.new)
                    _remove(self.old)
                    self.lock.release()
                    os.rmdir(self.folder)
        finally:
            self.lock._close()


def _become(part: _Part) -> None:
    """Sync the new folder and put it in the place of the target."""
    _sync_all(part.new)
    if not os.path.lexists(part.target):
        os.rename(part.new, part.target)
    elif not _exchange(part.new, part.target):
        os.rename(part.target, part.old)
        os.rename(part.new, part.target)
    _sync(part.target.parent)


def _settle_left(part: _Part) -> None:
    """Settle a dead writer's part."""
    with contextlib.suppress(OSError):
        if part.is_ours:
            part.lock = take(part.lock_file)
            if part.lock is not None:
                part.settle(own=False)


@contextlib.contextmanager
def _writing(path: Path) -> Iterator[_Part]:
    """Yield the locked part of a new writer of ``path``; settle it at the end."""
    target = Path(os.path.realpath(path))
    _make_folder(target.parent)
    repair(target)
    while True:
        part = _Part(target, target.with_name(f".{target.name}.{uuid.uuid4().hex}.part"))
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


def _repair(folder: Path, names: str) -> None:
    """Settle the parts of dead writers in ``folder`` whose targets' names match the pattern ``names``."""
    pattern = re.compile(rf"\.({names})\.[0-9a-f]{{32}}\.part", re.DOTALL)
    try:
        found = [match for name in os.listdir(folder) if (match := pattern.fullmatch(name))]
    except OSError:
        return
    for match in found:
        _settle_left(_Part(folder / match[1], folder / match[0]))


def _exchange(one: Path, other: Path) -> bool:
    """Swap what two names stand for, in one step; return whether that can be done here."""
    try:
        renameat2 = ctypes.CDLL(None, use_errno=True).renameat2
    except AttributeError:
        return False
    here, exchange = -100, 2  # AT_FDCWD, RENAME_EXCHANGE of Linux
    if renameat2(here, os.fsencode(one), here, os.fsencode(other), exchange) == 0:
        return True
    number = ctypes.get_errno()
    if number in NO_EXCHANGE:
        return False
    raise OSError(number, os.strerror(number), str(one), None, str(other))


def _remove(path: Path) -> None:
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)


def _make_folder(folder: Path) -> None:
    """Make ``folder`` and its parents where they are missing, on the disk."""
    if not folder.is_dir():
        _make_folder(folder.parent)
        folder.mkdir(exist_ok=True)
        _sync(folder.parent)


def _sync_all(folder: Path) -> None:
    """Put all that is in ``folder``, at any depth, on the disk."""
    with os.scandir(folder) as entries:
        for entry in entries:
            if entry.is_dir(follow_symlinks=False):
                _sync_all(Path(entry.path))
            elif entry.is_file(follow_symlinks=False):
                _sync(Path(entry.path))
    _sync(folder)


def _sync(path: Path) -> None:
    """Put a file's bytes, or the names in a folder, on the disk."""
    try:
        handle = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
        try:
            os.fsync(handle)
        finally:
            os.close(handle)
    except OSError as error:
        if error.errno not in NO_SYNC or not path.is_dir():
            raise


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

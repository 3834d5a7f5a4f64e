"""The hidden folder in which a file or folder is made, and how it comes into its place: see :mod:`halfbyte.files`.

    .NAME.<32 hex digits>.part/     or .grown, of a writer that another one goes on from
        NAME.lock    locked by the writer as long as it lives
        NAME         what is written; synced, then renamed to the target
        NAME.old     what is swapped with the target, in one step or, while there is no target, by two renames; where
                     the writer died, what the target has not become, or was: what is left over

The system takes a lock back when its process ends, however it ends. So a lock that can be had says that the writer is
dead, where a process id could be another process's by now, or one of another container. The lock has a file of its
own, since a writer may put another file in the place of the one it was given, and since locks on folders do not
reach other machines that share a disk.
"""

import contextlib
import ctypes
import errno
import os
import re
import shutil
import time
from pathlib import Path

from halfbyte.locks import Lock, Locked, take

NO_EXCHANGE = frozenset((errno.EINVAL, errno.ENOSYS, errno.EOPNOTSUPP, errno.EPERM))
"""What ``renameat2`` says where the kernel, a sandbox or the file system cannot exchange two names."""
NO_SYNC = frozenset((errno.EACCES, errno.EBADF, errno.EINVAL, errno.ENOTSUP, errno.EOPNOTSUPP))
"""What opening or syncing a folder says where only files can be synced."""
MOMENT = 0.5
"""Seconds for which a repair may have a lock that a writer wants."""


class Part:
    """A writer's hidden folder, as the head of this file draws it; by whatever end, it comes to :meth:`settle`."""

    def __init__(self, target: Path, folder: Path) -> None:
        self.target = target
        self.folder = folder
        self.new = folder / target.name
        self.old = folder / f"{target.name}.old"
        self.lock_file = folder / f"{target.name}.lock"
        self.grows = folder.suffix == ".grown"
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

    def mend(self) -> None:
        """Undo a swap that stopped halfway."""
        if os.path.lexists(self.old) and (os.path.lexists(self.new) or not os.path.lexists(self.target)):
            os.rename(self.old, self.target)
            with contextlib.suppress(OSError):
                sync(self.target.parent)

    def settle(self, *, own: bool, keep: bool = False) -> None:
        """Undo a swap that stopped halfway and remove all that is not the target. What fails is left for a repair.

        An interrupt meanwhile is raised once all is removed; a second one at once.

        Args:
            own: whether the part is the caller's own, so that nobody needs to be asked whether its writer lives.
            keep: whether what has grown stays, if there is anything.
        """
        if self.lock is None and self.grows:
            settle_left(self, keep=True)  # another's, perhaps
            return
        if self.lock is None:
            with contextlib.suppress(OSError):  # stopped before it was locked, so there is nothing in it
                self._remove_empty()
            return
        if not self.lock.held:
            return  # a forked child leaves the block
        try:
            with contextlib.suppress(OSError):
                try:
                    self._clear(self.lock, own, keep)
                except KeyboardInterrupt:
                    with contextlib.suppress(OSError):
                        self._clear(self.lock, own, keep)
                    raise
        finally:
            self.lock._close()

    def _remove_empty(self) -> None:
        self.lock_file.unlink(missing_ok=True)
        os.rmdir(self.folder)

    def _clear(self, lock: Lock, own: bool, keep: bool) -> None:
        """Remove what :meth:`settle` does, or if an interrupt came behind the lock's release, what is left."""
        if not lock.held:
            self._remove_empty()
            return
        self.mend()
        if own or lock.certain:
            remove(self.old)
            if keep and self._has_grown:
                return
            remove(self.new)
            lock.release()
            os.rmdir(self.folder)

    @property
    def _has_grown(self) -> bool:
        return self.new.is_dir() and any(self.new.iterdir())


def take_grown(part: Part) -> None:
    """Make the folder of a part that may be there already, with what has grown in it, and take its lock.

    Raises:
        Locked: a living writer has it.
    """
    until = time.monotonic() + MOMENT
    while part.lock is None:
        part.folder.mkdir(exist_ok=True)
        with contextlib.suppress(FileNotFoundError):  # a repair found the folder before it was locked, and removed it
            part.lock = take(part.lock_file)
        if part.lock is None:
            if time.monotonic() > until:
                raise Locked(part.lock_file, None)
            time.sleep(MOMENT / 50)  # a repair has it, or a writer
    if part.lock.certain:
        with contextlib.suppress(OSError):
            part.mend()
            remove(part.old)


def become(part: Part) -> None:
    """Sync the new folder and put it in the place of the target.

    It is called the old one before the two are exchanged, since it is that afterwards, whoever comes to it.
    """
    sync_all(part.new)
    if not os.path.lexists(part.target):
        os.rename(part.new, part.target)
    else:
        os.rename(part.new, part.old)
        if not exchange(part.old, part.target):
            os.rename(part.old, part.new)
            os.rename(part.target, part.old)
            os.rename(part.new, part.target)
    sync(part.target.parent)


def settle_left(part: Part, *, keep: bool = False) -> None:
    """Settle a dead writer's part; with ``keep`` what has grown stays."""
    with contextlib.suppress(OSError):
        if keep and part.new.exists() and not part.old.exists():
            return
        if part.is_ours:
            part.lock = take(part.lock_file)
            if part.lock is not None:
                part.settle(own=False, keep=keep)


def repair_parts(folder: Path, names: str) -> None:
    """Settle the parts of dead writers in ``folder`` whose targets' names match the pattern ``names``."""
    for part in parts_of(folder, names):
        settle_left(part, keep=part.grows)


def parts_of(folder: Path, names: str) -> list[Part]:
    """Return the parts in ``folder`` whose targets' names match the pattern ``names``."""
    pattern = re.compile(rf"\.({names})\.[0-9a-f]{{32}}\.(part|grown)", re.DOTALL)
    try:
        found = [match for name in os.listdir(folder) if (match := pattern.fullmatch(name))]
    except OSError:
        return []
    return [Part(folder / match[1], folder / match[0]) for match in found]


def exchange(one: Path, other: Path) -> bool:
    """Swap what two names stand for, in one step; return whether that can be done here."""
    try:
        renameat2 = ctypes.CDLL(None, use_errno=True).renameat2
    except AttributeError:
        return False
    here, exchanging = -100, 2  # AT_FDCWD, RENAME_EXCHANGE of Linux
    if renameat2(here, os.fsencode(one), here, os.fsencode(other), exchanging) == 0:
        return True
    number = ctypes.get_errno()
    if number in NO_EXCHANGE:
        return False
    raise OSError(number, os.strerror(number), str(one), None, str(other))


def remove(path: Path) -> None:
    """Remove a file, or a folder and all in it; what is not there is no error."""
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)


def make_folder(folder: Path) -> None:
    """Make ``folder`` and its parents where they are missing, on the disk."""
    if not folder.is_dir():
        make_folder(folder.parent)
        folder.mkdir(exist_ok=True)
        sync(folder.parent)


def sync_all(folder: Path) -> None:
    """Put all that is in ``folder``, at any depth, on the disk."""
    with os.scandir(folder) as entries:
        for entry in entries:
            if entry.is_dir(follow_symlinks=False):
                sync_all(Path(entry.path))
            elif entry.is_file(follow_symlinks=False):
                sync(Path(entry.path))
    sync(folder)


def sync(path: Path) -> None:
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

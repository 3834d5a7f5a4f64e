"""Locks that a process loses when it ends, however it ends."""

import contextlib
import errno
import fcntl
import functools
import os
import threading
from pathlib import Path

NO_LOCKS = frozenset((errno.ENOLCK, errno.ENOSYS, errno.ENOTSUP, errno.EOPNOTSUPP))
"""What ``flock`` says on a file system without locks."""


class Locked(Exception):
    """A lock is held by another process, or elsewhere in this one.

    Attributes:
        path: the lock's file.
        pid: the process that holds it, as it counts itself; None if it could not write that down.
    """

    def __init__(self, path: Path, pid: int | None) -> None:
        super().__init__(f"{path} is locked by {f'process {pid}' if pid else 'another process'}")
        self.path = path
        self.pid = pid


class Lock:
    """A lock on a file, held until :meth:`release` or the end of the process, however it ends. A context manager too.

    It is ``flock``'s. A POSIX record lock is lost as soon as anything in the process closes the file, after copying
    the folder for example, and does not keep the same process out. ``flock`` goes to forked children as well, so these
    close it right after the fork; programs that are started do not get it.

    Attributes:
        path: the lock's file.
        certain: whether the file system has locks. If not, everybody gets one.
    """

    def __init__(self, path: Path, handle: int) -> None:
        self.path = path
        self.certain = True
        self._handle = handle  # -1 once closed
        _held.add(self)

    @property
    def held(self) -> bool:
        """Whether this process holds it: false after release and in forked children."""
        return self._handle != -1

    def release(self) -> None:
        """Remove the file and let others have the lock. The second time, and in forked children, nothing happens."""
        try:
            with contextlib.suppress(OSError):
                if self.held and self._is_named():
                    os.unlink(self.path)
        finally:
            self._close()

    def _close(self) -> None:
        with _forks:
            handle, self._handle = self._handle, -1
            _held.discard(self)
            if handle != -1:
                with contextlib.suppress(OSError):
                    os.close(handle)

    def _is_named(self) -> bool:
        """Return whether ``path`` still leads to this file: who held the lock before may have removed it."""
        try:
            return os.path.samestat(os.stat(self.path), os.fstat(self._handle))
        except FileNotFoundError:
            return False

    def __enter__(self) -> "Lock":
        return self

    def __exit__(self, *_: object) -> None:
        self.release()


def lock(path: Path) -> Lock:
    """Take the lock on the file ``path``, which is made for it and removed on release.

    A file that a dead process left is no obstacle. On a file system without locks everybody gets the lock.

    Raises:
        Locked: somebody holds it.
    """
    path = Path(os.path.realpath(path))
    path.parent.mkdir(parents=True, exist_ok=True)
    held = take(path)
    if held is None:
        pid = None
        with contextlib.suppress(OSError, ValueError):
            pid = int(path.read_text())
        raise Locked(path, pid)
    with contextlib.suppress(OSError):
        os.ftruncate(held._handle, 0)
        os.pwrite(held._handle, f"{os.getpid()}\n".encode(), 0)
    return held


def take(path: Path) -> Lock | None:
    """Return the lock on ``path``, or None if somebody holds it."""
    _watch_forks()
    with _forks:
        while True:
            taken = Lock(path, os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o666))
            try:
                try:
                    fcntl.flock(taken._handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
                except BlockingIOError:
                    taken._close()
                    return None
                except OSError as error:
                    if error.errno not in NO_LOCKS:
                        raise
                    taken.certain = False
                if taken._is_named():
                    return taken
                taken._close()
            except BaseException:
                taken._close()
                raise


def is_locked(path: Path) -> bool:
    """Tell whether somebody holds the lock on ``path``, and leave the file as it is.

    For that a lock is taken for some microseconds if nobody does, which another process may find then.
    """
    with _forks:
        try:
            handle = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
        except OSError:
            return False
        try:
            fcntl.flock(handle, fcntl.LOCK_SH | fcntl.LOCK_NB)
        except BlockingIOError:
            return True
        except OSError:  # there are no locks here, so nobody can tell
            return False
        finally:
            os.close(handle)
        return False


_held: set[Lock] = set()
_forks = threading.RLock()
"""Held while a lock is taken or closed, so that a fork finds each open one in ``_held``."""


@functools.cache
def _watch_forks() -> None:
    def forget() -> None:
        for held in _held.copy():
            handle, held._handle = held._handle, -1
            os.close(handle)
        _held.clear()
        _forks.release()

    os.register_at_fork(before=_forks.acquire, after_in_parent=_forks.release, after_in_child=forget)

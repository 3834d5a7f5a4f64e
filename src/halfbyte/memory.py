"""How much memory this process has taken, and how much there is left for it.

The memory limit of a container is read from its control groups, version 2 (``memory.max``) and version 1
(``memory.limit_in_bytes``), since ``psutil`` reports the machine's memory whatever the container may use.
"""

import contextlib
import ctypes
import os
from pathlib import Path, PurePosixPath

import psutil


def free_memory() -> int:
    """Return the bytes that this process can still take: what is available, within its container's limit."""
    available = int(psutil.virtual_memory().available)
    limit = memory_limit()
    return available if limit is None else min(available, limit - anonymous_memory())


def anonymous_memory() -> int:
    """Return the bytes of this process that no file backs; where the system does not tell, all that are resident."""
    with contextlib.suppress(OSError):
        for line in Path("/proc/self/status").read_text().splitlines():
            if line.startswith("RssAnon:"):
                return int(line.split()[1]) * 1024
    return int(psutil.Process().memory_info().rss)


def give_back_freed() -> None:
    """Give pages of the heap that hold nothing back to the system, where the C library can (glibc's ``malloc_trim``).

    Tensors below 32 MiB come from the heap, and torch asks for aligned ones: where one was freed the next of its size
    does not always fit, so the heap grows to many times what is in it.
    """
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None) if os.name == "posix" else None
    if trim is not None:
        trim(ctypes.c_size_t(0))


def peak_anonymous_memory() -> int:
    """Return the most bytes without a file that this process has had: its peak, less the files' pages that it has now.

    Files' pages come and seldom go; where the system does not tell a peak, it is what there is now.
    """
    told = _status("VmHWM", "RssFile", "RssShmem")
    return max(told[0] - told[1] - told[2], anonymous_memory()) if told else anonymous_memory()


def mapped_memory(ending: str) -> int:
    """Return the bytes in memory of mapped files whose names have this ending; 0 where the system does not tell."""
    inside, found = False, 0
    try:
        text = Path("/proc/self/smaps").read_text(errors="replace")
    except OSError:
        return 0
    for line in text.splitlines():
        if line[:1].isdigit() or line[:1] in "abcdef":  # a mapping's addresses; its figures begin with a capital
            inside = line.endswith(ending)
        elif inside and line.startswith("Rss:"):
            found += int(line.split()[1]) * 1024
    return found


def _status(*names: str) -> list[int] | None:
    """Return figures of ``/proc/self/status`` in bytes, or None where one of them is not there."""
    found = {}
    with contextlib.suppress(OSError):
        for line in Path("/proc/self/status").read_text().splitlines():
            name, _, value = line.partition(":")
            if name in names:
                found[name] = int(value.split()[0]) * 1024
    return [found[name] for name in names] if len(found) == len(names) else None


def resident_memory() -> int:
    """Return the bytes of this process that are in memory, mapped files included; takes microseconds on Linux."""
    try:
        with open("/proc/self/statm", "rb", buffering=0) as about:
            return int(about.read(256).split()[1]) * os.sysconf("SC_PAGE_SIZE")
    except OSError:
        return int(psutil.Process().memory_info().rss)


def memory_limit() -> int | None:
    """Return the memory limit in bytes of the control groups that this process is in, or None."""
    membership = Path("/proc/self/cgroup")
    return cgroup_memory_limit(membership.read_text(), Path("/sys/fs/cgroup")) if membership.is_file() else None


def cgroup_memory_limit(membership: str, root: Path) -> int | None:
    """Return the lowest memory limit in bytes of the control groups that a process is in, or None.

    Args:
        membership: the text of ``/proc/<pid>/cgroup``.
        root: where the control groups are mounted, ``/sys/fs/cgroup``.
    """
    limits = []
    for entry in membership.splitlines():
        _, controllers, path = entry.split(":", 2)
        group = PurePosixPath(path.lstrip("/"))
        for folder in (group, *group.parents):
            if controllers == "":
                limits.append(root / folder / "memory.max")
            elif "memory" in controllers.split(","):
                limits.append(root / "memory" / folder / "memory.limit_in_bytes")
    texts = [file.read_text().strip() for file in limits if file.is_file()]
    return min((int(text) for text in texts if text != "max"), default=None)

"""How much memory this process has taken, and how much there is left for it.

The memory limit of a container is read from its control groups, version 2 (``memory.max``) and version 1
(``memory.limit_in_bytes``), since ``psutil`` reports the machine's memory whatever the container may use.
"""

import contextlib
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

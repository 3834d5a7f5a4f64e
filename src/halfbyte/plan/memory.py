"""How much memory there is, and how much of it is this process's own."""

from pathlib import Path

import psutil

from halfbyte.plan.doctor import cgroup_memory_limit

SHARE = 0.9
"""The part of the free memory that a run counts on; the rest is for what nobody foresees."""


def own_memory() -> int:
    """Return the bytes that this process has for itself; mapped files, which can be dropped, do not count."""
    info = psutil.Process().memory_info()
    return int(info.rss - getattr(info, "shared", 0))  # `shared` is Linux's


def free_memory() -> int:
    """Return the bytes that this process may still take without driving others or itself out of memory."""
    free: int = psutil.virtual_memory().available
    membership = Path("/proc/self/cgroup")
    if membership.is_file():
        limit = cgroup_memory_limit(membership.read_text(), Path("/sys/fs/cgroup"))
        if limit is not None:
            free = min(free, limit - own_memory())
    return int(SHARE * free)

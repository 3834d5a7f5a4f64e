"""What a container allows a process beside memory: processors by its control groups, versions 2 and 1."""

import contextlib
import os
from collections.abc import Iterator
from pathlib import Path, PurePosixPath

ROOT = Path("/sys/fs/cgroup")


def membership() -> str:
    """Return which control groups this process is in; empty where there are none."""
    with contextlib.suppress(OSError):
        return Path("/proc/self/cgroup").read_text()
    return ""


def groups(text: str, controller: str, root: Path = ROOT) -> Iterator[Path]:
    """Yield the folders of the groups that a process is in and of those above, as far as they can be seen.

    Args:
        text: of ``/proc/<pid>/cgroup``.
        controller: of version 1, as ``cpu``.
        root: where control groups are mounted.
    """
    for entry in text.splitlines():
        _, controllers, path = entry.split(":", 2)
        group = PurePosixPath(path.lstrip("/"))
        for folder in (group, *group.parents):
            if controllers == "":
                yield root / folder
            elif controller in controllers.split(","):
                yield root / controller / folder


def cpu_quota(text: str, root: Path = ROOT) -> float | None:
    """Return how many processors' time the control groups of a process give it, or None where they do not say.

    Args:
        text: of ``/proc/<pid>/cgroup``.
        root: where control groups are mounted.
    """
    quotas = []
    for folder in groups(text, "cpu", root):
        with contextlib.suppress(OSError, ValueError):
            if (folder / "cpu.max").is_file():
                quota, period = (folder / "cpu.max").read_text().split()
            else:
                quota = (folder / "cpu.cfs_quota_us").read_text().strip()
                period = (folder / "cpu.cfs_period_us").read_text().strip()
            if quota not in ("max", "-1"):
                quotas.append(int(quota) / int(period))
    return min(quotas, default=None)


def out_of_memory_kills(text: str, root: Path = ROOT) -> int:
    """Return how many processes of this one's control group were killed since they took more memory than it allows.

    Args:
        text: of ``/proc/<pid>/cgroup``.
        root: where control groups are mounted.
    """
    for folder in groups(text, "memory", root):
        for name in ("memory.events", "memory.oom_control"):
            with contextlib.suppress(OSError, ValueError):
                for line in (folder / name).read_text().splitlines():
                    key, _, count = line.partition(" ")
                    if key == "oom_kill" and int(count):
                        return int(count)
    return 0


def usable_processors() -> int:
    """Return how many processors this process may run on."""
    try:
        return len(os.sched_getaffinity(0))
    except AttributeError:  # not on macOS
        return os.cpu_count() or 1

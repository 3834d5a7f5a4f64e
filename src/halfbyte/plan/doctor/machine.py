"""What this machine gives a training run: processors and threads, memory and its limits.

threads          against cores, the processors that the process may use, and a container's quota
memory           of the machine and of the container; swap; limits of the shell; what was killed for memory
huge pages       large tensors of a step ask for them
load, governor   who else takes the processor, and how fast it is let run
"""

import contextlib
import os
import platform
import sys
from collections.abc import Iterator
from pathlib import Path

import psutil

from halfbyte.errors import size_text
from halfbyte.memory import memory_limit
from halfbyte.plan.doctor import limits
from halfbyte.plan.doctor.finding import Finding

LITTLE = 2 * 2**30
"""Bytes of memory with which only the smallest models train."""
UNLIMITED = -1
OLDEST = (3, 11)
HUGE_PAGES = Path("/sys/kernel/mm/transparent_hugepage/enabled")
GOVERNOR = Path("/sys/devices/system/cpu/cpu0/cpufreq/scaling_governor")


def check() -> Iterator[Finding]:
    """Yield what is found of the machine, without torch."""
    yield python()
    yield from memory(memory_limit())
    yield from shell_limits()
    yield from kills(limits.out_of_memory_kills(limits.membership()))
    yield from huge_pages(HUGE_PAGES)
    yield from governor(GOVERNOR)
    yield from load(os.getloadavg()[0] if hasattr(os, "getloadavg") else 0.0, limits.usable_processors())


def python() -> Finding:
    """Return which Python this is."""
    value = f"{platform.python_version()}, {platform.system()} {platform.machine()}"
    if sys.maxsize < 2**32:
        why = "torch has no build for a Python of 32 bits."
        return Finding("Python", f"{value}, 32 bits", why, "Install a Python of 64 bits.", "fault")
    return Finding("Python", value)


def threads(used: int, cores: int, quota: float | None, usable: int, environment: dict[str, str]) -> Iterator[Finding]:
    """Yield whether as many threads compute as there are processors for.

    Args:
        used: threads of torch.
        cores: of the machine.
        quota: processors' time that a container gives, or None.
        usable: processors that the process may run on.
        environment: the variables of the process.
    """
    asked = environment.get("OMP_NUM_THREADS")
    value = f"{used} of {cores} cores, OMP_NUM_THREADS {asked or 'not set'}"
    if quota is not None:
        value += f", {quota:g} of them this container's quota"
    room = min(cores, usable, *([max(int(quota), 1)] if quota is not None else []))
    if used > room:
        limit = "this container's quota" if quota is not None and int(quota) < min(cores, usable) else "there are cores"
        yield Finding(
            "threads",
            value,
            f"More threads compute than {limit} for: each waits for the one that has no core, and a step takes several "
            "times as long.",
            f"export OMP_NUM_THREADS={room}",
            "warning",
        )
    elif used < room:
        said = f"OMP_NUM_THREADS is {asked}" if asked is not None else "torch was told to"
        yield Finding(
            "threads",
            value,
            f"{room - used} of {room} cores do nothing, since {said}.",
            f"unset OMP_NUM_THREADS  # to use all {room} cores"
            if asked is not None
            else f"export OMP_NUM_THREADS={room}",
            "warning",
        )
    else:
        yield Finding("threads", value)
    if environment.get("OMP_WAIT_POLICY", "").lower() == "active" or environment.get("GOMP_SPINCOUNT") == "infinity":
        yield Finding(
            "waiting threads",
            "OMP_WAIT_POLICY is active, or GOMP_SPINCOUNT infinity",
            "Threads that wait take their core from whoever else wants it, also from this process's own.",
            "unset OMP_WAIT_POLICY GOMP_SPINCOUNT",
            "warning",
        )


def memory(limit: int | None) -> Iterator[Finding]:
    """Yield how much memory there is.

    Args:
        limit: of the container, in bytes.
    """
    there = psutil.virtual_memory()
    value = f"{size_text(there.total)}, {size_text(there.available)} available"
    room = there.available
    if limit is not None and limit < there.total:
        value += f", {size_text(limit)} allowed to this container"
        room = min(room, limit)
    if room < LITTLE:
        yield Finding(
            "memory",
            value,
            "A model of a billion parameters takes about 1.3 GiB to train in 4 bits, and the libraries 0.7 GiB.",
            "End what else takes memory (top, sorted by M), or give the container more; --memory says how much a run "
            "may take.",
            "warning",
        )
    else:
        yield Finding("memory", value)
    yield from swap(psutil.swap_memory().used, there.total)


def swap(used: int, total: int) -> Iterator[Finding]:
    """Yield whether much of what is in use has been put on the disk."""
    if used > total // 10:
        yield Finding(
            "swap",
            f"{size_text(used)} of memory are on the disk",
            "Some process has taken more than there is; training that has to fetch its own memory from there takes "
            "many times as long.",
            "End what takes the memory, or let a run take less: halfbyte train --memory SIZE",
            "warning",
        )


def shell_limits() -> Iterator[Finding]:
    """Yield limits that the shell sets (``ulimit``)."""
    import resource

    for name, option, what in (("RLIMIT_AS", "-v", "addresses"), ("RLIMIT_DATA", "-d", "data")):
        soft, _ = resource.getrlimit(getattr(resource, name))
        if soft not in (resource.RLIM_INFINITY, UNLIMITED):
            yield Finding(
                "shell's limits",
                f"ulimit {option} allows {size_text(soft)} of {what}",
                "Files of models are mapped, which counts as memory there: opening one fails with 'Cannot allocate "
                "memory' though there is some.",
                f"ulimit {option} unlimited",
                "warning",
            )


def kills(count: int) -> Iterator[Finding]:
    """Yield how many processes of this container were ended for want of memory."""
    if count:
        yield Finding(
            "memory kills",
            f"{count} process{'es' if count > 1 else ''} of this container since it started",
            "A run that ends without a word was most likely one of them.",
            "Give the container more memory, or a run less: halfbyte train --memory SIZE",
            "note",
        )


def huge_pages(file: Path) -> Iterator[Finding]:
    """Yield whether large tensors can have huge pages."""
    with contextlib.suppress(OSError):
        if "[never]" in file.read_text():
            yield Finding(
                "huge pages",
                "the system grants none",
                "Large tensors lie on pages of 4 KiB, which costs a step some percent.",
                f"echo madvise | sudo tee {file}",
                "note",
            )


def governor(file: Path) -> Iterator[Finding]:
    """Yield whether the processor is held slow."""
    with contextlib.suppress(OSError):
        if (chosen := file.read_text().strip()) == "powersave":
            yield Finding(
                "governor",
                f"the governor is {chosen}",
                "With some drivers the processor then stays at its lowest frequency.",
                "sudo cpupower frequency-set -g performance",
                "note",
            )


def load(average: float, processors: int) -> Iterator[Finding]:
    """Yield whether others take the processors."""
    if average > 1.5 * processors:
        yield Finding(
            "load",
            f"{average:.1f} processes want {processors} processors",
            "What else runs here takes its part of the time, and threads wait for the slowest of them.",
            "top  # shows who",
            "note",
        )

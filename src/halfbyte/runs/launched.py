"""What a launcher of processes (torchrun, ours, Ray) tells each of them by environment variables. Imports no torch."""

import ctypes
import os
import signal
import sys

import psutil

RESTARTS = "HALFBYTE_RESTARTS"
"""How often our launcher has started the processes of a job again; torchrun counts in a variable of its own."""
LAUNCHER = "HALFBYTE_LAUNCHER"
"""The process that is our launcher; torchrun does not tell its own."""
_PR_SET_PDEATHSIG = 1  # linux/prctl.h


def is_launched() -> bool:
    """Return whether a launcher started this process as one of several, or of one."""
    return "RANK" in os.environ and "WORLD_SIZE" in os.environ


def local_world_size() -> int:
    """Return how many processes the launcher started on this machine."""
    return int(os.environ.get("LOCAL_WORLD_SIZE") or os.environ.get("WORLD_SIZE", "1"))


def restarts() -> int:
    """Return how often the launcher has started the processes of this job again after one had died."""
    return sum(int(os.environ.get(name, "0")) for name in (RESTARTS, "TORCHELASTIC_RESTART_COUNT"))


def job() -> str | None:
    """Return what tells this launcher's job from others, the same after a restart; None if there is no launcher."""
    if not is_launched():
        return None
    name = os.environ.get("TORCHELASTIC_RUN_ID", "none")
    if name not in ("none", ""):  # torchrun's, where it was given none
        return name
    parent = psutil.Process(os.getppid())
    return f"{parent.pid} {parent.create_time()}"


def end_with_launcher() -> None:
    """Have this process asked to end (SIGTERM: it saves a checkpoint first) when the launcher ends, however it ends.

    On Linux; elsewhere nothing happens. The system tells it by a signal for each thread of the launcher, and a second
    SIGTERM would be a wish to end at once; so it is told by another signal, of which the first counts.
    """
    if not is_launched() or not sys.platform.startswith("linux") or "TORCHELASTIC_RUN_ID" not in os.environ:
        return
    parent = int(os.environ.get(LAUNCHER, os.getppid()))
    asked: list[int] = []

    def end(*_: object) -> None:
        if not asked:
            asked.append(signal.SIGTERM)
            os.kill(os.getpid(), signal.SIGTERM)

    signal.signal(signal.SIGUSR2, end)
    ctypes.CDLL(None, use_errno=True).prctl(_PR_SET_PDEATHSIG, signal.SIGUSR2, 0, 0, 0)
    if os.getppid() != parent:  # it ended in between
        end()

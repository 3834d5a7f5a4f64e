"""For the campaign: processes of ``--processes N``, forked from their launcher, which has imported all that they need.

Everything else is as it is in earnest: the launcher, torch's agent, the rendezvous, gloo, sessions, signals. A worker
that is forked has the launcher's signal handlers, its environment and its threads' locks; a new program would have none
of them, so the first two are put back here.
"""

import contextlib
import os
import signal
import sys
import traceback
from collections.abc import Callable
from typing import Any

import psutil

SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
TARGETS = ("one", "one", "launcher", "all", "launcher and one")


class Forked:
    """A forked process, with what torch's agent asks a ``subprocess.Popen`` for."""

    def __init__(self, pid: int) -> None:
        self.pid = pid
        self.returncode: int | None = None

    def poll(self) -> int | None:
        """Return the exit code, or minus the signal that ended it; None while it lives."""
        if self.returncode is None:
            done, status = os.waitpid(self.pid, os.WNOHANG)
            if done:
                self.returncode = os.waitstatus_to_exitcode(status)
        return self.returncode

    def wait(self, timeout: float | None = None) -> int:
        """Wait for the end; without a ``timeout``, since the agent has its own."""
        if self.returncode is None:
            self.returncode = os.waitstatus_to_exitcode(os.waitpid(self.pid, 0)[1])
        return self.returncode


def fork_workers(work: Callable[[], None]) -> None:
    """Have the launcher in this process fork its workers, each of which does ``work`` with the words it is given."""
    from torch.distributed.elastic.multiprocessing.subprocess_handler import SubprocessHandler

    def popen(self: Any, words: tuple[str, ...], environment: dict[str, str]) -> Forked:
        signal.pthread_sigmask(signal.SIG_BLOCK, SIGNALS)
        sys.stdout.flush()
        sys.stderr.flush()
        child = os.fork()
        if child:
            signal.pthread_sigmask(signal.SIG_UNBLOCK, SIGNALS)
            return Forked(child)
        code = 1
        try:
            os.setsid()
            os.environ.clear()
            os.environ.update(environment)
            sys.argv = ["halfbyte", *words[words.index("halfbyte") + 1 :]]
            signal.signal(signal.SIGINT, signal.default_int_handler)
            for number in SIGNALS[1:]:
                signal.signal(number, signal.SIG_DFL)
            signal.pthread_sigmask(signal.SIG_UNBLOCK, SIGNALS)
            work()
            code = 0
        except SystemExit as end:
            code = end.code if isinstance(end.code, int) else int(end.code is not None)
        except KeyboardInterrupt:
            code = 130
        except BaseException:
            traceback.print_exc()
        finally:
            with contextlib.suppress(BaseException):
                sys.stdout.flush()
                sys.stderr.flush()
            os._exit(code)

    SubprocessHandler._popen = popen


def is_writer() -> bool:
    """Return whether this process writes the run's folder, and has not been begun again."""
    return os.environ.get("RANK", "0") == "0" and os.environ.get("HALFBYTE_RESTARTS", "0") == "0"


def struck(target: str, launcher: int, number: int) -> list[int]:
    """Return the ids of the processes that ``target`` means, the launcher last; of ``one`` that with this number."""
    workers = []
    with contextlib.suppress(psutil.Error):
        workers = [process.pid for process in psutil.Process(launcher).children()]
    one = workers[number % len(workers) :][:1] if workers else []
    found = {"one": one, "launcher": [launcher], "all": [*workers, launcher], "launcher and one": [*one, launcher]}
    return found[target] or [launcher]


def kill(target: str, number: int) -> None:
    """Kill by SIGKILL what ``target`` means, from within: alone it is this process."""
    if "RANK" not in os.environ:
        os.kill(os.getpid(), signal.SIGKILL)
    pids = struck(target, os.getppid(), number)
    for pid in sorted(pids, key=lambda pid: pid == os.getpid()):  # this one last
        with contextlib.suppress(ProcessLookupError):
            os.kill(pid, signal.SIGKILL)

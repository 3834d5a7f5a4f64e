"""``--processes N``: N processes of this machine that train one model, started and watched by torchrun's own agent.

The agent (``torch.distributed.elastic``, 2.13) runs in a thread, so that signals stay ours: it would kill workers that
take more than thirty seconds to save. Each worker is this command once more, in a session of its own, on a rendezvous
at the loopback address and a free port. The first signal is passed on: the workers finish their step, save and end; so
is a second one, and they end at once. When this process is killed, Linux sends them SIGTERM
(:func:`halfbyte.runs.launched.end_with_launcher`).

The agent starts workers again whatever they ended with. Here only those are that a signal ended, since bad input
(exit code 2) stays bad; the workers see in the environment that they are to go on from the last checkpoint.
"""

import contextlib
import logging
import os
import signal
import socket
import sys
import tempfile
import threading
import uuid
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import psutil
from torch.distributed.elastic.multiprocessing import DefaultLogsSpecs
from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
from torch.distributed.launcher.api import LaunchConfig, elastic_launch

from halfbyte.errors import InputError
from halfbyte.runs.events import Listener, Note
from halfbyte.runs.launched import LAUNCHER, RESTARTS

INTERRUPTED = 130
SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
LOOPBACK = "127.0.0.1"


def launch(
    processes: int, arguments: Sequence[str], tell: Listener, max_restarts: int = 0, result: Path | None = None
) -> int:
    """Run ``halfbyte`` with ``arguments`` in ``processes`` processes and return the exit code when all have ended.

    Args:
        processes: how many; they share the cores.
        arguments: of the command line, as this process got them.
        tell: hears what is to be said, beside what the workers say themselves.
        max_restarts: how often workers begin again after one was killed.
        result: a file that comes last: who is killed after it ends nothing.

    Raises:
        InputError: a worker was killed, and no restart is left.
    """
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    if processes > cores:
        tell(Note(text=f"{processes} processes share {cores} core{'s' * (cores > 1)}: they wait for each other"))
    asked = Asked()
    job = uuid.uuid4().hex
    before = _stamp(result)
    with _environment(max(1, cores // processes)), _passed_on(asked):
        for restart in range(max_restarts + 1):
            if asked.is_set():
                return INTERRUPTED
            os.environ[RESTARTS] = str(restart)
            codes = _run(processes, arguments, job, asked)
            if asked.is_set():
                return INTERRUPTED if any(codes.values()) else 0
            failed = {code for code in codes.values() if code > 0}
            ended = {number: -code for number, code in codes.items() if code < 0}
            # by SIGTERM the agent ends the others where one has failed
            killed = {number: sent for number, sent in ended.items() if sent != signal.SIGTERM}
            if not killed and (failed or not ended):
                return 1 if 1 in failed else max(failed, default=0)
            sentence = _told(killed or ended)
            if _stamp(result) not in (None, before):
                tell(Note(text=f"{sentence}, when the run had finished"))
                return 0
            if restart == max_restarts:
                raise InputError(f"{sentence}; the run has ended. Checkpoints that were saved are whole: resume it.")
            tell(Note(text=f"{sentence}; all begin again from the last checkpoint ({restart + 1} of {max_restarts})"))
    raise AssertionError("a restart without an end")


class Asked:
    """Whether somebody asked by a signal for an end, and which processes have been told."""

    def __init__(self) -> None:
        self._signal: int | None = None
        self._told: set[int] = set()

    def is_set(self) -> bool:
        """Return whether somebody did."""
        return self._signal is not None

    def set(self, number: int) -> None:
        """Tell the processes, those that have been told before too: a second signal is a wish to end at once."""
        self._signal = number
        self._told.clear()
        self.tell()

    def tell(self) -> None:
        """Tell those that were started while the signal came."""
        if self._signal is None:
            return
        for child in psutil.Process().children():
            if child.pid not in self._told:
                self._told.add(child.pid)
                with contextlib.suppress(psutil.Error):
                    child.send_signal(self._signal if self._signal != signal.SIGHUP else signal.SIGTERM)


def _run(processes: int, arguments: Sequence[str], job: str, asked: Asked) -> dict[int, int]:
    """Start the processes, wait for all of them, and return the exit code of each that failed, by its number."""
    codes: dict[int, int] = {}
    errors: list[BaseException] = []

    def work(folder: str) -> None:
        config = LaunchConfig(
            min_nodes=1,
            max_nodes=1,
            nproc_per_node=processes,
            run_id=job,
            rdzv_backend="c10d",
            rdzv_endpoint=f"{LOOPBACK}:0",
            rdzv_configs={"is_host": True},
            local_addr=LOOPBACK,
            max_restarts=0,
            logs_specs=DefaultLogsSpecs(log_dir=folder),
        )
        try:
            elastic_launch(config, sys.executable)("-P", "-m", "halfbyte", *arguments)
        except ChildFailedError as error:
            codes.update({number: failure.exitcode for number, failure in error.failures.items()})
        except BaseException as error:
            errors.append(error)

    with tempfile.TemporaryDirectory(prefix="halfbyte-launch-") as folder, _silent("torch.distributed"):
        thread = threading.Thread(target=work, args=(folder,), name="launcher")
        thread.start()
        while thread.is_alive():
            thread.join(0.2)
            asked.tell()
    if errors:
        raise InputError(f"The processes cannot be started: {str(errors[0]).splitlines()[0]}.") from errors[0]
    return codes


def _stamp(file: Path | None) -> tuple[int, int] | None:
    """Return what tells a file from one that was written in its place; None where there is none."""
    if file is None or not file.exists():
        return None
    about = file.stat()
    return about.st_ino, about.st_mtime_ns


def _told(killed: Mapping[int, int]) -> str:
    number, sent = min(killed.items())
    memory = ", as the system does when memory runs out" if sent == signal.SIGKILL else ""
    return f"Process {number} was ended by {signal.Signals(sent).name}{memory}"


@contextlib.contextmanager
def _environment(threads: int) -> Iterator[None]:
    """Give the workers their threads, and gloo the loopback interface, unless the user's environment says otherwise."""
    loopback = [name for _, name in socket.if_nameindex() if name in ("lo", "lo0")]
    given = {"OMP_NUM_THREADS": str(threads)} | ({"GLOO_SOCKET_IFNAME": loopback[0]} if loopback else {})
    before = dict(os.environ)
    os.environ[LAUNCHER] = str(os.getpid())
    os.environ.update({name: value for name, value in given.items() if name not in before})
    try:
        yield
    finally:
        os.environ.clear()
        os.environ.update(before)


@contextlib.contextmanager
def _passed_on(asked: Asked) -> Iterator[None]:
    """While this lasts a signal to this process is one to the workers."""

    def pass_on(number: int, _: Any) -> None:
        asked.set(number)

    before = {number: signal.signal(number, pass_on) for number in SIGNALS}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


@contextlib.contextmanager
def _silent(name: str) -> Iterator[None]:
    """Leave out what the agent logs: how it sees the end of its workers, which is told here in a sentence."""
    loggers = [logging.getLogger(own) for own in logging.root.manager.loggerDict if own.startswith(name)]
    levels = [each.level for each in loggers]
    for each in loggers:
        each.setLevel(logging.CRITICAL + 1)
    try:
        yield
    finally:
        for each, own in zip(loggers, levels, strict=True):
            each.setLevel(own)

"""A side of a training benchmark in a process of its own, seen from the one that measures."""

import contextlib
import multiprocessing
import os
import re
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TypeVar

from halfbyte.bench.shapes import SHAPES, write_model
from halfbyte.bench.stacks import Failed, Imported, Job, Loaded, Side, Step, serve
from halfbyte.bench.training_report import SideResult
from halfbyte.errors import InputError

SAMPLING = 0.02
"""Seconds between two readings of a side's memory."""
Message = TypeVar("Message", Imported, Loaded, Step)


class SideProcess:
    """A side in its process, seen from here."""

    def __init__(self, side: Side, job: Job) -> None:
        spawn = multiprocessing.get_context("spawn")
        self._connection, theirs = spawn.Pipe()
        self._process = spawn.Process(target=serve, args=(theirs,), daemon=True)
        self._process.start()
        theirs.close()
        self._connection.send((side, job))
        self.side = side
        self.trials: dict[str, float | None] = {}
        self.steps: list[Step] = []
        self._imports = self._peak = 0
        self._load_seconds = 0.0

    def load(self) -> None:
        """Have the side import, then load."""
        self._receive(Imported)
        self._imports = self._peak = _anonymous(self._process.pid)
        self._load_seconds = self._ask("load", Loaded).seconds

    def step(self) -> None:
        """Have the side take a step."""
        self.steps.append(self._ask("step", Step))

    def profile(self) -> dict[str, float]:
        """Have the side take a step of which the parts are told."""
        peak = self._peak
        parts = self._ask("profile", Step).parts
        self._peak = peak  # a profile takes memory of its own
        assert parts is not None
        return parts

    def result(self, warm_up: int) -> SideResult:
        """Return what was measured, the first ``warm_up`` steps apart."""
        return SideResult(
            setting=self.side.setting,
            trials=self.trials,
            seconds=[step.seconds for step in self.steps[warm_up:]],
            processor_seconds=[step.processor_seconds for step in self.steps[warm_up:]],
            losses=[step.loss for step in self.steps],
            load_seconds=self._load_seconds,
            peak_bytes=self._peak - self._imports if self._imports else None,
        )

    def end(self) -> None:
        """End the process; what it would still write is not wanted."""
        self._process.kill()
        self._process.join()
        self._connection.close()

    def _ask(self, command: str, kind: type[Message]) -> Message:
        with contextlib.suppress(OSError):  # a process that has ended is found out by what it does not answer
            self._connection.send(command)
        return self._receive(kind)

    def _receive(self, kind: type[Message]) -> Message:
        """Wait for a message, watching the side's memory.

        Raises:
            ChildProcessError: the side failed, or was ended from outside.
            InputError: it refused its input.
        """
        while not self._connection.poll(SAMPLING):
            self._peak = max(self._peak, _anonymous(self._process.pid))
        try:
            message = self._connection.recv()
        except (EOFError, OSError):
            self._process.join()
            raise ChildProcessError(
                f"its process ended with exit code {self._process.exitcode}, perhaps for want of memory"
            ) from None
        if isinstance(message, Failed):
            raise (InputError if message.user else ChildProcessError)(message.text)
        assert isinstance(message, kind), message
        return message


@contextlib.contextmanager
def model_folder(model: str, progress: Callable[[str], None]) -> Iterator[str]:
    """Yield what to load: the model itself, or the folder of a temporary one of the shape that it names."""
    if model not in SHAPES:
        yield model
        return
    with tempfile.TemporaryDirectory(prefix="halfbyte-bench-") as folder:
        progress(f"writing random weights of the shape {model}")
        write_model(model, Path(folder))
        yield folder


@contextlib.contextmanager
def cpu_only() -> Iterator[None]:
    """Keep the processes that are started meanwhile on the CPU, and torch's profiler from printing."""
    before = dict(os.environ)
    os.environ |= {"CUDA_VISIBLE_DEVICES": "", "KINETO_LOG_LEVEL": "99"}
    try:
        yield
    finally:
        os.environ.clear()
        os.environ.update(before)


def _anonymous(pid: int | None) -> int:
    """Return the anonymous memory of a process in bytes, or 0 where the system does not tell or the process is gone."""
    try:
        status = Path(f"/proc/{pid}/status").read_text()
    except OSError:
        return 0
    found = re.search(r"^RssAnon:\s+(\d+) kB$", status, re.MULTILINE)
    return 1024 * int(found[1]) if found else 0

"""A process of its own for what takes time or memory (:mod:`halfbyte.deploy.ui.questions`).

The page's process has no torch, so that it opens at once and answers while a run trains; a preview that takes too much
memory ends its worker alone. The worker is kept, since its libraries take seconds to import, and gives way to others.
"""

import contextlib
import multiprocessing
import os
import signal
import threading
import time
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from typing import Any, TypeVar

from halfbyte.deploy.ui.attached import end_with
from halfbyte.errors import InputError

NICE = 3
PATIENCE = 900
"""Seconds that an answer may take: a configuration or a chat template may be made so that it never comes."""

Result = TypeVar("Result")


class Worker:
    """A process that answers one question after the other."""

    def __init__(self) -> None:
        self._pool: ProcessPoolExecutor | None = None
        self._turn = threading.Lock()

    def ask(self, work: Callable[..., Result], *arguments: Any) -> Result:
        """Have a function of another module done there.

        Raises:
            InputError: as it does; or it took too long, or its process was ended, for lack of memory most likely.
        """
        with self._turn:  # so that who waits is not hurt by what another asked
            if self._pool is None:
                context = multiprocessing.get_context("spawn")
                self._pool = ProcessPoolExecutor(1, mp_context=context, initializer=_begin, initargs=(os.getpid(),))
            begun = time.monotonic()
            try:
                return self._pool.submit(_timed, PATIENCE, work, *arguments).result()
            except BrokenProcessPool:
                self.close()
                told = "There was not enough memory for that; close other programs, or take less data."
                if time.monotonic() - begun >= PATIENCE:
                    told = f"That took more than {PATIENCE // 60} minutes; take less data, or another model."
                raise InputError(told) from None

    def close(self) -> None:
        """End the process."""
        if self._pool is not None:
            self._pool.shutdown(wait=False, cancel_futures=True)
            self._pool = None


def _timed(seconds: int, work: Callable[..., Result], *arguments: Any) -> Result:
    """Do it, or end: the system ends this process also in the midst of what Python cannot interrupt."""
    signal.alarm(seconds)
    try:
        return work(*arguments)
    finally:
        signal.alarm(0)


def _begin(parent: int) -> None:
    end_with(parent)
    with contextlib.suppress(OSError):
        os.nice(NICE)
    os.environ.setdefault("GOMP_SPINCOUNT", "1000")

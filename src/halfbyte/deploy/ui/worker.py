"""A process of its own for what takes time or memory (:mod:`halfbyte.deploy.ui.questions`).

The page's process has no torch, so that it opens at once and answers while a run trains; a preview that takes too much
memory ends its worker alone. The worker is kept, since its libraries take seconds to import, and gives way to others.
"""

import contextlib
import multiprocessing
import os
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from typing import Any, TypeVar

from halfbyte.deploy.ui.attached import end_with
from halfbyte.errors import InputError

NICE = 3

Result = TypeVar("Result")


class Worker:
    """A process that answers one question after the other."""

    def __init__(self) -> None:
        self._pool: ProcessPoolExecutor | None = None

    def ask(self, work: Callable[..., Result], *arguments: Any) -> Result:
        """Have a function of another module done there.

        Raises:
            InputError: as it does; or its process was ended, for lack of memory most likely.
        """
        if self._pool is None:
            context = multiprocessing.get_context("spawn")
            self._pool = ProcessPoolExecutor(1, mp_context=context, initializer=_begin, initargs=(os.getpid(),))
        try:
            return self._pool.submit(work, *arguments).result()
        except BrokenProcessPool:
            self.close()
            raise InputError("There was not enough memory for that; close other programs, or take less data.") from None

    def close(self) -> None:
        """End the process."""
        if self._pool is not None:
            self._pool.shutdown(wait=False, cancel_futures=True)
            self._pool = None


def _begin(parent: int) -> None:
    end_with(parent)
    with contextlib.suppress(OSError):
        os.nice(NICE)
    os.environ.setdefault("GOMP_SPINCOUNT", "1000")

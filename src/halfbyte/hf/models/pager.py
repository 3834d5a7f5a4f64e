"""Parts of a model, read from their files in the order of their use, within a budget: a thread, and who waits for it.

    forward              0, 1, ..., n-1, head
    backward of a step   n-1, ..., 1, 0, and the next step begins with 0 again
    decoding             0, 1, ..., n-1, head, and 0 again

As many units as the budget holds stay (they are *pinned*, the first ones); of the others there is the one that
computes, and those that come after it, which are read while it does. What the forward leaves in memory is what the
backward wants first, and the other way round. A step so reads ``2 (size - what stays)`` from the disk.

Left out: reading past the page cache (``O_DIRECT``) into memory of our own; each process would then read for itself,
and a weight that is used at the wrong time would be another layer's.
"""

import contextlib
import ctypes
import itertools
import logging
import threading
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from halfbyte.errors import InputError, size_text
from halfbyte.mapped import Files, Piece

logger = logging.getLogger(__name__)

LEAST = 2
"""Units that are in memory at least: the one that computes, and the next."""
LOOK = 1e-3
"""Seconds between two looks at how far a native call has come."""
PATIENCE = 30.0
"""Seconds of waiting for the disk after which it is told."""


@dataclass(frozen=True)
class Unit:
    """A decoder layer, or the head: what of it lies in mapped files.

    Attributes:
        pieces: of the files.
        nbytes: of them.
    """

    pieces: tuple[Piece, ...]
    nbytes: int


@dataclass
class Traffic:
    """What was read since the pager began.

    Attributes:
        read: bytes that were asked of the page cache, whether the disk had to give them or not.
        waited: seconds that computing stood still for them.
    """

    read: int = 0
    waited: float = 0.0


def least_of(units: Sequence[Unit]) -> int:
    """Return how many bytes must have room: units follow each other, so it is the largest run of :data:`LEAST`."""
    sizes = [unit.nbytes for unit in units]
    return max((sum(sizes[i : i + LEAST]) for i in range(max(len(sizes) - LEAST + 1, 1))), default=0)


class Pager:
    """Has the layers of a model in memory when they compute, within a budget.

    Args:
        units: of the model, in the order of its forward.
        budget: bytes of them that may be in memory at a time.

    Attributes:
        pinned: numbers of the units that stay once they were read.
        traffic: what was read, and waited for.

    Raises:
        InputError: the budget is less than two layers, or a file is gone.
    """

    def __init__(self, units: Sequence[Unit], budget: int) -> None:
        least = least_of(units)
        if budget < least:
            raise InputError(
                f"Of the base model {size_text(least)} must be in memory at a time ({LEAST} layers), but "
                f"{size_text(max(budget, 0))} are left for it: raise memory by {size_text(least - budget)}."
            )
        self._units = units
        self.budget = budget
        self.pinned: set[int] = set()
        self._window = budget
        for number, unit in enumerate(units):
            if self._window - unit.nbytes < least:
                break
            self.pinned.add(number)
            self._window -= unit.nbytes
        self.traffic = Traffic()
        self._files = Files(piece for unit in units for piece in unit.pieces)
        self._changed = threading.Condition()
        self._here: set[int] = set()
        self._wanted: list[int] = []
        self._followed: ctypes.c_int64 | None = None
        self._error: BaseException | None = None
        self._closed = False
        self._thread = threading.Thread(target=self._read_on, name="halfbyte-pager", daemon=True)
        self._thread.start()

    def enter(self, number: int, *, backward: bool, training: bool) -> None:
        """Have a unit in memory, and those that come next on their way.

        Args:
            number: of the unit that is to compute now.
            backward: whether it is its backward pass.
            training: whether a backward pass will follow.

        Raises:
            InputError: its file cannot be read any more.
        """
        with self._changed:
            self._wanted = self._ahead(number, backward, training)
            self._changed.notify_all()
            if number in self._here:
                return
            begun, told = time.perf_counter(), False
            while number not in self._here:
                if self._error is not None:
                    raise self._error
                self._changed.wait(1.0)
                if not told and time.perf_counter() - begun > PATIENCE:
                    logger.warning("Waiting for the disk: layer %d does not come for %.0f s.", number, PATIENCE)
                    told = True
            self.traffic.waited += time.perf_counter() - begun

    @contextlib.contextmanager
    def follow(self, at: int) -> Iterator[None]:
        """Meanwhile read ahead of a native call over all layers, which nobody waits in.

        Args:
            at: address of an int64, in which the call writes the number of the unit that it is at.
        """
        place = ctypes.c_int64.from_address(at)
        place.value = 0
        with self._changed:
            self._followed = place
            self._changed.notify_all()
        try:
            yield
        finally:
            with self._changed:
                self._followed = None

    def close(self) -> None:
        """Read and drop no more; the system decides from now on."""
        with self._changed:
            self._closed = True
            self._changed.notify_all()
        if threading.current_thread() is not self._thread:
            self._thread.join()
            self._files.close()

    def _ahead(self, number: int, backward: bool, training: bool) -> list[int]:
        """Return the units that shall be in memory, in the order in which they are used."""
        wanted: list[int] = []
        room = self._window
        for unit in _order(number, len(self._units), backward, training):
            if unit in wanted:
                continue
            if unit not in self.pinned:
                room -= self._units[unit].nbytes
                if room < 0:
                    break
            wanted.append(unit)
        return wanted

    def _read_on(self) -> None:
        """Read what is wanted and drop what is not, until the pager is closed."""
        try:
            while (number := self._next()) is not None:
                for nbytes in self._files.read(self._units[number].pieces):
                    self.traffic.read += nbytes
                    if self._closed:
                        return
                with self._changed:
                    self._here.add(number)
                    self._changed.notify_all()
        except BaseException as error:
            with self._changed:
                self._error = error
                self._changed.notify_all()

    def _next(self) -> int | None:
        """Wait for a unit to be read, drop what it takes the place of, and return it; None at the end."""
        with self._changed:
            while not self._closed:
                if self._followed is not None:
                    self._wanted = self._ahead(self._followed.value, False, False)
                for number in self._wanted:
                    if number not in self._here:
                        gone = self._here - self.pinned - set(self._wanted)
                        self._here -= gone
                        self._files.drop(piece for unit in gone for piece in self._units[unit].pieces)
                        return number
                self._changed.wait(None if self._followed is None else LOOK)
        return None


def _order(number: int, count: int, backward: bool, training: bool) -> Iterator[int]:
    """Yield the units from ``number`` on as they are used, and again."""
    down, up = range(count - 1, -1, -1), range(count)
    if backward:
        return itertools.chain(range(number, -1, -1), up)
    if training:
        return itertools.chain(range(number, count), down)
    return itertools.chain(range(number, count), up)

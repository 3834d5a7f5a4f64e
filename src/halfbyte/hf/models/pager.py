"""Parts of a model, read from their files in the order of their use, within a budget: a thread, and who waits for it.

    forward              0, 1, ..., n-1, head
    backward of a step   n-1, ..., 1, 0, and the next step begins with 0 again
    decoding             0, 1, ..., n-1, head, and 0 again

As many units as the budget holds stay (they are *pinned*, the first ones); of the others there is the one that
computes, and those that come after it, which are read while it does. What the forward leaves in memory is what the
backward wants first, and the other way round. A step so reads ``2 (size - what stays)`` from the disk.

Of a mixture of experts few tokens want little: so in decoding only what each token needs of a unit (attention, norms,
router) is read ahead and stays first. Experts are read when the router has chosen them, a layer's together, and stay by
use: that of the lowest count goes first, in which a use counts half as much after :data:`HALF_LIFE` passes. (Seen from
the beginning a use in pass ``t`` counts ``2^(t / HALF_LIFE)``, and no time changes the order: LRFU, Lee et al. 2001;
against the least recently and the least often used, LOG.md.) With many tokens nearly all experts of a layer are chosen,
and units are read ahead whole.

Left out: reading past the page cache (``O_DIRECT``) into memory of our own; each process would then read for itself,
and a weight that is used at the wrong time would be another layer's.
"""

import contextlib
import ctypes
import heapq
import itertools
import logging
import math
import threading
import time
from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass
from typing import NamedTuple

from halfbyte.errors import InputError, size_text
from halfbyte.mapped import Files, Piece, inner, joined

logger = logging.getLogger(__name__)

LEAST = 2
"""Units that are in memory at least: the one that computes, and the next."""
LOOK = 1e-3
"""Seconds between two looks at how far a native call has come."""
PATIENCE = 30.0
"""Seconds of waiting for the disk after which it is told."""
HALF_LIFE = 32.0
"""Passes after which a use of an expert counts half."""
LINE = 64
"""Parts that are told off to go next, at a time: looking through all takes a millisecond for thousands of experts."""

Key = tuple[int, int]
"""A part of a unit: the unit's number, and 0 for what each token needs, or 1 more than the number of an expert."""
Group = frozenset[Key]
"""Parts that are read together."""


class Part(NamedTuple):
    """What is in memory or is not.

    Attributes:
        pieces: of files.
        nbytes: of them.
    """

    pieces: tuple[Piece, ...]
    nbytes: int


@dataclass(frozen=True)
class Unit:
    """A decoder layer, or the head: what of it lies in mapped files.

    Attributes:
        always: what each token needs of it.
        experts: of a mixture, each apart.
    """

    always: Part
    experts: tuple[Part, ...] = ()

    @property
    def parts(self) -> tuple[Part, ...]:
        """All of it, in the order of :data:`Key`."""
        return (self.always, *self.experts)

    @property
    def nbytes(self) -> int:
        """Bytes of all of it."""
        return sum(part.nbytes for part in self.parts)

    @property
    def pieces(self) -> list[Piece]:
        """All of it, as long pieces as there are."""
        return joined(piece for part in self.parts for piece in part.pieces)


@dataclass
class Traffic:
    """What was read since the pager began.

    Attributes:
        read: bytes that were asked of the page cache, whether the disk had to give them or not.
        waited: seconds that computing stood still for them.
    """

    read: int = 0
    waited: float = 0.0


def least_of(sizes: Sequence[int]) -> int:
    """Return how many bytes of units must have room: they follow each other, so it is the largest run of
    :data:`LEAST`."""
    return max((sum(sizes[i : i + LEAST]) for i in range(max(len(sizes) - LEAST + 1, 1))), default=0)


class _Ahead:
    """What is read ahead: a group of each unit, as far as a budget goes.

    Args:
        groups: of the units, in the order of the forward.
        sizes: of the groups, in bytes.
        budget: bytes of them that may be in memory at a time.

    Attributes:
        pinned: numbers of the units that stay once they were read.
    """

    def __init__(self, groups: Sequence[Group], sizes: Sequence[int], budget: int) -> None:
        self._groups, self._sizes, self._window = groups, sizes, budget
        self.pinned: set[int] = set()
        least = least_of(sizes) if sum(sizes) > budget else 0
        for number, size in enumerate(sizes):
            if self._window - size < least:
                break
            self.pinned.add(number)
            self._window -= size

    def wanted(self, number: int, backward: bool = False, training: bool = False) -> list[Group]:
        """Return what shall be in memory when unit ``number`` computes, in the order in which it is used."""
        wanted: dict[int, None] = {}
        room = self._window
        for unit in _order(number, len(self._groups), backward, training):
            if unit in wanted:
                continue
            if unit not in self.pinned:
                room -= self._sizes[unit]
                if wanted and room < 0:
                    break
            wanted[unit] = None
        return [self._groups[unit] for unit in wanted]


class Pager:
    """Has the layers of a model in memory when they compute, within a budget.

    Args:
        units: of the model, in the order of its forward.
        budget: bytes of them that may be in memory at a time.
        table: the embedding, whose rows come as they are looked up, and nothing around them.

    Attributes:
        pinned: numbers of the units that stay once they were read.
        traffic: what was read, and waited for.

    Raises:
        InputError: the budget is less than two layers, or a file is gone.
    """

    def __init__(self, units: Sequence[Unit], budget: int, table: Sequence[Piece] = ()) -> None:
        least = least_of([unit.nbytes for unit in units])
        if budget < least:
            raise InputError(
                f"Of the base model {size_text(least)} must be in memory at a time ({LEAST} layers), but "
                f"{size_text(max(budget, 0))} are left for it: raise memory by {size_text(least - budget)}."
            )
        self._units = units
        self._parts = {(number, place): part for number, u in enumerate(units) for place, part in enumerate(u.parts)}
        self.budget = budget
        whole = [frozenset((number, place) for place in range(len(unit.parts))) for number, unit in enumerate(units)]
        self._whole = _Ahead(whole, [unit.nbytes for unit in units], budget)
        self.pinned = self._whole.pinned
        experts = [sum(part.nbytes for part in unit.experts) for unit in units]
        alone = [frozenset([(number, 0)]) for number in range(len(units))]
        self._always = _Ahead(alone, [unit.always.nbytes for unit in units], budget - max(experts, default=0))
        self._mixtures = sum(map(bool, experts))
        self.traffic = Traffic()
        self._files = Files([*(piece for unit in units for piece in unit.pieces), *table])
        self._table = table
        self._files.read_around(table, False)
        self._changed = threading.Condition()
        self._here: set[Key] = set()
        self._coming: Group = frozenset()
        self._held = 0  # bytes of both
        self._uses: dict[Key, float] = {}  # logarithms to base 2 of the counts
        self._now = 0.0  # passes, in half-lives
        self._line: list[tuple[float, Key]] = []  # what goes next, with its count then; the least used is the last
        self._wanted: list[Group] = []
        self._few = False
        self._followed: ctypes.c_int64 | None = None
        self._error: BaseException | None = None
        self._closed = False
        self._thread = threading.Thread(target=self._read_on, name="halfbyte-pager", daemon=True)
        self._thread.start()

    def drop_table(self) -> None:
        """Give back what was read of the embedding, which nobody has changed."""
        self._files.drop(self._table)

    def enter(self, number: int, *, backward: bool, training: bool, few: bool = False) -> None:
        """Have a unit in memory, and those that come next on their way.

        Args:
            number: of the unit that is to compute now.
            backward: whether it is its backward pass.
            training: whether a backward pass will follow.
            few: whether so few tokens go forward that experts are waited for in :meth:`choose` alone.

        Raises:
            InputError: its file cannot be read any more.
        """
        with self._changed:
            self._few = few and self._mixtures > 0
            self._wanted = (self._always if self._few else self._whole).wanted(number, backward, training)
            self._wait_for(number)

    def choose(self, number: int, experts: Collection[int]) -> None:
        """Have experts in memory, if a unit was entered with few tokens; else they are there or on their way.

        Args:
            number: of the unit.
            experts: that its router has chosen.

        Raises:
            InputError: the unit's file cannot be read any more.
        """
        with self._changed:
            if self._few:
                self._wanted = [self._count(number, experts), *self._always.wanted(number)]
                self._wait_for(number)

    def used(self, number: int, experts: Collection[int]) -> None:
        """Note which experts a native call has used, and drop what is over the budget with them.

        Args:
            number: of the unit.
            experts: of it that were used, each once.
        """
        with self._changed:
            there = self._count(number, experts) - self._here - self._coming
            self._make_room(there)
            self._here |= there

    def _wait_for(self, number: int) -> None:
        """Wait until the first group of those that are wanted is in memory; it is of unit ``number``."""
        first = self._wanted[0]
        self._changed.notify_all()
        if first <= self._here:
            return
        begun, told = time.perf_counter(), False
        while not first <= self._here:
            if self._error is not None:
                raise self._error
            self._changed.wait(1.0)
            if not told and time.perf_counter() - begun > PATIENCE:
                logger.warning("Waiting for the disk: layer %d does not come for %.0f s.", number, PATIENCE)
                told = True
        self.traffic.waited += time.perf_counter() - begun

    def _count(self, number: int, experts: Collection[int]) -> Group:
        """Count a use of experts, and return them."""
        keys = frozenset((number, 1 + expert) for expert in experts)
        self._now += 1 / (HALF_LIFE * max(self._mixtures, 1))
        for key in keys:
            before = self._uses.get(key, -math.inf)
            self._uses[key] = self._now + math.log2(1 + 2 ** (before - self._now))
        return keys

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
            self._files.read_around(self._table, True)
            self._files.close()

    def _read_on(self) -> None:
        """Read what is wanted, until the pager is closed."""
        try:
            while (found := self._next()) is not None:
                group, scattered = found
                for nbytes in self._files.read(self._pieces(group), scattered):
                    self.traffic.read += nbytes
                    if self._closed:
                        return
                with self._changed:
                    self._here |= group
                    self._coming = frozenset()
                    self._changed.notify_all()
        except BaseException as error:
            with self._changed:
                self._error = error
                self._changed.notify_all()

    def _next(self) -> tuple[Group, bool] | None:
        """Wait until there is something to be read, make room, and return it with whether it lies scattered."""
        with self._changed:
            while not self._closed:
                if self._followed is not None:
                    self._few = self._mixtures > 0
                    self._wanted = self._always.wanted(self._followed.value)
                for group in self._wanted:
                    if missing := group - self._here:
                        self._make_room(missing)
                        self._coming = missing
                        return missing, self._few
                self._changed.wait(None if self._followed is None else LOOK)
        return None

    def _make_room(self, coming: Group) -> None:
        """Drop as much of what is not wanted as is over the budget with what comes, the least used first."""
        self._held += self._nbytes(coming)
        if self._held <= self.budget:
            return
        gone = []
        wanted = set().union(*self._wanted)
        while self._held > self.budget:
            if not self._line:
                idle = ((self._uses.get(key, -math.inf), key) for key in self._here - wanted)
                self._line = heapq.nsmallest(LINE, idle)[::-1]
            if not self._line:
                break
            count, key = self._line.pop()
            if key in self._here and key not in wanted and count == self._uses.get(key, -math.inf):
                gone.append(key)
                self._here.remove(key)
                self._held -= self._parts[key].nbytes
        self._files.drop(inner(self._pieces(gone)))

    def _nbytes(self, keys: Collection[Key]) -> int:
        return sum(self._parts[key].nbytes for key in keys)

    def _pieces(self, keys: Collection[Key]) -> list[Piece]:
        return joined((piece for key in keys for piece in self._parts[key].pieces), gap=0)


def _order(number: int, count: int, backward: bool, training: bool) -> Iterator[int]:
    """Yield the units from ``number`` on as they are used, and again."""
    down, up = range(count - 1, -1, -1), range(count)
    if backward:
        return itertools.chain(range(number, -1, -1), up)
    if training:
        return itertools.chain(range(number, count), down)
    return itertools.chain(range(number, count), up)

"""Timing several implementations of one work against each other.

A machine's speed changes from minute to minute, so only what was measured side by side can be compared: the sides
take turns (A, B, C, A, B, C, ...), a ratio is taken within each round, and its median and quartiles over the rounds are
what counts. The machine's ceilings are timed as sides like any other.

- A sample lasts at least :data:`SAMPLE` seconds: as many calls, one after the other, as that takes.
- Before each sample there is a pause in which the threads of the side before stop spinning (bitsandbytes brings an
  OpenMP runtime of its own beside torch's), and one call that is not counted, which wakes the side's own.
- A side is a ring of calls, each over data of its own. Together they are larger than the caches, so that short calls
  find their weights in memory, as they do in a model.
- Everything is called before the first round, and the first round is not counted: no memory is touched for the first
  time, and none is given back to the system meanwhile (:func:`memory_kept`).
"""

import contextlib
import ctypes
import dataclasses
import itertools
import math
import time
from collections.abc import Callable, Iterator, Mapping, Sequence

import torch

Call = Callable[[], object]

SAMPLE = 0.02
PAUSE = 0.005
RING_BYTES = 128 * 2**20
RING_CALLS = 32


@dataclasses.dataclass(frozen=True)
class Ring:
    """The calls of one side, which are made one after the other, over and over.

    Attributes:
        calls: they do the same over different data.
        setting: which of an implementation's ways this is, if it has several.
    """

    calls: Sequence[Call]
    setting: str = ""


def ring_size(size: int) -> int:
    """Return of how many calls, each over data of ``size`` bytes, a ring should be."""
    return min(RING_CALLS, math.ceil(RING_BYTES / size))


def fastest(*rings: Ring) -> Ring:
    """Return the ring whose calls take the least time."""
    if len(rings) == 1:
        return rings[0]
    seconds = interleaved({str(i): ring for i, ring in enumerate(rings)}, rounds=2)
    return rings[min(range(len(rings)), key=lambda i: min(seconds[str(i)]))]


@torch.no_grad()
def interleaved(sides: Mapping[str, Ring], rounds: int) -> dict[str, list[float]]:
    """Return the seconds that one call of each side takes, in each of ``rounds`` rounds."""
    for side in sides.values():
        for call in side.calls:
            call()
    endless = {name: itertools.cycle(side.calls) for name, side in sides.items()}
    counts = {name: math.ceil(SAMPLE / _sample(calls, 1)) for name, calls in endless.items()}
    seconds: dict[str, list[float]] = {name: [] for name in sides}
    for _ in range(rounds + 1):
        for name, calls in endless.items():
            seconds[name].append(_sample(calls, counts[name]))
    return {name: times[1:] for name, times in seconds.items()}


def _sample(calls: Iterator[Call], count: int) -> float:
    time.sleep(PAUSE)
    if count > 1:
        next(calls)()
    start = time.perf_counter()
    for call in itertools.islice(calls, count):
        call()
    return (time.perf_counter() - start) / count


@contextlib.contextmanager
def memory_kept() -> Iterator[None]:
    """Let the process keep the memory that it frees, where the C library is glibc.

    By default every tensor of more than 32 MiB comes as fresh pages from the system and goes back to it, and a
    dequantization then spends most of its time in page faults.
    """
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    trim_threshold, mmap_threshold, mmap_max = -1, -3, -4  # malloc.h
    if mallopt is not None:
        mallopt(mmap_max, 0)
        mallopt(trim_threshold, 2**30)
    try:
        yield
    finally:
        if mallopt is not None:  # the largest thresholds that glibc adapts to by itself
            mallopt(mmap_max, 2**16)
            mallopt(mmap_threshold, 2**25)
            mallopt(trim_threshold, 2**26)

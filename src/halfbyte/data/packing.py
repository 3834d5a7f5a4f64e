"""How the samples of an optimizer step share forward passes: planned here, done in :mod:`halfbyte.data.collate`.

An optimizer step takes the same samples packed or not, so packing changes its speed and never the recipe. Its samples
are laid one behind the other in as few micro-batches as best fit decreasing finds (Johnson 1973: each sample, the
longest first, goes where the least room is left), so that nothing is padded, nothing cut, and the time that each pass
takes of its own is spent less often.

What that brings depends on the lengths alone. It is found by going through some steps of an epoch as the trainer's
sampler would order them.
"""

import bisect
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

PASS = 100
"""What a forward and backward pass costs beside its tokens, in tokens: see benchmarks/README.md."""
PAYS = 1.03
"""Packing is worth its while from so many times the speed."""
STEPS = 400
"""Optimizer steps that are looked at, at most."""
MEGABATCH = 50
"""Batches among which transformers (5.23, ``get_length_grouped_indices``) sorts rows by length."""

Lengths = Sequence[int] | np.ndarray[Any, Any]


@dataclass(frozen=True)
class PackingPlan:
    """What packing does to an optimizer step, on the average over the steps of an epoch.

    Attributes:
        tokens: the most that a packed micro-batch may hold.
        samples: of a step.
        passes: forward passes of a step as it is.
        packed_passes: of a packed one.
        padded_tokens: tokens that go through the model as it is, padding included.
        packed_tokens: those of a packed step, which has no padding.
    """

    tokens: int
    samples: float
    passes: float
    packed_passes: float
    padded_tokens: float
    packed_tokens: float

    @property
    def gain(self) -> float:
        """How many times as fast a packed step is expected to be."""
        return (self.padded_tokens + PASS * self.passes) / (self.packed_tokens + PASS * self.packed_passes)

    @property
    def pays(self) -> bool:
        """Whether packing is worth its while."""
        return self.gain >= PAYS

    def __str__(self) -> str:
        """For a run's log."""
        less = self.padded_tokens / self.packed_tokens
        return (
            f"Packing: {self.samples:.0f} rows a step in {self.packed_passes:.1f} passes of up to {self.tokens:,} "
            f"tokens in place of {self.passes:.1f}; {less:.2f} times fewer tokens with their padding, about "
            f"{self.gain:.2f} times as fast"
        )


def plan_packing(
    lengths: Lengths, batch_size: int, accumulation: int, max_length: int, group_by_length: bool
) -> PackingPlan:
    """Foresee what packing brings.

    Args:
        lengths: tokens of each row of the data.
        batch_size: rows of a micro-batch, unpacked.
        accumulation: micro-batches of an optimizer step.
        max_length: tokens that a row may have; those of the data may be shorter.
        group_by_length: whether the sampler puts rows of similar length into one step.

    Raises:
        ValueError: there are no rows.
    """
    lengths = np.asarray(lengths, dtype=np.int64)
    if not len(lengths):
        raise ValueError("there are no rows to pack")
    rows = min(batch_size * accumulation, len(lengths))
    largest_step = int(np.partition(lengths, len(lengths) - rows)[-rows:].sum())
    tokens = min(batch_size * max(int(lengths.max()), max_length), largest_step)
    steps = list(_steps(lengths, batch_size * accumulation, group_by_length))
    passes = packed_passes = padded = whole = 0
    for step in steps:
        batches = [step[first : first + batch_size] for first in range(0, len(step), batch_size)]
        passes += len(batches)
        padded += sum(len(batch) * int(batch.max()) for batch in batches)
        packed_passes += min(len(best_fit_decreasing(step.tolist(), tokens)), len(batches))
        whole += int(step.sum())
    samples = sum(map(len, steps))
    return PackingPlan(tokens, *(total / len(steps) for total in (samples, passes, packed_passes, padded, whole)))


def best_fit_decreasing(lengths: Sequence[int], tokens: int) -> list[list[int]]:
    """Distribute samples over as few bins as best fit decreasing finds, at most 11/9 of the fewest and 6/9 of one more.

    Args:
        lengths: of the samples.
        tokens: that a bin holds; a longer sample has a bin for itself.

    Returns:
        the indices of each bin's samples, ascending; the bins in the order of their first samples.
    """
    bins: list[list[int]] = []
    room: list[tuple[int, int]] = []  # left in a bin, and its number, sorted
    for index in sorted(range(len(lengths)), key=lambda index: -lengths[index]):
        length = lengths[index]
        place = bisect.bisect_left(room, (length, -1))
        left, number = room.pop(place) if place < len(room) else (tokens, len(bins))
        if number == len(bins):
            bins.append([])
        bins[number].append(index)
        bisect.insort(room, (left - length, number))
    return sorted(map(sorted, bins))


def divide(bins: Sequence[Sequence[int]], lengths: Sequence[int], count: int) -> list[list[int]]:
    """Divide bins until there are ``count`` of them, or no two samples are together.

    Args:
        bins: from :func:`best_fit_decreasing`.
        lengths: of the samples.
        count: bins that are wanted.
    """
    divided = [list(members) for members in bins]
    while len(divided) < count:
        many = [members for members in divided if len(members) > 1]
        if not many:
            break
        fullest = max(many, key=lambda members: sum(lengths[index] for index in members))
        divided.remove(fullest)
        half = -(-sum(lengths[index] for index in fullest) // 2)
        parts = best_fit_decreasing([lengths[index] for index in fullest], half)
        first = [fullest[place] for place in parts[0]]
        divided += [first, [index for index in fullest if index not in first]]
    return sorted(divided)


def _steps(lengths: np.ndarray[Any, Any], group: int, group_by_length: bool) -> Iterator[np.ndarray[Any, Any]]:
    """Yield the lengths of the samples of some optimizer steps, spread over an epoch, in the sampler's order."""
    mixed = lengths[np.random.default_rng(0).permutation(len(lengths))]
    mega = max(min(len(lengths) // (4 * group), MEGABATCH), 1) * group if group_by_length else group
    megas = range(0, len(lengths), mega)
    taken = max(STEPS * group // mega, 1)
    for first in megas[:: max(len(megas) // taken, 1)]:
        together = mixed[first : first + mega]
        if group_by_length:
            together = np.sort(together)[::-1]
        yield from (together[start : start + group] for start in range(0, len(together), group))

"""One pass over a table of rows: a few numbers a row, from which the survey is made.

Rows are compared by 64-bit hashes. A token at a place adds ``mix(token + place * 2**32)`` to the hash of its row,
modulo 2**64, with splitmix64's mixer (Steele, Lea, Flood, OOPSLA 2014): the hash of any beginning of a row is a
difference of two prefix sums, and a part of the table takes a dozen passes of numpy. Among a million different rows two
share a hash with a chance of 3e-8.
"""

import dataclasses
from collections import Counter
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, Any

import numpy as np
import pyarrow.compute as pc
from numpy.typing import NDArray

from halfbyte.choices import IGNORED

if TYPE_CHECKING:
    import datasets

PART_TOKENS = 1 << 19
"""Tokens that are looked at together, about: 4 MB for each array of 64-bit numbers."""
PART_ROWS = 10_000
OPENING = 5
"""Tokens of an answer that count as its opening."""

Hashes = NDArray[np.uint64]
Progress = Callable[[int, int], None]
"""Called now and then with the rows that are done, and all of them."""


@dataclasses.dataclass(frozen=True)
class Measured:
    """What was found in a table, arrays with one number a row.

    Attributes:
        lengths: tokens of the row.
        trained: tokens of it that have a label.
        prompts: tokens before the first trained one; all if there is none.
        hashes: of all token ids.
        prompt_hashes: of the ids before the first trained one.
        opening_hashes: of the first ``OPENING`` trained ids, or as many as the first answer has; of a text, a row with
            at most one token before the first trained one, from its beginning.
        answers: stretches of trained tokens in the table.
        ends: how many of them end with which token id.
    """

    lengths: NDArray[np.int32]
    trained: NDArray[np.int32]
    prompts: NDArray[np.int32]
    hashes: Hashes
    prompt_hashes: Hashes
    opening_hashes: Hashes
    answers: int
    ends: Counter[int]


@dataclasses.dataclass(frozen=True)
class Part:
    """Some rows of a table, one behind the other.

    Attributes:
        ids: int32 ``[T]``; ``labels`` as long.
        starts: where each row begins, int64 ``[N]``; ``ends``: behind its last token.
    """

    ids: NDArray[np.int32]
    labels: NDArray[np.int32]
    starts: NDArray[np.int64]
    ends: NDArray[np.int64]

    def places(self) -> NDArray[np.int64]:
        """Return each token's place in its row, ``[T]``."""
        return np.arange(len(self.ids)) - np.repeat(self.starts, self.ends - self.starts)


def parts(rows: "datasets.Dataset", longest: int) -> Iterator[Part]:
    """Yield the rows in order, about ``PART_TOKENS`` tokens at a time if none has more than ``longest``."""
    size = max(1, min(PART_ROWS, PART_TOKENS // max(longest, 1)))
    for table in rows.select_columns(["input_ids", "labels"]).with_format("arrow").iter(batch_size=size):
        ids, labels = (table[name].combine_chunks() for name in ("input_ids", "labels"))
        sizes = pc.list_value_length(ids).to_numpy(zero_copy_only=False).astype(np.int64)
        ends = np.cumsum(sizes)
        flat_ids, flat_labels = (array.flatten().to_numpy(zero_copy_only=False) for array in (ids, labels))
        yield Part(flat_ids, flat_labels, ends - sizes, ends)


def mix(values: NDArray[Any]) -> Hashes:
    """Return splitmix64 of each of ``values``."""
    hashes = values.astype(np.uint64)
    hashes += np.uint64(0x9E3779B97F4A7C15)
    hashes ^= hashes >> np.uint64(30)
    hashes *= np.uint64(0xBF58476D1CE4E5B9)
    hashes ^= hashes >> np.uint64(27)
    hashes *= np.uint64(0x94D049BB133111EB)
    hashes ^= hashes >> np.uint64(31)
    return hashes


def measure(rows: "datasets.Dataset", longest: int, progress: Progress | None = None) -> Measured:
    """Go once through ``rows``, a dataset with ``input_ids`` and ``labels`` of at most ``longest`` tokens."""
    lengths, labelled, prompts = (np.zeros(len(rows), np.int32) for _ in range(3))
    hashes, prompt_hashes, opening_hashes = (np.zeros(len(rows), np.uint64) for _ in range(3))
    done = answers = 0
    ends: Counter[int] = Counter()
    for part in parts(rows, longest):
        here = slice(done, done + len(part.starts))
        trained = np.flatnonzero(part.labels != IGNORED)
        before, behind = np.searchsorted(trained, part.starts), np.searchsorted(trained, part.ends)
        some = behind > before
        first = part.ends.copy()
        first[some] = trained[before[some]]
        lengths[here], labelled[here], prompts[here] = part.ends - part.starts, behind - before, first - part.starts
        sums = np.zeros(len(part.ids) + 1, np.uint64)
        np.cumsum(mix(part.ids + (part.places() << 32)), out=sums[1:])
        hashes[here], prompt_hashes[here] = sums[part.ends] - sums[part.starts], sums[first] - sums[part.starts]
        last = _lasts(trained, behind[some])
        whole = some & (prompts[here] <= 1)  # texts: their first token is read only, since nothing foretells it
        opening_hashes[here] = _openings(part, np.where(whole, part.starts, first), last)
        answers += len(last)
        tokens, times = np.unique(part.ids[last], return_counts=True)
        ends.update(dict(zip(tokens.tolist(), times.tolist(), strict=True)))
        done = here.stop
        if progress:
            progress(done, len(rows))
    return Measured(lengths, labelled, prompts, hashes, prompt_hashes, opening_hashes, answers, ends)


def _lasts(trained: NDArray[np.int64], behind: NDArray[np.int64]) -> NDArray[np.int64]:
    """Return where the stretches of trained tokens end, the borders of rows being ends too.

    Args:
        trained: places of trained tokens, rising.
        behind: for each row that has some, where its own end in ``trained``.
    """
    is_last = np.ones(len(trained), bool)
    is_last[:-1] = np.diff(trained) > 1
    is_last[behind - 1] = True
    return trained[is_last]


def _openings(part: Part, first: NDArray[np.int64], last: NDArray[np.int64]) -> Hashes:
    """Hash the beginnings of the first answers; 0 where a row has none."""
    hashes = np.zeros(len(first), np.uint64)
    some = first < part.ends
    if not some.any():
        return hashes
    begin = first[some]
    left = last[np.searchsorted(last, begin)] - begin  # tokens of the first answer behind its first
    for place in range(OPENING):
        at = np.minimum(begin + place, len(part.ids) - 1)
        hashes[some] += np.where(left >= place, mix(part.ids[at] + (np.int64(place) << 32)), np.uint64(0))
    return hashes

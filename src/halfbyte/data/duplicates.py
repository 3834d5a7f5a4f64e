"""Rows that say the same: equal ones, prompts with several answers, and rows that are nearly equal.

Equal rows and prompts are found among all rows by their hashes. Nearly equal are two rows whose sets of three tokens in
a row overlap by at least ``THRESHOLD`` (Jaccard's index). Candidates for that come from MinHash and its bands (Broder
1997; ``datasketch``), and each is then counted out. Of a long row the ``SKETCH`` triples with the least hashes stand
for all, the same ones in every row. Triples that more than 5 % of the rows have are the template's or a system
prompt's and are left out, so rows are compared by what is their own; what more than 5 % of the rows repeat goes with
them.

Left out: a row is compared with those that stand for others, not with all of a group, so that groups cost what their
number of rows does.
"""

import dataclasses
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from halfbyte.data.measure import Hashes, Measured, mix, parts

if TYPE_CHECKING:
    import datasets

NEAR_SAMPLE = 20_000
"""Rows among which nearly equal ones are looked for, at most."""
THRESHOLD = 0.8
SHINGLE = 3
"""Tokens in a row that are compared."""
SKETCH = 512
LEAST = 8
"""Triples that a row must have of its own to be compared."""
BANDS, BAND = 10, 5
"""MinHash values are compared by bands: at ``THRESHOLD`` 98 % of the pairs are found, at 0.5 27 % are looked at."""
COMMON_SHARE, COMMON_LEAST = 0.05, 10
CANDIDATES = 8
"""Rows that one is compared with, at most: the likeliest by their MinHash values."""
SHOWN = 20
"""Groups and pairs that are kept to be shown."""


@dataclasses.dataclass(frozen=True)
class Group:
    """Equal rows: the first of them, counted from 1, and how many there are."""

    row: int
    times: int
    where: str = ""


@dataclasses.dataclass(frozen=True)
class Pair:
    """Two rows, counted from 1, and Jaccard's index of their triples (1: equal); None where nobody asked for it."""

    row: int
    other: int
    similarity: float | None
    where: str = ""
    other_where: str = ""


@dataclasses.dataclass(frozen=True)
class Duplicates:
    """Rows that repeat an earlier one, and the largest groups of equal rows."""

    rows: int
    groups: list[Group]


@dataclasses.dataclass(frozen=True)
class Contradictions:
    """Prompts that stand with several answers, the rows that have such prompts, and some pairs of them."""

    prompts: int
    rows: int
    pairs: list[Pair]


@dataclasses.dataclass(frozen=True)
class Near:
    """Nearly equal rows: among how many they were looked for, how many are near an earlier one, and some pairs."""

    sampled: int
    rows: int
    pairs: list[Pair]


def duplicates(measured: Measured) -> Duplicates:
    """Find equal rows."""
    _, first, times = np.unique(measured.hashes, return_index=True, return_counts=True)
    order = np.lexsort((first, -times))[:SHOWN]
    groups = [Group(int(first[at]) + 1, int(times[at])) for at in order if times[at] > 1]
    return Duplicates(len(measured.hashes) - len(first), groups)


def contradictions(measured: Measured) -> Contradictions:
    """Find rows with an equal prompt and another answer; a single token (a beginning of sequence) is no prompt."""
    _, first = np.unique(measured.hashes, return_index=True)
    first = np.sort(first[(measured.prompts[first] > 1) & (measured.trained[first] > 0)])
    prompts, index, times = np.unique(measured.prompt_hashes[first], return_inverse=True, return_counts=True)
    several = prompts[times > 1]
    asked = (measured.prompts > 1) & (measured.trained > 0)
    rows = int(np.isin(measured.prompt_hashes[asked], several).sum())
    own = first[times[index] > 1]  # different rows that share a prompt, in order
    _, begin, back = np.unique(measured.prompt_hashes[own], return_index=True, return_inverse=True)
    pairs = [
        Pair(int(own[begin[back[at]]]) + 1, int(own[at]) + 1, None)
        for at in np.flatnonzero(begin[back] != np.arange(len(own)))[:SHOWN]
    ]
    return Contradictions(len(several), rows, pairs)


def draw(measured: Measured, most: int, seed: int) -> NDArray[np.int64]:
    """Return the numbers of all different rows, from 0, in order; a sample of ``most`` if there are more."""
    _, first = np.unique(measured.hashes, return_index=True)
    if len(first) > most:
        first = np.random.default_rng(seed).choice(first, most, replace=False)
    return np.sort(first)


class Index:
    """Rows that others are compared with."""

    def __init__(self, rows: "datasets.Dataset", numbers: NDArray[np.int64], longest: int) -> None:
        """Take in the rows with these ``numbers``, from 0."""
        from datasketch import MinHashLSH

        self._numbers = numbers
        self._lsh = MinHashLSH(num_perm=BANDS * BAND, params=(BANDS, BAND))
        self._sketches = list(_sketches(rows, numbers, longest))
        self._common = _common(self._sketches)
        for at, sketch in enumerate(self._sketches):
            self._sketches[at] = sketch.without(self._common)
        self._values = np.zeros((len(numbers), BANDS * BAND), np.uint32)

    def within(self) -> list[Pair]:
        """Return the pairs of a row and an earlier one that it is near, one for each such row."""
        pairs = []
        for at, minhash in _minhashes(self._sketches):
            if found := self._find(self._sketches[at], minhash):
                pairs.append(Pair(int(self._numbers[at]) + 1, int(self._numbers[found[0]]) + 1, found[1]))
            else:
                self._lsh.insert(at, minhash, check_duplication=False)
                self._values[at] = minhash.hashvalues
        return pairs

    def near(self, rows: "datasets.Dataset", numbers: NDArray[np.int64], longest: int) -> list[Pair]:
        """Return the pairs of one of other ``rows`` and one of these; after :meth:`within`."""
        others = [sketch.without(self._common) for sketch in _sketches(rows, numbers, longest)]
        found = [(at, self._find(others[at], minhash)) for at, minhash in _minhashes(others)]
        return [Pair(int(numbers[at]) + 1, int(self._numbers[match[0]]) + 1, match[1]) for at, match in found if match]

    def _find(self, sketch: "_Sketch", minhash: Any) -> tuple[int, float] | None:
        candidates = np.array(sorted(self._lsh.query(minhash)), int)
        agreed = (self._values[candidates] == minhash.hashvalues).sum(1)
        for at in candidates[np.argsort(-agreed, kind="stable")[:CANDIDATES]].tolist():
            if (similarity := sketch.similarity(self._sketches[at])) >= THRESHOLD:
                return at, similarity
        return None


@dataclasses.dataclass(frozen=True)
class _Sketch:
    """The triples of a row: their hashes up to ``bound``, rising, each once."""

    hashes: NDArray[np.uint32]
    bound: int

    def without(self, common: NDArray[np.uint32]) -> "_Sketch":
        return dataclasses.replace(self, hashes=np.setdiff1d(self.hashes, common, assume_unique=True))

    def similarity(self, other: "_Sketch") -> float:
        """Return Jaccard's index over the hashes that both sketches would hold."""
        bound = min(self.bound, other.bound)
        one, two = (sketch.hashes[: np.searchsorted(sketch.hashes, bound, "right")] for sketch in (self, other))
        both = len(np.intersect1d(one, two, assume_unique=True))
        union = len(one) + len(two) - both
        return both / union if union >= LEAST else 0.0


def _sketches(rows: "datasets.Dataset", numbers: NDArray[np.int64], longest: int) -> Iterator[_Sketch]:
    for part in parts(rows.select(numbers), longest):
        shingles = _shingles(part.ids)
        for start, end in zip(part.starts.tolist(), part.ends.tolist(), strict=True):
            own = np.unique(shingles[start : max(end - SHINGLE + 1, start)])
            yield _Sketch(own[:SKETCH].copy(), int(own[SKETCH - 1]) if len(own) > SKETCH else 2**32 - 1)


def _shingles(ids: NDArray[np.int32]) -> NDArray[np.uint32]:
    """Return for each place a hash of the tokens from there on."""
    count = max(len(ids) - SHINGLE + 1, 0)
    sums = np.zeros(count, np.uint64)
    for place in range(SHINGLE):
        sums += mix(ids[place : place + count] + (np.int64(place) << 32))
    return (sums >> np.uint64(32)).astype(np.uint32)


def _common(sketches: Sequence[_Sketch]) -> NDArray[np.uint32]:
    """Return the triples of the template and of system prompts."""
    together = np.concatenate([np.zeros(0, np.uint32), *(sketch.hashes for sketch in sketches)])
    together.sort()
    least = int(max(COMMON_SHARE * len(sketches), COMMON_LEAST)) + 1
    if len(together) < least:
        return together[:0]
    return np.unique(together[least - 1 :][together[least - 1 :] == together[: len(together) - least + 1]])


def _minhashes(sketches: Sequence[_Sketch]) -> Iterator[tuple[int, Any]]:
    """Yield the places of those that have enough triples of their own, and the MinHash of these."""
    from datasketch import MinHash

    enough = [at for at, sketch in enumerate(sketches) if len(sketch.hashes) >= LEAST]
    triples = (sketches[at].hashes.tolist() for at in enough)
    yield from zip(enough, MinHash.generator(triples, num_perm=BANDS * BAND, hashfunc=int), strict=True)


def nearly_equal(rows: "datasets.Dataset", measured: Measured, longest: int, seed: int) -> tuple[Near, Index]:
    """Look for nearly equal rows among ``NEAR_SAMPLE`` different ones."""
    numbers = draw(measured, NEAR_SAMPLE, seed)
    index = Index(rows, numbers, longest)
    pairs = index.within()
    return Near(len(numbers), len(pairs), sorted(pairs, key=lambda pair: -(pair.similarity or 0))[:SHOWN]), index


def shared(measured: Measured, hashes: Hashes) -> int:
    """Return how many rows have one of these ``hashes``."""
    return int(np.isin(measured.hashes, hashes).sum())

"""Rows of general data among those of the task (``replay``), so that a model forgets less of what it knew.

    FILE*0.1    a source, and the share of all rows that are to be its own

Of N rows of the task and a share s, N s / (1 − s) are taken: the weight of the source (``data/sources.py``) is that
number over the rows that it has. Which of them is drawn with the run's seed; they are shuffled among the others.
"""

from typing import NamedTuple

from halfbyte.data.named_files import STANDARD_INPUT
from halfbyte.data.sources import NUMBER, Source, read_source, resolve
from halfbyte.errors import InputError


class Replay(NamedTuple):
    """A source, and the share of all rows that are to be its own."""

    source: Source
    share: float


def parse(given: str) -> Replay:
    """Return what ``FILE*0.1`` means.

    Raises:
        InputError: it means nothing.
    """
    name, star, behind = given.strip().rpartition("*")
    if not star or not name or not NUMBER.fullmatch(behind) or not 0 < float(behind) < 1:
        raise InputError(f"{given!r} is no source and share below 1; write FILE*0.1 for a tenth of all rows.")
    [source] = resolve(name)
    if source.weight != 1:
        raise InputError(f"{given!r} has a weight (@{source.weight:g}) beside its share; leave the weight away.")
    if source.path == STANDARD_INPUT:
        raise InputError("standard input is read once, and rows for replay are counted before; name a file.")
    return Replay(source, float(behind))


def written(given: str) -> str:
    """Return ``given`` as it may be read from any folder: a file with its whole path."""
    source, share = parse(given)
    split = f"@{source.split}" if source.split else ""
    name = given.strip().rpartition("*")[0] if source.is_hub else f"{source.path}{split}"
    return f"{name}*{share:g}"


def weighted(replay: Replay, rows: int, seed: int) -> Source:
    """Return the source with the weight by which it comes to its share beside ``rows`` others.

    Raises:
        InputError: it has no rows, or cannot be read.
    """
    source, share = replay
    there = sum(1 for _ in read_source(source, seed=seed))
    if not there:
        raise InputError(f"replay: {source.path} has no rows; name another file.")
    return source.model_copy(update={"weight": rows * share / (1 - share) / there})

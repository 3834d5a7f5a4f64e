"""In which form a method learns from encoded examples: what one row of its table is.

    answers   an answer behind its prompt, or a text:   input_ids, labels
    blocks    texts one behind the other, cut into equal lengths: input_ids, labels
    pairs     the better of two answers, and the other: input_ids, labels, rejected_ids, rejected_labels
    judged    an answer, and whether it is good:        input_ids, labels, good

Blocks are made as for GPT-3 (arXiv 2005.14165, appendix B): documents stand one behind the other, an end-of-sequence
token behind each, and nothing keeps those of one block apart. No token is lost: a block begins with the last token of
the one before it, which is read there and not trained again, so each token of a document is trained once.
"""

from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING, Any, Literal, NamedTuple

import numpy as np

from halfbyte.choices import IGNORED
from halfbyte.data.examples import BadRow, Judged, Preference

if TYPE_CHECKING:
    from halfbyte.data.tokens import Encoded

Form = Literal["answers", "blocks", "pairs", "judged"]
REJECTED_IDS, REJECTED_LABELS, GOOD = "rejected_ids", "rejected_labels", "good"
LISTS: dict[Form, tuple[str, ...]] = {
    "answers": ("input_ids", "labels"),
    "blocks": ("input_ids", "labels"),
    "pairs": ("input_ids", "labels", REJECTED_IDS, REJECTED_LABELS),
    "judged": ("input_ids", "labels"),
}
"""The columns of a form that are lists of token ids or labels; each ``ids`` before its labels."""


class Placed(NamedTuple):
    """A row of the table and where its example stands."""

    row: Mapping[str, Any]
    where: str


class Former:
    """Makes the rows of a table of encoded examples.

    Args:
        form: of the rows.
        length: tokens of a block.
    """

    def __init__(self, form: Form, length: int) -> None:
        self._form = form
        self._length = length
        self._ids: list[Any] = []
        self._labels: list[Any] = []
        self._waiting = 0
        self._where = ""

    def rows(self, encoded: "Encoded") -> Iterator[Placed]:
        """Yield the rows that an example fills."""
        where = encoded.example.where
        match self._form:
            case "blocks":
                for row in encoded.rows:
                    yield from self._fill(row, where)
            case "pairs":
                one, other = encoded.rows
                rejected = {REJECTED_IDS: other["input_ids"], REJECTED_LABELS: other["labels"]}
                yield Placed({**one, **rejected}, where)
            case "judged":
                example = encoded.example
                verdicts = [True, False] if isinstance(example, Preference) else [_verdict(example)]
                for row, good in zip(encoded.rows, verdicts, strict=True):
                    yield Placed({**row, GOOD: good}, where)
            case _:
                for row in encoded.rows:
                    yield Placed(row, where)

    def rest(self) -> Iterator[Placed]:
        """Yield the last block, which is shorter."""
        if self._waiting and any((labels != IGNORED).any() for labels in self._labels):
            yield Placed({"input_ids": np.concatenate(self._ids), "labels": np.concatenate(self._labels)}, self._where)
        self._ids, self._labels, self._waiting = [], [], 0

    def _fill(self, row: Mapping[str, Any], where: str) -> Iterator[Placed]:
        if not self._waiting:
            self._where = where
        self._ids.append(row["input_ids"])
        self._labels.append(row["labels"])
        self._waiting += len(row["input_ids"])
        if self._waiting < self._length:
            return
        ids, labels = np.concatenate(self._ids), np.concatenate(self._labels)
        start = 0
        while len(ids) - start >= self._length:
            block = slice(start, start + self._length)
            yield Placed({"input_ids": ids[block], "labels": labels[block].copy()}, self._where)
            self._where = where
            start += self._length - 1
            labels[start] = IGNORED  # trained in the block before
        left = len(ids) - start
        keep = left > 1  # else nothing but the token that the last block ended with
        self._ids, self._labels = ([ids[start:]], [labels[start:]]) if keep else ([], [])
        self._waiting = left if keep else 0


def sides(row: Mapping[str, Any]) -> Iterator[tuple[Any, Any]]:
    """Yield the ids and labels of each sequence of a row."""
    yield row["input_ids"], row["labels"]
    if REJECTED_IDS in row:
        yield row[REJECTED_IDS], row[REJECTED_LABELS]


def alike(where: str) -> BadRow:
    """Return what a pair is whose answers have the same tokens, whole or as far as ``max_length`` leaves them."""
    return BadRow(
        where,
        "answers alike",
        "has a chosen and a rejected answer that are alike as they are trained (cut at max_length, blanks at the ends "
        "left away by the chat template); remove it, or raise max_length.",
    )


def _verdict(example: Any) -> bool:
    if not isinstance(example, Judged):
        raise TypeError(f"{type(example).__name__} says nothing of its answer")
    return example.good

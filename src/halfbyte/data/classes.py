"""Rows for classification: a text or a pair of texts, and the class that it belongs to.

    text, label                                  and other names of both (``TEXTS``, ``LABELS``)
    sentence1, sentence2, label                  pairs as GLUE names them (arXiv 1804.07461), and others (``PAIRS``)

A label is a name or a whole number, of one kind in all rows. The classes are those of the training data: numbers in
their order, names in that of the alphabet, unless the model at hand knows just these names in another order. So the
labels of all rows are gone through before the first row becomes tokens, which a row's class number depends on.

A text becomes tokens as the tokenizer's own template writes it (``[CLS] a [SEP] b [SEP]``); of what is too long the
end is cut off, of a pair that of the longer one, and what the template puts behind it stays. Control tokens that are
written out in a text are plain text.
"""

import dataclasses
import itertools
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from halfbyte.data.cells import Cells, is_blank, shown
from halfbyte.data.columns import Own, check_used
from halfbyte.data.examples import BadRow, Example
from halfbyte.data.tokens import Encoded, Row
from halfbyte.errors import InputError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

TEXTS = (
    "text", "sentence", "content", "review", "comment", "tweet", "message", "document", "body", "prompt", "question",
    "query", "utterance", "title",
)  # fmt: skip
"""Columns of a text by their likeliness."""
PAIRS = (
    ("sentence1", "sentence2"), ("question1", "question2"), ("premise", "hypothesis"), ("text1", "text2"),
    ("text", "text_pair"), ("question", "sentence"), ("question", "passage"), ("question", "context"),
    ("query", "passage"), ("query", "document"),
)  # fmt: skip
"""Columns of a pair of texts; GLUE's first."""
LABELS = ("label", "labels", "class", "category", "sentiment", "intent", "topic", "target", "label_text")
"""Columns of the class."""
OWN = {"text": False, "text_pair": False, "label": False}
"""What a column of the user's own can be named to be."""
MOST_CLASSES = 10_000
FEW_ROWS = 20
"""From so many rows on labels must recur: most of them once each are answers, not classes."""
CHUNK = 1000
"""Rows that are tokenized together."""
NUMBER = re.compile(r"[+-]?\d+(\.0+)?")
PADDED_TOO = ("token_type_ids",)
"""What a tokenizer may give beside the ids: which of a pair's texts a token is of."""


@dataclasses.dataclass(frozen=True)
class Labelled(Example):
    """A text or a pair of texts, and its class as the data has it: a name, a number, or None where none was asked."""

    text: str
    pair: str | None
    label: str | int | None


def labelled_of(
    rows: Iterable[tuple[str, Any]],
    *,
    columns: Mapping[str, str] | None = None,
    template: str | None = None,
    with_labels: bool = True,
) -> Iterator[Labelled | BadRow]:
    """Return the examples of rows, one for each, as they are read.

    Args:
        rows: of each where it stands, and its value or that it is bad.
        columns: for ``text``, ``text_pair`` and ``label`` the columns that they are.
        template: a text with columns in braces, which becomes the text.
        with_labels: a row without a label is bad; False does not look for labels.

    Raises:
        InputError: ``columns`` or ``template`` cannot be understood.
    """
    own = Own(columns or {}, template, OWN)
    for where, value in rows:
        if isinstance(value, BadRow):
            yield value
            continue
        if isinstance(value, str):
            value = {"text": value}
        if not isinstance(value, Mapping):
            yield BadRow(where, "no columns", f"is not an object with named columns, but {shown(value)}; make it one.")
            continue
        try:
            cells = own.cells(where, value) if own else Cells(where, value)
            example = _example(cells, with_labels)
            if own:
                check_used(cells, "a text and its label")
        except BadRow as bad:
            yield bad
        else:
            yield dataclasses.replace(example, **cells.rest)


def _example(cells: Cells, with_labels: bool) -> Labelled:
    label = _label(cells) if with_labels else None
    pair = None if cells.made else next((p for p in PAIRS if all(cells.filled(name) for name in p)), None)
    name = cells.find(*(name for name in TEXTS if name not in LABELS)) if pair is None else pair[0]
    if name is None:
        raise cells.bad(
            "no column of a text",
            f"has the columns {cells.told}, and none of them is a text to classify; say "
            "which is (--columns text=...,label=...).",
        )
    text = cells.text(name)
    if not text.strip():
        raise cells.bad(
            "text is empty", f": {cells.called(name)} is empty, so there is nothing to classify; remove the row."
        )
    return Labelled(cells.where, text, None if pair is None else cells.text(pair[1]), label)


def _label(cells: Cells) -> str | int:
    name = cells.find(*LABELS)
    if name is None:
        raise cells.bad(
            "no column of a label",
            f"has the columns {cells.told}, and none of them is a label; name it "
            "(--columns text=...,label=...), or train on answers in words with task lm or seq2seq.",
        )
    value = cells.get(*LABELS)
    if is_blank(value) or (isinstance(value, str) and not value.strip()):
        raise cells.bad("label is missing", f": {cells.called(name)} is empty; fill it in, or remove the row.")
    if isinstance(value, bool):
        return "true" if value else "false"
    if isinstance(value, float) and not value.is_integer():
        raise cells.bad(
            "label is a fraction",
            f": {cells.called(name)} is {value}, which is no class; scores (regression) cannot be trained on.",
        )
    text = str(int(value)) if isinstance(value, float) else value if isinstance(value, str) else None
    if text is None and not isinstance(value, int):
        raise cells.bad(
            "label is no name",
            f": {cells.called(name)} is {shown(value)}; it must be one name or number, several cannot be trained.",
        )
    if text is not None and not NUMBER.fullmatch(text.strip()):
        return text.strip()
    number = int(value if text is None else text.strip().partition(".")[0])
    if number < 0:
        raise cells.bad(
            "label is missing", f": {cells.called(name)} is {number}, which stands for no label; remove the row."
        )
    return number


class Classes:
    """The classes of the training data, gathered row by row.

    Attributes:
        counts: examples of each label, as the data has them.
    """

    def __init__(self) -> None:
        self.counts: dict[str | int, int] = {}
        self._first: dict[type, Labelled] = {}

    def add(self, example: Labelled) -> None:
        """Take in the label of an example.

        Raises:
            InputError: there are names and numbers, or far too many labels.
        """
        label = example.label
        assert label is not None
        self._first.setdefault(type(label), example)
        if len(self._first) > 1:
            name, number = self._first[str], self._first[int]
            raise InputError(
                f"Labels are names in some rows ({name.where}: {name.label!r}) and numbers in others ({number.where}: "
                f"{number.label}); write all of them one way."
            )
        self.counts[label] = self.counts.get(label, 0) + 1
        if len(self.counts) > MOST_CLASSES:
            raise InputError(
                f"The data has over {MOST_CLASSES:,} different labels, such as {label!r}: that is text to write, not "
                "a class to name; use task lm or seq2seq."
            )

    @property
    def by_name(self) -> dict[str, int]:
        """Examples of each class by its name."""
        return {str(label): count for label, count in self.counts.items()}

    def names(self, known: Sequence[str] | None = None) -> list[str]:
        """Return the names of the classes in the order of their numbers.

        Args:
            known: the model's own names, whose order wins if they are the same.

        Raises:
            InputError: there is only one class, or a class for nearly each row.
        """
        rows = sum(self.counts.values())
        if len(self.counts) == 1:
            raise InputError(
                f"All {rows:,} rows have the label {next(iter(self.counts))!r}: there is nothing to tell apart; name "
                "data with two classes or more."
            )
        if rows >= FEW_ROWS and len(self.counts) > rows / 2:
            raise InputError(
                f"The data has {len(self.counts):,} different labels in {rows:,} rows, such as "
                f"{next(iter(self.counts))!r}: that is text to write, not a class to name; use task lm or seq2seq."
            )
        names = [str(label) for label in sorted(self.counts, key=lambda label: (isinstance(label, str), label))]
        return list(known) if known and sorted(known) == sorted(names) else names


class LabelledRows:
    """How a text and its class become a row of a table.

    Args:
        tokenizer: the model's.
        max_length: tokens, those of the template included.
        parse_special_tokens: take control tokens that are written out in the texts for such.

    Attributes:
        columns: of the table; ``labels`` holds one number, that of the class.
        names: of the classes; none before they are known.
    """

    def __init__(
        self, tokenizer: "PreTrainedTokenizerBase", max_length: int, parse_special_tokens: bool = False
    ) -> None:
        self._tokenizer = tokenizer
        self._max_length = max_length
        self._plain = not parse_special_tokens
        more = [name for name in PADDED_TOO if name in tokenizer.model_input_names]
        self.columns = ("input_ids", "labels", *more)
        self.names: list[str] = []

    def encode(self, examples: Iterable[Example | BadRow]) -> Iterator[Encoded]:
        """Yield what becomes of each example; one whose label is not among the classes is bad."""
        numbers = {name: number for number, name in enumerate(self.names)}
        stream = iter(examples)
        while chunk := list(itertools.islice(stream, CHUNK)):
            yield from self._chunk(chunk, numbers)

    def tokens(self, text: str, pair: str | None = None) -> tuple[Row, int]:
        """Return the ids of a text, cut off to ``max_length``, and how many there were before."""
        [(row, length)] = self._tokens([(text, pair)])
        return row, length

    def reference(self, row: Row) -> str:
        """Return the name of a row's class."""
        return self.names[int(row["labels"][0])]

    def _chunk(self, chunk: list[Example | BadRow], numbers: Mapping[str, int]) -> Iterator[Encoded]:
        good = [example for example in chunk if isinstance(example, Labelled)]
        tokens = iter(self._tokens([(example.text, example.pair) for example in good]))
        for example in chunk:
            if isinstance(example, BadRow):
                yield Encoded(Example(example.where), [], False, example)
                continue
            assert isinstance(example, Labelled)
            row, length = next(tokens)
            number = numbers.get(str(example.label))
            bad = None
            if number is None:
                bad = BadRow(
                    example.where,
                    "label that is not trained",
                    f"has the label {example.label!r}, which no row of the training data has; remove the row.",
                )
            elif not len(row["input_ids"]):
                bad = BadRow(example.where, "text is empty", "has a text of which no token is left; remove the row.")
            rows: list[Row] = [] if bad else [dict(row) | {"labels": np.array([number], np.int32)}]
            yield Encoded(example, rows, length > self._max_length, bad, example.notes, (length,))

    def _tokens(self, texts: Sequence[tuple[str, str | None]]) -> list[tuple[Row, int]]:
        found: dict[int, tuple[Row, int]] = {}
        for paired in (False, True):
            places = [place for place, (_, pair) in enumerate(texts) if (pair is not None) == paired]
            if not places:
                continue
            whole = self._called([texts[place] for place in places], paired)
            lengths = [len(ids) for ids in whole["input_ids"]]
            long = [i for i, length in enumerate(lengths) if length > self._max_length]
            cut = self._called([texts[places[i]] for i in long], paired, truncated=True) if long else {}
            at = {i: number for number, i in enumerate(long)}
            for i, place in enumerate(places):
                source, number = (cut, at[i]) if i in at else (whole, i)
                row = {name: np.array(source[name][number], np.int32) for name in self.columns if name != "labels"}
                found[place] = row, lengths[i]
        return [found[place] for place in range(len(texts))]

    def _called(self, texts: Sequence[tuple[str, str | None]], paired: bool, truncated: bool = False) -> Any:
        cut = {"truncation": "longest_first", "max_length": self._max_length} if truncated else {}
        firsts, seconds = zip(*texts, strict=True)
        return self._tokenizer(
            list(firsts),
            list(seconds) if paired else None,
            return_token_type_ids="token_type_ids" in self.columns,
            return_attention_mask=False,
            split_special_tokens=self._plain,
            verbose=False,
            **cut,
        )

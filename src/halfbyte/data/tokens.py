"""Examples to token ids and labels: the model is trained on the answers and on stopping after them.

:mod:`halfbyte.data.template` writes the text and says which characters are trained; here it becomes tokens, and a
token's label is the token itself where it is trained, else ``IGNORED`` (:mod:`halfbyte.data.labels`). Control tokens
that are written out in the data are plain text (:mod:`halfbyte.data.control`). What is cut off at ``max_length`` is not
trained, a stop token least of all; an example of which nothing is left to train is a bad row.

Examples stream through: a second thread turns one chunk of texts into tokens (the tokenizer's own threads do the work)
while the first reads and writes the next.
"""

import dataclasses
import itertools
from collections.abc import Iterable, Iterator, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

from halfbyte.choices import IGNORED
from halfbyte.data.control import ControlTokens, tools_for
from halfbyte.data.encoders import Encoder
from halfbyte.data.examples import BadRow, Example, Judged, Preference
from halfbyte.data.forms import alike
from halfbyte.data.labels import Whole, label_drafts
from halfbyte.data.template import Draft, Writer

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

CHUNK = 1 << 20
"""Characters that are tokenized together."""
DRAFT = 256
"""What a draft takes beside its text, in characters: thousands of short ones are a chunk too."""

LONG = 1 << 20
"""Characters of a text that is tokenized whole, whatever ``max_length`` leaves of it."""

Row = Mapping[str, Any]
"""One training sequence: ``input_ids`` and ``labels`` of equal length, lists or arrays of integers."""


@dataclasses.dataclass(frozen=True)
class Encoded:
    """What became of an example.

    Attributes:
        example: where it stands, what was not used.
        rows: ``input_ids`` and ``labels``, int32 ``[L]``, at most ``max_length`` long, each with a trained token; none
            where the example is bad.
        truncated: whether it lost tokens to ``max_length``.
        bad: why it cannot be trained on, if so.
        notes: what was made of it that its author might not expect: the example's own notes, and those of writing it.
        lengths: tokens of each row that was written, before any was cut or left away; of texts over ``LONG``, so many
            as were counted.
    """

    example: Example
    rows: list[Row]
    truncated: bool
    bad: BadRow | None = None
    notes: tuple[str, ...] = ()
    lengths: tuple[int, ...] = ()

    @property
    def prompts(self) -> list[int]:
        """For each row, the tokens before the first trained one."""
        return [int((row["labels"] != IGNORED).argmax()) for row in self.rows]

    @property
    def trained(self) -> list[int]:
        """For each row, its trained tokens."""
        return [int((row["labels"] != IGNORED).sum()) for row in self.rows]


class _Written(NamedTuple):
    example: Example
    drafts: list[Draft]
    notes: tuple[str, ...] = ()
    bad: BadRow | None = None
    clipped: bool = False


def encode_examples(
    examples: Iterable[Example | BadRow],
    tokenizer: "PreTrainedTokenizerBase",
    max_length: int,
    *,
    parse_special_tokens: bool = False,
    **writing: Any,
) -> Iterator[Encoded]:
    """Yield what becomes of each example, in order; rows are cut off at the right after ``max_length`` tokens.

    Args:
        examples: read some two thousand ahead; bad rows among them are passed on.
        tokenizer: fast or slow.
        max_length: tokens.
        parse_special_tokens: take control tokens that are written out in the texts for such.
        writing: further arguments of :class:`halfbyte.data.template.Writer`.

    Raises:
        InputError: the chat template cannot write any conversation, or no stop token is known.
    """
    write = Writer(tokenizer, **writing)
    control, encode = tools_for(tokenizer, write.template)

    def written(example: Example | BadRow) -> _Written:
        if isinstance(example, BadRow):
            return _Written(Example(example.where), [], bad=example)
        try:
            drafts, notes = control.write(write, example, parse_special_tokens)
        except BadRow as bad:
            return _Written(example, [], example.notes, bad)
        notes = (*example.notes, *(note for draft in drafts for note in draft.notes), *notes)
        clipped = False
        if any(len(draft.text) > LONG for draft in drafts):
            enough = max(LONG, max_length * max(map(len, tokenizer.get_vocab())))
            clipped = any(len(draft.text) > enough for draft in drafts)
            drafts = [_clip(draft, enough) for draft in drafts]
        return _Written(example, drafts, notes, None, clipped)

    under_way: Future[list[Encoded]] | None = None
    with ThreadPoolExecutor(1, "tokenize") as thread:
        for chunk in _chunks(map(written, examples)):
            before, under_way = under_way, thread.submit(_encode_chunk, chunk, encode, control, max_length)
            if before:
                yield from before.result()
        if under_way:
            yield from under_way.result()


def decode_trained(tokenizer: "PreTrainedTokenizerBase", row: Row, *, skip_special_tokens: bool = False) -> list[str]:
    """Return the trained stretches of a row as texts: what the model learns to write."""
    runs = itertools.groupby(row["labels"], lambda label: label != IGNORED)
    return [
        tokenizer.decode([int(label) for label in labels], skip_special_tokens=skip_special_tokens)
        for trained, labels in runs
        if trained
    ]


def _chunks(examples: Iterable[_Written]) -> Iterator[list[_Written]]:
    chunk: list[_Written] = []
    size = 0
    for example in examples:
        chunk.append(example)
        size += sum(len(draft.text) for draft in example.drafts) + DRAFT * max(len(example.drafts), 1)
        if size >= CHUNK:
            yield chunk
            chunk, size = [], 0
    if chunk:
        yield chunk


def _encode_chunk(chunk: list[_Written], encode: Encoder, control: ControlTokens, max_length: int) -> list[Encoded]:
    tokenized = label_drafts(encode, control, [draft for example in chunk for draft in example.drafts])
    encoded = []
    for example, drafts, notes, bad, clipped in chunk:
        whole = list(itertools.islice(tokenized, len(drafts)))
        lengths = tuple(len(row.ids) for row in whole)
        rows: list[Row] = [
            {"input_ids": row.ids[:max_length], "labels": row.labels[:max_length]}
            for row in whole
            if row.prompt < min(len(row.ids), max_length)
        ]
        if isinstance(example, Preference | Judged) and 0 < len(rows) < len(whole):
            rows, whole = [], [row for row in whole if row.prompt >= min(len(row.ids), max_length)]
        if isinstance(example, Preference) and len(rows) == 2 and _equal(*rows):
            bad, rows = alike(example.where), []
        if not rows and not bad:
            bad = _untrained(example.where, whole, max_length, clipped)
        if any(row.leaks for row in whole):
            bad, rows = _leak(example.where), []
        truncated = clipped or any(length > max_length for length in lengths)
        encoded.append(Encoded(example, rows, truncated, bad, notes, lengths))
    return encoded


def _equal(one: Row, other: Row) -> bool:
    return all(np.array_equal(one[name], other[name]) for name in ("input_ids", "labels"))


def _leak(where: str) -> BadRow:
    return BadRow(
        where,
        "control token that cannot be plain text",
        "holds a control token that this tokenizer cannot read as plain text; take it out, or have such tokens taken "
        "for what they are with parse_special_tokens (--parse-special-tokens).",
    )


def _clip(draft: Draft, size: int) -> Draft:
    """Return the first ``size`` characters: no token stands for more than ``size / max_length`` of them."""
    if len(draft.text) <= size:
        return draft
    spans, plain = ([(i, min(j, size)) for i, j in ranges if i < size] for ranges in (draft.spans, draft.plain))
    return dataclasses.replace(draft, text=draft.text[:size], spans=spans, plain=plain)


def _untrained(where: str, rows: list[Whole], max_length: int, clipped: bool) -> BadRow:
    """Return why nothing of these rows is trained."""
    rows = [row for row in rows if row.prompt < len(row.ids)]
    if not rows and clipped:
        return BadRow(
            where,
            "answer beyond max_length",
            f": its prompt alone takes more than {max_length} tokens (max_length); shorten the prompt.",
        )
    if not rows:
        return BadRow(where, "nothing to train on", "has nothing to train on: no token of it has a label.")
    row = min(rows, key=lambda row: row.prompt)
    return BadRow(
        where,
        "answer beyond max_length",
        f": its prompt alone takes {row.prompt} tokens, so with max_length {max_length} nothing of the answer is left "
        f"to train on; shorten the prompt, or raise max_length ({len(row.ids)} would hold all of it).",
    )

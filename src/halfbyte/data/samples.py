"""Rows as people read them: their text, what of it is trained, and no character that would do something to a screen.

A row becomes pieces, each the text of one token, or of several where a character needs several. Marked without colours:

    <|im_start|>user↵
    say a<|im_end|>↵
    <|im_start|>assistant↵
    ⟦it is a<|im_end|>⟧
"""

import dataclasses
import itertools
import unicodedata
from collections.abc import Iterable, Iterator, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
import pyarrow.compute as pc
from numpy.typing import NDArray

from halfbyte import tables
from halfbyte.choices import IGNORED
from halfbyte.data.forms import GOOD, sides
from halfbyte.errors import counted

if TYPE_CHECKING:
    import datasets
    from transformers import PreTrainedTokenizerBase

    from halfbyte.data.table import Tokenized

SHOWN_TOKENS = 400
"""Tokens of a row that are shown; of a longer one the middle is left out."""
SHORT_TOKENS = 120
OPEN, CLOSE = "⟦", "⟧"
BLOCKS = "▁▂▃▄▅▆▇█"
WINDOW = 8
"""Tokens that one character may need, at most; more are bytes that make none."""


@dataclasses.dataclass(frozen=True)
class Piece:
    """Part of a row: the text of ``tokens`` tokens, or a gap where so many are left out."""

    text: str
    trained: bool = False
    special: bool = False
    tokens: int = 1
    is_gap: bool = False


@dataclasses.dataclass(frozen=True)
class Sample:
    """A row to show: its number from 1, where it comes from, its tokens, those of them that are trained, its text.

    Attributes:
        rejected: of a pair of answers, prompt and answer of the one that is not preferred.
        good: of a judged answer, the judgement.
    """

    row: int
    where: str
    tokens: int
    trained: int
    pieces: list[Piece]
    rejected: list[Piece] = dataclasses.field(default_factory=list)
    good: bool | None = None

    def parts(self) -> Iterator[tuple[str, list[Piece]]]:
        """Yield what stands in the row, each under its name; a single answer has none."""
        names = {None: "chosen" if self.rejected else "", True: "good", False: "bad"}
        yield names[self.good], self.pieces
        if self.rejected:
            yield "rejected", self.rejected


def sample(
    rows: "datasets.Dataset", number: int, tokenizer: "PreTrainedTokenizerBase", limit: int = SHOWN_TOKENS
) -> Sample:
    """Return row ``number``, from 1; of one with more than ``limit`` tokens the middle is left out."""
    row = rows[number - 1]
    both = [(list(ids), [label != IGNORED for label in labels]) for ids, labels in sides(row)]
    pieces = [_shortened(ids, trained, tokenizer, limit) for ids, trained in both]
    tokens, trained = sum(len(ids) for ids, _ in both), sum(sum(labelled) for _, labelled in both)
    where = str(row.get("where", ""))
    return Sample(number, where, tokens, trained, pieces[0], pieces[1] if len(pieces) > 1 else [], row.get(GOOD))


def _shortened(ids: list[int], trained: list[bool], tokenizer: "PreTrainedTokenizerBase", limit: int) -> list[Piece]:
    left_out = len(ids) - limit
    if left_out <= 0:
        return list(_pieces(ids, trained, tokenizer))
    head = limit // 2
    tail = len(ids) - (limit - head)
    return [
        *_pieces(ids[:head], trained[:head], tokenizer),
        Piece("", tokens=left_out, is_gap=True),
        *_pieces(ids[tail:], trained[tail:], tokenizer),
    ]


def _pieces(ids: Sequence[int], trained: Sequence[bool], tokenizer: "PreTrainedTokenizerBase") -> Iterator[Piece]:
    """Yield the text of each token, decoded behind the one before it: alone, many tokenizers take its space away."""
    special = _special_ids(tokenizer)
    begin = before = 0  # tokens from `begin` on are decoded together; those up to `before` have been told
    for at in range(len(ids)):
        behind = at + 1
        told = _decode(tokenizer, ids[begin:before])
        text = _decode(tokenizer, ids[begin:behind])
        alone = ids[at] in special
        ends = behind == len(ids) or trained[behind] != trained[at] or ids[behind] in special or alone
        if text.endswith("\ufffd") and not ends and behind - before < WINDOW:
            continue
        yield Piece(text[len(told) :], trained[at], alone, behind - before)
        begin, before = before, behind


def _decode(tokenizer: "PreTrainedTokenizerBase", ids: Sequence[int]) -> str:
    if not ids:
        return ""
    return str(tokenizer.decode(ids, skip_special_tokens=False, clean_up_tokenization_spaces=False))


def _special_ids(tokenizer: "PreTrainedTokenizerBase") -> set[int]:
    added = {number for number, token in tokenizer.added_tokens_decoder.items() if token.special}
    return added | set(tokenizer.all_special_ids)


def joined(pieces: Iterable[Piece]) -> Iterator[Piece]:
    """Yield pieces of one kind that follow each other as one."""
    for (trained, special, is_gap), group in itertools.groupby(
        pieces, lambda piece: (piece.trained, piece.special, piece.is_gap)
    ):
        together = list(group)
        text = "".join(piece.text for piece in together)
        yield Piece(text, trained, special, sum(piece.tokens for piece in together), is_gap)


def gap(piece: Piece) -> str:
    """Return what is written in the place of tokens that are left out."""
    return f" … {piece.tokens:,} tokens left out … "


def plain(pieces: Iterable[Piece], border: str = "") -> str:
    """Return pieces as text that can be printed anywhere, the trained stretches between ``OPEN`` and ``CLOSE``.

    Args:
        pieces: of a sample.
        border: is put between the tokens.
    """
    texts = []
    for trained, group in itertools.groupby(pieces, lambda piece: piece.trained):
        text = border.join(gap(piece) if piece.is_gap else visible(piece.text) for piece in group)
        texts.append(f"{OPEN}{text}{CLOSE}" if trained else text)
    return "".join(texts)


class _Visible(dict[int, str]):
    """How characters are shown, by their code point: as they are, if they only show something.

    Escaped are control characters (a terminal obeys them), signs that turn the direction of the text around them or
    show nothing at all, line separators, and halves of characters. Joiners and marks of direction stay: Persian, Hindi
    and emoji are written with them.
    """

    KEPT = "\u00ad\u061c\u200c\u200d\u200e\u200f\u0600\u0601\u0602\u0603\u0604\u0605\u06dd\u070f\u08e2"

    def __missing__(self, code: int) -> str:
        character = chr(code)
        hidden = unicodedata.category(character) in ("Cc", "Cf", "Cs", "Zl", "Zp") and character not in self.KEPT
        shown = _escape(code) if hidden else character
        self[code] = shown
        return shown


def _escape(code: int) -> str:
    return f"\\x{code:02x}" if code < 0x100 else f"\\u{code:04x}" if code < 0x10000 else f"\\U{code:08x}"


_VISIBLE = _Visible({ord("\n"): "↵\n", ord("\t"): "⇥"})


def visible(text: str) -> str:
    """Return ``text`` with escapes for what does not show, ``↵`` before each newline and ``⇥`` for tabs."""
    return text.translate(_VISIBLE)


def one_line(text: str) -> str:
    """Return :func:`visible` text without newlines."""
    return visible(text).replace("\n", " ")


def choose(lengths: NDArray[Any], count: int, seed: int = 0) -> list[int]:
    """Return numbers, from 1, of rows to show: the first, one of median length, the longest, then drawn ones."""
    if not len(lengths) or count <= 0:
        return []
    drawn = np.random.default_rng(seed).permutation(len(lengths))[: count + 3].tolist() if count > 3 else []
    return [number + 1 for number in dict.fromkeys([0, _median(lengths), int(lengths.argmax()), *drawn])][:count]


def _median(lengths: NDArray[Any]) -> int:
    """Return the number, from 0, of a row of median length."""
    middle = (len(lengths) - 1) // 2
    return int(np.argpartition(lengths, middle)[middle])


def blocks(counts: Iterable[int]) -> str:
    """Return a line of blocks as high as ``counts``; nothing at all is a blank."""
    heights = list(counts)
    most = max(heights, default=0)
    return "".join(BLOCKS[-(-height * len(BLOCKS) // most) - 1] if height else " " for height in heights)


def preview_lines(tokenized: "Tokenized", tokenizer: "PreTrainedTokenizerBase", columns: int = 30) -> list[str]:
    """Return what opens a run: counts, a line of blocks of the rows' lengths, and a row of median length.

    Takes milliseconds for a million rows: of the table only the lists' offsets are read, and one row.
    """
    counts = tokenized.counts
    share = counts.trained_tokens / max(counts.tokens, 1)
    rows, tokens = counted(counts.rows, "row"), counted(counts.tokens, "token")
    lines = [f"{rows}: {tokens}, {counts.trained_tokens:,} of them trained ({share:.0%})"]
    lengths = row_lengths(tokenized.rows)
    if not len(lengths):
        return lines
    least, most = int(lengths.min()), int(lengths.max())
    number = _median(lengths) + 1
    heights = np.histogram(lengths, min(columns, most - least + 1), (least, most + 1))[0]
    middle = f"half have {int(lengths[number - 1]):,} or less"
    lines.append(f"tokens a row: {least:,} {blocks(heights.tolist())} {most:,}, {middle}")
    shown = sample(tokenized.rows, number, tokenizer, SHORT_TOKENS)
    lines.append(f"row {number:,} ({one_line(shown.where)}), trained is what stands in {OPEN} {CLOSE}:")
    for name, pieces in shown.parts():
        lines += [f"{name}:"] * bool(name) + [plain(joined(pieces))]
    return lines


def row_lengths(rows: "datasets.Dataset") -> NDArray[Any]:
    """Return the tokens of each row of a table with ``input_ids``, mapped and whole: only the lists' offsets are read.

    What is a selection of a table is gone through.
    """
    column = rows.data.column("input_ids")
    if len(column) != len(rows):
        return tables.lengths(rows)
    return np.concatenate([np.zeros(0, np.int32), *(pc.list_value_length(chunk).to_numpy() for chunk in column.chunks)])

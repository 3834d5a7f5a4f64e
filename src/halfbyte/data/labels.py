"""Written examples to token ids and labels.

A token's label is the token itself where it is trained, else ``IGNORED``. Labels never depend on token ids, so a pad
token that is also the stop token does no harm. Rendered chats are tokenized as they are. Where a token would reach
across the border of prompt and answer, the two are tokenized apart, as they are in use. The first token of a row has
nothing before it and is never trained.
"""

import bisect
import itertools
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import numpy as np

from halfbyte.choices import IGNORED
from halfbyte.data.control import ControlTokens
from halfbyte.data.encoders import Encoder, Source, Tokens
from halfbyte.data.template import Draft

BEFORE = ("\n", ".", "a")
"""Characters to put before a text that is the middle of another."""


class Whole(NamedTuple):
    """A row before it is cut.

    Attributes:
        ids: int32 ``[L]``.
        labels: int32 ``[L]``.
        prompt: the tokens before the first trained one; ``L`` if none is.
        leaks: whether plain text became a control token all the same: some tokenizers cannot help it.
    """

    ids: Any
    labels: Any
    prompt: int
    leaks: bool = False


class _Piece(NamedTuple):
    """A stretch of a text that is encoded by itself: its ids are those of ``tokens`` from ``skip`` on.

    Attributes:
        start: its first character.
        first: its first token in the text.
        shift: the character of the text that is the first of ``tokens``.
    """

    start: int
    first: int
    tokens: Tokens
    skip: int = 0
    shift: int = 0


def label_drafts(encode: Encoder, control: ControlTokens, drafts: list[Draft]) -> Iterator[Whole]:
    """Yield the row of each draft."""
    sources = [control.source(draft.text, draft.plain) for draft in drafts]
    together = encode(sources) if sources else []
    starts = _starts(encode, drafts, sources, together)
    cuts = [
        (source, [start for (start, _), token in zip(draft.spans, tokens, strict=True) if token is None])
        for source, draft, tokens in zip(sources, drafts, starts, strict=True)
        if None in tokens
    ]
    apart = _encode_apart(encode, cuts) if cuts else iter(())
    for draft, source, tokens, firsts in zip(drafts, sources, together, starts, strict=True):
        pieces = next(apart) if None in firsts else [_Piece(0, 0, tokens)]
        row = pieces[0].tokens.ids
        if draft.begin or len(pieces) > 1:
            begin_ids = np.array(draft.begin, dtype=np.int32)
            row = np.concatenate([begin_ids, *(piece.tokens.ids[piece.skip :] for piece in pieces)])
        labels = np.full_like(row, IGNORED)
        begin, prompt = len(draft.begin), len(row)
        for (start, end), known in zip(draft.spans, firsts, strict=True):
            first = known if len(pieces) == 1 and known is not None else _first_from(pieces, start)
            first, last = max(begin + first, 1), begin + _count_until(pieces, end)
            if first < last:
                labels[first:last] = row[first:last]
                prompt = min(prompt, first)
        yield Whole(row, labels, prompt, source.aliased and control.leaks(source, row))


def _starts(
    encode: Encoder, drafts: list[Draft], sources: list[Source], together: Sequence[Tokens]
) -> list[list[int | None]]:
    """Return the index of each answer's first token, or None if the prompt before it may have other tokens when alone.

    Either one token covers its end and the beginning of the answer, or it ends in several whitespace characters, of
    which pre-tokenizers of GPT-2's kind keep the last for the word that follows. For the latter, the end of the prompt
    is encoded by itself, from the last token on that is more than whitespace; most prompts end alike.
    """
    starts = [
        [tokens.border(start) if start else 0 for start, _ in draft.spans]
        for draft, tokens in zip(drafts, together, strict=True)
    ]
    doubtful = [
        (row, span, _tail(together[row], sources[row], start, at) if at else None)
        for row, draft in enumerate(drafts)
        for span, ((start, _), at) in enumerate(zip(draft.spans, starts[row], strict=True))
        if at is not None and draft.text[max(start - 2, 0) : start].isspace()
    ]
    tails = list({tail for *_, tail in doubtful if tail})
    alone = dict(zip(tails, (tokens.ids.tolist() for tokens in encode(tails)), strict=True)) if tails else {}
    for row, span, tail in doubtful:
        ids, at = alone[tail] if tail else None, starts[row][span]
        if not ids or at is None or together[row].ids[max(at - len(ids), 0) : at].tolist() != ids:
            starts[row][span] = None
    return starts


def _tail(tokens: Tokens, source: Source, start: int, at: int) -> Source | None:
    """Return what lies before ``start``, the first character of token ``at``, from a token on that is not all white."""
    for token in range(at - 1, -1, -1):
        begin = tokens.begin(token)
        if begin is None:
            return None
        if not (text := source.text[begin:start]).isspace():
            return Source(text, source.aliased)
    return None


def _first_from(pieces: list[_Piece], position: int) -> int:
    """Return the index of the token that begins at a character."""
    piece = pieces[bisect.bisect_right(pieces, position, key=lambda piece: piece.start) - 1]
    if piece.start == position:
        return piece.first
    return piece.first + piece.tokens.until(position - piece.shift) - piece.skip


def _count_until(pieces: list[_Piece], position: int) -> int:
    """Return how many tokens begin before a character."""
    piece = pieces[bisect.bisect_left(pieces, position, key=lambda piece: piece.start) - 1]
    return piece.first + piece.tokens.until(position - piece.shift) - piece.skip


def _encode_apart(encode: Encoder, texts: list[tuple[Source, list[int]]]) -> Iterator[list[_Piece]]:
    """Encode each text in pieces, cut at its positions: as in use, where the prompt comes without the answer."""
    rows = [list(itertools.pairwise([0, *cuts, len(text)])) for (text, _), cuts in texts]
    parts = [
        (start, Source(text[start:end], aliased))
        for ((text, aliased), _), row in zip(texts, rows, strict=True)
        for start, end in row
    ]
    pieces = [
        _Piece(start, 0, tokens, 0, start)
        for (start, _), tokens in zip(parts, encode([part for _, part in parts]), strict=True)
    ]
    # Some tokenizers (Llama 2) put a space before a text; behind a character they don't, if that stays by itself.
    left = [at for at, (start, _) in enumerate(parts) if start]
    for before in BEFORE:
        if not left:
            break
        behind = encode([Source(before + parts[at][1].text, parts[at][1].aliased) for at in left])
        for at, tokens in zip(left, behind, strict=True):
            if skip := tokens.border(1):
                pieces[at] = _Piece(parts[at][0], 0, tokens, skip, parts[at][0] - 1)
        left = [at for at in left if not pieces[at].skip]
    whole = iter(pieces)
    for row in rows:
        first = 0
        made = []
        for piece in itertools.islice(whole, len(row)):
            made.append(piece._replace(first=first))
            first += len(piece.tokens.ids) - piece.skip
        yield made

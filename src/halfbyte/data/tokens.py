"""Examples to token ids and labels: the model is trained on the answers and on stopping after them.

:mod:`halfbyte.data.template` writes the text and says which characters are trained; here it becomes tokens, and a
token's label is the token itself where it is trained, else ``IGNORED``. Labels never depend on token ids, so a pad
token that is also the stop token does no harm. Rendered chats are tokenized as they are. Where a token would reach
across the border of prompt and answer, the two are tokenized apart, as they are in use. The first token of a row has
nothing before it and is never trained.

Examples stream through: a second thread turns one chunk of texts into tokens (the tokenizer's own threads do the work)
while the first reads and writes the next.

Left out: tokenizers that are not "fast", because they cannot say which characters a token stands for.
"""

import bisect
import dataclasses
import itertools
from collections.abc import Iterable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from typing import TYPE_CHECKING, Any, overload

import numpy as np
from tokenizers import Encoding, processors

from halfbyte.choices import IGNORED
from halfbyte.data.formats import Example
from halfbyte.data.template import Draft, Writer
from halfbyte.errors import InputError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

CHUNK = 1 << 20
"""Characters that are tokenized together."""
DRAFT = 256
"""What a draft takes beside its text, in characters: thousands of short ones are a chunk too."""

Row = Mapping[str, Any]
"""One training sequence: ``input_ids`` and ``labels`` of equal length, lists or arrays of integers."""

Offsets = Sequence[tuple[int, int]]
"""For each token, the characters of the text that it stands for: the first, and the one after the last."""


@dataclasses.dataclass(frozen=True)
class Encoded:
    """What became of an example.

    Attributes:
        example: where it stands, what was not used.
        rows: ``input_ids`` and ``labels``, int32 ``[L]``, at most ``max_length`` long, each with a trained token.
        truncated: whether it lost tokens to ``max_length``.
    """

    example: Example
    rows: list[Row]
    truncated: bool


def encode_examples(
    examples: Iterable[Example], tokenizer: "PreTrainedTokenizerBase", max_length: int
) -> Iterator[Encoded]:
    """Yield each example's rows, in order, cut off at the right after ``max_length`` tokens.

    Args:
        examples: from :func:`halfbyte.data.read_examples`; read some two thousand ahead.
        tokenizer: a fast one.
        max_length: tokens.

    Raises:
        InputError: no answer of an example begins within ``max_length``, the chat template cannot write one, or no
            stop token is known.
    """
    if not tokenizer.is_fast:
        raise InputError(
            f"{type(tokenizer).__name__} is not a fast tokenizer, so answers cannot be told from prompts; "
            "use a model folder with a tokenizer.json."
        )
    under_way: Future[list[Encoded]] | None = None
    with ThreadPoolExecutor(1, "tokenize") as thread:
        for chunk in _chunks(examples, Writer(tokenizer)):
            before, under_way = under_way, thread.submit(_encode_chunk, chunk, tokenizer, max_length)
            if before:
                yield from before.result()
        if under_way:
            yield from under_way.result()


def decode_trained(tokenizer: "PreTrainedTokenizerBase", row: Row) -> list[str]:
    """Return the trained stretches of a row as texts, special tokens included: what the model learns to write."""
    runs = itertools.groupby(row["labels"], lambda label: label != IGNORED)
    return [tokenizer.decode([int(label) for label in labels]) for trained, labels in runs if trained]


def _chunks(examples: Iterable[Example], write: Writer) -> Iterator[list[tuple[Example, list[Draft]]]]:
    chunk: list[tuple[Example, list[Draft]]] = []
    size = 0
    for example in examples:
        drafts = write(example)
        chunk.append((example, drafts))
        size += sum(len(draft.text) + DRAFT for draft in drafts)
        if size >= CHUNK:
            yield chunk
            chunk, size = [], 0
    if chunk:
        yield chunk


def _encode_chunk(
    chunk: list[tuple[Example, list[Draft]]], tokenizer: "PreTrainedTokenizerBase", max_length: int
) -> list[Encoded]:
    tokenized = _rows(tokenizer, [draft for _, drafts in chunk for draft in drafts])
    encoded = []
    for example, drafts in chunk:
        whole = list(itertools.islice(tokenized, len(drafts)))
        truncated = any(len(row["input_ids"]) > max_length for row in whole)
        encoded.append(Encoded(example, _cut(example.where, whole, max_length), truncated))
    return encoded


def _rows(tokenizer: "PreTrainedTokenizerBase", drafts: list[Draft]) -> Iterator[Row]:
    together = _encode(tokenizer, [draft.text for draft in drafts])
    cuts = [
        [start for start, _ in draft.spans if start and _merges(draft.text, offsets, start)]
        for draft, (_, offsets) in zip(drafts, together, strict=True)
    ]
    apart = _encode_apart(tokenizer, [(draft.text, at) for draft, at in zip(drafts, cuts, strict=True) if at])
    for draft, (ids, offsets), at in zip(drafts, together, cuts, strict=True):
        if at:
            ids, offsets = next(apart)
        begin = len(draft.begin)
        row = np.array(draft.begin + ids, dtype=np.int32)
        labels = np.full_like(row, IGNORED)
        for start, end in draft.spans:
            first = _first_behind(offsets, start)
            last = bisect.bisect_left(offsets, end, lo=first, key=lambda token: token[0])
            labels[begin + first : begin + last] = row[begin + first : begin + last]
        labels[:1] = IGNORED
        yield {"input_ids": row, "labels": labels}


def _encode(tokenizer: "PreTrainedTokenizerBase", texts: list[str]) -> list[tuple[list[int], Offsets]]:
    if not texts:
        return []
    # The post-processor adds nothing here, but it may take the spaces from the characters that a token stands for.
    backend = tokenizer.backend_tokenizer
    post_processor, backend.post_processor = backend.post_processor, processors.Sequence([])
    try:
        encoded = tokenizer(
            texts, add_special_tokens=False, return_attention_mask=False, return_token_type_ids=False, verbose=False
        )
    finally:
        backend.post_processor = post_processor
    return [(ids, _Places(one)) for ids, one in zip(encoded["input_ids"], encoded.encodings, strict=True)]


class _Places(Sequence[tuple[int, int]]):
    """The offsets of an encoded text, looked up one by one: a search among thousands of tokens needs a dozen."""

    def __init__(self, encoding: Encoding) -> None:
        self.encoding = encoding

    def __len__(self) -> int:
        return len(self.encoding)

    def __iter__(self) -> Iterator[tuple[int, int]]:
        return iter(self.encoding.offsets)

    @overload
    def __getitem__(self, token: int) -> tuple[int, int]: ...
    @overload
    def __getitem__(self, token: slice) -> Offsets: ...
    def __getitem__(self, token: Any) -> Any:
        if isinstance(token, slice):
            return self.encoding.offsets[token]
        if (place := self.encoding.token_to_chars(token)) is None:
            raise IndexError(token)
        return place


def _first_behind(offsets: Offsets, position: int) -> int:
    """Return the index of the first token that reaches beyond ``position``."""
    return bisect.bisect_right(offsets, position, key=lambda token: token[1])


def _merges(text: str, offsets: Offsets, start: int) -> bool:
    """Tell whether a prompt that ends at ``start`` may have other tokens here than when it stands alone.

    Either one token covers its end and the beginning of the answer, or it ends in several whitespace characters, of
    which pre-tokenizers of GPT-2's kind keep the last for the word that follows.
    """
    return offsets[_first_behind(offsets, start)][0] < start or text[max(start - 2, 0) : start].isspace()


def _encode_apart(
    tokenizer: "PreTrainedTokenizerBase", texts: list[tuple[str, list[int]]]
) -> Iterator[tuple[list[int], Offsets]]:
    """Encode each text in pieces, cut at its positions: as in use, where the prompt comes without the answer."""
    rows = [
        [(start, text[start:end]) for start, end in itertools.pairwise([0, *cuts, len(text)])] for text, cuts in texts
    ]
    pieces = [piece for row in rows for _, piece in row]
    # Some tokenizers (Llama 2) put a space before a text; behind a newline they don't, if that stays by itself.
    plain = iter(_encode(tokenizer, pieces))
    behind = iter(_encode(tokenizer, ["\n" + piece for row in rows for start, piece in row if start]))
    for row in rows:
        ids: list[int] = []
        offsets: list[tuple[int, int]] = []
        for start, _ in row:
            piece_ids, places = next(plain)
            shift = start
            if start:
                behind_ids, behind_places = next(behind)
                first = _first_behind(behind_places, 1)
                if behind_places[first][0] >= 1:
                    piece_ids, places, shift = behind_ids[first:], behind_places[first:], start - 1
            ids += piece_ids
            offsets += [(left + shift, right + shift) for left, right in places]
        yield ids, offsets


def _cut(where: str, rows: list[Row], max_length: int) -> list[Row]:
    """Cut the rows of one example to ``max_length`` and leave away those that have no trained token left."""
    cut: list[Row] = [{key: values[:max_length] for key, values in row.items()} for row in rows]
    kept = [row for row in cut if (row["labels"] != IGNORED).any()]
    if not kept:
        trained = np.flatnonzero(rows[0]["labels"] != IGNORED)
        if not len(trained):
            raise InputError(f"{where} is empty: there is nothing to train on.")
        raise InputError(
            f"{where}: its prompt alone takes {trained[0]} tokens, so with max_length {max_length} nothing of the "
            "answer is left to train on; raise max_length or shorten the prompt."
        )
    return kept

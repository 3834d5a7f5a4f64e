"""A tokenizer as training needs it: the ids of many texts, and which token begins at a character of each.

A "fast" tokenizer (one of the ``tokenizers`` library) says for each token which characters it stands for, and works on
all cores. Finding that out costs it a seventh of its time; byte-level tokenizers need not be asked, as the lengths of
their tokens say it too, if together they are as long as the text. A "slow" tokenizer, written in Python or around
SentencePiece, says only ids. There a border is found by encoding what lies before it: if that gives the first ids of
the whole text, the next token begins at the border. If not, the text has to be cut there, as where a token reaches
across.

A text may come with aliases (:mod:`halfbyte.data.control`): characters for private use that stand for control tokens,
while control tokens that are written out are plain text. Fast tokenizers do this with a second tokenizer in which the
control tokens have these names; all else about it is the same, so that what is plain text gets the tokens that it would
have if the control token had never been one.
"""

import bisect
import contextlib
import itertools
import json
import re
import threading
import typing
import unicodedata
from collections.abc import Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any, Literal, NamedTuple, Protocol

import numpy as np
from tokenizers import Encoding, Tokenizer, processors

from halfbyte.errors import InputError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


NormalForm = Literal["", "NFC", "NFD", "NFKC", "NFKD"]

MANY = 64
"""Texts from which on it pays to look at the vocabulary first."""


_ALONE = threading.Lock()


class Source(NamedTuple):
    """A text to encode.

    Attributes:
        text: characters.
        aliased: whether control tokens in it stand under their aliases.
    """

    text: str
    aliased: bool = False


class Tokens(Protocol):
    """The tokens of a text."""

    @property
    def ids(self) -> Any:
        """The token ids, int32 ``[T]``."""

    def border(self, position: int) -> int | None:
        """Return the index of the token that begins at a character, or None if a token reaches across."""

    def until(self, position: int) -> int:
        """Return how many tokens begin before a character."""

    def begin(self, token: int) -> int | None:
        """Return the character that a token begins at, or None where that is not known."""


class Encoder(Protocol):
    """Encodes texts, no special tokens added."""

    def __call__(self, sources: Sequence[Source]) -> Sequence[Tokens]:
        """Return the tokens of each text."""


def encoder_for(tokenizer: "PreTrainedTokenizerBase", aliases: Mapping[str, str]) -> Encoder:
    """Return what encodes with ``tokenizer``.

    Args:
        tokenizer: fast or slow.
        aliases: for each control token what stands for it in a text that is ``aliased``, of the same length.

    Raises:
        InputError: the tokenizer does not work on texts.
    """
    if type(tokenizer).__name__ == "MistralCommonBackend":
        raise InputError(
            "A tokenizer of mistral-common writes conversations itself, so what is trained cannot be chosen; "
            "use a copy of the model with tokenizer.json and a chat template, or uninstall mistral-common."
        )
    return FastEncoder(tokenizer, aliases) if tokenizer.is_fast else SlowEncoder(tokenizer, aliases)


class FastEncoder:
    """Encodes with a tokenizer of the ``tokenizers`` library, on all cores."""

    def __init__(self, tokenizer: "PreTrainedTokenizerBase", aliases: Mapping[str, str]) -> None:
        self._backend: Tokenizer = tokenizer.backend_tokenizer
        self._aliases = aliases
        self._renamed: Tokenizer | None = None
        self._bytes: Any = None
        self._normal_form = _byte_level(self._backend)

    def __call__(self, sources: Sequence[Source]) -> Sequence[Tokens]:
        aliased = [source.aliased for source in sources]
        if not any(aliased):
            return self._plain([source.text for source in sources])
        self._renamed = self._renamed or renamed(self._backend, self._aliases)
        kinds = {
            False: iter(self._plain([source.text for source in sources if not source.aliased])),
            True: iter(_with_places(self._renamed, [source.text for source in sources if source.aliased])),
        }
        return [next(kinds[flag]) for flag in aliased]

    def _plain(self, texts: list[str]) -> Sequence[Tokens]:
        if self._normal_form is None or len(texts) < MANY:
            return _with_places(self._backend, texts)
        if self._bytes is None:
            self._bytes = _byte_lengths(self._backend)
        with _as_they_are(self._backend):
            encodings = self._backend.encode_batch_fast(texts, add_special_tokens=False)
        rows = [np.array(encoding.ids, dtype=np.int32) for encoding in encodings]
        tokens: list[Tokens | None] = [self._by_length(text, ids) for text, ids in zip(texts, rows, strict=True)]
        others = [at for at, one in enumerate(tokens) if one is None]
        for at, one in zip(others, _with_places(self._backend, [texts[at] for at in others]), strict=True):
            tokens[at] = one
        return [one for one in tokens if one is not None]

    def _by_length(self, text: str, ids: Any) -> "ByteTokens | None":
        """Return the tokens with the places that their lengths give them, or None if these do not fit the text."""
        if text.isascii():
            size = len(text)
        elif not self._normal_form or unicodedata.is_normalized(self._normal_form, text):
            size = len(text.encode())
        else:
            return None
        ends = self._bytes[ids].cumsum()
        return ByteTokens(ids, text, ends) if len(ids) and ends[-1] == size else None


class FastTokens:
    """The tokens of a text, whose places are asked for one by one: lists of all of them take longer than encoding."""

    def __init__(self, encoding: Encoding) -> None:
        self._encoding = encoding
        self.ids = np.array(encoding.ids, dtype=np.int32)

    def border(self, position: int) -> int | None:
        encoding = self._encoding
        first = encoding.char_to_token(position)
        if first is None:  # of a character that a normalizer has removed, or behind the last one
            first = bisect.bisect_right(range(len(encoding)), position, key=lambda token: self._place(token)[1])
        return first if first == len(encoding) or self._place(first)[0] >= position else None

    def until(self, position: int) -> int:
        return bisect.bisect_left(range(len(self._encoding)), position, key=lambda token: self._place(token)[0])

    def begin(self, token: int) -> int:
        return self._place(token)[0]

    def _place(self, token: int) -> tuple[int, int]:
        place: tuple[int, int] | None = self._encoding.token_to_chars(token)
        if place is None:
            raise IndexError(token)
        return place


class ByteTokens:
    """The tokens of a text, each of which stands for as many bytes as it has: ``ends`` is where they end."""

    def __init__(self, ids: Any, text: str, ends: Any) -> None:
        self.ids = ids
        self._text = text
        self._ends = ends

    def border(self, position: int) -> int | None:
        place = self._byte(position)
        first = int(self._ends.searchsorted(place, side="right"))
        begin = self._ends[first - 1] if first else 0
        return first if begin == place else None

    def until(self, position: int) -> int:
        return int(self._ends.searchsorted(self._byte(position), side="left")) + 1 if position else 0

    def begin(self, token: int) -> int:
        byte = int(self._ends[token - 1]) if token else 0
        return byte if self._text.isascii() else len(self._text.encode()[:byte].decode(errors="ignore"))

    def _byte(self, position: int) -> int:
        return position if self._text.isascii() else len(self._text[:position].encode())


def _with_places(backend: Tokenizer, texts: list[str]) -> list[Tokens]:
    if not texts:
        return []
    with _as_they_are(backend):
        return [FastTokens(encoding) for encoding in backend.encode_batch(texts, add_special_tokens=False)]


@contextlib.contextmanager
def _as_they_are(backend: Tokenizer) -> Iterator[None]:
    """Have texts neither cut nor padded nor processed; one thread at a time, since all of them share the tokenizer.

    The post-processor would add nothing here, but it may take the spaces from the characters that a token stands for.
    """
    with _ALONE:
        kept = backend.post_processor, backend.truncation, backend.padding, backend.encode_special_tokens
        backend.post_processor = processors.Sequence([])
        backend.no_truncation()
        backend.no_padding()
        backend.encode_special_tokens = False
        try:
            yield
        finally:
            backend.post_processor, truncation, padding, backend.encode_special_tokens = kept
            if truncation:
                backend.enable_truncation(**truncation)
            if padding:
                backend.enable_padding(**padding)


def _byte_level(backend: Tokenizer) -> NormalForm | None:
    """Return the Unicode normal form that a byte-level tokenizer brings texts into, or "", or None if it is none."""
    try:
        saved = json.loads(backend.pre_tokenizer.__getstate__())
        normalizer = json.loads(backend.normalizer.__getstate__()) if backend.normalizer else None
    except Exception:  # there is none, or one written in Python; the library has no class of its own for this
        return None
    last = saved["pretokenizers"][-1] if saved.get("pretokenizers") else saved
    if last["type"] != "ByteLevel" or last["add_prefix_space"]:
        return None
    if not normalizer or normalizer.get("normalizers") == []:
        return ""
    kind = normalizer["type"]
    return kind if kind in typing.get_args(NormalForm) else None


def _byte_lengths(backend: Tokenizer) -> Any:
    """Return how many bytes each token of a byte-level tokenizer stands for, int64 ``[vocabulary]``."""
    vocabulary = backend.get_vocab(with_added_tokens=False)
    added = backend.get_added_tokens_decoder()
    lengths = np.zeros(max([*vocabulary.values(), *added], default=0) + 1, np.int64)
    lengths[list(vocabulary.values())] = list(map(len, vocabulary))  # which has a letter for each byte
    for index, token in added.items():
        lengths[index] = len(token.content.encode())
    return lengths


def renamed(backend: Tokenizer, names: Mapping[str, str]) -> Tokenizer:
    """Return a copy of a tokenizer with other names for some tokens, and without a post-processor.

    The tokens are renamed in the vocabulary too, since some models (Unigram) find a control token's name there.

    Raises:
        InputError: the tokenizer has a part that cannot be copied.
    """
    try:
        saved = json.loads(backend.to_str())
        for token in saved["added_tokens"]:
            token["content"] = names.get(token["content"], token["content"])
        model: dict[str, Any] = saved["model"]
        if isinstance(model["vocab"], dict):
            model["vocab"] = {names.get(word, word): index for word, index in model["vocab"].items()}
        else:
            model["vocab"] = [[names.get(word, word), score] for word, score in model["vocab"]]
        if model.get("unk_token") in names:
            model["unk_token"] = names[model["unk_token"]]
        return Tokenizer.from_str(json.dumps({**saved, "post_processor": None, "truncation": None, "padding": None}))
    except Exception as error:  # the library has no class of its own for these
        raise InputError(
            f"This tokenizer cannot keep control tokens in the data's texts as plain text ({error}); take them out of "
            "the data, or have them taken for control tokens with parse_special_tokens (--parse-special-tokens)."
        ) from error


class SlowEncoder:
    """Encodes with a tokenizer that is not "fast", a text at a time."""

    def __init__(self, tokenizer: "PreTrainedTokenizerBase", aliases: Mapping[str, str]) -> None:
        self._tokenizer = tokenizer
        tokens: dict[str, int] = tokenizer.added_tokens_encoder
        self._named = {aliases.get(token, token): index for token, index in tokens.items()}
        longest = sorted(filter(None, self._named), key=len, reverse=True)
        self._pattern = re.compile(f"({'|'.join(map(re.escape, longest))})" if longest else "((?!))")

    def __call__(self, sources: Sequence[Source]) -> Sequence[Tokens]:
        return [SlowTokens(self, source) for source in sources]

    def ids(self, source: Source) -> list[int]:
        """Return the ids of one text."""
        if source.aliased:
            pieces = self._pattern.split(source.text)
            return list(itertools.chain.from_iterable(
                [self._named[piece]] if at % 2 else self._plain(piece) for at, piece in enumerate(pieces) if piece
            ))  # fmt: skip
        ids: list[int] = self._tokenizer(source.text, add_special_tokens=False, verbose=False)["input_ids"]
        return ids

    def _plain(self, text: str) -> list[int]:
        tokens = self._tokenizer.tokenize(text, split_special_tokens=True)
        ids: list[int] = self._tokenizer.convert_tokens_to_ids(tokens)
        return ids


class SlowTokens:
    """The tokens of a text; a border is found by encoding what lies before it."""

    def __init__(self, encoder: SlowEncoder, source: Source) -> None:
        self._encoder = encoder
        self._source = source
        self._ids = encoder.ids(source)
        self.ids = np.array(self._ids, dtype=np.int32)

    def border(self, position: int) -> int | None:
        before = self._before(position)
        return len(before) if self._ids[: len(before)] == before else None

    def until(self, position: int) -> int:
        before = self._before(position)
        pairs = enumerate(zip(before, self._ids, strict=False))
        differ = next((at for at, (one, other) in pairs if one != other), None)
        return min(len(before) if differ is None else differ + 1, len(self._ids))

    def begin(self, token: int) -> None:
        return None

    def _before(self, position: int) -> list[int]:
        return self._encoder.ids(Source(self._source.text[:position], self._source.aliased)) if position else []

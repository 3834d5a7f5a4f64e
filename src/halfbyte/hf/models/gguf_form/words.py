"""A tokenizer as llama.cpp has it: one of three kinds, made of what the fast tokenizer's own file says.

    gpt2     byte-level BPE: pieces, merges, how a text is cut first (:mod:`halfbyte.hf.models.gguf_form.splits`)
    llama    SentencePiece's BPE, with bytes for what is in no piece: pieces and scores. llama.cpp joins the pair whose
             piece has the best score; a tokenizer of transformers' the pair that comes first among its merges. So a
             piece's score is minus the place of its first merge.
    t5       SentencePiece's unigrams: pieces and their scores

What is between the tokenizer's last id and the embedding's last row are unused tokens. Where llama.cpp will make other
ids of some texts than the tokenizer, that is said.
"""

import base64
import json
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from gguf import TokenType
from transformers import PreTrainedTokenizerBase

from halfbyte.errors import InputError, named
from halfbyte.hf.models.gguf_form.splits import PROBE, WITHOUT_MARKS, check_way, way_of

SPACE = "▁"
NEVER = "[NONE] [NONE]"
"""llama.cpp wants a merge; no text comes to these pieces."""
ADDED_SCORE = -1000.0
MADE = 1e6
"""A score below that of every merge, for pieces that none makes."""
BY_NAME = ("phi-3", "phi3")
"""Where a model is called so, llama.cpp drops spaces behind special tokens, of which it expects these to be there."""
EXPECTED = ("<s>", "</s>", "<unk>", "<|endoftext|>")


@dataclass
class Words:
    """What the file says of a tokenizer.

    Attributes:
        model: the kind.
        pre: how a text is cut first, for gpt2.
        tokens, types, scores, merges: as GGUF has them; scores are empty for gpt2, merges for the others.
        ids: of special tokens, by gguf's names.
        flags: whether something is added to texts, by gguf's names.
        template: the chat template.
        charsmap: of unigrams: how texts are normalised.
        notes: sentences on what llama.cpp will do otherwise.
    """

    model: str
    pre: str
    tokens: list[str]
    types: list[int]
    scores: list[float]
    merges: list[str]
    ids: dict[str, int]
    flags: dict[str, bool]
    template: str | list[dict[str, str]] | None
    charsmap: bytes | None = None
    notes: list[str] = field(default_factory=list)

    def write(self, writer: Any) -> None:
        """Say it in the file."""
        writer.add_tokenizer_model(self.model)
        writer.add_tokenizer_pre(self.pre)
        writer.add_token_list(self.tokens)
        if self.scores:
            writer.add_token_scores(self.scores)
        writer.add_token_types(self.types)
        if self.model == "gpt2":
            writer.add_token_merges(self.merges or [NEVER])
        for name, number in self.ids.items():
            getattr(writer, f"add_{name}_token_id")(number)
        for name, flag in self.flags.items():
            getattr(writer, f"add_{name}")(flag)
        if self.charsmap is not None:
            writer.add_precompiled_charsmap(self.charsmap)
        if self.template is not None:
            writer.add_chat_template(self.template)

    def may_be_called(self, name: str) -> bool:
        """Whether llama.cpp opens a file with this tokenizer under the name."""
        return not any(part in name.lower() for part in BY_NAME) or set(EXPECTED) <= set(self.tokens)


def words_of(
    tokenizer: PreTrainedTokenizerBase, rows: int, stops: list[int] | None = None, pre: str | None = None
) -> Words:
    """Return a tokenizer as llama.cpp has it.

    Args:
        tokenizer: transformers'.
        rows: of the model's embedding.
        stops: tokens that end an answer, as the generation settings name them; None leaves that to the tokenizer.
        pre: llama.cpp's name for how texts are cut, where it is not recognised.

    Raises:
        InputError: llama.cpp has no such kind, or the tokenizer has tokens without a row.
    """
    backend = getattr(tokenizer, "backend_tokenizer", None)
    if backend is None:
        raise InputError(
            f"{type(tokenizer).__name__} has no tokenizer.json, of which a GGUF file's vocabulary is made; save it as "
            "a fast tokenizer."
        )
    about = json.loads(backend.to_str())
    kind = _kind(about, type(tokenizer).__name__)
    if pre is not None:
        check_way(pre)
    tokens, types = _tokens(tokenizer, about, kind, rows)
    words = Words(
        kind, "default", tokens, types, [], [], _special(tokenizer, stops), _flags(tokenizer), _template(tokenizer)
    )
    if kind == "gpt2":
        words.pre = pre or _recognised(backend, about)
        words.merges = [pair if isinstance(pair, str) else " ".join(pair) for pair in about["model"]["merges"]]
    elif kind == "llama":
        words.scores = _scores(tokens, types, about["model"]["merges"])
    else:
        words.scores = [float(score) for _, score in about["model"]["vocab"]]
        words.scores += [ADDED_SCORE] * (rows - len(words.scores))
        words.charsmap = _charsmap(about.get("normalizer"))
    _spaces(words, backend, tokenizer)
    words.notes += _notes(words, backend, about)
    return words


def _kind(about: Mapping[str, Any], name: str) -> str:
    model = about["model"]["type"]
    said = json.dumps([about.get("pre_tokenizer"), about.get("decoder")])
    if model == "Unigram":
        return "t5"
    if model == "BPE" and "ByteLevel" in said:
        return "gpt2"
    if model == "BPE" and about["model"].get("byte_fallback"):
        return "llama"
    raise InputError(
        f"{name} is a {model} tokenizer of a kind that llama.cpp does not have for models that write: byte-level BPE "
        "and SentencePiece's with byte fallback are written."
    )


def _tokens(
    tokenizer: PreTrainedTokenizerBase, about: Mapping[str, Any], kind: str, rows: int
) -> tuple[list[str], list[int]]:
    by_id = {number: token for token, number in tokenizer.get_vocab().items()}
    if by_id and max(by_id) >= rows:
        beyond = [by_id[number] for number in sorted(by_id) if number >= rows]
        raise InputError(
            f"The tokenizer has {max(by_id) + 1:,} tokens and the model rows for {rows:,}: {named(beyond)} would have "
            "none; take the tokenizer that goes with the model."
        )
    unknown = about["model"].get("unk_token")
    if kind == "t5" and about["model"].get("unk_id") is not None:
        unknown = about["model"]["vocab"][about["model"]["unk_id"]][0]
    added = tokenizer.added_tokens_decoder
    tokens, types = [], []
    for number in range(rows):
        token = by_id.get(number)
        if token is None:
            token, is_a = f"[PAD{number}]", TokenType.UNUSED
        elif token == unknown and kind != "gpt2":
            is_a = TokenType.UNKNOWN
        elif number in added:
            is_a = TokenType.CONTROL if added[number].special else TokenType.USER_DEFINED
            if kind == "llama" and not added[number].special:
                token = token.replace(SPACE, " ")
        elif kind == "llama" and _is_byte(token):
            is_a = TokenType.BYTE
        else:
            is_a = TokenType.NORMAL
        tokens.append(token)
        types.append(int(is_a))
    twice = sorted(token for token, count in Counter(tokens).items() if count > 1)
    if twice:
        raise InputError(f"Two tokens are called {named(twice)}, and llama.cpp tells them by name.")
    if kind == "llama" and sum(_is_byte(token) for token in tokens) < 256:
        raise InputError(
            "The tokenizer has no tokens for single bytes (<0x00> to <0xFF>), without which llama.cpp cannot read "
            "every text."
        )
    return tokens, types


def _is_byte(token: str) -> bool:
    return len(token) == 6 and token.startswith("<0x") and token.endswith(">")


def _recognised(backend: Any, about: Mapping[str, Any]) -> str:
    found = way_of(backend, bool(about["model"].get("ignore_merges")))
    if found is None:
        raise InputError(
            "The tokenizer cuts texts in a way that is not recognised, and llama.cpp has to be told which; name the "
            "one that it has for this family with pre (--pre), such as llama-bpe."
        )
    return found


def _special(tokenizer: PreTrainedTokenizerBase, stops: list[int] | None) -> dict[str, int]:
    own = tokenizer.eos_token_id
    ends = list(dict.fromkeys([*([own] if own is not None and (not stops or own in stops) else []), *(stops or [])]))
    named_ids = {
        "bos": tokenizer.bos_token_id,
        **dict(zip(("eos", "eot", "eom"), ends, strict=False)),
        "unk": tokenizer.unk_token_id,
        "pad": tokenizer.pad_token_id,
    }
    return {name: int(number) for name, number in named_ids.items() if number is not None}


def _flags(tokenizer: PreTrainedTokenizerBase) -> dict[str, bool]:
    """Return what is put before and behind texts, as a text shows."""
    plain = tokenizer("a", add_special_tokens=False).input_ids
    whole = tokenizer("a").input_ids
    before = whole[: whole.index(plain[0])] if plain and plain[0] in whole else []
    behind = whole[len(before) + len(plain) :]
    return {
        "add_bos_token": before == [tokenizer.bos_token_id] and bool(before),
        "add_eos_token": behind == [tokenizer.eos_token_id] and bool(behind),
    }


def _template(tokenizer: PreTrainedTokenizerBase) -> str | list[dict[str, str]] | None:
    held: str | Mapping[str, str] | None = tokenizer.chat_template
    if isinstance(held, Mapping):
        return [{"name": name, "template": template} for name, template in held.items()]
    return held


def _scores(tokens: list[str], types: list[int], merges: list[Any]) -> list[float]:
    places: dict[str, int] = {}
    for place, pair in enumerate(merges):
        made = "".join(pair.split(" ") if isinstance(pair, str) else pair)
        places.setdefault(made, place)
    return [
        ADDED_SCORE if kind in (TokenType.CONTROL, TokenType.USER_DEFINED, TokenType.UNUSED)
        else 0.0 if kind in (TokenType.BYTE, TokenType.UNKNOWN)
        else -float(places.get(token, MADE))
        for token, kind in zip(tokens, types, strict=True)
    ]  # fmt: skip


def _charsmap(normalizer: Mapping[str, Any] | None) -> bytes | None:
    parts = [normalizer, *(normalizer or {}).get("normalizers", [])]
    found = [part["precompiled_charsmap"] for part in parts if part and part.get("type") == "Precompiled"]
    return base64.b64decode(found[0]) if found and found[0] else None


def _spaces(words: Words, backend: Any, tokenizer: PreTrainedTokenizerBase) -> None:
    """Find out by trying whether a space is put before texts."""
    first = backend.encode("a", add_special_tokens=False).tokens
    if words.model == "gpt2":
        if first and first[0].startswith("Ġ"):
            words.notes.append("The tokenizer puts a space before a text, and llama.cpp does not: begin it with one.")
        return
    prefixed = bool(first) and first[0].startswith(SPACE)
    words.flags["add_space_prefix"] = prefixed
    if not prefixed:
        return
    special = next((t.content for t in tokenizer.added_tokens_decoder.values() if t.special), None)
    behind = backend.encode(f"{special}a", add_special_tokens=False).tokens if special else []
    others = []
    if backend.encode(" a", add_special_tokens=False).tokens == first:
        others.append("a text that begins with one")
    if words.model == "llama" and len(behind) > 1 and not behind[1].startswith(SPACE):
        others.append("what follows a special token")
    if others:
        words.notes.append(
            f"llama.cpp puts a space before {' and before '.join(others)}, and the tokenizer does not: the ids of these"
            " differ by that space."
        )


def _notes(words: Words, backend: Any, about: Mapping[str, Any]) -> list[str]:
    found = []
    if backend.normalizer is not None and words.charsmap is None:
        normal = backend.normalizer.normalize_str(PROBE).replace(SPACE, " ").removeprefix(" ")
        if normal != PROBE:
            found.append(
                "The tokenizer normalises texts before it cuts them, and llama.cpp takes them as they are: letters "
                "that are put together from several characters may become other tokens."
            )
    if words.pre in WITHOUT_MARKS:
        found.append("llama.cpp cuts letters with marks of their own (as Hindi has them) otherwise than the tokenizer.")
    if words.model == "llama":
        missing = _unlisted(words, about["model"]["merges"])
        if missing:
            found.append(
                f"llama.cpp may join {missing:,} pairs of pieces that the tokenizer does not join, so that some texts "
                "become other tokens."
            )
    if words.model == "t5" and about["model"].get("byte_fallback"):
        found.append("llama.cpp reads what is in no piece as the unknown token, where the tokenizer has bytes for it.")
    return found


def _unlisted(words: Words, merges: list[Any]) -> int:
    """Count pairs of pieces that make a piece and are no merge."""
    listed = {tuple(pair.split(" ")) if isinstance(pair, str) else tuple(pair) for pair in merges}
    normal = {token for token, kind in zip(words.tokens, words.types, strict=True) if kind == TokenType.NORMAL}
    return sum(
        (token[:i], token[i:]) not in listed
        for token in normal
        for i in range(1, len(token))
        if token[:i] in normal and token[i:] in normal
    )

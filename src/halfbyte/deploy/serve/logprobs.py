"""Log-probabilities in the two forms of OpenAI's API, and the texts and bytes of single tokens that they name."""

import re
from collections.abc import Iterable
from typing import Any

from transformers import PreTrainedTokenizerBase

from halfbyte.generate.sampling import Chosen


class TokenTexts:
    """Tokens as bytes: those of byte-level vocabularies, SentencePiece's, and otherwise what the tokenizer decodes."""

    def __init__(self, tokenizer: PreTrainedTokenizerBase) -> None:
        """
        Args:
            tokenizer: of which nobody else makes use at the same time.
        """
        self._tokenizer = tokenizer
        self._special = set(tokenizer.added_tokens_decoder)
        backend = getattr(tokenizer, "backend_tokenizer", None)
        shown = "" if backend is None else str(backend.decoder)
        self._is_byte_level = "ByteLevel" in shown
        self._known: dict[int, bytes] = {}
        self._bytes = _byte_characters() if self._is_byte_level else {}

    def bytes_of(self, token: int) -> bytes:
        """Return the bytes of a token."""
        if token not in self._known:
            self._known[token] = self._found(token)
        return self._known[token]

    def text_of(self, token: int) -> str:
        """Return its text; what is no whole character is shown as ``bytes:\\xe2``, as OpenAI does."""
        raw = self.bytes_of(token)
        try:
            return raw.decode()
        except UnicodeDecodeError:
            return "bytes:" + "".join(f"\\x{byte:02x}" for byte in raw)

    def _found(self, token: int) -> bytes:
        name = self._tokenizer.convert_ids_to_tokens(token)
        if not isinstance(name, str):
            return b""  # the head has rows behind the vocabulary
        if token in self._special:
            return name.encode()
        if self._is_byte_level:
            if all(character in self._bytes for character in name):
                return bytes(self._bytes[character] for character in name)
            return name.encode()
        if match := re.fullmatch(r"<0x([0-9A-Fa-f]{2})>", name):
            return bytes([int(match[1], 16)])
        if "▁" in name:
            return name.replace("▁", " ").encode()
        return str(self._tokenizer.decode([token], clean_up_tokenization_spaces=False)).encode()

    def of_chat(self, chosen: Iterable[Chosen]) -> list[dict[str, Any]]:
        """Return tokens as ``choices[].logprobs.content`` has them."""
        return [
            self._entry(one.token, one.logprob)
            | {"top_logprobs": [self._entry(token, logprob) for token, logprob in one.top]}
            for one in chosen
        ]

    def of_completion(self, chosen: Iterable[Chosen], offset: int) -> dict[str, Any]:
        """Return tokens as ``choices[].logprobs`` of a completion has them; ``offset`` is that of the first one."""
        found: dict[str, list[Any]] = {"tokens": [], "token_logprobs": [], "top_logprobs": [], "text_offset": []}
        for one in chosen:
            found["tokens"].append(self.text_of(one.token))
            found["token_logprobs"].append(_finite(one.logprob))
            found["top_logprobs"].append({self.text_of(token): _finite(logprob) for token, logprob in one.top} or None)
            found["text_offset"].append(offset)
            offset += self.length_of(one.token)
        return found

    def length_of(self, token: int) -> int:
        """Return how many whole characters a token has."""
        return len(self.bytes_of(token).decode("utf-8", "ignore"))

    def _entry(self, token: int, logprob: float | None) -> dict[str, Any]:
        return {"token": self.text_of(token), "bytes": list(self.bytes_of(token)), "logprob": _finite(logprob)}


def _finite(logprob: float | None) -> float:
    """Return a log-probability; minus infinity, which JSON lacks, as OpenAI writes it."""
    return -9999.0 if logprob is None or logprob == float("-inf") else logprob


def _byte_characters() -> dict[str, int]:
    """Return the byte that each character of a byte-level vocabulary stands for (GPT-2's table)."""
    printable = [*range(33, 127), *range(161, 173), *range(174, 256)]
    rest = [byte for byte in range(256) if byte not in printable]
    return {chr(byte): byte for byte in printable} | {chr(256 + place): byte for place, byte in enumerate(rest)}

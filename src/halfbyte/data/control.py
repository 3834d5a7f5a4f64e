"""Control tokens that are written out in the data's texts: plain text, unless somebody asks otherwise.

A text such as "What does <|im_end|> mean?" must not end a turn. So before a conversation is written, each control token
in it is replaced by as many private-use characters; afterwards these are put back, and it is known which characters of
the written text are the data's (``Draft.plain``). Then the control tokens that the template wrote get aliases, private
characters of another range, under which :mod:`halfbyte.data.encoders` knows them. All replacements keep the length, so
places stay what they are. Only rows that hold such a token go this way.

Control tokens are the tokenizer's special tokens, and those that the template writes around turns though they are not
called special (DeepSeek's ``<｜User｜>``). Not among them is what the model itself writes within its answers: what is
not special and comes as a pair of tags (``<think>``, ``<tool_call>``), and what the template looks for in a message.
"""

import dataclasses
import re
import weakref
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import jinja2
import numpy as np

from halfbyte.data.encoders import Encoder, Source, encoder_for
from halfbyte.data.examples import BadRow, Completion, Example, Judged, Preference, Text
from halfbyte.data.template import Draft
from halfbyte.errors import InputError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

ALIASES, MASKS = 0xF0000, 0x100000
"""The first of the private-use characters that stand for the template's control tokens, and for the data's."""
_PRIVATE = re.compile("[\U000f0000-\U0010ffff]")
_MASKED = re.compile("([\U00100000-\U0010ffff])\\1*")
_NOT_TEXT = ("where", "unused", "notes")

Write = Callable[[Example], list[Draft]]

_TOOLS: "weakref.WeakKeyDictionary[Any, tuple[Any, tuple[ControlTokens, Encoder]]]" = weakref.WeakKeyDictionary()


class ControlTokens:
    """The control tokens of a tokenizer with a chat template.

    Attributes:
        aliases: what stands for each of them, of the same length.
    """

    def __init__(self, tokenizer: "PreTrainedTokenizerBase", template: str | None = None) -> None:
        tokens = control_tokens(tokenizer, template)
        self._begin, self._end = tokenizer.bos_token or "", tokenizer.eos_token or ""
        ids = (tokenizer.convert_tokens_to_ids(token) for token in tokens if token != tokenizer.unk_token)
        self._ids = np.array([*ids], dtype=np.int64)
        self._pattern = re.compile("|".join(map(re.escape, tokens)) or "(?!)")
        self._masks = {token: chr(MASKS + at) * len(token) for at, token in enumerate(tokens)}
        self._masked = {mask[0]: token for token, mask in self._masks.items()}
        self.aliases = {token: chr(ALIASES + at) * len(token) for at, token in enumerate(tokens)}

    def write(self, write: Write, example: Example, parse: bool = False) -> tuple[list[Draft], tuple[str, ...]]:
        """Return the example's drafts, with ``plain`` filled, and notes about the control tokens in its texts.

        Args:
            write: a :class:`halfbyte.data.template.Writer`.
            example: as it was read.
            parse: take the control tokens for such.

        Raises:
            BadRow: ``write`` says so, or the texts hold private-use characters beside control tokens.
        """
        texts = _fields(example)
        found = self._find(texts)
        if not found:
            return write(example), ()
        if parse:
            return write(self._without_edges(example)), tuple(
                f"{token!r} in the data's texts became a control token, as parse_special_tokens asks" for token in found
            )
        if any(map(_PRIVATE.search, _strings(texts))):
            raise BadRow(example.where, "private characters beside control tokens", _both(found[0]))
        try:
            drafts = write(dataclasses.replace(example, **{name: self.mask(value) for name, value in texts.items()}))
        except BadRow:
            write(example)  # may say the same of the texts as they are
            raise
        notes = tuple(
            f"{token!r} in the data's texts was kept as plain text; to make it a control token, set "
            "parse_special_tokens (--parse-special-tokens)"
            for token in found
        )
        return [self._unmask_draft(draft) for draft in drafts], notes

    def render(self, messages: Any, render: Callable[[Any], str]) -> Source:
        """Return what ``render`` writes for a conversation, with the control tokens in its texts as plain text.

        Raises:
            InputError: the texts hold private-use characters beside control tokens.
        """
        found = self._find(messages)
        if not found:
            return Source(render(messages))
        if any(map(_PRIVATE.search, _strings(messages))):
            raise InputError(f"The prompt {_both(found[0])}")
        return self.source(*self.unmask(render(self.mask(messages))))

    def mask(self, value: Any) -> Any:
        """Return a value of strings, lists and dictionaries with private-use characters for the control tokens."""
        match value:
            case str():
                return self._pattern.sub(lambda match: self._masks[match[0]], value)
            case dict():
                return {self.mask(key): self.mask(item) for key, item in value.items()}
            case list() | tuple():
                return type(value)([self.mask(item) for item in value])
        return value

    def unmask(self, text: str) -> tuple[str, list[tuple[int, int]]]:
        """Put back what :meth:`mask` replaced; return the text and the characters that are plain text."""
        plain = [match.span() for match in _MASKED.finditer(text) if match[1] in self._masked]
        return _MASKED.sub(self._original, text), plain

    def source(self, text: str, plain: list[tuple[int, int]]) -> Source:
        """Return what to encode: a text of which the characters ``plain`` are plain text."""
        return Source(self.alias(text, plain), True) if plain else Source(text)

    def alias(self, text: str, plain: list[tuple[int, int]]) -> str:
        """Return ``text`` with aliases for the control tokens that lie outside of the ranges ``plain``."""
        parts, done = [], 0
        for start, end in [*plain, (len(text), len(text))]:
            parts.append(self._pattern.sub(lambda match: self.aliases[match[0]], text[done:start]))
            parts.append(text[start:end])
            done = end
        return "".join(parts)

    def leaks(self, source: Source, ids: Any) -> bool:
        """Tell whether the token ids of an aliased text hold more control tokens than the text has aliases."""
        expected = sum(source.text.count(alias) for alias in self.aliases.values())
        return int(np.isin(ids, self._ids).sum()) > expected

    def _unmask_draft(self, draft: Draft) -> Draft:
        text, plain = self.unmask(draft.text)
        return dataclasses.replace(draft, text=text, plain=plain)

    def _original(self, match: re.Match[str]) -> str:
        length = len(match[0])
        token = self._masked.get(match[1], match[1])
        return (token * -(-length // len(token)))[:length]

    def _find(self, value: Any) -> list[str]:
        """Return the control tokens in a value of strings, lists and dictionaries, each once."""
        search = self._pattern.search
        return sorted({token for text in _strings(value) if search(text) for token in self._pattern.findall(text)})

    def _without_edges(self, example: Example) -> Example:
        """Leave away the tokens around a text that are put there anyway, so that none stands twice."""
        match example:
            case Text(_, text):
                return dataclasses.replace(example, text=text.removeprefix(self._begin).removesuffix(self._end))
            case Completion(_, prompt, completion):
                prompt, completion = prompt.removeprefix(self._begin), completion.removesuffix(self._end)
                return dataclasses.replace(example, prompt=prompt, completion=completion)
            case Judged(_, str(prompt), str(completion)):
                prompt, completion = prompt.removeprefix(self._begin), completion.removesuffix(self._end)
                return dataclasses.replace(example, prompt=prompt, completion=completion)
            case Preference(_, str(prompt), str(chosen), str(rejected)):
                one, other = chosen.removesuffix(self._end), rejected.removesuffix(self._end)
                prompt = prompt.removeprefix(self._begin)
                return dataclasses.replace(example, prompt=prompt, chosen=one, rejected=other)
        return example


def tools_for(tokenizer: "PreTrainedTokenizerBase", template: str | None = None) -> tuple[ControlTokens, Encoder]:
    """Return a tokenizer's control tokens, and what encodes with it: for a fast one, the same each time.

    A chat asks for them with each message, and making them takes up to seconds where the vocabulary is large.
    """
    if not tokenizer.is_fast:
        control = ControlTokens(tokenizer, template)
        return control, encoder_for(tokenizer, control.aliases)
    key = (template, len(tokenizer), tuple(tokenizer.all_special_tokens), id(tokenizer.backend_tokenizer))
    known = _TOOLS.get(tokenizer)
    if known is None or known[0] != key:
        control = ControlTokens(tokenizer, template)
        known = _TOOLS[tokenizer] = (key, (control, encoder_for(tokenizer, control.aliases)))
    return known[1]


def control_tokens(tokenizer: "PreTrainedTokenizerBase", template: str | None = None) -> list[str]:
    """Return the control tokens of a tokenizer with a chat template, the longest first."""
    named = set(tokenizer.all_special_tokens)  # which slow tokenizers may have added as ordinary ones
    tokens = [token for token in tokenizer.added_tokens_decoder.values() if token.content.strip()]
    added = {token.content: token.special or token.content in named for token in tokens}
    written = _written(tokenizer, template, [token for token, special in added.items() if not special])
    control = [
        token
        for token, special in added.items()
        if (special or (token in written and not _tag(token, added))) and not _parsed(token, template or "")
    ]
    return sorted(control, key=len, reverse=True)


def _written(tokenizer: "PreTrainedTokenizerBase", template: str | None, tokens: list[str]) -> set[str]:
    """Return those of ``tokens`` that the template writes around the turns of a conversation."""
    if template is None or not any(token in template for token in tokens):
        return set()
    roles = [("system", "a"), ("user", "b"), ("assistant", "c"), ("user", "d")]
    turns = [{"role": role, "content": content} for role, content in roles]
    text = template  # of one that refuses even this
    for messages in (turns, turns[1:]):
        try:
            text = tokenizer.apply_chat_template(
                messages, chat_template=template, tokenize=False, add_generation_prompt=True
            )
            break
        except (jinja2.TemplateError, InputError, TypeError, ValueError):
            continue
    return {token for token in tokens if token in text}


def _tag(token: str, added: dict[str, bool]) -> bool:
    """Tell whether a token is one of a pair such as ``<think>`` and ``</think>``."""
    return token.startswith("</") or (token.startswith("<") and "</" + token[1:] in added)


def _parsed(token: str, template: str) -> bool:
    """Tell whether the template looks for a token in a message: ``'</think>' in content``, ``.split('</think>')``."""
    if token not in template:
        return False
    twin = "<" + token[2:] if token.startswith("</") else "</" + token[1:]
    quoted = "|".join(f"""['"]{re.escape(name)}['"]""" for name in (token, twin))
    return re.search(rf"split\(\s*(?:{quoted})|(?:{quoted})\s+(?:not\s+)?in\b", template) is not None


def _both(token: str) -> str:
    return (
        f"holds {token!r} and characters for private use (U+F0000 and above), which halfbyte needs to keep that as "
        "plain text; take one of the two out."
    )


def _fields(example: Example) -> dict[str, Any]:
    """Return what an example says, by the names of its fields."""
    return {name: value for name, value in vars(example).items() if name not in _NOT_TEXT}


def _strings(value: Any) -> list[str]:
    """Return all strings in a value of strings, lists and dictionaries, in any order."""
    found, waiting = [], [value]
    while waiting:
        item = waiting.pop()
        if isinstance(item, str):
            found.append(item)
        elif isinstance(item, dict):
            waiting += item
            waiting += item.values()
        elif isinstance(item, list | tuple):
            waiting += item
    return found

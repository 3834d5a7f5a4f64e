"""Messages looked at and changed, one at a time: their texts, thoughts and tool calls."""

import dataclasses
import json
import re
from collections.abc import Iterator
from typing import Any

from halfbyte.data.examples import Message

_INLINE = re.compile(r"\s*<think>\n?(.*?)</think>(\s*)", re.DOTALL)


@dataclasses.dataclass(frozen=True)
class Calls:
    """How a template takes tool calls.

    Attributes:
        as_text: arguments as JSON text, else as an object.
        content: of a message that has calls only; None: it has no content.
        with_ids: each call has an id.
    """

    as_text: bool
    content: str | None
    with_ids: bool


def as_called(message: Message, calls: Calls, number: int) -> Message:
    """Return a message with tool calls as a template takes them; ``number`` is that of its first call.

    Raises:
        ValueError: a call has no name, or arguments that are no JSON object.
    """
    taken = []
    if not isinstance(message["tool_calls"], list):
        raise ValueError("tool calls are no list")
    for place, call in enumerate(message["tool_calls"], start=number):
        function = call.get("function") or call if isinstance(call, dict) else None
        if not isinstance(function, dict) or not isinstance(function.get("name"), str):
            raise ValueError("a call has no name")
        arguments = function.get("arguments") or {}
        given = json.loads(arguments) if isinstance(arguments, str) else arguments
        if not isinstance(given, dict):
            raise ValueError("arguments are no JSON object")
        text = arguments if isinstance(arguments, str) else json.dumps(given, ensure_ascii=False)
        named = {**function, "arguments": text if calls.as_text else given}
        rest = {key: value for key, value in call.items() if key not in ("type", "function", "name", "arguments")}
        taken.append({"type": "function", **rest, "function": named})
        if calls.with_ids:
            taken[-1]["id"] = call_id(place)
    changed: Message = {**message, "tool_calls": taken}
    if not message.get("content"):
        changed["content"] = calls.content
    return changed


def call_id(number: int) -> str:
    """Return an id of nine letters and digits, as Mistral's templates want them."""
    return f"call{number:05}"


def text_of(message: Message) -> str:
    """Return the text of a message, whose content may be a list of parts."""
    content = message.get("content")
    if isinstance(content, list):
        return "".join(part.get("text", "") for part in content)
    return content or ""


def words_of(message: Message) -> Iterator[str]:
    """Yield what of a message must be found in the text, the edges' white space left away."""
    yield text_of(message).strip()
    for call in message.get("tool_calls") or ():
        yield call["function"]["name"]
        arguments = call["function"].get("arguments") or {}
        yield from _leaves(json.loads(arguments) if isinstance(arguments, str) else arguments)


def holds(text: str, word: str) -> bool:
    """Tell whether a template has written a word, be it in JSON, between single quotes, with other white space, or
    without its thought."""
    if word in text:
        return True
    quoted = word.replace("\\", "\\\\").replace("'", "\\'").replace("\n", "\\n").replace("\r", "\\r")
    forms = [quoted, *(json.dumps(word, ensure_ascii=ascii_only)[1:-1] for ascii_only in (False, True))]
    if "</think>" in word:
        forms.append(split_thought(word)[1].strip())
    if any(form in text for form in forms):
        return True
    return "".join(word.split()) in "".join(text.split())


def _leaves(value: Any) -> Iterator[str]:
    match value:
        case dict():
            for key, item in value.items():
                yield key
                yield from _leaves(item)
        case list():
            for item in value:
                yield from _leaves(item)
        case str():
            yield value.strip()
        case bool() | None:
            pass
        case _:
            yield json.dumps(value)


def split_thought(content: str) -> tuple[str, str]:
    """Return a thought that stands before an answer, without ``<think>`` but with what closes it, and the answer."""
    match = _INLINE.match(content)
    return (f"{match[1]}</think>{match[2]}", content[match.end() :]) if match else ("", content)


def with_thought(thought: str, answer: str) -> str:
    """Return a thought and an answer as one text, as Qwen's and DeepSeek's models write them."""
    return f"<think>\n{thought}\n</think>\n\n{answer}"

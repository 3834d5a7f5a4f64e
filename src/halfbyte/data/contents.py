"""What a turn says, where it is more than a text: a list of parts.

    {"type": "text", "text"}                               OpenAI's; also "input_text", "output_text", and the text in
                                                           "value" (LLaMA-Factory's second form)
    {"type": "thinking", "thinking"}, "reasoning"          thoughts
    {"type": "tool_use", "name", "input"}, "tool_call"     a call (Anthropic's; LLaMA-Factory's, as JSON)
    {"type": "tool_result", "tool_use_id", "content"}      a result, within a user's turn (Anthropic's)

Texts of several parts follow each other without anything between, as templates write them. Images, sound and what else
there may be cannot be trained on here.
"""

import dataclasses
from collections.abc import Mapping
from typing import Any

from halfbyte.data.calls import calls_of
from halfbyte.data.cells import Cells, shown, words
from halfbyte.data.examples import Message

TEXTS = ("text", "input_text", "output_text")
THOUGHTS = ("thinking", "reasoning")
CALLS = ("tool_use", "tool_call")
MEDIA = ("image", "images", "audio", "audios", "video", "videos")
"""Columns that hold what is no text."""
MARKS = ("<image>", "<audio>", "<video>")
"""Where it belongs in the text."""


@dataclasses.dataclass
class Content:
    """What a turn says.

    Attributes:
        text: of all of its parts.
        thoughts: before the text.
        calls: of tools.
        results: of tools, messages of their own that go before.
    """

    text: str = ""
    thoughts: list[str] = dataclasses.field(default_factory=list)
    calls: list[dict[str, Any]] = dataclasses.field(default_factory=list)
    results: list[Message] = dataclasses.field(default_factory=list)


def content_of(cells: Cells, place: str, given: Any, *, may_lack: bool = False) -> Content:
    """Return what a turn says.

    Args:
        cells: the row.
        place: the turn, for messages.
        given: a text, or a list of parts.
        may_lack: whether a null is no text rather than an error.

    Raises:
        BadRow: it holds what is no text.
    """
    if isinstance(given, Mapping):
        given = [given]
    if not isinstance(given, list):
        return Content(cells.as_text(f"the content of {place}", given, "" if may_lack else None))
    content = Content()
    texts = []
    for part in given:
        kind, said = _said(part)
        if kind in TEXTS and isinstance(said, str):
            texts.append(cells.as_text(f"the content of {place}", said))
        elif kind in THOUGHTS and isinstance(said, str):
            content.thoughts.append(cells.as_text(f"the thought of {place}", said))
        elif kind in CALLS:
            content.calls += calls_of(cells, place, part if said is None else said)
        elif kind == "tool_result":
            content.results.append(_result(cells, place, part))
        else:
            raise cells.bad(
                "content is no text", f", {place} holds {shown(part)}; only text can be trained on, so leave it out."
            )
    content.text = "".join(texts)
    return content


def check_media(cells: Cells) -> None:
    """Make sure that a row's texts need no image, sound or film beside them.

    Raises:
        BadRow: they do.
    """
    if not cells.names.present(MEDIA) or (name := cells.filled(*MEDIA)) is None:
        return
    mark = next((mark for mark in MARKS if any(mark in words(value) for value in cells.row.values())), None)
    if mark:
        raise cells.bad(
            "content is no text", f"has {name} for {mark} in its text; only text can be trained on, so leave it out."
        )


def _said(part: Any) -> tuple[Any, Any]:
    """Return the type of a part, and what it says in the key of that name or in those that many have."""
    if not isinstance(part, Mapping):
        return "text", part
    kind = part.get("type", "text")
    return kind, next((part[key] for key in ("text", "value", words(kind)) if part.get(key) is not None), None)


def _result(cells: Cells, place: str, part: Mapping[str, Any]) -> Message:
    message: Message = {"role": "tool", "content": content_of(cells, place, part.get("content"), may_lack=True).text}
    if part.get("tool_use_id"):
        message["tool_call_id"] = cells.as_text(f"the tool_use_id of {place}", part["tool_use_id"])
    return message

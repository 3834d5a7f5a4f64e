"""Turns of a conversation, as data sets write them, to messages as chat templates read them.

Two forms: ``{"role", "content"}`` (OpenAI's, and what templates take) and ``{"from", "value"}`` (ShareGPT's).
"""

import json
import re
import reprlib
from collections.abc import Mapping, Sequence
from typing import Any

from halfbyte.data.cells import Cells
from halfbyte.data.examples import Message
from halfbyte.errors import named

ROLES = {
    "system": "system", "developer": "system",
    "user": "user", "human": "user", "prompter": "user",
    "assistant": "assistant", "gpt": "assistant", "chatgpt": "assistant", "bard": "assistant", "bing": "assistant",
    "claude": "assistant", "model": "assistant", "bot": "assistant", "ai": "assistant", "chatbot": "assistant",
    "tool": "tool", "function": "tool", "observation": "tool", "function_response": "tool", "tool_response": "tool",
    "ipython": "tool", "environment": "tool",
    "function_call": "call", "tool_call": "call",
}  # fmt: skip
"""What a role is called, and which of a template's it is; ``call``: an assistant's turn that is a call, as JSON."""

SYSTEM = ("system", "system_prompt", "system_message")
HISTORY = ("history",)
TOOLS = ("tools", "functions")
TURNS = ("messages", "conversations", "conversation", "dialogue", "dialog", "turns", "chat")
"""Columns that hold a conversation."""
KEPT = ("name", "tool_call_id")
THOUGHTS = ("reasoning_content", "reasoning", "thinking", "thoughts")
UNANSWERED = "the last turn is no answer, and is not trained"
EMPTY = "an empty answer is read, not trained"
WEIGHTS = "weights other than 0 count as 1"
DEVELOPER = "developer turns became system turns"


def is_turns(value: Any) -> bool:
    """Tell whether ``value`` is a list of turns."""
    return isinstance(value, list) and bool(value) and all(isinstance(turn, Mapping) for turn in value)


def messages(cells: Cells, name: str, turns: Any) -> list[Message]:
    """Return the messages of a column's turns.

    Raises:
        BadRow: it holds no turns, or one has a role or content that is not known.
    """
    turns = cells.parsed(name, turns)
    if not is_turns(turns):
        raise cells.bad(f"{name} is no conversation", f": {name} must be a list of turns, but it is {_shown(turns)}.")
    found = [_message(cells, number, turn) for number, turn in enumerate(turns, start=1)]
    unknown = {f"{name}[].{key}": None for turn in turns for key in turn if key not in _KNOWN}
    if unknown:
        cells.note(f"of the turns not used: {named(unknown)}")
    return found


def conversation(cells: Cells, turns: list[Message]) -> list[Message]:
    """Return ``turns``, which are seen to hold an answer to learn from.

    Raises:
        BadRow: there is none.
    """
    answers = [turn for turn in turns[1:] if turn["role"] == "assistant"]
    if not answers:
        raise cells.bad(
            "no answer",
            "has no assistant turn that answers something, so there is nothing to learn from it; remove it.",
        )
    full = [turn for turn in answers if turn["content"].strip() or turn.get("tool_calls")]
    if not full:
        raise cells.bad("answer is empty", "has empty answers only, so there is nothing to learn from it; remove it.")
    if len(full) < len(answers):
        cells.note(EMPTY)
        for turn in answers:
            if not turn["content"].strip() and not turn.get("tool_calls"):
                turn["train"] = False
    if all(turn.get("train") is False for turn in full):
        raise cells.bad("no turn to train", "says of every answer that it is not to be trained; remove it.")
    if turns[-1]["role"] != "assistant":
        cells.note(UNANSWERED)
    return turns


def opening(cells: Cells) -> list[Message]:
    """Return the system turn and the earlier questions and answers of a row that has such columns."""
    turns: list[Message] = []
    system = cells.text(*SYSTEM, missing="") if cells.find(*SYSTEM) else ""
    if system.strip():
        turns.append({"role": "system", "content": system})
    history = cells.parsed("history", cells.get(*HISTORY)) if cells.find(*HISTORY) else None
    for pair in history or []:
        if not isinstance(pair, list | tuple) or len(pair) != 2:
            raise cells.bad(
                "history is no list of pairs", f": history must hold pairs of a question and its answer, not {pair!r}."
            )
        turns.append({"role": "user", "content": cells.as_text("history", pair[0])})
        turns.append({"role": "assistant", "content": cells.as_text("history", pair[1])})
    return turns


def as_turns(cells: Cells, name: str, value: Any, role: str) -> list[Message]:
    """Return the turns of a value: they themselves, or a text as one turn of ``role``."""
    if isinstance(value, list):
        return messages(cells, name, value)
    return [{"role": role, "content": cells.as_text(name, value)}]


def tools_of(cells: Cells) -> list[dict[str, Any]] | None:
    """Return the functions that a row describes, as templates take them."""
    name = cells.find(*TOOLS)
    found = cells.parsed(name or "", cells.get(*TOOLS))
    if not found:
        return None
    if not isinstance(found, list) or not all(isinstance(tool, Mapping) for tool in found):
        raise cells.bad("tools are no list", f": {name} must be a list of functions, but it is {_shown(found)}.")
    return [dict(tool) if "function" in tool else {"type": "function", "function": dict(tool)} for tool in found]


def transcript(text: str, marks: Mapping[str, str]) -> list[Message]:
    """Return the turns of a text in which marks such as ``\\n\\nHuman:`` begin them; none if it does not begin so."""
    parts = re.split("(" + "|".join(map(re.escape, marks)) + ")", text)
    if parts[0].strip() or len(parts) < 3:
        return []
    pairs = zip(parts[1::2], parts[2::2], strict=True)
    return [{"role": marks[mark], "content": content.strip()} for mark, content in pairs]


def _message(cells: Cells, number: int, turn: Mapping[str, Any]) -> Message:
    place = f"turn {number}"
    given = next((turn[key] for key in ("role", "from") if key in turn), None)
    role = ROLES.get(str(given).strip().casefold())
    if role is None:
        raise cells.bad(
            "role not known",
            f", {place} has the role {_shown(given)}; known are {', '.join(ROLES)}. Rename it, or leave the turn out.",
        )
    if str(given).strip().casefold() == "developer":
        cells.note(DEVELOPER)
    content = next((turn[key] for key in ("content", "value", "text") if key in turn), None)
    message: Message = {"role": role}
    if role == "call":
        message = {"role": "assistant", "content": "", "tool_calls": _calls(cells, place, cells.parsed(place, content))}
    else:
        calls = turn.get("tool_calls") or turn.get("function_call")
        message["content"] = _content(cells, place, content, may_lack=bool(calls))
        if calls:
            message["tool_calls"] = _calls(cells, place, cells.parsed(place, calls))
    thought = next((turn[key] for key in THOUGHTS if turn.get(key)), None)
    if thought is not None:
        message["reasoning_content"] = cells.as_text(f"the thought of {place}", thought)
    message |= {key: turn[key] for key in KEPT if turn.get(key) is not None}
    if role in ("assistant", "call") and (train := _trained(cells, place, turn)) is not None:
        message["train"] = train
    return message


_KNOWN = {
    "role",
    "from",
    "content",
    "value",
    "text",
    "tool_calls",
    "function_call",
    "train",
    "weight",
    *THOUGHTS,
    *KEPT,
}


def _content(cells: Cells, place: str, content: Any, may_lack: bool) -> str:
    if isinstance(content, list):
        texts = []
        for part in content:
            text = part.get("text") if isinstance(part, Mapping) else part
            if not isinstance(text, str) or (isinstance(part, Mapping) and part.get("type", "text") != "text"):
                raise cells.bad(
                    "content is no text",
                    f", {place} holds {_shown(part)}; only text can be trained on, so leave it out.",
                )
            texts.append(text)
        content = "".join(texts)
    return cells.as_text(f"the content of {place}", content, "" if may_lack else None)


def _calls(cells: Cells, place: str, calls: Any) -> list[dict[str, Any]]:
    """Return calls as OpenAI writes them, but the arguments as an object, which is what templates take."""
    made = []
    for call in calls if isinstance(calls, Sequence) and not isinstance(calls, str) else [calls]:
        function = call.get("function", call) if isinstance(call, Mapping) else None
        if not isinstance(function, Mapping) or not isinstance(function.get("name"), str):
            raise cells.bad(
                "tool call not understood",
                f", {place} calls {_shown(call)}; a call needs a name and arguments: write "
                '{"name": ..., "arguments": {...}}.',
            )
        arguments = function.get("arguments", function.get("parameters", {}))
        if isinstance(arguments, str):
            try:
                arguments = json.loads(arguments or "{}")
            except ValueError as error:
                raise cells.bad(
                    "tool call not understood", f", {place} has arguments that are no JSON ({error})."
                ) from None
        made.append(
            {key: call[key] for key in ("id",) if call.get(key)}
            | {"type": "function", "function": {"name": function["name"], "arguments": arguments}}
        )
    return made


def _trained(cells: Cells, place: str, turn: Mapping[str, Any]) -> bool | None:
    value = next((turn[key] for key in ("train", "weight") if turn.get(key) is not None), None)
    if value is None or isinstance(value, bool):
        return value
    if not isinstance(value, int | float):
        raise cells.bad("weight is no number", f", {place} has the weight {_shown(value)}; write 0 or 1.")
    if value not in (0, 1):
        cells.note(WEIGHTS)
    return bool(value)


def _shown(value: Any) -> str:
    return reprlib.repr(dict(value) if isinstance(value, Mapping) else value)

"""Turns of a conversation, as data sets write them, to messages as chat templates read them.

    {"role", "content"}                        OpenAI's form, and what templates take
    {"from", "value"}                          ShareGPT's
    {"input", "output"}, {"human", "assistant"}   two turns in one (Capybara, MOSS)
    "a text"                                   user and assistant in turn (UltraChat, LIMA)
    "\\n\\nHuman: ...\\n\\nAssistant: ..."         a whole conversation as one text (HH-RLHF, OIG, Guanaco)

Turns stay as they are, also several of one role in a row; what a chat template cannot write is its affair.
"""

import re
from collections.abc import Iterator, Mapping
from typing import Any

from halfbyte.data.calls import calls_of
from halfbyte.data.cells import Cells, plain, shown
from halfbyte.data.contents import Content, content_of
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
PLAIN_ROLES = [
    role for role, meant in ROLES.items() if meant in ("system", "user", "assistant") and role != "developer"
]

SYSTEM = ("system", "system_prompt", "system_message")
HISTORY = ("history",)
TURNS = ("messages", "conversations", "conversation", "dialogue", "dialog", "turns", "chat")
"""Columns that hold a conversation."""
PAIRS = (
    ("input", "output"), ("human", "assistant"), ("user", "assistant"), ("question", "answer"), ("prompt", "response"),
    ("query", "response"), ("instruction", "output"), ("human", "gpt"), ("prompt", "completion"), ("user", "bot"),
)  # fmt: skip
"""Keys of turns that hold a question and its answer."""
KEPT = ("name", "tool_call_id")
THOUGHTS = ("reasoning_content", "reasoning", "thinking", "thoughts")
_KNOWN = {"role", "from", "content", "value", "text", "tool_calls", "function_call", "train", "weight", "loss_weight"}
_KNOWN.update(THOUGHTS, KEPT)

EMPTY = "an empty answer is read, not trained"
EMPTY_ASKED = "a turn that is no answer is empty"
WEIGHTS = "weights other than 0 count as 1"
DEVELOPER = "developer turns became system turns"
IN_TURN = "texts without roles were taken for user and assistant in turn"
TRANSCRIPT = "a transcript was parted into its turns"


def is_turns(value: Any) -> bool:
    """Tell whether ``value`` is a list of turns."""
    return isinstance(value, list) and bool(value) and all(isinstance(turn, Mapping) for turn in value)


def messages(cells: Cells, name: str, turns: Any) -> list[Message]:
    """Return the messages of a column's turns.

    Raises:
        BadRow: it holds no turns, or one has a role or content that is not known.
    """
    if turns is None:
        raise cells.bad(f"{name} is missing", f": {cells.called(name)} is null; fill it in, or remove the row.")
    turns = _listed(cells, name, turns)
    if not is_turns(turns):
        raise cells.bad(
            f"{name} is no conversation", f": {cells.called(name)} must be a list of turns, but it is {shown(turns)}."
        )
    found = [message for number, turn in enumerate(turns, start=1) for message in _messages(cells, name, number, turn)]
    if any(not (message["content"].strip() or message["role"] == "assistant") for message in found):
        cells.note(EMPTY_ASKED)
    return found


def conversation(cells: Cells, turns: list[Message]) -> list[Message]:
    """Return ``turns``, which are seen to hold an answer to learn from; what follows the last is for the template.

    Raises:
        BadRow: there is none.
    """
    answers = [turn for turn in turns[1:] if turn["role"] == "assistant"]
    if not answers:
        raise cells.bad(
            "no answer",
            "has no assistant turn that answers something, so there is nothing to learn from it; remove it.",
        )
    full = [turn for turn in answers if holds_something(turn)]
    if not full:
        raise cells.bad("answer is empty", "has empty answers only, so there is nothing to learn from it; remove it.")
    if len(full) < len(answers):
        cells.note(EMPTY)
        for turn in answers:
            if not holds_something(turn):
                turn["train"] = False
    if all(turn.get("train") is False for turn in full):
        raise cells.bad("no turn to train", "says of every answer that it is not to be trained; remove it.")
    return turns


def holds_something(turn: Message) -> bool:
    """Tell whether a turn says or calls anything."""
    return bool(turn["content"].strip() or turn.get("tool_calls"))


def system_of(cells: Cells) -> list[Message]:
    """Return the turn of a row's column for it, if that says anything."""
    system = cells.text(*SYSTEM, missing="") if cells.find(*SYSTEM) else ""
    return [{"role": "system", "content": system}] if system.strip() else []


def opening(cells: Cells) -> list[Message]:
    """Return the system turn and the earlier questions and answers of a row that has such columns.

    Raises:
        BadRow: the history is neither pairs nor turns.
    """
    turns = system_of(cells)
    given = cells.parsed("history", cells.get(*HISTORY)) if cells.find(*HISTORY) else None
    if is_turns(given):
        return turns + messages(cells, "history", given)
    listed = given or []
    for pair in listed if isinstance(listed, list | tuple) else [listed]:
        if not isinstance(pair, list | tuple) or len(pair) != 2:
            raise cells.bad(
                "history is no list of pairs",
                f": history must hold pairs of a question and its answer, not {shown(pair)}.",
            )
        turns.append({"role": "user", "content": cells.as_text("history", pair[0])})
        turns.append({"role": "assistant", "content": cells.as_text("history", pair[1])})
    return turns


def as_turns(cells: Cells, name: str, value: Any, role: str) -> list[Message]:
    """Return the turns of a value: they themselves, or a text as one turn of ``role``."""
    if isinstance(value, list):
        return messages(cells, name, value)
    return [{"role": role, "content": cells.as_text(name, value)}]


def transcript(text: str, marks: Mapping[str, str]) -> list[Message]:
    """Return the turns of a text in which marks such as ``\\n\\nHuman:`` begin them; none if it does not begin so.

    A newline in a mark is also fulfilled by the text's beginning. Of a turn, one blank behind its mark and the
    newlines at its end are part of the layout.
    """
    words = {mark.strip(): role for mark, role in marks.items()}
    beginnings = (
        f"(?:^|{re.escape(mark[: -len(word)])}){re.escape(word)}" for mark, word in zip(marks, words, strict=True)
    )
    parts = re.split("(" + "|".join(beginnings) + ")", text.lstrip())
    if parts[0].strip() or len(parts) < 3:
        return []
    pairs = zip(parts[1::2], parts[2::2], strict=True)
    return [{"role": words[mark.strip()], "content": said.removeprefix(" ").rstrip("\n")} for mark, said in pairs]


def _listed(cells: Cells, name: str, turns: Any) -> Any:
    """Return turns as a list of objects, where they are that in another way."""
    turns = cells.parsed(name, turns)
    if isinstance(turns, Mapping):
        keys = [key for key in ("role", "from", "content", "value") if isinstance(turns.get(key), list)]
        if len(keys) == 2 and len(turns[keys[0]]) == len(turns[keys[1]]):  # datasets' form of a list of objects
            return [dict(zip(keys, values, strict=True)) for values in zip(*(turns[key] for key in keys), strict=True)]
        return turns
    if isinstance(turns, list) and len(turns) > 1 and all(isinstance(turn, str) for turn in turns):
        cells.note(IN_TURN)
        return [{"role": ("user", "assistant")[at % 2], "content": turn} for at, turn in enumerate(turns)]
    return turns


def _messages(cells: Cells, name: str, number: int, turn: Mapping[str, Any]) -> Iterator[Message]:
    """Yield the message of a turn, or both of one that holds a question and its answer."""
    pair = None if "role" in turn or "from" in turn else next((pair for pair in PAIRS if turn.keys() >= {*pair}), None)
    if pair is None:
        yield from _message(cells, number, turn)
        known = _KNOWN
    else:
        for role, key in zip(("user", "assistant"), pair, strict=True):
            yield from _message(cells, number, {"role": role, "content": turn[key]})
        known = {*pair}
    if not turn.keys() <= known:
        unknown = [f"{name}[].{key}" for key, value in turn.items() if key not in known and value is not None]
        if unknown:
            cells.note(f"of the turns not used: {named(unknown)}")


def _message(cells: Cells, number: int, turn: Mapping[str, Any]) -> Iterator[Message]:
    """Yield the message of a turn; behind the results of tools that it brings along."""
    place = f"turn {number}"
    text = turn.get("content", turn.get("value"))
    given = turn.get("role", turn.get("from"))
    if len(turn) == 2 and isinstance(text, str) and given in PLAIN_ROLES:  # most are
        yield {"role": ROLES[given], "content": cells.as_text(f"the content of {place}", text)}
        return
    given = next((turn[key] for key in ("role", "from") if turn.get(key) is not None), None)
    role = ROLES.get(plain(given)) if isinstance(given, str) else None
    if role is None:
        raise cells.bad(
            "role not known",
            f", {place} has the role {shown(given)}; known are {', '.join(ROLES)}. Rename it, or leave the turn out.",
        )
    if str(given).strip().casefold() == "developer":
        cells.note(DEVELOPER)
    said = next((turn[key] for key in ("content", "value", "text") if turn.get(key) is not None), None)
    if role == "call":
        content = Content(calls=calls_of(cells, place, said))
        role = "assistant"
    else:
        calls = turn.get("tool_calls") or turn.get("function_call")
        content = content_of(cells, place, said, may_lack=bool(calls))
        if calls:
            content.calls += calls_of(cells, place, calls)
    yield from content.results
    if content.results and not content.text:
        return
    message: Message = {"role": role, "content": content.text}
    if content.calls:
        message["tool_calls"] = content.calls
    thought = next((turn[key] for key in THOUGHTS if turn.get(key)), None)
    if thought is not None:
        content.thoughts.insert(0, cells.as_text(f"the thought of {place}", thought))
    if content.thoughts:
        message["reasoning_content"] = "\n\n".join(content.thoughts)
    for key in KEPT:
        if turn.get(key) is not None:
            message[key] = cells.as_text(f"the {key} of {place}", turn[key])
    if role == "assistant" and (train := _trained(cells, place, turn)) is not None:
        message["train"] = train
    yield message


def _trained(cells: Cells, place: str, turn: Mapping[str, Any]) -> bool | None:
    value = next((turn[key] for key in ("train", "weight", "loss_weight") if turn.get(key) is not None), None)
    if value is None or isinstance(value, bool):
        return value
    if not isinstance(value, int | float):
        raise cells.bad("weight is no number", f", {place} has the weight {shown(value)}; write 0 or 1.")
    if value not in (0, 1):
        cells.note(WEIGHTS)
    return bool(value)

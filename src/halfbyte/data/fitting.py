"""A conversation made such that a chat template can write it; what was changed for that is told.

The rule: a conversation is written as it stands wherever the template takes it. Only what a template refuses, or would
leave away, is put another way, always the same for one template:

    a system turn                the text goes before that of the next user turn
    turns of one role in a row   become one turn, a blank line between them
    an assistant's first turn    is left out (it answers nothing, so it is never trained)
    thoughts                     go where the template writes them, or as <think>...</think> before the answer; where
                                 its prompt says that there are none, they are left out
    contents                     become texts or lists of parts
    tool calls                   arguments become JSON text or objects

Tool calls that the template cannot write at all have no other way: such a row is bad.
"""

import reprlib
from typing import Any

from halfbyte.data.dialect import Dialect
from halfbyte.data.examples import Message
from halfbyte.data.messages import as_called, call_id, split_thought, text_of, with_thought
from halfbyte.data.rendering import Refused

SYSTEM_MOVED = "the system text went before the user's, because the chat template takes no system turn there"
JOINED = "turns of the {} in a row became one, because the chat template cannot write them apart"
LEFT_OUT = "the assistant's turn at the beginning was left out, because the chat template cannot write it"
THOUGHTS_OFF = "thoughts were left out, because thinking is off"
THOUGHTS_CLOSED = "thoughts were left out, because the chat template asks for none (--thinking on does)"
THOUGHTS_LOST = "thoughts were left out, because the chat template has no place for them"
THOUGHTS_INLINE = (
    "thoughts were written as <think>...</think> before the answer, because the chat template has no other place for "
    "them (--thinking off leaves them out)"
)
TEXT_DROPPED = "what was said beside a tool call was left out, because the chat template writes the call only"
NO_TOOLS = "the descriptions of the tools were left out, because the chat template has no place for them"
THOUGHTS_DROPPED = "thoughts were left out where the chat template does not write them"
UNANSWERED = "what stands behind the last answer was left out, because there is nothing to learn from it"
NEW_IDS = "tool calls got ids of nine characters, because the chat template wants such"

_PLAIN = {"role", "content", "train"}
_SEPARATOR = "\n\n"


def fit(
    dialect: Dialect, messages: list[Message], tools: list[dict[str, Any]] | None
) -> tuple[list[Message], list[str]]:
    """Return the messages as the template takes them, and notes of what was changed.

    Args:
        dialect: the template's.
        messages: of an example; contents that are lists of parts must be texts only.
        tools: of the example.

    Raises:
        Refused: there are tools and the template knows none, or what is not text.
    """
    if _is_plain(messages) and not dialect.parts and not tools:
        return messages, []
    notes: list[str] = []
    messages = [
        {key: value for key, value in message.items() if key != "tool_calls" or value} | {"content": _text(message)}
        for message in messages
    ]
    if messages[0]["role"] == "assistant" and len(messages) > 1 and not dialect.takes("assistant first"):
        messages = messages[1:]
        notes.append(LEFT_OUT)
    messages = [_with_thought(dialect, message, notes) for message in messages]
    messages = _with_system(dialect, messages, notes)
    messages = _joined(dialect, messages, notes)
    messages = _with_calls(dialect, messages, tools, notes)
    if dialect.parts:
        messages = [
            message if message["content"] is None else {**message, "content": dialect.content(message["content"])}
            for message in messages
        ]
    return messages, list(dict.fromkeys(notes))


def _is_plain(messages: list[Message]) -> bool:
    """Tell whether there is nothing but user and assistant in turn, with texts: what every template takes."""
    role = "user"
    for message in messages:
        if message["role"] != role or not isinstance(message.get("content"), str) or not message.keys() <= _PLAIN:
            return False
        if role == "assistant" and "</think>" in message["content"]:
            return False
        role = "assistant" if role == "user" else "user"
    return True


def _text(message: Message) -> str:
    content = message.get("content")
    for part in content if isinstance(content, list) else [{"text": content or ""}]:
        if not isinstance(part, dict) or not isinstance(part.get("text"), str):
            found = part.get("type", part) if isinstance(part, dict) and "text" not in part else content
            raise Refused(
                "content that is not text",
                f"a message of the {message['role']} holds {reprlib.repr(found)}, and only text can be trained on; "
                "leave it away.",
            )
    return text_of(message)


def _with_thought(dialect: Dialect, message: Message, notes: list[str]) -> Message:
    if message["role"] != "assistant":
        return message
    content: str = message["content"]
    inline, answer = split_thought(content) if "</think>" in content else ("", content)
    own = message.get("reasoning_content") or message.get("reasoning") or message.get("thinking")
    bare = {key: value for key, value in message.items() if key not in ("reasoning_content", "reasoning", "thinking")}
    if not own and not inline:
        return bare
    words = (own or inline.rpartition("</think>")[0]).strip("\n")
    bare["content"] = answer
    if not words.strip():
        return bare if dialect.thoughts != "opened" else message
    if dialect.thinking == "off":
        notes.append(THOUGHTS_OFF)
        return bare
    if own and message.get("tool_calls") and dialect.thoughts != "closed":
        return {**bare, "reasoning_content": words}  # some templates (Gemma 4) write thoughts beside calls only
    match dialect.thoughts:
        case "written":
            return {**bare, "reasoning_content": words}
        case "opened":
            return {**bare, "reasoning_content": words} if own else message
        case "closed":
            notes.append(THOUGHTS_CLOSED)
        case "inline" if not own:
            return message
        case "inline":
            notes.append(THOUGHTS_INLINE)
            return {**bare, "content": with_thought(words, answer)}
        case _:
            notes.append(THOUGHTS_LOST)
    return bare


def _with_system(dialect: Dialect, messages: list[Message], notes: list[str]) -> list[Message]:
    """Move those system turns that the template does not take to the next user turn."""
    fitted: list[Message] = []
    waiting: list[str] = []
    for message in messages:
        role = message["role"]
        if role == "system":
            first = not fitted or (len(fitted) == 1 and fitted[0]["role"] == "system")
            if not dialect.takes("system") or not (first or dialect.takes("later system")):
                notes.append(SYSTEM_MOVED)
                waiting.append(message["content"])
                continue
        elif waiting and role == "user":
            message = {**message, "content": _SEPARATOR.join([*waiting, message["content"]])}
            waiting = []
        elif waiting and role == "assistant":  # nobody asked: the system text is the question
            fitted.append({"role": "user", "content": _SEPARATOR.join(waiting)})
            waiting = []
        fitted.append(message)
    return [*fitted, {"role": "user", "content": _SEPARATOR.join(waiting)}] if waiting else fitted


def _joined(dialect: Dialect, messages: list[Message], notes: list[str]) -> list[Message]:
    """Join turns of one role in a row where the template does not take them."""
    fitted: list[Message] = []
    for message in messages:
        role = message["role"]
        if fitted and fitted[-1]["role"] == role and role != "tool" and not dialect.takes(f"{role}s in a row"):
            notes.append(JOINED.format(role))
            fitted[-1] = _one(fitted[-1], message)
        else:
            fitted.append(message)
    return fitted


def _one(first: Message, second: Message) -> Message:
    """Return two messages as one, which is trained if neither says that it is not."""
    joined = {**first, **second}
    for key in ("content", "reasoning_content"):
        if texts := [message[key] for message in (first, second) if message.get(key)]:
            joined[key] = _SEPARATOR.join(texts)
    if calls := [*(first.get("tool_calls") or []), *(second.get("tool_calls") or [])]:
        joined["tool_calls"] = calls
    if any(message.get("train") is False for message in (first, second)):
        joined["train"] = False
    return joined


def _with_calls(
    dialect: Dialect, messages: list[Message], tools: list[dict[str, Any]] | None, notes: list[str]
) -> list[Message]:
    """Return tool calls and their results in the template's way."""
    made_calls = any(message.get("tool_calls") for message in messages)
    called = made_calls or any(message["role"] == "tool" for message in messages)
    calls = dialect.calls if called else None
    if called and not calls:
        what = "tool calls" if made_calls else "results of tools"
        raise Refused(
            f"{what} that the chat template cannot write",
            f"it has {what}, which the model's chat template cannot write; leave them away, or take another "
            "template (--chat-template).",
        )
    if tools and not dialect.takes_tools:
        if not dialect.calls:
            raise Refused(
                "tools that the chat template cannot write",
                "it has tools, but the model's chat template cannot tell the model of any; leave them away, or take "
                "another template (--chat-template).",
            )
        notes.append(NO_TOOLS)
    if not calls:
        return messages
    fitted: list[Message] = []
    ids: dict[str, str] = {}
    made = results = 0
    for message in messages:
        if message.get("tool_calls"):
            if message["content"] and not dialect.takes_text_beside_calls:
                notes.append(TEXT_DROPPED)
                message = {**message, "content": ""}
            given = message["tool_calls"]
            try:
                message = as_called(message, calls, made)
            except (ValueError, RecursionError):
                raise Refused(
                    "tool call that cannot be read",
                    "it has a tool call without a name, or with arguments that are not a JSON object; mend it.",
                ) from None
            ids.update({str(call["id"]): call_id(place) for place, call in enumerate(given, made) if call.get("id")})
            made += len(given)
            if calls.with_ids:
                notes.append(NEW_IDS)
        elif message["role"] == "tool" and calls.with_ids:
            message = {**message, "tool_call_id": ids.get(str(message.get("tool_call_id")), call_id(results))}
        results += message["role"] == "tool"
        fitted.append(message)
    return fitted

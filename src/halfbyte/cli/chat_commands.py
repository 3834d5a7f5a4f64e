"""The commands of a chat: what begins with a slash."""

import json
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rich.table import Table
from rich.text import Text

from halfbyte.cli.console import notes
from halfbyte.cli.talk import system_text
from halfbyte.errors import InputError, counted, named, nearest, size_text
from halfbyte.files import absolute, write_text

if TYPE_CHECKING:
    from halfbyte.cli.chat import Chat

NONE = ("none", "base", "off")
"""Words for no adapter, no system prompt, no seed."""
SETTINGS = (
    "temperature", "top_p", "top_k", "min_p", "repetition_penalty", "frequency_penalty", "presence_penalty",
    "max_new_tokens", "seed",
)  # fmt: skip
WHOLE = ("top_k", "max_new_tokens", "seed")
MAY_LACK = ("top_k", "seed")


@dataclass(frozen=True)
class Command:
    """One command.

    Attributes:
        takes: what stands behind it, for /help.
        about: what it does.
        run: does it, with what stands behind it.
    """

    takes: str
    about: str
    run: "Callable[[Chat, str], None]"


def obey(chat: "Chat", line: str) -> None:
    """Do what a line says that begins with a slash.

    Raises:
        InputError: there is no such command, or it cannot be done.
    """
    word, _, rest = line.partition(" ")
    if word not in COMMANDS:
        raise InputError(f"There is no {word}{nearest(word, COMMANDS)}; /help tells what there is.")
    COMMANDS[word].run(chat, rest.strip())


def say(text: str) -> None:
    """Say something beside the conversation."""
    notes.print(text, style="dim", markup=False, soft_wrap=True)


def _help(_: "Chat", __: str) -> None:
    table = Table.grid(padding=(0, 2))
    for word, command in COMMANDS.items():
        table.add_row(Text(f"{word} {command.takes}"), Text(command.about))
    table.add_row('"""', "Begin a message of several lines, and end it; a line that ends in \\ goes on as well.")
    table.add_row("//...", "Say something that begins with a slash.")
    table.add_row("Ctrl-C", "Stop an answer; what is written of it stays.")
    notes.print(table, style="dim")


def _system(chat: "Chat", rest: str) -> None:
    dialogue = chat.dialogue
    if rest:
        dialogue.system = None if rest.lower() in NONE else system_text(rest)
    say("There is no system prompt." if dialogue.system is None else f"System prompt: {dialogue.system}")


def _reset(chat: "Chat", _: str) -> None:
    chat.dialogue.reset()
    chat.unanswered = None
    say("The conversation is forgotten.")


def _undo(chat: "Chat", _: str) -> None:
    question = chat.unanswered or chat.dialogue.undo()
    chat.unanswered = None
    say("There is nothing to undo." if question is None else f"Forgotten: {_short(question)}")


def _retry(chat: "Chat", _: str) -> None:
    question = chat.unanswered or chat.dialogue.undo()
    if question is None:
        raise InputError("There is no question yet, so there is nothing to answer again.")
    chat.answer(question)


def _save(chat: "Chat", rest: str) -> None:
    path = _path(rest, "/save")
    if not chat.dialogue.messages:
        raise InputError("There is no turn yet, so there is nothing to save.")
    if path.exists() and path not in chat.files:
        raise InputError(f"{path} is there already; name another file.")
    line = json.dumps({"messages": chat.dialogue.whole()}, ensure_ascii=False)
    try:
        write_text(path, f"{line}\n")
    except OSError as error:
        raise InputError(f"{path} cannot be written ({error.strerror}); name another file.") from None
    chat.files.add(path)
    say(f"Saved in {path}, as a row that can be trained on.")


def _load(chat: "Chat", rest: str) -> None:
    from halfbyte.data.prompts import asked_of
    from halfbyte.data.readers import read_rows

    path = _path(rest, "/load")
    rows = asked_of(read_rows(path))
    asked = next(rows)
    if isinstance(asked, InputError):
        raise asked
    if isinstance(asked.prompt, str):
        raise InputError(f"{asked.where} is no conversation, but a text; give a file that /save has written.")
    chat.dialogue.load(asked.whole)
    chat.unanswered = None
    if asked.row.keys() == {"messages"} and next(rows, None) is None:  # as /save writes it, so it may be written again
        chat.files.add(path)
    say(f"{counted(len(chat.dialogue.messages), 'turn')} from {asked.where}.")
    for turn in chat.dialogue.messages[-2:]:
        say(f"{turn['role']}: {_short(str(turn['content']))}")


def _path(rest: str, word: str) -> Path:
    if not rest:
        raise InputError(f"{word} needs the name of a file: {word} talk.jsonl.")
    return absolute(rest)


def _adapter(chat: "Chat", rest: str) -> None:
    known = chat.engine.decoder.adapters
    if rest:
        if rest not in known and rest.lower() not in NONE:
            there = f"there is {named([*known, 'none'])}" if known else "there is none; start with --adapter NAME=PATH"
            raise InputError(f"There is no adapter {rest!r}{nearest(rest, known)}; {there}.")
        chat.dialogue.adapter = rest if rest in known else None
    now = "The base answers" if chat.dialogue.adapter is None else f"The adapter {chat.dialogue.adapter} answers"
    others = [name for name in known if name != chat.dialogue.adapter]
    say(f"{now}; there is also {named(others)}." if others else f"{now}.")


def _compare(chat: "Chat", rest: str) -> None:
    known, now = chat.engine.decoder.adapters, chat.dialogue.adapter
    if not known:
        raise InputError("There is no adapter to compare the base with; start with --adapter NAME=PATH.")
    turns, first = list(chat.dialogue.messages), chat.dialogue.first
    question = rest or chat.unanswered or chat.dialogue.undo()
    try:
        if question is None:
            raise InputError("There is no question yet; write it behind /compare.")
        chat.compare(question, [None, *([now] if now else known)])
    finally:
        chat.dialogue.messages, chat.dialogue.first = turns, first


def _set(chat: "Chat", rest: str) -> None:
    word, _, value = rest.replace("=", " ").partition(" ")
    name = word.strip("-").replace("-", "_").lower()
    sampling = chat.dialogue.sampling
    if name and name not in SETTINGS:
        raise InputError(f"There is no setting {word!r}{nearest(name, SETTINGS)}; there is {named(SETTINGS)}.")
    if value.strip():
        number = _number(name, value.strip())
        if name == "seed":
            replace(sampling, seed=number)  # looks at its range
            chat.dialogue.seeded(number)
        else:
            chat.dialogue.sampling = replace(sampling, **{name: number})
    for one in [name] if name else SETTINGS:
        now = chat.dialogue.seed if one == "seed" else getattr(chat.dialogue.sampling, one)
        say(f"{one} {'none' if now is None else now}")


def _number(name: str, text: str) -> Any:
    if name in MAY_LACK and text.lower() in NONE:
        return None
    try:
        return int(text) if name in WHOLE else float(text)
    except ValueError:
        kind = "whole number" if name in WHOLE else "number"
        raise InputError(f"{name} takes a {kind}, not {text!r}.") from None


def _stats(chat: "Chat", _: str) -> None:
    decoder, figures, last = chat.engine.decoder, chat.engine.figures(), chat.last
    reason = getattr(decoder, "reason", None)
    most = chat.dialogue.most
    table = Table.grid(padding=(0, 2))
    table.add_row("decodes", "natively" if reason is None else f"through transformers: {reason}")
    if last:
        cached = f", {last.cached:,} more were held" if last.cached else ""
        table.add_row("last prompt", f"{last.read:,} tokens read{cached}; first token after {last.first_seconds:.2f} s")
        table.add_row("last answer", f"{last.written:,} tokens, {last.rate:.1f} tokens/s")
        table.add_row("context", f"{last.context:,} tokens{f' of {most:,}' if most else ''}")
    table.add_row("in all", f"{figures.tokens_read:,} tokens read, {figures.tokens_cached:,} more were held")
    table.add_row("", f"{figures.tokens_written:,} written")
    budget = f" of {size_text(chat.engine.memory)}" if chat.engine.memory else ""
    table.add_row("keys, values", f"{size_text(figures.bytes_held)}{budget}")
    notes.print(table, style="dim")


def _quit(chat: "Chat", _: str) -> None:
    chat.is_over = True


def _short(text: str, most: int = 70) -> str:
    line = " ".join(text.split())
    return line if len(line) <= most else f"{line[: most - 3]}..."


COMMANDS: dict[str, Command] = {
    "/help": Command("", "Tell what there is.", _help),
    "/reset": Command("", "Forget the conversation, but not the system prompt.", _reset),
    "/undo": Command("", "Forget the last question and its answer.", _undo),
    "/retry": Command("", "Answer the last question again.", _retry),
    "/system": Command("[TEXT|FILE|none]", "Show or change the system prompt.", _system),
    "/adapter": Command("[NAME|none]", "Show or change which adapter answers; none: the base.", _adapter),
    "/compare": Command("[TEXT]", "Answer it, or the last question, with base and adapter; nothing is kept.", _compare),
    "/set": Command("[NAME VALUE]", "Show or change how answers are drawn: /set temperature 0.7.", _set),
    "/save": Command("FILE", "Write the conversation as a row of JSON lines.", _save),
    "/load": Command("FILE", "Go on with a conversation from a file.", _load),
    "/stats": Command("", "Tokens, speed and memory.", _stats),
    "/quit": Command("", "End; so does Ctrl-D.", _quit),
    "/exit": Command("", "End.", _quit),
}

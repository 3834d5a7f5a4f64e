"""Rows to examples: which columns a row may have, and what each of them means.

A file holds rows of one format, told by the columns of its first row:

    messages                    a conversation: a list of {"role": ..., "content": ...}
    instruction (input) output  one question and its answer; an input that is there follows the instruction
    prompt completion           a text and how it goes on (what a chat template makes of it: see ``template``)
    text                        a text, trained on from beginning to end

Of several that fit, the first one in this list counts. An example says which columns of its row were not used. A new
format is one more entry of ``FORMATS``. Left out: the tool role and content that is not text.
"""

import dataclasses
import reprlib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from halfbyte.data.readers import Progress, named, read_rows
from halfbyte.errors import InputError

ROLES = ("system", "user", "assistant")

Message = dict[str, Any]
"""One turn: ``role`` (one of ``ROLES``), ``content`` (text), and whatever else the chat template may read."""


@dataclasses.dataclass(frozen=True)
class Example:
    """What a row of data says.

    Attributes:
        where: file and row, for error messages.
        unused: columns of the row that had no part in it.
    """

    where: str
    unused: tuple[str, ...] = dataclasses.field(default=(), kw_only=True, compare=False)


@dataclasses.dataclass(frozen=True)
class Chat(Example):
    """A conversation; every assistant turn that follows another message is an answer.

    Attributes:
        messages: the turns, with at least one answer among them.
    """

    messages: list[Message]


@dataclasses.dataclass(frozen=True)
class Completion(Example):
    """A prompt and how it goes on."""

    prompt: str
    completion: str


@dataclasses.dataclass(frozen=True)
class Text(Example):
    """A text without a prompt."""

    text: str


@dataclasses.dataclass(frozen=True)
class Format:
    """The columns that a row must have and those that it may have, and what makes an example of them."""

    columns: tuple[str, ...]
    optional: tuple[str, ...]
    read: Callable[[str, dict[str, Any]], Example]


def read_examples(path: str | Path, progress: Progress | None = None) -> Iterator[Example]:
    """Yield the examples of a ``.jsonl``, ``.ndjson``, ``.json`` or ``.csv`` file, one for each row, as they are read.

    Args:
        path: the file.
        progress: called now and then with the rows read, the bytes read, and the bytes of the file.

    Raises:
        InputError: the file is missing or of another kind (at once), unreadable or without rows, or a row is malformed
            (when it comes to that).
    """
    return _examples(read_rows(path, progress))


def _examples(rows: Iterator[tuple[str, Any]]) -> Iterator[Example]:
    form: Format | None = None
    for where, row in rows:
        if not isinstance(row, dict):
            raise InputError(f"{where} is not an object with named columns, but {reprlib.repr(row)}.")
        form = form or _format_of(where, row)
        if missing := [column for column in form.columns if column not in row]:
            raise InputError(
                f"{where} has no {named(missing)}: by its first row this file needs {named(form.columns)}, "
                f"and this row has {named(row) or 'nothing'}."
            )
        unused = tuple(column for column in row if column not in form.columns and column not in form.optional)
        example = form.read(where, row)
        yield dataclasses.replace(example, unused=unused) if unused else example


def _format_of(where: str, row: dict[str, Any]) -> Format:
    for form in FORMATS:
        if all(column in row for column in form.columns):
            return form
    needed = ", or ".join(named(form.columns) for form in FORMATS)
    raise InputError(f"{where} has the columns {named(row) or '(none)'}; needed are {needed}.")


def _chat(where: str, row: dict[str, Any]) -> Chat:
    messages = row["messages"]
    if not isinstance(messages, list) or not messages:
        raise InputError(f"{where}: messages must be a list of turns, but it is {reprlib.repr(messages)}.")
    for number, message in enumerate(messages, start=1):
        turn = f"{where}, message {number}"
        if not isinstance(message, dict) or not {"role", "content"} <= message.keys():
            raise InputError(f"{turn} must have a role and a content, but it is {reprlib.repr(message)}.")
        if message["role"] not in ROLES:
            raise InputError(f"{turn} has the role {reprlib.repr(message['role'])}; roles are {', '.join(ROLES)}.")
        _text(turn, message, "content")
    if not any(message["role"] == "assistant" for message in messages[1:]):
        raise InputError(f"{where} has no assistant turn that answers something, so there is nothing to learn from it.")
    return Chat(where, messages)


def _instruction(where: str, row: dict[str, Any]) -> Chat:
    question = _text(where, row, "instruction")
    if row.get("input"):
        question += "\n\n" + _text(where, row, "input")
    answer = _text(where, row, "output")
    return Chat(where, [{"role": "user", "content": question}, {"role": "assistant", "content": answer}])


def _completion(where: str, row: dict[str, Any]) -> Completion:
    return Completion(where, _text(where, row, "prompt"), _text(where, row, "completion"))


def _whole_text(where: str, row: dict[str, Any]) -> Text:
    return Text(where, _text(where, row, "text"))


FORMATS = (
    Format(("messages",), (), _chat),
    Format(("instruction", "output"), ("input",), _instruction),
    Format(("prompt", "completion"), (), _completion),
    Format(("text",), (), _whole_text),
)


def _text(where: str, row: dict[str, Any], column: str) -> str:
    value = row[column]
    if not isinstance(value, str):
        raise InputError(f"{where}: {column} must be text, but it is {reprlib.repr(value)}.")
    try:
        value.encode()
    except UnicodeEncodeError:
        raise InputError(f"{where}: {column} holds half of a character (a lone surrogate); remove it.") from None
    return value

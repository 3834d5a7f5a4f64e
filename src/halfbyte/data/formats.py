"""Data files to examples: which columns a row may have, and what each of them means.

A file holds rows of one shape, told by the columns of its first row:

    messages                    a conversation: a list of {"role": ..., "content": ...}
    instruction (input) output  one question and its answer; an input that is there follows the instruction
    prompt completion           a text and how it goes on (what a chat template makes of it: see ``tokens``)
    text                        a text, trained on from beginning to end

Files are JSON lines (``.jsonl``, ``.ndjson``), JSON (an array of rows, or an object that holds one) and CSV with a
header, all in UTF-8. They are read with the standard library, because it knows the line that an error is in.
Columns beyond these are ignored. A new kind of file is one more entry of ``READERS``, a new shape one more of
``SHAPES``. Left out: the tool role and content that is not text.
"""

import csv
import dataclasses
import json
import reprlib
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

from halfbyte.errors import InputError

ROLES = ("system", "user", "assistant")

Message = dict[str, Any]
"""One turn: ``role`` (one of ``ROLES``), ``content`` (text), and whatever else the chat template may read."""


@dataclasses.dataclass(frozen=True)
class Chat:
    """A conversation; every assistant turn that follows another message is an answer.

    Attributes:
        where: file and row, for error messages.
        messages: the turns, with at least one answer among them.
    """

    where: str
    messages: list[Message]


@dataclasses.dataclass(frozen=True)
class Completion:
    """A prompt and how it goes on."""

    where: str
    prompt: str
    completion: str


@dataclasses.dataclass(frozen=True)
class Text:
    """A text without a prompt."""

    where: str
    text: str


Example = Chat | Completion | Text


def read_examples(path: str | Path) -> list[Example]:
    """Read the rows of a ``.jsonl``, ``.ndjson``, ``.json`` or ``.csv`` file.

    Raises:
        InputError: the file is missing, unreadable, of another kind or without rows, or a row is malformed.
    """
    file = Path(path).expanduser()
    if not file.is_file():
        raise InputError(f"There is no data file {str(path)!r}; name a {_one_of(READERS)} file.")
    if file.suffix.lower() not in READERS:
        raise InputError(f"{path} is no kind of data file that can be read here; name a {_one_of(READERS)} file.")
    examples: list[Example] = []
    columns: tuple[str, ...] = ()
    try:
        for where, row in READERS[file.suffix.lower()](file):
            if not isinstance(row, dict):
                raise InputError(f"{where} is not an object with named columns, but {reprlib.repr(row)}.")
            columns = columns or _columns(where, row)
            if missing := [column for column in columns if column not in row]:
                raise InputError(
                    f"{where} has no {_and(missing)}: by its first row this file needs {_and(columns)}, "
                    f"and this row has {_and(row)}."
                )
            examples.append(SHAPES[columns](where, row))
    except OSError as error:
        raise InputError(f"{path} cannot be read: {error.strerror}.") from error
    except UnicodeDecodeError as error:
        raise InputError(f"{path} is not UTF-8 text ({error.reason}); save it as UTF-8.") from error
    if not examples:
        raise InputError(f"{path} holds no rows.")
    return examples


def _columns(where: str, row: dict[str, Any]) -> tuple[str, ...]:
    for columns in SHAPES:
        if all(column in row for column in columns):
            return columns
    shapes = ", or ".join(_and(columns) for columns in SHAPES)
    raise InputError(f"{where} has the columns {_and(row) or '(none)'}; needed are {shapes}.")


def _chat(where: str, row: dict[str, Any]) -> Chat:
    messages = row["messages"]
    if not isinstance(messages, list) or not messages:
        raise InputError(f"{where}: messages must be a list of turns, but it is {reprlib.repr(messages)}.")
    for number, message in enumerate(messages, start=1):
        turn = f"{where}, message {number}"
        if not isinstance(message, dict) or not {"role", "content"} <= message.keys():
            raise InputError(f"{turn} must have a role and a content, but it is {reprlib.repr(message)}.")
        if message["role"] not in ROLES:
            raise InputError(f"{turn} has the role {message['role']!r}; roles are {', '.join(ROLES)}.")
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


SHAPES: dict[tuple[str, ...], Callable[[str, dict[str, Any]], Example]] = {
    ("messages",): _chat,
    ("instruction", "output"): _instruction,
    ("prompt", "completion"): _completion,
    ("text",): _whole_text,
}


def _text(where: str, row: dict[str, Any], column: str) -> str:
    value = row[column]
    if not isinstance(value, str):
        raise InputError(f"{where}: {column} must be text, but it is {reprlib.repr(value)}.")
    try:
        value.encode()
    except UnicodeEncodeError:
        raise InputError(f"{where}: {column} holds half of a character (a lone surrogate); remove it.") from None
    return value


def _read_lines(path: Path) -> Iterator[tuple[str, Any]]:
    row = 0
    with path.open(encoding="utf-8-sig") as lines:
        for number, line in enumerate(lines, start=1):
            if not line.strip():
                continue
            row += 1
            try:
                yield f"{path}, row {row} (line {number})", json.loads(line)
            except json.JSONDecodeError as error:
                raise InputError(f"{path}, line {number} is not JSON: {error.msg} at column {error.colno}.") from error


def _read_json(path: Path) -> Iterator[tuple[str, Any]]:
    text = path.read_text(encoding="utf-8-sig")
    try:
        content = json.loads(text) if text.strip() else []
    except json.JSONDecodeError as error:
        if error.msg == "Extra data" and error.lineno > 1:  # JSON lines under the name .json, as many files are
            yield from _read_lines(path)
            return
        raise InputError(f"{path}, line {error.lineno} is not JSON: {error.msg} at column {error.colno}.") from error
    if isinstance(content, dict):
        lists = {key: value for key, value in content.items() if isinstance(value, list)}
        if "data" not in lists and len(lists) != 1:
            raise InputError(f"{path} is an object with the keys {_and(content)}; one of them must hold the rows.")
        content = lists["data"] if "data" in lists else next(iter(lists.values()))
    if not isinstance(content, list):
        raise InputError(f"{path} must hold an array of rows, but it holds {reprlib.repr(content)}.")
    for row, value in enumerate(content, start=1):
        yield f"{path}, row {row}", value


def _read_csv(path: Path) -> Iterator[tuple[str, Any]]:
    row = line = 1
    with path.open(encoding="utf-8-sig", newline="") as lines:
        reader = csv.reader(lines, strict=True)
        try:
            header = next(reader, [])
            line = reader.line_num + 1
            for values in reader:
                if values:
                    where = f"{path}, row {row} (line {line})"
                    if len(values) != len(header):
                        raise InputError(
                            f"{where} has {len(values)} fields, but the header names {len(header)}: {_and(header)}."
                        )
                    yield where, dict(zip(header, values, strict=True))
                    row += 1
                line = reader.line_num + 1
        except csv.Error as error:
            raise InputError(f"{path}, line {line} is not CSV: {error}.") from error


READERS: dict[str, Callable[[Path], Iterator[tuple[str, Any]]]] = {
    ".jsonl": _read_lines,
    ".ndjson": _read_lines,
    ".json": _read_json,
    ".csv": _read_csv,
}


def _and(names: Iterable[str]) -> str:
    return " and ".join(names)


def _one_of(names: Iterable[str]) -> str:
    *first, last = names
    return f"{', '.join(first)} or {last}"

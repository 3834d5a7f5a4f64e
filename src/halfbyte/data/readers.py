"""Data files to rows, read piece by piece: no file is ever whole in memory.

By the ending of its name a file is JSON lines (``.jsonl``, ``.ndjson``), JSON (an array of rows, or an object that
holds one) or CSV with a header, in UTF-8. A reader takes a file's path and its open bytes and yields, row by row, where
it stands (``rows.jsonl, row 17 (line 23)``) and its value; a new kind of file is one more entry of ``READERS``.

They are written with the standard library, because it knows the line that an error is in. Whatever is wrong with a file
is one sentence with that line: its bytes (a decoder that met an invalid one has written it as a lone surrogate, which
no text has), its syntax, and what Python's parser cannot take, nesting and numbers without end.
"""

import csv
import io
import json
import re
import reprlib
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any, BinaryIO, TextIO

from halfbyte.errors import InputError

PIECE = 1 << 20
"""Characters of a JSON file that are read at once."""
MARGIN = 16
"""An error so near to the end of a piece may be the cut: no literal and no escape of JSON is longer."""
TELL_EVERY = 1000
"""Rows from one call of ``progress`` to the next."""
NAMES_SHOWN = 12
LONGEST_NAME = 60

Progress = Callable[[int, int, int], None]
"""Called with the rows read, the bytes read, and the bytes of the file."""


def read_rows(path: str | Path, progress: Progress | None = None) -> Iterator[tuple[str, Any]]:
    """Yield where each row of a ``.jsonl``, ``.ndjson``, ``.json`` or ``.csv`` file stands, and what it holds.

    Args:
        path: the file.
        progress: called every 1000 rows and at the end.

    Raises:
        InputError: the file is missing or of another kind (at once), unreadable, malformed or without rows (when it
            comes to that).
    """
    file = Path(path).expanduser()
    if not file.is_file():
        raise InputError(f"There is no data file {str(path)!r}; name a {_one_of(READERS)} file.")
    if file.suffix.lower() not in READERS:
        raise InputError(f"{path} is no kind of data file that can be read here; name a {_one_of(READERS)} file.")
    return _read(file, READERS[file.suffix.lower()], progress)


def named(names: Iterable[Any]) -> str:
    """List the names of columns for an error message, each on one line and not too many of them."""
    listed = [name if isinstance(name, str) and name.strip() and name.isprintable() else repr(name) for name in names]
    shown = [name if len(name) <= LONGEST_NAME else f"{name[: LONGEST_NAME - 3]}..." for name in listed[:NAMES_SHOWN]]
    if len(listed) > NAMES_SHOWN:
        shown.append(f"{len(listed) - NAMES_SHOWN} more")
    return " and ".join([", ".join(shown[:-1]), shown[-1]] if len(shown) > 1 else shown)


def _read(path: Path, reader: "Reader", progress: Progress | None) -> Iterator[tuple[str, Any]]:
    row = 0
    try:
        size = path.stat().st_size
        with path.open("rb") as file:
            for row, found in enumerate(reader(path, file), start=1):
                yield found
                if progress and row % TELL_EVERY == 0:
                    progress(row, file.tell(), size)
    except OSError as error:
        raise InputError(f"{path} cannot be read: {error.strerror}.") from error
    if not row:
        raise InputError(f"{path} holds no rows.")
    if progress:
        progress(row, size, size)


def _read_lines(path: Path, file: BinaryIO) -> Iterator[tuple[str, Any]]:
    row = 0
    with _text(file) as text:
        for number, line in enumerate(_lines(path, text), start=1):
            if not line.strip():
                continue
            row += 1
            try:
                value = json.loads(line)
            except (ValueError, RecursionError) as error:
                raise _not_json(path, number, error) from error
            yield f"{path}, row {row} (line {number})", value


def _read_json(path: Path, file: BinaryIO) -> Iterator[tuple[str, Any]]:
    with _text(file) as text:
        source = _Json(path, text)
        match source.peek():
            case "":
                return
            case "[":
                rows = source.elements()
            case "{":
                member = _member_with_rows(source)
                text.seek(0)
                if member is None:
                    yield from _read_lines(path, file)
                    return
                source = _Json(path, text)
                rows = _elements_of_member(source, member)
            case _:
                value = source.value()
                raise InputError(f"{path} must hold an array of rows, but it holds {reprlib.repr(value)}.")
        for row, (line, value) in enumerate(rows, start=1):
            yield f"{path}, row {row} (line {line})", value
        source.finish()


def _member_with_rows(source: "_Json") -> int | None:
    """Go through an object; return the place of its member that is the array of rows, counted from 0.

    Returns:
        None if there is more behind the object, on another line: JSON lines under the name .json, as many files are.
    """
    names: list[str] = []
    lists: dict[str, int] = {}
    for number, name in enumerate(source.members()):
        names.append(name)
        lists.pop(name, None)  # of two members of one name the second counts, as elsewhere in JSON
        if source.peek() == "[":
            lists[name] = number
            for _ in source.elements():
                pass
        else:
            source.value()
    line = source.line
    if source.peek() and source.line > line:
        return None
    source.finish()
    if "data" not in lists and len(lists) != 1:
        raise InputError(f"{source.path} is an object with the keys {named(names)}; one of them must hold the rows.")
    return lists["data"] if "data" in lists else next(iter(lists.values()))


def _elements_of_member(source: "_Json", member: int) -> Iterator[tuple[int, Any]]:
    for number, _ in enumerate(source.members()):
        if number == member:
            yield from source.elements()
        else:
            source.value()


def _read_csv(path: Path, file: BinaryIO) -> Iterator[tuple[str, Any]]:
    row = line = 1
    with _text(file, newline="") as text:
        reader = csv.reader(_lines(path, text), strict=True)
        try:
            header = next(reader, [])
            line = reader.line_num + 1
            for values in reader:
                if values:
                    where = f"{path}, row {row} (line {line})"
                    if len(values) != len(header):
                        raise InputError(
                            f"{where} has {len(values)} fields, but the header names {len(header)}: {named(header)}."
                        )
                    yield where, dict(zip(header, values, strict=True))
                    row += 1
                line = reader.line_num + 1
        except csv.Error as error:
            raise InputError(f"{path}, line {line} is not CSV: {error}.") from error


Reader = Callable[[Path, BinaryIO], Iterator[tuple[str, Any]]]

READERS: dict[str, Reader] = {
    ".jsonl": _read_lines,
    ".ndjson": _read_lines,
    ".json": _read_json,
    ".csv": _read_csv,
}


class _Json:
    """JSON text that is taken apart from its beginning to its end; no more of it is held than the value being read."""

    def __init__(self, path: Path, text: TextIO) -> None:
        self.path = path
        self.line = 1  # of what comes next
        self._text = text
        self._piece = ""
        self._at = 0  # what comes next in the piece
        self._before = 0  # characters that stood before the piece in its first line
        self._decoder = json.JSONDecoder()

    def peek(self) -> str:
        """Return the next character that is no whitespace, or nothing at the end."""
        while True:
            found = _SOMETHING.search(self._piece, self._at)
            self._to(found.start() if found else len(self._piece))
            if found:
                return found[0]
            if not self._more():
                return ""

    def elements(self) -> Iterator[tuple[int, Any]]:
        """Take the array that comes next: yield the line and the value of each element."""
        self._take("[")
        if self._took("]"):
            return
        while True:
            self.peek()
            yield self.line, self.value()
            if not self._took(","):
                self._take("]", "Expecting ',' delimiter")
                return

    def members(self) -> Iterator[str]:
        """Take the object that comes next: yield each member's name; who asks for the next has taken its value."""
        self._take("{")
        if self._took("}"):
            return
        while True:
            if self.peek() != '"':
                raise self._wrong("Expecting property name enclosed in double quotes", self._at)
            name: str = self.value()
            self._take(":", "Expecting ':' delimiter")
            yield name
            if not self._took(","):
                self._take("}", "Expecting ',' delimiter")
                return

    def value(self) -> Any:
        """Take the next value, of whatever kind."""
        self.peek()
        while True:
            try:
                value, end = self._decoder.raw_decode(self._piece, self._at)
            except json.JSONDecodeError as error:
                cut = error.msg.startswith("Unterminated string") or error.pos + MARGIN > len(self._piece)
                if not (cut and self._more()):
                    raise self._wrong(error.msg, error.pos) from error
            except (ValueError, RecursionError) as error:
                raise _not_json(self.path, self.line, error) from error
            else:
                if not isinstance(value, int | float) or end + MARGIN <= len(self._piece) or not self._more():
                    self._to(end)
                    return value

    def finish(self) -> None:
        """Make sure that nothing comes any more."""
        if self.peek():
            raise self._wrong("Extra data", self._at)

    def _took(self, character: str) -> bool:
        if self.peek() != character:
            return False
        self._at += 1
        return True

    def _take(self, character: str, otherwise: str = "Expecting value") -> None:
        if not self._took(character):
            raise self._wrong(otherwise, self._at)

    def _to(self, end: int) -> None:
        self.line += self._piece.count("\n", self._at, end)
        self._at = end

    def _more(self) -> bool:
        """Read on if there is more, and forget what was taken: the piece begins with what comes next, then."""
        new = self._text.read(max(PIECE, len(self._piece) - self._at))
        if not new:
            return False
        taken = self._piece[: self._at]
        last_line = taken.rpartition("\n")[2]
        self._before = len(last_line) + (self._before if len(last_line) == len(taken) else 0)
        self._piece = self._piece[self._at :] + new
        self._at = 0
        _check(self.path, self.line + self._piece.count("\n") - new.count("\n"), new)
        return True

    def _wrong(self, what: str, at: int) -> InputError:
        line = self.line + self._piece.count("\n", self._at, at)
        begin = self._piece.rfind("\n", 0, at) + 1
        column = at - begin + 1 + (0 if begin else self._before)
        return InputError(f"{self.path}, line {line} is not JSON: {what.removesuffix(' at')} at column {column}.")


_SOMETHING = re.compile(r"[^ \t\n\r]")


def _text(file: BinaryIO, newline: str | None = None) -> TextIO:
    return io.TextIOWrapper(file, encoding="utf-8-sig", errors="surrogateescape", newline=newline)


def _lines(path: Path, text: TextIO) -> Iterator[str]:
    for number, line in enumerate(text, start=1):
        _check(path, number, line)
        yield line


def _check(path: Path, number: int, text: str) -> None:
    """Make sure that ``text``, which begins in line ``number``, was valid."""
    if text.isascii():
        return
    try:
        text.encode()
    except UnicodeEncodeError as error:
        byte, line = ord(text[error.start]) & 0xFF, number + text.count("\n", 0, error.start)
        raise InputError(
            f"{path}, line {line} is not UTF-8 text (byte 0x{byte:02x}); save the file as UTF-8."
        ) from None


def _not_json(path: Path, line: int, error: Exception) -> InputError:
    match error:
        case json.JSONDecodeError():
            what = error.msg.removesuffix(" at")
            return InputError(f"{path}, line {line} is not JSON: {what} at column {error.colno}.")
        case RecursionError():
            return InputError(f"{path}, line {line} has brackets within brackets, too many to be read.")
        case _:
            return InputError(f"{path}, line {line} has a number with too many digits to be read; write it as text.")


def _one_of(names: Iterable[str]) -> str:
    *first, last = names
    return f"{', '.join(first)} or {last}"

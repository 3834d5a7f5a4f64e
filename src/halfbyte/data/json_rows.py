"""JSON in all the forms that data comes in, to rows: no more is in memory than the row being read.

    lines       an object a line (JSON lines), each by itself: a bad one is a bad row
    objects     one behind the other, each over several lines
    an array    of objects; if it is cut off, its whole rows are read and the rest is one bad row; behind an object that
                cannot be read it goes on with the next one that begins with the same name
    an object   that holds the array of rows, or a list for each column, or rows by number, or is one row itself

They are told apart by what the file holds, not by its name. Control characters within texts are taken as they are.
"""

import dataclasses
import itertools
import json
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any, TextIO

from halfbyte.data.cells import plain
from halfbyte.data.conversations import TURNS
from halfbyte.data.examples import BadRow
from halfbyte.data.json_text import Json, problem
from halfbyte.data.texts import damage, damaged, nul_bytes
from halfbyte.errors import InputError, counted, named

FIRST = 1 << 20
"""Characters of a first line that are looked at; a longer one may as well be all of an array."""

Found = Iterator[tuple[str, Any]]
Open = Callable[[], TextIO]
_decode = json.JSONDecoder(strict=False).decode


def read_json(path: Path, open_again: Open) -> Found:
    """Yield the rows of a file of JSON, whichever form it has.

    Args:
        path: for messages.
        open_again: returns the text from its beginning.
    """
    match Json(path, open_again()).peek():
        case "[":
            if _is_lines(open_again()):
                return _lines(path, open_again())
            return _array(path, Json(path, open_again()))
        case "{":
            if _is_lines(open_again()):
                return _lines(path, open_again())
            return _object(path, open_again)
        case "":
            return iter(())
        case _:
            return _lines(path, open_again())


def _is_lines(text: TextIO) -> bool:
    """Tell whether the first lines that say anything are values by themselves; the very first may be damaged."""
    lines = (line for line in iter(lambda: text.readline(FIRST), "") if line.strip())
    first = next(lines, "")
    if not first.endswith("\n"):
        return False
    second = next(lines, "")
    if _is_value(first):
        return second != ""
    return first.lstrip()[:1] == second.lstrip()[:1] == "{" and _is_value(second)


def _is_value(line: str) -> bool:
    try:
        _decode(line)
    except (ValueError, RecursionError) as error:
        return not isinstance(error, json.JSONDecodeError)  # a value, if one that cannot be held
    return True


def _lines(path: Path, text: TextIO) -> Found:
    row = 0
    for number, line in enumerate(text, start=1):
        if line.isspace():
            continue
        row += 1
        where = f"{path}, row {row} (line {number})"
        line = line.removeprefix("\ufeff")  # of a file that others were put together from
        if "\0" in line:
            yield where, nul_bytes(where)
            continue
        if what := damage(number, line, text.encoding):
            yield where, damaged(where, what)
            continue
        try:
            yield where, _decode(line)
        except (ValueError, RecursionError) as error:
            with_comma = line.rstrip()
            if with_comma.endswith(",") and _is_value(with_comma[:-1]):
                yield where, _decode(with_comma[:-1])
                continue
            whole = "" if line.endswith("\n") else "; the file may be cut off"
            yield where, BadRow(where, "not JSON", f"{problem(error)}{whole}.")


def _array(path: Path, source: Json, *, whole: bool = True) -> Found:
    row = 0
    elements = source.elements()
    while True:
        try:
            line, value = next(elements)
        except StopIteration:
            if whole:
                source.finish()
            return
        except InputError as error:
            where, why = f"{path}, row {row + 1} (line {source.line})", _reason(path, error)
            if source.resume():
                row += 1
                yield where, BadRow(where, "not JSON", f": it cannot be read ({why}).")
                elements = source.elements(begun=True)
                continue
            if not row:
                raise
            yield _rest(path, row, source, error)
            return
        row += 1
        yield _sound(f"{path}, row {row} (line {line})", value, source)


def _sound(where: str, value: Any, source: Json) -> tuple[str, Any]:
    """Return a row of the value that was taken last, a bad one if bytes of it are no text."""
    return where, damaged(where, source.damage) if source.damage else value


def _rest(path: Path, row: int, source: Json, error: InputError) -> tuple[str, BadRow]:
    where = f"{path}, row {row + 1} (line {source.line})"
    if source.cut:
        return where, BadRow(where, "cut off", f": the file is cut off here; {_whole(row)}.")
    why = _reason(path, error)
    return where, BadRow(where, "not JSON", f": from here on it cannot be read ({why}); {_whole(row)}.")


def _whole(rows: int) -> str:
    return f"{counted(rows, 'row')} before it {'is' if rows == 1 else 'are'} whole"


def _reason(path: Path, error: InputError) -> str:
    return str(error).removeprefix(f"{path}, ").rstrip(".")


def _object(path: Path, open_again: Open) -> Found:
    """Yield the rows of a file that begins with an object which is not a line."""
    source = Json(path, open_again())
    source.peek()
    begins = source.line
    members: dict[str, Member] = {}
    broken: InputError | None = None
    try:
        for place, name in enumerate(source.members()):
            members[name] = Member(place, talk=plain(name) in TURNS)
            members[name].take(source)
    except InputError as error:
        broken = error
    ends = source.line
    if not broken and source.peek():
        if source.line > ends == begins:  # a line, then, but too long a one to be looked at before
            yield from _lines(path, open_again())
        else:
            yield from _objects(path, Json(path, open_again()))
        return
    tables = {name: member for name, member in members.items() if member.kind == "dict"}
    table = tables.get("data", next(iter(tables.values())) if len(tables) == 1 else None)
    if broken and (table is None or table.whole):
        raise broken
    if table:
        source = Json(path, open_again())
        for place, _ in enumerate(source.members()):
            if place == table.place:
                yield from _array(path, source, whole=False)
                return
            source.value()
    if tables:
        raise InputError(
            f"{path} is an object with the lists {named(tables)}; call the one that holds the rows 'data'."
        )
    if members and all(name.isdecimal() and member.kind == MAPPING for name, member in members.items()):
        source = Json(path, open_again())
        for row, _ in enumerate(source.members(), start=1):
            source.peek()
            where = f"{path}, row {row} (line {source.line})"
            yield _sound(where, source.value(), source)
        return
    source = Json(path, open_again())
    value = source.value()
    if _are_columns(path, members):
        columns = [list(column.values()) if isinstance(column, dict) else column for column in value.values()]
        for row, cells in enumerate(zip(*columns, strict=True), start=1):
            where, found = f"{path}, row {row}", dict(zip(value, cells, strict=True))
            whole = not source.damage or not damage(1, json.dumps(found, ensure_ascii=False), source.encoding)
            yield where, found if whole else damaged(where, source.damage)
        return
    if members and (("data" in members and members["data"].count == 0) or {m.count for m in members.values()} == {0}):
        return
    yield _sound(f"{path}, row 1 (line {begins})", value, source)


MAPPING, NUMBERED = "mapping", "numbered"


@dataclasses.dataclass
class Member:
    """What a member of an object is.

    Attributes:
        place: how many stand before it.
        talk: whether it is called as a conversation is.
        kind: of the first element of a list: the name of its type, or "turn" (of a conversation any); ``NUMBERED`` (an
            object whose names are numbers, as pandas writes a column), ``MAPPING`` (any other object), or nothing.
        count: elements of a list or of a numbered object, else -1.
        whole: whether it was read to its end.
    """

    place: int
    talk: bool = False
    kind: str = ""
    count: int = -1
    whole: bool = False

    def take(self, source: Json) -> None:
        """Look at the value that comes next, and take it."""
        if source.peek() == "[":
            self.count = 0
            for _, value in source.elements():
                kind = "turn" if isinstance(value, dict) and {"role", "from"} & value.keys() else type(value).__name__
                if not self.kind or (self.talk and kind == "turn"):
                    self.kind = kind
                self.count += 1
        elif isinstance(value := source.value(), dict):
            numbered = bool(value) and all(name.isdecimal() for name in value)
            self.kind, self.count = (NUMBERED, len(value)) if numbered else (MAPPING, -1)
        self.whole = True


def _are_columns(path: Path, members: Mapping[str, Member]) -> bool:
    """Tell whether an object's members are the columns of a table."""
    kinds = {member.kind for member in members.values()}
    sizes = {member.count for member in members.values()}
    if not members or min(sizes) < 1 or "turn" in kinds or (NUMBERED in kinds and len(kinds) > 1):
        return False
    if len(sizes) == 1:
        return len(members) > 1 or kinds <= {"str", NUMBERED}
    if kinds == {"str"}:
        lengths = named(f"{name} ({member.count:,})" for name, member in members.items())
        raise InputError(f"{path} holds columns of different lengths: {lengths}; make them equal.")
    return False


def _objects(path: Path, source: Json) -> Found:
    for row in itertools.count(1):
        if not source.peek():
            return
        where = f"{path}, row {row} (line {source.line})"
        try:
            found = _sound(where, source.value(), source)
            source.skip(",")
        except InputError as error:
            why = _reason(path, error)
            if not source.resume():
                yield _rest(path, row - 1, source, error)
                return
            found = where, BadRow(where, "not JSON", f": it cannot be read ({why}).")
        yield found

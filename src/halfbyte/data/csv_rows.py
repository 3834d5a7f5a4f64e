"""CSV to rows: with whatever delimiter, with or without quotation marks, and with damage.

What a file is written with (:class:`Dialect`) is told by its first rows. A quotation mark that is never closed, or
closed by the next one lines further down, makes one bad row and not one of all lines between: they are read again, if
they are rows by themselves.
"""

import csv
import dataclasses
import itertools
import sys
from collections import deque
from collections.abc import Iterator
from pathlib import Path
from typing import Any, TextIO

from halfbyte.data.examples import BadRow
from halfbyte.data.texts import damage, damaged, nul_bytes
from halfbyte.errors import InputError

DELIMITERS = {",": "commas", ";": "';'", "\t": "tabs", "|": "'|'"}
SNIFFED = 50
"""Rows that tell the dialect."""
SNIFFED_CHARACTERS = 1 << 18
LONGEST_NAME = 80
LONGEST_ROW = 1 << 24
"""Characters of a row that goes over several lines; what is longer has lost a quotation mark."""


@dataclasses.dataclass(frozen=True)
class Dialect:
    """How the fields of a file are told apart.

    Attributes:
        delimiter: what stands between them.
        quoted: whether quotation marks hold a field together; else they are part of it.
        backslash: whether a quotation mark within such a field has a backslash before it; else it is doubled.
    """

    delimiter: str = ","
    quoted: bool = True
    backslash: bool = False

    @property
    def options(self) -> dict[str, Any]:
        """What :func:`csv.reader` calls this."""
        quoting = csv.QUOTE_MINIMAL if self.quoted else csv.QUOTE_NONE
        escape = {"doublequote": False, "escapechar": "\\"} if self.backslash else {}
        return {"delimiter": self.delimiter, "quoting": quoting, "strict": True, **escape}

    def unusual(self, usual: str) -> list[str]:
        """Return in words what somebody should know of it."""
        facts = []
        if self.delimiter != usual:
            facts.append(f"with {DELIMITERS.get(self.delimiter, repr(self.delimiter))} between its fields")
        if not self.quoted:
            facts.append("with quotation marks as part of the fields")
        if self.backslash:
            facts.append("with backslashes before quotation marks")
        return facts


def dialect_of(text: TextIO, usual: str = ",") -> Dialect:
    """Return the dialect of the text that comes next.

    The delimiter is the one that gives most rows the same number of fields. Tabs do without quotation marks, and marks
    with backslashes, where more of the rows fit then.
    """
    return _dialect(*_sample(text), usual)


def _dialect(lines: list[str], is_cut: bool, usual: str) -> Dialect:
    if lines and (named := _named_delimiter(lines[0])) is not None:
        return Dialect(named)

    def score(delimiter: str) -> tuple[float, int, bool]:
        try:
            rows = [row for row in itertools.islice(csv.reader(lines, delimiter=delimiter), SNIFFED) if row]
        except csv.Error:
            return 0, 0, False
        fields = len(rows[0]) if rows else 0
        if fields < 2:
            return 0, 0, delimiter == usual
        return sum(len(row) == fields for row in rows) / len(rows), fields, delimiter == usual

    delimiter = max(DELIMITERS, key=score)
    dialects = [Dialect(delimiter)]
    if delimiter == "\t":
        dialects.append(Dialect(delimiter, quoted=False))
    if any('\\"' in line for line in lines):
        dialects.append(Dialect(delimiter, backslash=True))
    return max(dialects, key=lambda dialect: _fitting(lines, dialect, is_cut))  # of equals the first


def is_table(text: TextIO, usual: str = ",", least: int = 2, share: float = 1.0) -> bool:
    """Tell whether the text that comes next is a table beyond doubt.

    It has ``least`` rows or more, ``share`` of them of as many fields as the first, which has two or more and no empty
    one. If the delimiter ``usual`` is a tab, it has to be one.
    """
    lines, is_cut = _sample(text)
    dialect = _dialect(lines, is_cut, usual)
    first = next(csv.reader(lines, **dialect.options | {"strict": False}), [])
    return (
        len(lines) >= least
        and len(first) > 1
        and all(first)
        and (usual != "\t" or dialect.delimiter == usual)
        and _fitting(lines, dialect, is_cut) >= share
    )


def _sample(text: TextIO) -> tuple[list[str], bool]:
    """Return the first lines of a text, and whether there are more."""
    csv.field_size_limit(sys.maxsize)  # Python's own bound, for the whole process, is 131,072 characters
    lines: list[str] = []
    length = 0
    while length < SNIFFED_CHARACTERS and len(lines) < 4 * SNIFFED and (line := text.readline(SNIFFED_CHARACTERS)):
        lines.append(line)
        length += len(line)
    return lines, bool(text.readline(1))


def _fitting(lines: list[str], dialect: Dialect, is_cut: bool) -> float:
    """Return the share of rows that have as many fields as the first."""
    reader = csv.reader(lines, **dialect.options)
    rows: list[list[str]] = []
    errors = 0
    while len(rows) + errors < SNIFFED:
        try:
            row = next(reader)
        except StopIteration:
            break
        except csv.Error:
            errors += not (is_cut and reader.line_num == len(lines))
            continue
        if row:
            rows.append(row)
    return sum(len(row) == len(rows[0]) for row in rows) / (len(rows) + errors) if rows else 0


def read_csv(path: Path, text: TextIO, dialect: Dialect) -> Iterator[tuple[str, Any]]:
    """Yield the rows below a header, as mappings from its names; a row that does not fit it is a bad row.

    Lines without anything, rows of empty fields (sheets end in such), and empty fields behind the last column are left
    out.
    """
    csv.field_size_limit(sys.maxsize)  # again, for somebody may have set it
    lines = _Lines(text)
    reader = csv.reader(lines, **dialect.options)
    header: list[str] | None = None
    row, alike = 0, 0
    while True:
        line = lines.begin()
        where = f"{path}, row {row + 1} (line {line})"
        problem = ""
        try:
            values = next(reader, None)
        except csv.Error as error:
            values, problem = [], "a quoted field never ends" if "unexpected end" in str(error) else str(error)
            if header is None:
                raise InputError(f"{path}, line {line} is not CSV: {problem}; mend its quotes.") from error
        if values is None:
            break
        if header is None:
            if what := lines.damage():
                raise InputError(f"{path} {what}")
            header = _header(path, values) if not (line == 1 and _named_delimiter(lines.taken[0])) else None
            continue
        if problem:
            row += 1
            lines.give_back(dialect, len(header))
            if bad := lines.bad_bytes(where):
                yield where, bad
            elif dialect.delimiter == "\t" and len(fields := lines.plain_fields()) == len(header):
                yield where, dict(zip(header, fields, strict=True))
            else:
                yield where, BadRow(where, "not CSV", f"is not CSV: {problem}; mend its quotes.")
            continue
        while len(values) > len(header) and not values[-1]:
            values.pop()
        if not any(values):
            continue
        row += 1
        if bad := lines.bad_bytes(where):
            yield where, bad
        elif len(values) != len(header):
            yield where, BadRow(
                where, "number of fields",
                f"has {len(values)} fields, but the header names {len(header)}; quote fields that hold the delimiter.",
            )  # fmt: skip
        elif values == header:
            yield where, BadRow(where, "header again", "is the header once more; remove the line.")
        else:
            if row <= SNIFFED:
                alike += any(value and value == name for value, name in zip(values, header, strict=True))
            if alike > 2:
                raise InputError(
                    f"{path} seems to have no header: its first line is like the rows below it; put a line with the "
                    "names of the columns above them."
                )
            yield where, dict(zip(header, values, strict=True))
    if not row and header:
        raise InputError(
            f"{path} holds one line only, which was taken for the names of columns; if it is a row, put them above it."
        )


class _Lines:
    """Lines for a reader of CSV, which can have those of a damaged row again.

    Attributes:
        taken: the lines of the row that is being read.
    """

    def __init__(self, text: TextIO) -> None:
        self.taken: list[str] = []
        self._text = text
        self._again: deque[str] = deque()
        self._size = 0
        self._is_plain = True
        self._number = 1

    def __iter__(self) -> "_Lines":
        return self

    def __next__(self) -> str:
        if self._size > LONGEST_ROW:
            raise StopIteration
        line = self._again.popleft() if self._again else next(self._text)
        self.taken.append(line)
        self._size += len(line)
        self._is_plain = self._is_plain and line.isascii() and "\0" not in line
        return line

    def begin(self) -> int:
        """Begin with another row; return the number of its first line."""
        self._number += len(self.taken)
        self.taken.clear()
        self._size = 0
        self._is_plain = True
        return self._number

    def damage(self) -> str:
        """Return what is wrong with the bytes of the row, if they are not of its encoding."""
        return "" if self._is_plain else damage(self._number, "".join(self.taken), self._text.encoding)

    def bad_bytes(self, where: str) -> BadRow | None:
        """Return the bad row that this one is by its bytes, if it is one."""
        if self._is_plain:
            return None
        if what := self.damage():
            return damaged(where, what)
        return nul_bytes(where) if any("\0" in line for line in self.taken) else None

    def give_back(self, dialect: Dialect, fields: int) -> None:
        """Read all lines of a damaged row but the first again, if those between are rows of so many fields."""
        between = self.taken[1:-1][:SNIFFED] or self.taken[1:]
        single = [next(csv.reader([line], **dialect.options | {"strict": False}), []) for line in between]
        if all(len(values) in (0, fields) for values in single):
            self._again.extendleft(reversed(self.taken[1:]))
            del self.taken[1:]

    def plain_fields(self) -> list[str]:
        """Return the fields of a row of one line, divided at tabs."""
        return self.taken[0].rstrip("\r\n").split("\t") if len(self.taken) == 1 else []


def _named_delimiter(line: str) -> str | None:
    """Return the delimiter that a first line names as Excel does: ``sep=;``."""
    words = line.strip("\r\n").strip('"')
    return words[4] if words[:4].casefold() == "sep=" and len(words) == 5 else None


def _header(path: Path, header: list[str]) -> list[str] | None:
    """Return the names of columns, or nothing if the line is empty."""
    if not any(header):
        return None
    names = [name.strip() for name in header]
    twice = sorted({name for name in names if name and names.count(name) > 1})
    if twice:
        raise InputError(f"{path} names the column {twice[0]!r} more than once in its first line; rename one.")
    long = next((name for name in names if len(name) > LONGEST_NAME), None)
    if long is not None:
        raise InputError(
            f"{path} begins with {long[:40] + '...'!r} where the names of columns should be; put a first line with "
            "their names above the rows."
        )
    return header

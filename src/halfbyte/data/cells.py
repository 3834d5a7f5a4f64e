"""The cells of a row, by the names of their columns, as text or as what they are."""

import ast
import datetime
import decimal
import json
import math
import re
import reprlib
from collections.abc import Mapping
from functools import lru_cache
from typing import Any

from halfbyte.data.examples import BadRow
from halfbyte.errors import named, nearest

NUMBER = "a number became text"
BOOLEAN = "true or false became text"
DATE = "a date became text"
RENAMED = "columns were found by names that are written otherwise"
FIRST = "the first of several answers was taken"
PARSED = "JSON that was written as text was read"
PYTHON = "a Python list that was written as text was read"

LITERAL = 1 << 20
"""Characters of Python text that are read; it takes some hundred bytes of memory for each."""


class Names:
    """Which of a row's columns is meant by a name; rows with the same columns share one.

    Attributes:
        columns: the columns, by their exact names, by the names they are asked for.
    """

    def __init__(self, columns: Mapping[str, str]) -> None:
        self.columns = columns
        self._present: dict[tuple[str, ...], tuple[str, ...]] = {}

    def present(self, names: tuple[str, ...]) -> tuple[str, ...]:
        """Return those of ``names`` that are there."""
        try:
            return self._present[names]
        except KeyError:
            there = self._present[names] = tuple(name for name in names if name in self.columns)
            return there


class Cells:
    """One row; keeps which of its columns were used and what was made of them.

    Args:
        where: file and row.
        row: the columns.
        names: of the columns; without them their own, however those are written.
        made: values that stand in no column, by such names; they win.

    Attributes:
        where: file and row.
        row: the columns.
        names: of the columns.
        made: values that stand in no column.
        notes: what was made of it.
        used: the columns, by their exact names, that had a part in it.
    """

    def __init__(
        self,
        where: str,
        row: Mapping[str, Any],
        names: Names | None = None,
        made: Mapping[str, Any] | None = None,
    ) -> None:
        self.where = where
        self.row = row
        self.notes: dict[str, None] = {}  # in their order
        self._given = names is not None
        self.names = plain_names(tuple(row)) if names is None else names
        self._columns = self.names.columns
        self.made = made or {}
        self.used: set[str] = set()

    def find(self, *names: str) -> str | None:
        """Return the first of ``names`` that the row has, by exact name or as :func:`plain` has it.

        One that holds something goes before one that does not: rows of different shapes in one table have the columns
        of all of them, most of them null.
        """
        if self.made and (made := next((name for name in names if name in self.made), None)):
            return made
        present = self.names.present(names)
        if not present:
            return None
        if len(present) > 1:
            for name in present:
                if not is_blank(self.row[self._columns[name]]):
                    return name
        return present[0]

    def filled(self, *names: str) -> str | None:
        """Return the first of ``names`` that the row has with something in it."""
        name = self.find(*names)
        return None if name is None or is_blank(self.peek(name)) else name

    def peek(self, name: str) -> Any:
        """Return the value of a column, which does not count as used by that; None where it is missing."""
        if name in self.made:
            return self.made[name]
        column = self._columns.get(name)
        return None if column is None else self.row[column]

    def get(self, *names: str) -> Any:
        """Return the value of the first of these columns that is there, which is used then; None if none is."""
        name = self.find(*names)
        if name is None:
            return None
        if name not in self.made:
            column = self._columns[name]
            self.used.add(column)
            if column != name and not self._given:
                self.note(RENAMED)
        value = self.peek(name)
        return None if isinstance(value, float) and math.isnan(value) else value

    def text(self, *names: str, missing: str | None = None) -> str:
        """Return a value as text.

        Args:
            names: the first of them that is there counts.
            missing: what stands for a null, or a column that is not there; None makes that a bad row.
        """
        return self.as_text(self.find(*names) or names[0], self.get(*names), missing)

    def answer(self, *names: str) -> str:
        """Return a value as a text that holds something; of a list of them the first."""
        name = self.find(*names) or names[0]
        value = self.get(*names)
        if isinstance(value, Mapping) and "text" in value:
            value = value["text"]  # SQuAD's form, published
        if isinstance(value, list | tuple):
            found = [item["text"] if isinstance(item, Mapping) and "text" in item else item for item in value]
            if not found:
                raise self.bad(
                    "answer is missing", f": {self.called(name)} is an empty list; fill it in, or remove the row."
                )
            if all(isinstance(item, str | int | float) for item in found):
                if len(found) > 1:
                    self.note(FIRST)
                value = found[0]
        if value is None:
            raise self.bad(
                "answer is missing",
                f": {self.called(name)} is {shown(self.peek(name))}; fill it in, or remove the row.",
            )
        text = self.as_text(name, value)
        if not text.strip():
            raise self.bad(
                "answer is empty", f": {self.called(name)} is empty, so there is nothing to learn; remove the row."
            )
        return text

    def as_text(self, name: str, value: Any, missing: str | None = None) -> str:
        """Return ``value``, that of a column or of a part of one called ``name``, as text."""
        match value:
            case str():
                text = value
            case None if missing is not None:
                return missing
            case None:
                raise self.bad(f"{name} is missing", f": {self.called(name)} is null; fill it in, or remove the row.")
            case bool():
                self.note(BOOLEAN)
                return "true" if value else "false"
            case int() | float() | decimal.Decimal():
                self.note(NUMBER)
                try:
                    return str(value)
                except ValueError:  # Python writes no number of over 4300 digits
                    raise self.bad(
                        "number too long",
                        f": {self.called(name)} is a number of thousands of digits; write it as text.",
                    ) from None
            case datetime.date() | datetime.time():
                self.note(DATE)
                return str(value)
            case _:
                raise self.bad(
                    f"{name} is no text",
                    f": {self.called(name)} must be text, but it is {shown(value)}; write it as text.",
                )
        if not text.isascii():
            try:
                text.encode()
            except UnicodeEncodeError:
                raise self.bad(
                    "half a character",
                    f": {self.called(name)} holds half of a character (a lone surrogate); remove it.",
                ) from None
        return text

    def parsed(self, name: str, value: Any) -> Any:
        """Return ``value``, or if it is text that looks like a list or an object what that says.

        JSON is read, and what Python writes for a list: pandas puts that into CSV.
        """
        if isinstance(value, str) and value.lstrip()[:1] in ("[", "{"):
            read, error = self._read(value)
            if error:
                raise self.bad(
                    f"{name} is no JSON", f": {self.called(name)} is neither a list nor JSON text ({error})."
                )
            return read
        return value

    def parsed_turns(self, *names: str) -> Any:
        """Return a value that is a list of turns, or text of one, as that list; any other as it is."""
        value = self.get(*names)
        if isinstance(value, Mapping) and {"role", "from"} & value.keys():
            return [value]
        if isinstance(value, str) and value.lstrip().startswith(("[{", '{"role"', '{"from"')):
            notes = dict(self.notes)
            read, _ = self._read(value)
            turns = [read] if isinstance(read, Mapping) else read
            if isinstance(turns, list) and all(
                isinstance(turn, dict) and {"role", "from"} & turn.keys() for turn in turns
            ):
                return turns
            self.notes = notes
        return value

    def _read(self, text: str) -> tuple[Any, str]:
        """Return what a text says as JSON or as Python, and why it says nothing if so."""
        try:
            read = json.loads(text)
        except (ValueError, RecursionError) as error:
            why = str(error) if isinstance(error, ValueError) else "nested too deeply"
        else:
            self.note(PARSED)
            return read, ""
        if len(text) <= LITERAL and "'" in text:
            try:
                read = ast.literal_eval(text.strip())
            except (ValueError, SyntaxError, TypeError, RecursionError, MemoryError):
                pass
            else:
                self.note(PYTHON)
                return read, ""
        return None, why

    def called(self, name: str) -> str:
        """Return what an error calls a column: by its own name too where somebody named it as another."""
        if not self._given or name not in self._columns:
            return name
        return f"{self._columns[name]!r} (named as the {name})"

    def note(self, text: str) -> None:
        """Remember what was made of the row."""
        self.notes[text] = None

    def use(self, *columns: str) -> None:
        """Count columns, by their exact names, as used."""
        self.used.update(columns)

    def bad(self, kind: str, sentence: str) -> BadRow:
        """Return the error that this row cannot be trained on."""
        return BadRow(self.where, kind, sentence)

    def lacks(self, column: str, what: str) -> BadRow:
        """Return the error that a column is not there that somebody named."""
        return self.bad(
            f"no column {column}",
            f"has no column {column!r}{nearest(column, map(str, self.row))}, which {what}; it has "
            f"{named(self.row) or 'none'}.",
        )

    @property
    def filled_names(self) -> set[str]:
        """The plain names of the columns that hold something."""
        full = (plain(str(name)) for name, column in self._columns.items() if not is_blank(self.row[column]))
        return {*self.made, *full}

    @property
    def told(self) -> str:
        """The columns as somebody should be told them, with what they were named as."""
        columns = named(map(str, self.row)) or "(none)"
        if not self._given:
            return columns
        names = [*(f"the template is the {name}" for name in self.made)]
        names += [f"{column!r} is named as the {name}" for name, column in self._columns.items()]
        return f"{columns} ({', '.join(names) or 'none is named'})"

    @property
    def shown_names(self) -> list[str]:
        """The names that shapes ask for where columns were given such, else the columns."""
        return [*self.made, *self._columns] if self._given else [str(column) for column in self.row]

    @property
    def unused_names(self) -> list[str]:
        """The names under which columns were given that were not asked for."""
        return [name for name, column in self._columns.items() if column not in self.used] if self._given else []

    @property
    def rest(self) -> dict[str, Any]:
        """What an example takes over from the row; an empty cell is none that was not used."""
        unused = tuple(str(name) for name, value in self.row.items() if name not in self.used and not is_blank(value))
        return {"unused": unused, "notes": tuple(self.notes)}


def is_blank(value: Any) -> bool:
    """Tell whether a cell holds nothing: null, NaN as pandas has it, an empty text, list or object."""
    if isinstance(value, str | list | dict):
        return not value
    return value is None or (isinstance(value, float) and math.isnan(value))


def words(value: Any) -> str:
    """Return any value as text to compare; a number of thousands of digits, which Python does not write, is none."""
    try:
        return str(value)
    except ValueError:
        return ""


def shown(value: Any) -> str:
    """Return any value as a short text on one line, as JSON has it."""
    try:
        return _short.repr(dict(value) if isinstance(value, Mapping) else value)
    except ValueError:  # a number of thousands of digits
        return "a number of thousands of digits"


class _Short(reprlib.Repr):
    """Writes values as JSON does; of what is long the beginning and the end."""

    def repr_NoneType(self, _value: None, _level: int) -> str:
        return "null"

    def repr_bool(self, value: bool, _level: int) -> str:
        return "true" if value else "false"

    def repr_float(self, value: float, _level: int) -> str:
        return json.dumps(value)

    def repr_tuple(self, value: tuple[Any, ...], level: int) -> str:
        return self.repr_list(list(value), level)

    def repr_str(self, value: str, _level: int) -> str:
        text = json.dumps(value[: self.maxstring], ensure_ascii=False)
        if not text.isprintable():
            text = json.dumps(value[: self.maxstring])
        return text if len(value) <= self.maxstring else f'{text[:-1]}..."'


_short = _Short()


def plain(name: str) -> str:
    """Return a column's name without case, and with one ``_`` for blanks, ``-`` and ``_``."""
    return re.sub(r"[\s_-]+", "_", name.strip().casefold())


@lru_cache(maxsize=4096)
def plain_names(columns: tuple[str, ...]) -> Names:
    """Return the columns by their plain names and, what wins, by their own."""
    names = {plain(column): column for column in reversed(columns) if isinstance(column, str)}
    return Names(names | {column: column for column in columns})

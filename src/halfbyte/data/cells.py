"""The cells of a row, by the names of their columns, as text or as what they are."""

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
RENAMED = "columns were found by names that are written otherwise"
FIRST = "the first of several answers was taken"
PARSED = "JSON that was written as text was read"


class Cells:
    """One row; keeps which of its columns were used and what was made of them.

    Attributes:
        where: file and row.
        row: the columns.
        notes: what was made of it.
    """

    def __init__(self, where: str, row: Mapping[str, Any]) -> None:
        self.where = where
        self.row = row
        self.notes: dict[str, None] = {}  # in their order
        self._names = _by_plain_name(tuple(row))
        self._used: set[str] = set()

    def find(self, *names: str) -> str | None:
        """Return the first of ``names`` that the row has, by exact name or as :func:`plain` has it."""
        return next((name for name in names if name in self._names), None)

    def get(self, *names: str) -> Any:
        """Return the value of the first of these columns that is there, which is used then; None if none is."""
        name = self.find(*names)
        if name is None:
            return None
        column = self._names[name]
        self._used.add(column)
        if column != name:
            self.note(RENAMED)
        value = self.row[column]
        return None if isinstance(value, float) and math.isnan(value) else value

    def text(self, *names: str, missing: str | None = None) -> str:
        """Return a value as text.

        Args:
            names: the first of them that is there counts.
            missing: what stands for a null, or a column that is not there; None makes that a bad row.
        """
        return self.as_text(self.find(*names) or names[0], self.get(*names), missing)

    def answer(self, *names: str) -> str:
        """Return a value as a text that holds something."""
        name = self.find(*names) or names[0]
        value = self.get(*names)
        if isinstance(value, Mapping) and isinstance(value.get("text"), list):
            value = value["text"]  # SQuAD's form
        if isinstance(value, list) and value and all(isinstance(item, str) for item in value):
            if len(value) > 1:
                self.note(FIRST)
            value = value[0]
        text = self.as_text(name, value)
        if not text.strip():
            raise self.bad("answer is empty", f": {name} is empty, so there is nothing to learn; remove the row.")
        return text

    def as_text(self, name: str, value: Any, missing: str | None = None) -> str:
        """Return ``value``, that of a column or of a part of one called ``name``, as text."""
        match value:
            case str():
                text = value
            case None if missing is not None:
                return missing
            case None:
                raise self.bad(f"{name} is missing", f": {name} is null; fill it in, or remove the row.")
            case bool():
                self.note(BOOLEAN)
                return "true" if value else "false"
            case int() | float():
                self.note(NUMBER)
                return str(value)
            case _:
                raise self.bad(
                    f"{name} is no text", f": {name} must be text, but it is {reprlib.repr(value)}; write it as text."
                )
        if not text.isascii():
            try:
                text.encode()
            except UnicodeEncodeError:
                raise self.bad(
                    "half a character", f": {name} holds half of a character (a lone surrogate); remove it."
                ) from None
        return text

    def parsed(self, name: str, value: Any) -> Any:
        """Return ``value``, or if it is text that looks like a JSON list or object what that says."""
        if isinstance(value, str) and value.lstrip()[:1] in ("[", "{"):
            try:
                read = json.loads(value)
            except (ValueError, RecursionError) as error:
                raise self.bad(f"{name} is no JSON", f": {name} is neither a list nor JSON text ({error}).") from None
            self.note(PARSED)
            return read
        return value

    def parsed_turns(self, *names: str) -> Any:
        """Return a value that is a list of turns, or JSON text of one, as that list; any other as it is."""
        value = self.get(*names)
        if isinstance(value, str) and value.lstrip().startswith("[{"):
            try:
                read = json.loads(value)
            except (ValueError, RecursionError):
                return value
            if isinstance(read, list) and all(
                isinstance(turn, dict) and {"role", "from"} & turn.keys() for turn in read
            ):
                self.note(PARSED)
                return read
        return value

    def use(self, *columns: str) -> None:
        """Count columns, by their exact names, as used."""
        self._used.update(columns)

    def note(self, text: str) -> None:
        """Remember what was made of the row."""
        self.notes[text] = None

    def bad(self, kind: str, sentence: str) -> BadRow:
        """Return the error that this row cannot be trained on."""
        return BadRow(self.where, kind, sentence)

    def lacks(self, column: str, what: str) -> BadRow:
        """Return the error that a column is not there that somebody named."""
        return self.bad(
            f"no column {column}",
            f"has no column {column!r}{nearest(column, self.row)}, which {what}; it has {named(self.row) or 'none'}.",
        )

    @property
    def rest(self) -> dict[str, Any]:
        """What an example takes over from the row."""
        unused = tuple(column for column in self.row if column not in self._used)
        return {"unused": unused, "notes": tuple(self.notes)}


def plain(name: str) -> str:
    """Return a column's name without case, and with one ``_`` for blanks, ``-`` and ``_``."""
    return re.sub(r"[\s_-]+", "_", name.strip().casefold())


@lru_cache(maxsize=4096)
def _by_plain_name(columns: tuple[str, ...]) -> dict[str, str]:
    """Return the columns by their plain names and, what wins, by their own."""
    names = {plain(column): column for column in reversed(columns) if isinstance(column, str)}
    return names | {column: column for column in columns}

"""Columns of the user's own: which of them is the prompt, which the answer, and texts that are made of several.

``columns`` gives columns the names that shapes know (``{"prompt": "Frage", "completion": "Antwort"}``); only those are
looked at then. ``template`` makes a text of a row's columns (``"Translate {source}:"``): the prompt where an answer is
named among ``columns``, else the text that is trained. Braces hold a column's name and nothing else: no attributes, no
format, no code; ``{{`` and ``}}`` stand for braces.
"""

import re
from collections.abc import Iterable, Mapping
from typing import Any

from halfbyte.data.cells import Cells, Names, plain, plain_names
from halfbyte.errors import InputError, named, nearest

ANSWERED = {"completion", "chosen", "rejected", "label"}
"""Columns beside which a template makes the prompt."""


KINDS = 1000
"""Kinds of rows, by the columns they have, that are remembered."""


class Own:
    """The columns that a user names.

    Args:
        columns: for names of ours the columns that they are.
        template: a text with columns in braces.
        known: the names of ours; those without which a row is still whole are mapped to True.

    Raises:
        InputError: a name is not known, or the template names no column.
    """

    def __init__(self, columns: Mapping[str, str], template: str | None, known: Mapping[str, bool]) -> None:
        for name in columns:
            if plain(name) not in known:
                raise InputError(
                    f"columns names {name!r}{nearest(name, known)}; what a column can be is {', '.join(known)}."
                )
        self._columns = {plain(name): column for name, column in columns.items()}
        self._optional = {name for name, optional in known.items() if optional}
        self._pieces = [] if template is None else pieces(template)
        self._known: dict[tuple[tuple[str, str], ...], Names] = {}
        self._made = "prompt" if ANSWERED & self._columns.keys() else "text"

    def __bool__(self) -> bool:
        return bool(self._columns or self._pieces)

    def cells(self, where: str, row: Mapping[str, Any]) -> Cells:
        """Return a row by the names of ours.

        Raises:
            BadRow: it lacks a column that is named.
        """
        there = plain_names(tuple(row)).columns
        names: dict[str, str] = {}
        bare = Cells(where, row, Names({}))
        for name, column in self._columns.items():
            found = there.get(column) or there.get(plain(column))
            if found is not None:
                names[name] = found
            elif name in self._optional:
                bare.note(f"there is no column {column!r}{nearest(column, map(str, row))}, named as the {name}")
            else:
                raise bare.lacks(column, f"columns names as the {name}")
        text = ""
        for words, column in self._pieces:
            text += words
            if column:
                found = there.get(column) or there.get(plain(column))
                if found is None:
                    raise bare.lacks(column, "the template names")
                bare.use(found)
                value = row[found]
                text += bare.as_text(column, None if isinstance(value, float) and value != value else value, "")
        cells = Cells(where, row, self._shared(names), {self._made: text} if self._pieces else None)
        cells.notes = bare.notes
        cells.use(*bare.used)
        return cells

    def _shared(self, names: dict[str, str]) -> Names:
        """Return names that all rows with these columns share; there are but a few kinds of rows."""
        key = tuple(names.items())
        if key not in self._known and len(self._known) >= KINDS:
            self._known.clear()
        return self._known.setdefault(key, Names(names))


def paired(text: str) -> dict[str, str]:
    """Read columns as an option has them, such as ``prompt=question,completion=answer``.

    Raises:
        ValueError: they are no pairs.
    """
    pairs = [pair.split("=", 1) for pair in text.split(",")]
    if not all(len(pair) == 2 and pair[0].strip() and pair[1].strip() for pair in pairs):
        raise ValueError("must be pairs such as prompt=question,completion=answer")
    return {name.strip(): column.strip() for name, column in pairs}


def check_used(cells: Cells, shape: str) -> None:
    """Make sure that all columns that somebody named had a part in the example.

    Raises:
        BadRow: one had none.
    """
    if unused := cells.unused_names:
        raise cells.bad(
            "a named column has no place",
            f"has no place for the {named(unused)} that columns names: it was read as {shape}; leave that away, or put "
            "it into a template (--template).",
        )


def pieces(template: str) -> list[tuple[str, str]]:
    """Return the words of a template, each with the column that follows; ``{{`` and ``}}`` are braces.

    Raises:
        InputError: a brace stands alone, or no column is named.
    """
    found: list[tuple[str, str]] = []
    words = ""
    for token in _tokens(template):
        if token in ("{{", "}}"):
            words += token[0]
        elif token in ("{", "}"):
            raise InputError(f"The template {template!r} has a brace {token!r} by itself; write it twice.")
        elif token[0] == "{":
            found.append((words, token[1:-1].strip()))
            words = ""
            if not found[-1][1]:
                raise InputError(f"The template {template!r} has braces without a column's name in them.")
        else:
            words += token
    if not found:
        raise InputError(f"The template {template!r} names no column; write one in braces, such as {{question}}.")
    return [*found, (words, "")]


def _tokens(template: str) -> Iterable[str]:
    return re.findall(r"\{\{|\}\}|\{[^{}]*\}|[{}]|[^{}]+", template)

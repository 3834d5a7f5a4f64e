"""Rows to examples: which shape a row has, and what its columns mean in it.

Every row tells its shape by its columns, so a file may mix them; of several shapes that fit, the first one of
:data:`halfbyte.data.shapes.FORMATS` counts whose first column holds anything, unless the user names one. Columns are
found whatever their case, blanks and ``-``; columns of the user's own are named first (:mod:`halfbyte.data.columns`).
An example says which columns of its row were not used and what was made of the others.
"""

import dataclasses
import difflib
import itertools
import re
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from functools import lru_cache
from typing import Any

from halfbyte.data import preferences, trees
from halfbyte.data.cells import Cells, Names, plain, shown
from halfbyte.data.columns import Own, check_used
from halfbyte.data.contents import check_media
from halfbyte.data.examples import BadRow, Example
from halfbyte.data.shapes import FORMATS, NAMES, OWN, PAIRS, Format, is_message
from halfbyte.errors import LONGEST_NAME, NAMES_SHOWN, InputError, named, nearest

Row = tuple[str, Any]
Groups = tuple[tuple[str, ...], ...]
TOLD: list[tuple[str, Groups]] = [
    *(
        (FORMATS[name].about, FORMATS[name].needs)
        for name in ("preference", "messages", "alpaca", "completion", "text")
    ),
    *((" and ".join(names[0] for names in pair), pair) for pair in PAIRS),
]
"""Shapes that rows of other columns may have been meant to have; of the others, their values say more."""
TOLD_NAMES = {name for _, groups in TOLD for names in groups for name in names}
_NAME = re.compile(r"[^\W\d][\w.:/-]*")
MAYBE_JUDGED = {"messages", "alpaca", "completion", "question"}
"""Shapes of rows that a label would make judged ones."""
AHEAD = 1000
"""Rows at the beginning whose labels are no judgements, behind which the first judgement may come."""
LIKELY = 0.7
"""How alike two names must be for one to be taken for the other, misspelt."""


def examples_of(
    rows: Iterable[Row],
    *,
    format: str | None = None,
    columns: Mapping[str, str] | None = None,
    template: str | None = None,
    counts: Counter[str] | None = None,
) -> Iterator[Example | BadRow]:
    """Return the examples of rows, one for each, as they are read; of a tree of messages one for all of its rows.

    Args:
        rows: of each where it stands, and its value or that it is bad.
        format: the shape of all of them, a key of ``FORMATS``; None lets each row tell its own.
        columns: for names of ours (:data:`halfbyte.data.shapes.OWN`) the columns that they are.
        template: a text with columns in braces, which becomes the prompt where a completion is named among ``columns``,
            else the text that is trained.
        counts: is told how many rows have which shape.

    Raises:
        InputError: there is no such format, or ``columns`` or ``template`` cannot be understood.
    """
    if format is not None:
        wanted = format.strip().casefold()
        format = NAMES.get(wanted, wanted)
        if format not in FORMATS:
            raise InputError(
                f"There is no format {format!r}{nearest(format, [*FORMATS, *NAMES])}; formats are {', '.join(FORMATS)}."
            )
    own = Own(columns or {}, template, OWN)
    if not own and format in (None, "oasst"):
        rows = trees.gathered(rows)
    return _examples(rows, format, own, counts if counts is not None else Counter())


def example_of(cells: Cells) -> Example:
    """Return the example of one row by the shape that it tells.

    Raises:
        BadRow: it has none, or cannot be used.
    """
    check_media(cells)
    return FORMATS[_format_of(cells)].read(cells)


def _examples(rows: Iterable[Row], format: str | None, own: Own, counts: Counter[str]) -> Iterator[Example | BadRow]:
    rest = iter(rows)
    first, judged = _first(rest, own) if format is None else ([], False)
    for where, value in itertools.chain(first, rest):
        if isinstance(value, BadRow):
            yield value
            continue
        if isinstance(value, str):
            value = {"text": value}
        if not isinstance(value, Mapping):
            yield BadRow(where, "no columns", f"is not an object with named columns, but {shown(value)}; make it one.")
            continue
        try:
            cells = own.cells(where, value) if own else Cells(where, value)
            name = _format_of(cells) if format is None else _checked(format, cells)
            judged = judged or name == "unpaired"
            if judged and format is None and name in MAYBE_JUDGED and preferences.is_unreadable(cells):
                raise preferences.unreadable(cells, name)
            check_media(cells)
            example = FORMATS[name].read(cells)
            if own:
                check_used(cells, f"a row of {FORMATS[name].about}")
        except BadRow as bad:
            yield bad
        except RecursionError:
            yield BadRow(where, "nested too deeply", "is nested too deeply to be read; write it flatter.")
        else:
            counts[name] += 1
            yield dataclasses.replace(example, **cells.rest)


def _first(rows: Iterator[Row], own: Own) -> tuple[list[Row], bool]:
    """Return the first rows, as long as a judgement may be missing, and whether one follows: then it is missing."""
    first: list[Row] = []
    for where, value in itertools.islice(rows, AHEAD):
        first.append((where, value))
        if not isinstance(value, Mapping):
            break
        try:
            cells = own.cells(where, value) if own else Cells(where, value)
            if not preferences.is_unreadable(cells):
                return first, preferences.is_judged(cells)
        except (BadRow, RecursionError):  # which is told when it comes to that
            break
    return first, False


def _format_of(cells: Cells) -> str:
    """Return the first shape that a row has; one whose first column holds something goes before others."""
    empty = None
    candidates = FORMATS if cells.made else _candidates(cells.names)
    for name, form in candidates.items():
        if form.fits(cells):
            if len(candidates) == 1 or form.leads(cells):
                return name
            empty = empty or name
    if empty:
        return empty
    columns = cells.shown_names
    if is_message(cells):
        raise cells.bad(
            "a message, not a conversation",
            f"has the columns {named(columns)}, so it seems to be one message; put all of a conversation into one row, "
            "as a list called messages.",
        )
    raise cells.bad(
        "columns not recognised",
        f"has the columns {cells.told}, which make no known shape{_nearest_shape(columns)}; say which "
        "is which (--columns prompt=...,completion=..., or --columns text=...)" + _no_names(columns) + ".",
    )


def _no_names(columns: Sequence[str]) -> str:
    """Return the hint that a table lacks its header, where what stands for names are words or numbers of a row."""
    if all(_NAME.fullmatch(column) for column in columns):
        return ""
    return "; if these are not names but a row, put a line with the names of the columns above it"


@lru_cache(maxsize=4096)
def _candidates(names: Names) -> dict[str, Format]:
    return {name: form for name, form in FORMATS.items() if form.may_fit(names)}


def _checked(name: str, cells: Cells) -> str:
    """Return ``name``, that of a shape which a row is said to have, if it has its columns."""
    form = FORMATS[name]
    for group in form.needs:
        if not cells.find(*group):
            raise cells.bad(
                f"not of the format {name}",
                f"has the columns {cells.told}, but the format {name} needs "
                f"{' or '.join(group)}{_misspelt(group, cells.shown_names)}.",
            )
    if not form.fits(cells) and name not in ("text", "messages"):
        raise cells.bad(
            f"not of the format {name}",
            f"has the columns {cells.told}, which are no row of the format {name} ({form.about}).",
        )
    return name


def _misspelt(names: Iterable[str], columns: Iterable[str]) -> str:
    """Return the hint to a column that is called nearly as one of ``names``."""
    return next((hint for column in columns if (hint := _close(column, tuple(names)))), "")


def _close(column: str, names: tuple[str, ...]) -> str:
    close = difflib.get_close_matches(plain(column), names, n=1, cutoff=LIKELY)
    return f" (is {column!r} its {close[0]!r}?)" if close else ""


def _nearest_shape(columns: Iterable[str]) -> str:
    return _nearest(tuple(column[:LONGEST_NAME] for column in columns)[:NAMES_SHOWN])


@lru_cache(maxsize=256)
def _nearest(columns: tuple[str, ...]) -> str:
    """Return the shape that columns come nearest to, and what is missing or misspelt."""
    known = [plain(column) for column in columns]
    likely = {name: LIKELY for column in known for name in difflib.get_close_matches(column, TOLD_NAMES, cutoff=LIKELY)}

    def likeness(names: tuple[str, ...]) -> float:
        return 1.0 if {*names} & {*known} else max(likely.get(name, 0.0) for name in names)

    def score(groups: Groups) -> float:
        return sum(map(likeness, groups)) / len(groups)

    about, groups = max(TOLD, key=lambda shape: score(shape[1]))
    if not score(groups):
        return f"; such are {'; '.join(form.about for form in FORMATS.values())}"
    lacking = [names for names in groups if not {*names} & {*known}]
    hints = "".join(_misspelt(names, columns) for names in lacking)
    without = f", without {' and '.join(names[0] for names in lacking)}" if lacking else ""
    return f"; the nearest is {about}{without}{hints}"

"""One data file to rows, as what it is: told by its content first and by the ending of its name second.

    JSON in any form      ``json_rows``      .jsonl .ndjson .json
    CSV, any delimiter    ``csv_rows``       .csv .tsv
    Parquet, Arrow        ``tabular``        .parquet .arrow .feather
    plain text            here               .txt .md: a row ``{"text": ...}`` for a file, or for a piece of it

Text may be in any encoding and packed (``texts``). A row comes with where it stands (``rows.jsonl, row 17 (line 23)``),
and may be bad by itself (:class:`halfbyte.data.examples.BadRow`); what is wrong with a file as a whole is an error.
JSON, CSV and text are read by the standard library, because it knows the line that an error is in.
"""

import difflib
import json
import os
import re
import stat
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, BinaryIO, TextIO

from halfbyte.data import csv_rows, json_rows, tabular, texts
from halfbyte.errors import InputError, nearest
from halfbyte.files import absolute

JSON, CSV, PARQUET, ARROW, PLAIN = "JSON", "CSV", "Parquet", "Arrow", "text"
KINDS = {
    ".jsonl": JSON, ".ndjson": JSON, ".json": JSON, ".csv": CSV, ".tsv": CSV, ".parquet": PARQUET, ".arrow": ARROW,
    ".feather": ARROW, ".txt": PLAIN, ".text": PLAIN, ".md": PLAIN, ".markdown": PLAIN,
}  # fmt: skip
FOREIGN = {
    b"PK\x03\x04": "an archive or a sheet (zip, xlsx); unpack it, or save the sheet as CSV",
    b"\xd0\xcf\x11\xe0": "a document of Microsoft Office; save it as CSV or as plain text",
    b"%PDF": "a PDF; save its text as plain text",
    b"\x89HDF": "HDF5; save it as Parquet or JSON lines",
    b"SQLite f": "a database (SQLite); save its table as CSV",
}
"""First bytes of files that are no data to be read here, and what to do."""
TAR, TAR_AT = b"ustar", 257
"""What an archive of tar holds, usually packed, and where."""
LONGEST_PATH = 300
LOOKED_AT = 1 << 16
"""Characters that tell whether a file is JSON."""
TELL_EVERY = 1000
"""Rows from one call of ``progress`` to the next."""

Progress = Callable[[int, int, int], None]
"""Called with the rows read, the bytes read, and the bytes of the file."""
Split = int | str | None
"""How plain text is divided: a row a file ("document", None), or pieces of at most so many characters."""


def read_rows(
    path: str | Path,
    progress: Progress | None = None,
    *,
    encoding: str | None = None,
    split_text: Split = None,
    said: list[str] | None = None,
    name: Path | None = None,
) -> Iterator[tuple[str, Any]]:
    """Return the rows of a data file, each with where it stands; they are read as they are asked for.

    Args:
        path: the file.
        progress: called every 1000 rows and at the end.
        encoding: of text; None finds it.
        split_text: how plain text is divided.
        said: is told, in sentences, what was found out about the file that its name does not say.
        name: what the file is called in messages, if not by its path.

    Raises:
        InputError: the file is missing (at once), of no kind that can be read, unreadable, or without rows (when it
            comes to that).
    """
    file = absolute(path)
    check_file(file)
    return _read(file, name or Path(path), progress, encoding, pieces_of(split_text), said if said is not None else [])


def check_file(path: Path) -> None:
    """Make sure that ``path`` is a file.

    Raises:
        InputError: it is not.
    """
    try:
        mode = path.stat().st_mode
    except (FileNotFoundError, NotADirectoryError, ValueError):  # a name that holds NUL is a ValueError
        what = "is a link to nothing" if os.path.islink(path) else f"is not there{near(path)}"
    except OSError as error:
        what = f"cannot be looked at ({error.strerror})"
    else:
        if stat.S_ISREG(mode):
            return
        what = "is a folder" if stat.S_ISDIR(mode) else "is no regular file (a pipe can be given as -)"
    raise InputError(f"The data file {shown_path(path)} {what}; name a file, a folder or a hub id.")


def shown_path(path: Path | str) -> str:
    """Return a path for a message, on one line and not endless."""
    text = repr(str(path))
    return text if len(text) <= LONGEST_PATH else f"{text[:100]}...{text[-100:]}"


def pieces_of(split_text: Split) -> int | None:
    """Return how many characters a piece of plain text may have; None is all of it.

    Raises:
        InputError: ``split_text`` is no such number.
    """
    if split_text in (None, "document"):
        return None
    try:
        characters = int(split_text)
    except ValueError:
        characters = 0
    if characters < 1:
        raise InputError(
            f"split_text (--split-text) is {split_text!r}; it must be document, or a number of characters."
        )
    return characters


def kind_of(path: Path) -> str | None:
    """Return the kind of a file by its name, without an ending that says that it is packed; None if it says nothing."""
    name = path.name.casefold()
    for suffix in texts.SUFFIXES:
        name = name.removesuffix(suffix)
    return KINDS.get(Path(name).suffix)


def _read(
    file_path: Path, path: Path, progress: Progress | None, encoding: str | None, longest: int | None, said: list[str]
) -> Iterator[tuple[str, Any]]:
    row = 0
    try:
        size = file_path.stat().st_size
        with file_path.open("rb") as file:
            for row, found in enumerate(_rows(file_path, path, file, encoding, longest, said), start=1):
                yield found
                if progress and row % TELL_EVERY == 0:
                    progress(row, min(file.tell(), size), size)
    except OSError as error:
        raise InputError(f"{path} cannot be read: {error.strerror or error}.") from error
    except UnicodeError as error:
        raise InputError(f"{path} is not text of the given encoding ({error}); name another (--encoding).") from None
    if not row:
        raise InputError(f"{path} holds no rows.")
    if progress:
        progress(row, size, size)


def _rows(
    file_path: Path, path: Path, file: BinaryIO, encoding: str | None, longest: int | None, said: list[str]
) -> Iterator[tuple[str, Any]]:
    head = file.read(8)
    if head.startswith(b"PAR1"):
        return tabular.read_parquet(file_path, path, file)
    if head.startswith((b"ARROW1", b"\xff\xff\xff\xff")):
        return tabular.read_arrow(file_path, path, file)
    by_name = kind_of(path)
    if texts.open_bytes(path, file).read(TAR_AT + len(TAR))[TAR_AT:] == TAR:
        raise InputError(f"{path} is an archive (tar); unpack it.")
    if what := next((what for mark, what in FOREIGN.items() if head.startswith(mark)), None):
        raise InputError(f"{path} is {what}.")
    if by_name in (PARQUET, ARROW):
        raise InputError(f"{path} is no {by_name} file that can be read here; save it as JSON lines or CSV.")
    found = texts.find_encoding(path, file, encoding)

    def open_again() -> TextIO:
        return texts.open_text(path, file, found, newline="" if kind == CSV else None)

    kind = CSV  # so that newlines stay as they are where the beginning is looked at
    kind = _kind(path, by_name, open_again)
    facts = []
    if encoding is None and found != "utf-8-sig":
        facts.append(f"in {texts.shown(found)}")
    if kind == CSV:
        usual = "\t" if ".tsv" in path.name.casefold() else ","
        dialect = csv_rows.dialect_of(open_again(), usual)
        facts += dialect.unusual(usual)
    if facts or (kind != by_name and (by_name or kind == CSV)):
        said.append(" ".join([f"{path.name} is read as {kind}", " and ".join(facts)]).rstrip())
    match kind:
        case "JSON":
            return json_rows.read_json(path, open_again)
        case "CSV":
            return csv_rows.read_csv(path, open_again(), dialect)
        case _:
            return _plain(path, open_again(), longest)


def _kind(path: Path, by_name: str | None, open_again: Callable[[], TextIO]) -> str:
    """Return what a file of text is: JSON or a table also under the name of another kind, or of none."""
    words = open_again().read(LOOKED_AT).lstrip("\ufeff \t\r\n")
    if by_name == JSON or not words:
        return JSON if by_name is None else by_name
    if by_name is None and words[0] in "{[":
        return JSON
    if words[0] in "{[" and path.suffix.casefold() not in (".md", ".markdown"):
        if _OVER_LINES.match(words):
            return JSON
        try:
            if isinstance(json.loads(words.split("\n", 1)[0], strict=False), dict):
                return JSON
        except (ValueError, RecursionError):
            pass
    if by_name is None:
        if csv_rows.is_table(open_again()):
            return CSV
        raise InputError(
            f"{path} is no kind of data file that can be read here; name a file that ends in {', '.join(KINDS)}, or "
            "one that holds JSON or a table."
        )
    if by_name == PLAIN and ".txt" in path.name.casefold() and csv_rows.is_table(open_again(), "\t", least=3):
        return CSV
    return by_name


_OVER_LINES = re.compile(r'\[\s*\{\s*"|\{\s*\n\s*"')
"""How an array of objects begins, and an object over several lines."""


def _plain(path: Path, text: TextIO, longest: int | None) -> Iterator[tuple[str, Any]]:
    """Yield a file of text as one row, or in pieces that end where a paragraph, a line or a word does."""
    row, line, waiting, at = 1, 1, "", 0

    def found(piece: str) -> Iterator[tuple[str, Any]]:
        nonlocal row, line
        if piece.strip():
            where = f"{path}, row {row} (line {line + len(piece) - len(piece.lstrip(chr(10)))})"
            if what := texts.damage(line, piece, text.encoding):
                yield where, texts.damaged(where, what)
            else:
                yield where, texts.nul_bytes(where) if "\0" in piece else {"text": piece.strip("\n")}
            row += 1
        line += piece.count("\n")

    pieces = iter(lambda: text.read(texts.BLOCK), "")
    if longest is None:
        yield from found("".join(pieces))
        return
    for words in pieces:
        waiting, at = waiting[at:] + words, 0
        while len(waiting) - at > longest:
            end = _end(waiting, at, longest)
            yield from found(waiting[at:end])
            at = end
    yield from found(waiting[at:])


def _end(text: str, begin: int, longest: int) -> int:
    """Return where a piece of at most ``longest`` characters of a longer text ends best."""
    for mark in ("\n\n", "\n", " "):
        place = text.rfind(mark, begin + longest // 2, begin + longest)
        if place >= 0:
            return place + len(mark)
    return begin + longest


def near(path: Path) -> str:
    """Return the hint to a name that is nearly the same, at the first level where there is no such name."""
    while not is_there(path.parent) and path.parent != path.parent.parent:
        path = path.parent
    try:
        names = [entry.name for entry in path.parent.iterdir() if entry.name != path.name]
    except OSError:
        return ""
    stems = set(difflib.get_close_matches(path.stem, {Path(name).stem for name in names}, n=10))
    return nearest(path.name, [name for name in names if Path(name).stem in stems])  # the endings alone are no likeness


def is_there(path: Path) -> bool:
    """Tell whether there is such a file or folder, or something that may not be looked at."""
    try:
        path.lstat()
    except PermissionError:
        return True
    except (OSError, ValueError):
        return False
    return True

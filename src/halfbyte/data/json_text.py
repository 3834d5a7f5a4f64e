"""JSON text, taken apart from its beginning to its end: no more of it is held than the value being read."""

import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any, TextIO

from halfbyte.data.texts import damage
from halfbyte.errors import InputError

PIECE = 1 << 20
"""Characters of a file that are read at once."""
MARGIN = 16
"""An error so near to the end of a piece may be the cut: no literal and no escape of JSON is longer."""


SPACES = 1000
"""Characters of whitespace that may stand between two elements where one is looked for."""


class Json:
    """A text of which one value after the other is taken.

    Attributes:
        path: for messages.
        encoding: of the bytes of the text.
        line: of what comes next.
        cut: whether an error was that the text ends too early.
        damage: what was wrong with the bytes of the value that was taken last, if anything (``texts.damage``).
    """

    def __init__(self, path: Path, text: TextIO) -> None:
        self.path = path
        self.line = 1
        self.encoding = text.encoding
        self._text = text
        self.cut = False
        self.damage = ""
        self._is_damaged = False  # what was read into the piece
        self._ended = False
        self._piece = ""
        self._at = 0  # what comes next in the piece
        self._before = 0  # characters that stood before the piece in its first line
        self._first: re.Match[str] | None = None  # how the first element of an array begins
        self._decoder = json.JSONDecoder(strict=False)

    def peek(self) -> str:
        """Return the next character that is no whitespace, or nothing at the end."""
        while True:
            found = _SOMETHING.search(self._piece, self._at)
            self._to(found.start() if found else len(self._piece))
            if found:
                return found[0]
            if not self._more():
                return ""

    def elements(self, *, begun: bool = False) -> Iterator[tuple[int, Any]]:
        """Take the array that comes next: yield the line and the value of each element.

        A comma behind the last is left alone. With ``begun`` the elements that are left are taken (:meth:`resume`).
        """
        if not begun:
            self._take("[")
            self.peek()
            self._first = _BEGINNING.match(self._piece, self._at)
        while not self._took("]"):
            self.peek()
            yield self.line, self.value()
            if not self._took(","):
                self._take("]", "Expecting ',' delimiter")
                return

    def resume(self) -> bool:
        """Go on behind an element that cannot be read, with one that begins with the same name; tell if there is any.

        Objects within an element usually begin with another name than the elements themselves.
        """
        self.peek()
        begin = _BEGINNING.match(self._piece, self._at) or self._first
        if self.cut or not begin:
            return False
        following = re.compile(r"\}\s*,?\s*(?=\{\s*" + re.escape(begin[1]) + r"\s*:)")
        while not (found := following.search(self._piece, self._at + 1)):
            self._to(max(self._at, len(self._piece) - len(begin[1]) - SPACES))
            if not self._more():
                return False
        self._to(found.end())
        return True

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
                raise not_json(self.path, self.line, error) from error
            else:
                if not isinstance(value, int | float) or end + MARGIN <= len(self._piece) or not self._more():
                    self.damage = ""
                    if self._is_damaged:
                        self.damage = damage(self.line, self._piece[self._at : end], self.encoding)
                    self._to(end)
                    return value

    def skip(self, character: str) -> None:
        """Take ``character`` if it comes next."""
        self._took(character)

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
            self._ended = True
            return False
        taken = self._piece[: self._at]
        last_line = taken.rpartition("\n")[2]
        self._before = len(last_line) + (self._before if len(last_line) == len(taken) else 0)
        self._piece = self._piece[self._at :] + new
        self._at = 0
        self._is_damaged = bool(damage(1, self._piece if self._is_damaged else new, self.encoding))
        return True

    def _wrong(self, what: str, at: int) -> InputError:
        beyond = what.startswith("Unterminated string") or _is_cut(self._piece[at : at + 2 * MARGIN].strip(), what)
        self.cut = beyond and (self._ended or not self._more())
        line = self.line + self._piece.count("\n", self._at, at)
        begin = self._piece.rfind("\n", 0, at) + 1
        column = at - begin + 1 + (0 if begin else self._before)
        return InputError(f"{self.path}, line {line} is not JSON: {what.removesuffix(' at')} at column {column}.")


def not_json(path: Path, line: int, error: Exception) -> InputError:
    """Return the error that a value in ``line`` cannot be read."""
    return InputError(f"{path}, line {line} {problem(error)}.")


def problem(error: Exception) -> str:
    """Return what Python's parser complains of, as the end of a sentence."""
    match error:
        case json.JSONDecodeError():
            return f"is not JSON: {error.msg.removesuffix(' at')} at column {error.colno}"
        case RecursionError():
            return "has brackets within brackets, too many to be read"
        case _:
            return "has a number with too many digits to be read; write it as text"


def _is_cut(rest: str, what: str) -> bool:
    """Tell whether ``rest``, where an error is that is called ``what``, may be all that is left of a literal."""
    if what.startswith("Invalid \\"):
        return len(rest) < 2 * MARGIN and '"' not in rest
    return any(literal.startswith(rest) for literal in ("true", "false", "null", "NaN", "Infinity", "-Infinity"))


_BEGINNING = re.compile(r'\{\s*("[^"\\]{1,80}")\s*:')
_SOMETHING = re.compile(r"[^ \t\n\r]")

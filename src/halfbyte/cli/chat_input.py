"""What the user types: a line with editing, history and completion, or several lines.

    \"\"\"         alone on a line begins a message of several lines, and ends it
    ... \\       at its end, a line goes on with the next one

What is pasted comes as one message where the terminal tells (bracketed paste, readline 8.1).
"""

import contextlib
import sys
from collections.abc import Iterable, Iterator
from pathlib import Path

from halfbyte.cli.console import notes

FENCE = '"""'
MOST_HISTORY = 2000


@contextlib.contextmanager
def editing(words: Iterable[str], history: Path) -> Iterator[None]:
    """Give ``input`` line editing, a history that is kept in a file, and completion of commands, in a terminal.

    Args:
        words: that a line may begin with.
        history: the file; only its user may read it.
    """
    if sys.stdin is None or not sys.stdin.isatty():
        yield
        return
    try:
        import readline
    except ImportError:
        yield
        return
    known = sorted(words)

    def complete(text: str, state: int) -> str | None:
        found = [word for word in known if word.startswith(text)] if readline.get_begidx() == 0 and text else []
        return f"{found[state]} " if state < len(found) else None

    before, delimiters = readline.get_completer(), readline.get_completer_delims()
    readline.set_completer(complete)
    readline.set_completer_delims(" \t\n")
    readline.parse_and_bind("tab: complete")
    readline.parse_and_bind("set enable-bracketed-paste on")
    readline.set_history_length(MOST_HISTORY)
    with contextlib.suppress(OSError):
        readline.read_history_file(history)
    try:
        yield
    finally:
        readline.set_completer(before)
        readline.set_completer_delims(delimiters)
        with contextlib.suppress(OSError):
            history.parent.mkdir(parents=True, exist_ok=True)
            history.touch(mode=0o600)
            readline.write_history_file(history)


def read_message() -> str | None:
    """Return what the user types next, or None at the end."""
    while sys.stdin is not None:
        try:
            return _read()
        except EOFError:
            return None
        except KeyboardInterrupt:
            notes.print("\n/quit or Ctrl-D ends.", style="dim")
    return None


def _read() -> str:
    line = _line("> ")
    if line.strip() == FENCE:
        return "\n".join(_block())
    lines = []
    while line.endswith("\\"):
        lines.append(line[:-1])
        try:
            line = _line(". ")
        except EOFError:
            line = ""
    return "\n".join([*lines, line]).strip()


def _block() -> Iterator[str]:
    """Yield the lines up to the closing fence, or to the end of what there is."""
    while True:
        try:
            line = _line(". ")
        except EOFError:
            return
        if line.strip() == FENCE:
            return
        yield line


def _line(prompt: str) -> str:
    return input(prompt if sys.stdin.isatty() else "")

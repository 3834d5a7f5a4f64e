"""How an answer is shown while it comes: as it is, or, in a terminal that can, as Markdown.

Markdown is drawn block by block. A block that another one follows is printed once and for all; only the last one, which
may still change, is drawn anew, and of it no more than fits on the screen, so that nothing flickers and nothing scrolls
away half-drawn. Text that only looks like HTML stays text, and lines stay lines.
"""

import os
import sys
import time
from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING, Protocol

from rich.console import Console, ConsoleOptions, RenderableType, RenderResult
from rich.live import Live
from rich.segment import Segment
from rich.table import Table
from rich.text import Text

from halfbyte.cli.console import notes

if TYPE_CHECKING:
    from markdown_it.token import Token
    from rich.markdown import Markdown

SECONDS = 0.06
"""Between two drawings."""
CONTROL = (
    {code: 0x2400 + code for code in range(32) if chr(code) not in "\t\n"}
    | {0x7F: 0x2421}
    | dict.fromkeys(range(0x80, 0xA0), 0xFFFD)
)
"""Characters that a terminal obeys, and the ones that stand for them there."""


class Screen(Protocol):
    """Shows one answer after the other."""

    def begin(self) -> None:
        """Begin an answer."""

    def add(self, text: str, *, is_thought: bool = False) -> None:
        """Show what came."""

    def end(self, remark: str | None = None) -> None:
        """End the answer, with a remark on its end."""

    def columns(self, texts: Mapping[str, str], *, is_last: bool) -> None:
        """Show several answers side by side, as far as they are."""


def screen_for(plain: bool) -> Screen:
    """Return the screen that standard output is."""
    able = sys.stdout is not None and sys.stdout.isatty() and "NO_COLOR" not in os.environ
    return PlainScreen() if plain or not able or os.environ.get("TERM") == "dumb" else MarkdownScreen(Console())


class PlainScreen:
    """Answers as they are on standard output; thoughts, in grey where there are colours, on standard error."""

    def __init__(self) -> None:
        self._was_thought = False

    def begin(self) -> None:
        """Begin an answer."""
        self._was_thought = False

    def add(self, text: str, *, is_thought: bool = False) -> None:
        """Show what came."""
        if is_thought:
            notes.print(shown(text) if notes.is_terminal else text, style="dim", end="", markup=False, soft_wrap=True)
        else:
            if self._was_thought:
                notes.print()
            sys.stdout.write(shown(text) if sys.stdout.isatty() else text)
            sys.stdout.flush()
        self._was_thought = is_thought

    def end(self, remark: str | None = None) -> None:
        """End the answer."""
        if remark:
            notes.print(f" ({remark})", style="dim", end="" if sys.stdout.isatty() else "\n", markup=False)
        print(flush=True)

    def columns(self, texts: Mapping[str, str], *, is_last: bool) -> None:
        """Show several answers one below the other, at their end."""
        if is_last:
            for name, text in texts.items():
                print(f"[{name}]\n{shown(text) if sys.stdout.isatty() else text}\n", flush=True)


class MarkdownScreen:
    """Answers drawn in a terminal."""

    def __init__(self, console: Console) -> None:
        self._console = console
        self._live: Live | None = None
        self._rest = self._thought = ""
        self._printed = False
        self._drawn = 0.0

    def begin(self) -> None:
        """Begin an answer."""
        self._rest = self._thought = ""
        self._printed = False
        self._start()

    def add(self, text: str, *, is_thought: bool = False) -> None:
        """Show what came."""
        if is_thought:
            self._thought += shown(text)
        else:
            if self._thought:
                self._print(Text(self._thought.strip(), style="dim"))
                self._thought = ""
            self._rest += shown(text)
        if time.monotonic() - self._drawn >= SECONDS:
            self._draw()

    def end(self, remark: str | None = None) -> None:
        """End the answer: what is left is printed as it stays."""
        self._stop()
        if self._thought:
            self._print(Text(self._thought.strip(), style="dim"))
        if self._rest.strip():
            self._print(markdown(self._rest))
        if remark:
            notes.print(f"({remark})", style="dim", markup=False)
        self._rest = self._thought = ""

    def columns(self, texts: Mapping[str, str], *, is_last: bool) -> None:
        """Show several answers side by side."""
        table = Table(expand=True, show_lines=False)
        for name in texts:
            table.add_column(Text(name), ratio=1)
        table.add_row(*(markdown(shown(text)) for text in texts.values()))
        if is_last:
            self._stop()
            self._console.print(table)
        elif self._live is None:
            self._start()
        elif time.monotonic() - self._drawn >= SECONDS:
            self._live.update(_Tail(table), refresh=True)
            self._drawn = time.monotonic()

    def _start(self) -> None:
        self._live = Live(Text("…", style="dim"), console=self._console, auto_refresh=False, transient=True)
        self._live.start(refresh=True)

    def _stop(self) -> None:
        if self._live:
            self._live.stop()
            self._live = None

    def _draw(self) -> None:
        if self._live is None:
            return
        begin = last_block(self._rest)
        if begin:
            self._print(markdown(self._rest[:begin]))
            self._rest = self._rest[begin:]
        tail = Text(self._thought.strip(), style="dim") if self._thought else markdown(self._rest)
        self._live.update(_Tail(tail), refresh=True)
        self._drawn = time.monotonic()

    def _print(self, renderable: RenderableType) -> None:
        if self._printed:
            self._console.print()
        self._console.print(renderable)
        self._printed = True


class _Tail:
    """The last lines of something, as many as the screen has."""

    def __init__(self, renderable: RenderableType) -> None:
        self._renderable = renderable

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        lines = console.render_lines(self._renderable, options.update(height=None), pad=False)
        for line in lines[-max(1, console.height - 2) :]:
            yield from line
            yield Segment.line()


def shown(text: str) -> str:
    """Return a text without characters that a terminal would obey."""
    return text.translate(CONTROL)


def last_block(text: str) -> int:
    """Return where the last block of a Markdown text begins, in characters; 0 where there is one at most."""
    from markdown_it import MarkdownIt

    begins = [
        token.map[0]
        for token in MarkdownIt("commonmark", {"html": False}).enable("table").parse(text)
        if token.level == 0 and token.map and token.nesting >= 0
    ]
    return sum(len(line) + 1 for line in text.split("\n")[: begins[-1]]) if len(begins) > 1 else 0


def markdown(text: str) -> "Markdown":
    """Return Markdown to be drawn, in which HTML is text and each line is one, as chat models mean them."""
    from markdown_it import MarkdownIt
    from rich.markdown import Markdown

    drawn = Markdown("", code_theme="ansi_dark", hyperlinks=False)
    parser = MarkdownIt("commonmark", {"html": False}).enable("strikethrough").enable("table")
    drawn.markup, drawn.parsed = text, parser.parse(text)
    for token in _tokens(drawn):
        if token.type == "softbreak":
            token.type = "hardbreak"
    return drawn


def _tokens(drawn: "Markdown") -> Iterator["Token"]:
    for token in drawn.parsed:
        yield from token.children or ()

"""What the commands print: answers on standard output, everything else on standard error; the run in the terminal."""

import contextlib
import shlex
import shutil
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import typer
from rich.console import Console, RenderableType
from rich.live import Live
from rich.progress import (
    BarColumn,
    DownloadColumn,
    MofNCompleteColumn,
    Progress,
    ProgressColumn,
    Task,
    TaskID,
    TextColumn,
    TimeRemainingColumn,
)
from rich.text import Text

from halfbyte.cli.live import StepView
from halfbyte.runs import events
from halfbyte.runs.report.words import duration, figure

INTERRUPTED = 130
EVERY = 15.0
"""Seconds between two lines about how far something is, where no bar can be drawn."""
TABLE_WIDTH = 160
"""Characters, where standard output is not a terminal."""

notes = Console(stderr=True, highlight=False)


def fail(sentence: str) -> int:
    """Print an error's sentence and return its exit code."""
    typer.echo(f"Error: {sentence}", err=True)
    return 2


def print_table(table: RenderableType) -> None:
    """Print a table on standard output, wide where that is not a terminal."""
    Console(width=None if sys.stdout.isatty() else TABLE_WIDTH).print(table)


def command(*arguments: str) -> str:
    """Return a command line for the user to type, as this program was started."""
    started = sys.argv[0]
    program = started if Path(started).name == "halfbyte" and shutil.which("halfbyte") != started else "halfbyte"
    return shlex.join([program, *arguments])


def shown(path: Path) -> str:
    """Return ``path`` as short as it can be said from the working directory."""
    here = Path.cwd()
    return str(path.relative_to(here)) if path.is_relative_to(here) and path != here else str(path)


@contextlib.contextmanager
def status(text: str) -> Iterator[None]:
    """Show in a terminal that something is under way."""
    with notes.status(text) if notes.is_terminal else contextlib.nullcontext():
        yield


@contextlib.contextmanager
def bar(*columns: str, tells_rate: bool = False) -> Iterator[Progress]:
    """Show a progress bar with these columns before it, or lines without a terminal; add tasks to what is yielded.

    Args:
        *columns: texts.
        tells_rate: say how many are done in a second.
    """
    texts = [TextColumn(column) for column in columns]
    rates = [_Rate()] if tells_rate else []
    made = [*texts, BarColumn(), MofNCompleteColumn(), *rates, TimeRemainingColumn()]
    with Progress(*made, console=notes, transient=True) if notes.is_terminal else _Lines(*columns) as progress:
        if isinstance(progress, _Lines):
            progress.tells_rate = tells_rate
        yield progress


def stages(progress: Progress) -> Callable[[str, int, int], None]:
    """Return what shows in a bar how far each of several things is that are done one after the other.

    It is told what is being done, how many of it are done and how many there are, 0 where that is not known.
    """
    under_way: list[tuple[str, TaskID]] = []

    def tell(what: str, done: int, total: int) -> None:
        if not under_way or under_way[0][0] != what:
            for _, task in under_way:
                progress.remove_task(task)
            under_way[:] = [(what, progress.add_task(what, total=total or None))]
        progress.update(under_way[0][1], completed=done, total=total or None)

    return tell


class _Rate(ProgressColumn):
    """How many are done in a second."""

    def render(self, task: Task) -> Text:
        """Return it, as the last ones went."""
        return Text(_rate(task))


def _rate(task: Task) -> str:
    return f"{task.speed:.3g}/s" if task.speed else ""


class _Lines(Progress):
    """How far something is, a line now and then."""

    def __init__(self, *columns: str) -> None:
        super().__init__(disable=True)
        self.tells_rate = False
        self._words = " ".join(columns)
        self._said = time.monotonic()

    def update(self, task_id: TaskID, **changes: Any) -> None:
        """Note how far a task is, and say it if that was not said lately."""
        super().update(task_id, **changes)
        task = self._tasks[task_id]
        if task.total and time.monotonic() - self._said >= EVERY:
            self._said = time.monotonic()
            left = "" if task.time_remaining is None else f", {duration(task.time_remaining)} left"
            rate = f", {_rate(task)}" if self.tells_rate and task.speed else ""
            what = self._words.format(task=task).strip()
            notes.print(f"{what}: {task.completed:,.0f} of {task.total:,.0f}{rate}{left}", markup=False)


class TerminalDisplay:
    """A listener of a run: its step, figures and times, drawn anew; a line a step without a terminal.

    Args:
        console: where it shows; None: standard error.
        unit: what the rate counts.
    """

    def __init__(self, console: Console | None = None, unit: str = "trained tokens") -> None:
        self._console = console or notes
        self._unit = unit
        self._is_live = self._console.is_terminal and not self._console.is_dumb_terminal
        self._progress: Progress | None = None
        self._live: Live | None = None
        self._view = StepView(0)

    def __call__(self, event: events.Event) -> None:
        """Show ``event``."""
        match event:
            case events.Stage(name="data", text=text) if self._is_live:
                self._progress = Progress(
                    TextColumn(text), BarColumn(), DownloadColumn(), TimeRemainingColumn(),
                    console=self._console, transient=True,
                )  # fmt: skip
                self._progress.add_task("", total=None)
                self._progress.start()
            case events.Progress(done=done, total=total) if self._progress:
                self._progress.update(self._progress.task_ids[0], completed=done, total=total)
            case events.Stage(name="model"):
                self.close()
                self._say(event.text)
            case events.Note():
                self._say(event.told, "yellow" if event.trouble else None)
            case events.Begin():
                self._begin(event.step, event.total_steps)
            case events.StepMetrics():
                self._view.step(event)
                if not self._live:
                    self._say(self._view.line())
            case events.Evaluation(step=step, figures=figures):
                self._view.evaluated(event)
                told = ", ".join(
                    [f"{figure(name)} {value:.4g}" for name, value in figures.items()]
                    + [f"{figure(name)} not finite" for name in event.not_finite]
                )
                self._say(f"evaluation after step {step}: {told}")
            case events.Sample(step=step, prompt=prompt, answer=answer):
                self._view.aside()
                self._say(f"step {step}  {prompt}\n→ {answer}")
            case events.End():
                self.close()

    def close(self) -> None:
        """Leave the terminal with what was drawn last, also where a run ends with an error."""
        for drawn in (self._progress, self._live):
            if drawn:
                drawn.stop()
        self._progress = self._live = None

    def _say(self, text: str, style: str | None = None) -> None:
        self._console.print(text, style=style, markup=False, highlight=False, soft_wrap=not self._is_live)

    def _begin(self, step: int, total_steps: int) -> None:
        self._view = StepView(total_steps, step, self._unit)
        if self._is_live:
            self._live = Live(self._view, console=self._console, refresh_per_second=4, vertical_overflow="visible")
            self._live.start()

"""What the commands print: answers on standard output, everything else on standard error; the run in the terminal."""

import contextlib
import shlex
import shutil
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import typer
from rich.console import Console, RenderableType
from rich.progress import (
    BarColumn,
    DownloadColumn,
    MofNCompleteColumn,
    Progress,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)

from halfbyte.runs import events

INTERRUPTED = 130
TABLE_WIDTH = 160
"""Characters, where standard output is not a terminal."""
PLAIN_INTERVAL = 15.0
"""Seconds between two lines of a run where the output is not a terminal."""

FIGURES = {"rewards/accuracies": "accuracy", "rewards/margins": "margin"}
"""What of a step's figures is shown, and under which name."""

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
def bar(*columns: str) -> Iterator[Progress]:
    """Show a progress bar with these columns before it, in a terminal; add tasks to what is yielded."""
    texts = [TextColumn(column) for column in columns]
    with Progress(
        *texts, BarColumn(), MofNCompleteColumn(), TimeRemainingColumn(), console=notes, transient=True,
        disable=not notes.is_terminal,
    ) as progress:  # fmt: skip
        yield progress


class TerminalDisplay:
    """A listener of a run: a bar with step, loss, rate, elapsed and remaining time; plain lines without a terminal.

    Args:
        console: where it shows; None: standard error.
        unit: what the rate counts.
    """

    def __init__(self, console: Console | None = None, unit: str = "trained tokens") -> None:
        self._console = console or notes
        self._unit = unit
        self._progress: Progress | None = None
        self._total = 0
        self._last_line = 0.0

    def __call__(self, event: events.Event) -> None:
        """Show ``event``."""
        match event:
            case events.Stage(name="data", text=text) if self._console.is_terminal:
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
            case events.Note(text=text):
                self._say(text)
            case events.Begin():
                self._begin(event.step, event.total_steps)
            case events.StepMetrics():
                self._step(event)
            case events.Evaluation(step=step, figures=figures):
                self._say(f"step {step}  " + "  ".join(f"{name} {value:.4g}" for name, value in figures.items()))
            case events.Sample(step=step, prompt=prompt, answer=answer):
                self._say(f"step {step}  {prompt}\n→ {answer}")
            case events.End():
                self.close()

    def close(self) -> None:
        """Take the bar away, which stays where a run ends with an error."""
        if self._progress:
            self._progress.stop()
            self._progress = None

    def _say(self, text: str) -> None:
        self._console.print(text, markup=False, highlight=False)

    def _begin(self, step: int, total_steps: int) -> None:
        self._total = total_steps
        self._last_line = time.monotonic()
        if self._console.is_terminal:
            self._progress = Progress(
                TextColumn("step"),
                MofNCompleteColumn(),
                BarColumn(bar_width=None),
                TextColumn("{task.fields[figures]}"),
                TimeElapsedColumn(),
                TextColumn("left"),
                TimeRemainingColumn(elapsed_when_finished=False),
                console=self._console,
            )
            self._progress.add_task("", completed=step, total=total_steps, figures="")
            self._progress.start()

    def _step(self, step: events.StepMetrics) -> None:
        shown = [f"{name} {step.figures[key]:.3g}" for key, name in FIGURES.items() if key in step.figures]
        figures = "  ".join([f"loss {step.loss:.3f}", *shown, f"{step.tokens_per_second:,.0f} {self._unit}/s"])
        if self._progress:
            self._progress.update(self._progress.task_ids[0], completed=step.step, figures=figures)
        elif time.monotonic() - self._last_line >= PLAIN_INTERVAL or step.step == self._total:
            self._last_line = time.monotonic()
            self._say(f"step {step.step}/{self._total}  {figures}  {step.elapsed:.0f} s")

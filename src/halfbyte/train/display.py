"""What a run shows while it goes: nothing (:class:`Display`), or a live line in a terminal (:class:`TerminalDisplay`).

The run calls ``begin`` once, ``step`` after each optimizer step and ``end`` once, and ``note`` at any time.
"""

import time
from dataclasses import dataclass

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

PLAIN_INTERVAL = 15.0
"""Seconds between two lines where the output is not a terminal."""


@dataclass(frozen=True)
class StepMetrics:
    """One optimizer step; one line of ``metrics.jsonl``.

    Attributes:
        step: number of the step, from 1.
        epoch: passes over the data so far.
        loss: mean negative log-likelihood of the step's trained tokens, in nats.
        learning_rate: the one the step was made with.
        grad_norm: L2 norm of the gradient before clipping.
        trained_tokens: tokens with a label, since the start of the run.
        tokens_per_second: trained tokens of this step over its seconds.
        elapsed: seconds of training since the start of the run, the time between an interruption and resuming apart.
    """

    step: int
    epoch: float
    loss: float
    learning_rate: float
    grad_norm: float
    trained_tokens: int
    tokens_per_second: float
    elapsed: float


class Display:
    """Shows nothing; subclass it to show something."""

    def note(self, text: str) -> None:
        """Tell one fact, such as what is being loaded."""

    def begin(self, first_step: int, total_steps: int) -> None:
        """Training starts after ``first_step`` steps (0, or those of the checkpoint) of ``total_steps``."""

    def step(self, metrics: StepMetrics) -> None:
        """An optimizer step is done."""

    def end(self) -> None:
        """Training is over, for whatever reason."""


class TerminalDisplay(Display):
    """A progress bar with step, loss, rate, elapsed and remaining time; plain lines where there is no terminal."""

    def __init__(self, console: Console | None = None) -> None:
        self._console = console or Console(stderr=True)
        self._progress: Progress | None = None
        self._total = 0
        self._last_line = 0.0

    def note(self, text: str) -> None:
        self._console.print(text, markup=False, highlight=False)

    def begin(self, first_step: int, total_steps: int) -> None:
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
            self._progress.add_task("", completed=first_step, total=total_steps, figures="")
            self._progress.start()

    def step(self, metrics: StepMetrics) -> None:
        figures = f"loss {metrics.loss:.3f}  {metrics.tokens_per_second:,.0f} trained tokens/s"
        if self._progress:
            self._progress.update(self._progress.task_ids[0], completed=metrics.step, figures=figures)
        elif time.monotonic() - self._last_line >= PLAIN_INTERVAL or metrics.step == self._total:
            self._last_line = time.monotonic()
            self.note(f"step {metrics.step}/{self._total}  {figures}  {metrics.elapsed:.0f} s")

    def end(self) -> None:
        if self._progress:
            self._progress.stop()
            self._progress = None

"""The step under way, in as many lines as the width asks for: nothing is cut off, whatever the width.

    step 120/400 ━━━━━━━━━━╸━━━━━━━━━━━━━━━━━━━━━━━ 2 min 05 s, 4 min 50 s left
    loss 0.213 (mean 0.245)  learning rate 4.2e-4  gradient norm 1.31  27 trained tokens/s  1.90 GiB
    evaluation 0.152 (step 100)

In a terminal rich's ``Live`` draws it anew four times a second, so that another width is used from the next drawing on;
what was drawn at the old one and no longer fits stays above and takes nothing with it.
"""

import time
from collections import deque
from collections.abc import Sequence

from rich.console import Console, ConsoleOptions, RenderResult
from rich.text import Text

from halfbyte.errors import size_text
from halfbyte.runs import events
from halfbyte.runs.history import LOSS_STEPS
from halfbyte.runs.report.axes import number
from halfbyte.runs.report.words import duration, figure

SHOWN = {"rewards/accuracies": "accuracy", "rewards/margins": "margin", "expert_load": "expert load"}
"""What of a step's figures is shown, and under which name."""
RECENT = 30
"""Steps by whose time the time left is told."""
LEAST_BAR = 8
"""Characters; a shorter bar says nothing and is left away."""
GAP = "  "


class StepView:
    """What is known of a run's steps, as a thing that rich can draw.

    Args:
        total: steps of the run.
        step: those that were made before.
        unit: what the rate counts.
    """

    def __init__(self, total: int, step: int = 0, unit: str = "trained tokens") -> None:
        self.total = total
        self.unit = unit
        self._number = step
        self._step: events.StepMetrics | None = None
        self._losses: deque[float] = deque(maxlen=LOSS_STEPS)
        self._evaluation = ""
        self._begun = time.monotonic()
        self._before = 0.0  # seconds of training until then
        self._times = deque([(step, self._begun)], maxlen=RECENT)

    def step(self, step: events.StepMetrics) -> None:
        """Take in a step."""
        now = time.monotonic()
        if self._step is None:
            self._before = max(0.0, step.elapsed - (now - self._begun))
        self._number, self._step = step.step, step
        self._losses.append(step.loss)
        self._times.append((step.step, now))

    def aside(self) -> None:
        """Count the time of what comes before the first step, evaluation and samples, to no step."""
        if self._step is None:
            self._times[0] = (self._number, time.monotonic())

    def evaluated(self, evaluation: events.Evaluation) -> None:
        """Take in an evaluation."""
        self.aside()
        if evaluation.figures:
            name, value = next(iter(evaluation.figures.items()))
            label = "" if name == "loss" else f"{figure(name)} "
            self._evaluation = f"evaluation {label}{value:.4g} (step {evaluation.step:,})"

    def figures(self) -> list[str]:
        """Return the figures of the last step, then the last evaluation."""
        step = self._step
        if step is None:
            return [self._evaluation] if self._evaluation else []
        mean = f" (mean {sum(self._losses) / len(self._losses):.3f})" if len(self._losses) > 1 else ""
        pieces = [f"loss {step.loss:.3f}{mean}"]
        pieces += [f"{name} {step.figures[key]:.3g}" for key, name in SHOWN.items() if key in step.figures]
        pieces += [f"learning rate {number(step.learning_rate)}", f"gradient norm {step.grad_norm:.3g}"]
        pieces.append(f"{step.tokens_per_second:,.0f} {self.unit}/s")
        if step.memory_bytes:
            pieces.append(size_text(step.memory_bytes))
        if step.gpu_memory_bytes:
            pieces.append(f"GPU {size_text(step.gpu_memory_bytes)}")
        return [*pieces, self._evaluation] if self._evaluation else pieces

    def elapsed(self) -> float:
        """Return the seconds of training so far."""
        return self._before + time.monotonic() - self._begun

    def left(self) -> float | None:
        """Return the seconds that are left, as the last steps went; None before the first."""
        (first, begun), (last, now) = self._times[0], self._times[-1]
        return (now - begun) / (last - first) * (self.total - last) if last > first else None

    def times(self) -> str:
        """Return the time so far, and the time left."""
        left = self.left()
        told = f", {duration(left)} left" if left is not None and self._number < self.total else ""
        return duration(self.elapsed()) + told

    def line(self) -> str:
        """Return all of it as one line."""
        return GAP.join([f"step {self._number}/{self.total}", *self.figures(), self.times()])

    def lines(self, width: int) -> list[str]:
        """Return all of it in lines of at most ``width`` characters; a word that is longer has a line of its own."""
        head, tail = f"step {self._number}/{self.total}", self.times()
        room = width - len(head) - len(tail) - 2
        first = [f"{head} {bar(self._number / max(self.total, 1), room)} {tail}"] if room >= LEAST_BAR else None
        return (first or flow([head, tail], width)) + flow(self.figures(), width)

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        """Yield the lines that fit; the last column stays free, since some terminals begin a new line behind it."""
        for line in self.lines(max(1, options.max_width - 1)):
            yield Text(line, no_wrap=len(line) < options.max_width, overflow="fold")


def bar(share: float, width: int) -> str:
    """Return a line of ``width`` characters of which ``share`` is heavy."""
    done = round(share * width)
    return "━" * done + "─" * (width - done)


def flow(pieces: Sequence[str], width: int) -> list[str]:
    """Put pieces one behind the other into lines of at most ``width`` characters; longer ones are parted at blanks."""
    lines: list[str] = []
    line = ""
    for piece in pieces:
        fitting = [piece] if len(piece) <= width else piece.split(" ")
        for at, part in enumerate(fitting):
            gap = GAP if at == 0 else " "
            if line and len(line) + len(gap) + len(part) > width:
                lines.append(line)
                line = part
            else:
                line = f"{line}{gap}{part}" if line else part
    return [*lines, line] if line else lines

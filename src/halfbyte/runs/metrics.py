"""``metrics.jsonl``: every event of a run that is worth keeping, in the order in which it happened."""

import hashlib
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from halfbyte import __version__
from halfbyte.files import append, read_lines, write_text
from halfbyte.runs.events import Event, Header, StepMetrics, from_lines, to_line


class MetricsFile:
    """A listener that writes the file; events that come before :meth:`open` are written then.

    Each line is on the disk before the call returns, so that no checkpoint is ahead of it.

    Attributes:
        lacked: how many of the steps that were made the file did not have when it was opened.
    """

    def __init__(self) -> None:
        self._path: Path | None = None
        self._waiting: list[Event] = []
        self.lacked = 0

    def __call__(self, event: Event) -> None:
        """Keep ``event``."""
        if not event.kept:
            return
        if self._path is None:
            self._waiting.append(event)
        else:
            append(self._path, to_line(event))

    def digest(self) -> dict[str, Any] | None:
        """Return how many lines there are behind the header, and their SHA-256."""
        if self._path is None:
            return None
        lines = read_lines(self._path)[1:]
        return {"lines": len(lines), "sha256": _digest(lines)}

    def open(self, path: Path, step: int = 0, known: Sequence[StepMetrics] = ()) -> list[StepMetrics]:
        """Begin the file at ``path``, or with ``step`` go on with the one that is there.

        Args:
            path: of the file.
            step: that was made last.
            known: steps up to that one, of which the file gets those that it lacks.

        Returns:
            The steps up to ``step``; what is told of later ones is taken out of the file.
        """
        before = until(read_events(path), step) if step and path.exists() else []
        whole = with_steps(before, known)
        self.lacked, before = len(whole) - len(before), whole
        events = [Header(halfbyte=__version__), *before, *self._waiting]
        write_text(path, "".join(to_line(event) + "\n" for event in events))
        self._path, self._waiting = path, []
        return [event for event in before if isinstance(event, StepMetrics)]


def is_as(path: Path, digest: Mapping[str, Any]) -> bool:
    """Return whether the file at ``path`` begins with what :meth:`MetricsFile.digest` was taken of."""
    lines = read_lines(path)[1:] if path.exists() else []
    return bool(_digest(lines[: digest["lines"]]) == digest["sha256"])


def _digest(lines: Iterable[str]) -> str:
    return hashlib.sha256("".join(f"{line}\n" for line in lines).encode()).hexdigest()


def read_events(path: Path) -> list[Event]:
    """Return the events in the file at ``path``, as :func:`halfbyte.runs.events.from_lines` reads them."""
    return list(from_lines(read_lines(path), str(path)))


def until(events: Iterable[Event], step: int) -> list[Event]:
    """Return the events that were told before step ``step + 1`` was made."""
    kept: list[Event] = []
    for event in events:
        if isinstance(event, StepMetrics) and event.step > step:
            break
        kept.append(event)
    return kept


def with_steps(events: Sequence[Event], known: Sequence[StepMetrics]) -> list[Event]:
    """Return ``events`` with those of the ``known`` steps, by their numbers, that they lack.

    Tokens and seconds since the start of the run, which nobody knows of them, are those of the step before.
    """
    there = {event.step for event in events if isinstance(event, StepMetrics)}
    lacking = [step for step in known if step.step not in there]
    filled: list[Event] = []
    last: StepMetrics | None = None

    def fill(until: float) -> None:
        nonlocal last
        while lacking and lacking[0].step < until:
            step = lacking.pop(0)
            if last:
                step = step.model_copy(update={"trained_tokens": last.trained_tokens, "elapsed": last.elapsed})
            filled.append(step)
            last = step

    for event in events:
        if isinstance(event, StepMetrics):
            fill(event.step)
            last = event
        filled.append(event)
    fill(float("inf"))
    return filled

"""``report.html`` of a run that goes on: a listener that writes the page at evaluations, checkpoints and the end."""

import dataclasses
import time
from collections.abc import Callable, Mapping
from typing import Any

from halfbyte.files import disk_full, write_text
from halfbyte.runs.events import Begin, Checkpoint, End, Evaluation, Event
from halfbyte.runs.folder import RunFolder
from halfbyte.runs.history import Run, State, read_run
from halfbyte.runs.report.page import report_page

SHARE = 0.05
"""Of the time that passes, what pages may take."""


def write_report(folder: RunFolder, *, state: State | None = None) -> Run:
    """Write the page of the run in ``folder`` and return what it shows.

    Raises:
        InputError: there is no run, or one that cannot be read.
    """
    run = read_run(folder.path, state=state)
    write_text(folder.report, report_page(run))
    return run


class ReportFile:
    """Writes the page of a run while it goes.

    Of a page that cannot be made the run hears, and goes on.

    Args:
        folder: of the run.
        note: takes a sentence.
    """

    def __init__(self, folder: RunFolder, note: Callable[[str], None]) -> None:
        self._folder = folder
        self._note = note
        self._run: Run | None = None
        self._written = self._took = 0.0  # time.monotonic(), seconds
        self._failed = False

    def __call__(self, event: Event) -> None:
        """Take in ``event``, and write the page if it is time."""
        if isinstance(event, Begin):  # the file has it all, also of before the run was resumed
            self._run = read_run(self._folder.path, state="running")
        elif self._run and event.kept:
            self._run.events.append(event)
        match event:
            case Evaluation() | Checkpoint() if time.monotonic() - self._written >= self._took / SHARE:
                self._write("running")
            case End(reason=reason) if reason != "finished":
                self._write(reason)

    def finish(self, summary: Mapping[str, Any]) -> None:
        """Write the page of a run that has come to ``summary``."""
        self._write("finished", summary)

    def _write(self, state: State, summary: Mapping[str, Any] | None = None) -> None:
        if self._run is None:
            return
        begun = time.monotonic()
        try:
            # a new one, since what follows from the events is kept
            run = dataclasses.replace(self._run, state=state, summary=dict(summary or {}))
            write_text(self._folder.report, report_page(run))
        except Exception as error:  # hours of training do not end for a page
            if disk_full(error):
                raise
            if not self._failed:
                self._failed = True
                self._note(f"report.html could not be written ({type(error).__name__}: {error}); the run goes on")
        self._written = time.monotonic()
        self._took = self._written - begun

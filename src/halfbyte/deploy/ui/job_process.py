"""The process of a job: it waits for its turn, runs the command, and writes down how that ended.

    python -m halfbyte.deploy.ui.job_process FOLDER

It gets the lock of its folder from whoever starts it, and holds it as long as it lives.
"""

import contextlib
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from types import FrameType
from typing import IO

from halfbyte.deploy.ui.jobs import CANCELLED, END, LOG, all_jobs, put_card, read_job
from halfbyte.files import write_text

LOOK = 0.3
"""Seconds between two looks at whether it is its turn."""
NICE = 5
"""How much a job gives way to the page."""


class _Running:
    """The command, and whether somebody wants it to end."""

    def __init__(self) -> None:
        self.child: subprocess.Popen[bytes] | None = None
        self.is_ending = False

    def end(self, number: int, _: FrameType | None) -> None:
        """Take a signal: pass it on."""
        self.is_ending = True
        if self.child:
            self.child.send_signal(number)


def main(folder: Path) -> int:
    """Run the job in ``folder`` when its turn comes; return the command's exit code."""
    running = _Running()
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, running.end)
    job = read_job(folder)
    if job is None:
        return 2
    while not running.is_ending and not _is_first(folder):
        time.sleep(LOOK)
    code = CANCELLED
    if not running.is_ending:
        with (folder / LOG).open("ab", buffering=0) as log:
            code = _run(running, list(job.command), log)
    if code == 0:
        put_card(folder, job.output)
    write_text(folder / END, json.dumps({"code": code, "ended": time.time()}) + "\n")
    return code


def _is_first(folder: Path) -> bool:
    """Tell whether no job that was asked for earlier waits or runs."""
    before = [job for job in all_jobs(folder.parent) if job.folder.name < folder.name]
    return not any(job.state in ("waiting", "running") for job in before)


def _give_way() -> None:
    """Let the page go first. Linux may weigh sessions before processes (autogroups), and a job is a session."""
    os.nice(NICE)
    with contextlib.suppress(OSError):
        Path("/proc/self/autogroup").write_text(str(NICE))


def _run(running: _Running, command: list[str], log: IO[bytes]) -> int:
    _give_way()
    environment = os.environ | {"PYTHONUNBUFFERED": "1", "NO_COLOR": "1", "COLUMNS": "120"}
    running.child = subprocess.Popen(
        command, stdin=subprocess.DEVNULL, stdout=log, stderr=subprocess.STDOUT, env=environment
    )
    if running.is_ending:
        running.child.terminate()
    code = running.child.wait()
    return code if code >= 0 else 128 - code


if __name__ == "__main__":
    sys.exit(main(Path(sys.argv[1])))

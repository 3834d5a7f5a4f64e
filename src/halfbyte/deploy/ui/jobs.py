"""What the page starts: each job a process of its own and a folder, which outlives the page, browser and server.

    job.json    what it is: a kind, a title, the command, where it writes, when it was asked for
    log.txt     what the command printed
    README.md   the card that its result is to have, if there is one
    lock        held by its process as long as it lives
    stop        somebody wants it to end
    end.json    how it ended, and when

Jobs run one after the other, in the order in which they were asked for; each waits for its turn by itself
(:mod:`halfbyte.deploy.ui.job_process`), so that nobody has to be there who starts it. The lock is taken before the
process begins and handed to it, so that there is no time in which a job looks as if it were dead.
"""

import contextlib
import fcntl
import json
import os
import secrets
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from halfbyte.errors import InputError
from halfbyte.files import write_text
from halfbyte.locks import is_locked

ABOUT, LOG, LOCK, STOP, END = "job.json", "log.txt", "lock", "stop", "end.json"
CARD = "README.md"
"""The card that what is made gets, if somebody edited it."""
USE = "\n## Use\n"
"""Where a card begins to say how a model is run, which depends on its form."""
CANCELLED = 130
"""The exit code of what was interrupted."""
TAIL = 64 * 1024
"""Bytes of a log that are shown."""

State = Literal["waiting", "running", "done", "stopped", "failed", "broken off"]


@dataclass(frozen=True)
class Job:
    """A job, as its folder tells of it.

    Attributes:
        folder: its own.
        kind: what it does: train, merge, export, audit.
        title: what it is called.
        command: the words of its command.
        output: the folder that it writes to.
        asked: when it was asked for, seconds since 1970.
        options: what the page wants to know of it again.
    """

    folder: Path
    kind: str
    title: str
    command: tuple[str, ...]
    output: Path
    asked: float
    options: dict[str, Any]

    @property
    def state(self) -> State:
        """What has become of it."""
        try:
            code = json.loads((self.folder / END).read_text(encoding="utf-8"))["code"]
        except (OSError, ValueError, KeyError, TypeError):
            if not is_locked(self.folder / LOCK):
                return "stopped" if (self.folder / STOP).exists() and not self.log else "broken off"
            return "running" if (self.folder / LOG).exists() else "waiting"
        if code == 0:
            return "done"
        return "stopped" if code == CANCELLED or (self.folder / STOP).exists() else "failed"

    @property
    def log(self) -> str:
        """The end of what it printed."""
        try:
            with (self.folder / LOG).open("rb") as file:
                file.seek(max(os.fstat(file.fileno()).st_size - TAIL, 0))
                return file.read().decode("utf-8", errors="replace")
        except OSError:
            return ""

    def stop(self) -> None:
        """Ask it to end: a training run saves what it has."""
        with contextlib.suppress(OSError, ValueError):
            (self.folder / STOP).touch()
            pid = int((self.folder / LOCK).read_text())
            if is_locked(self.folder / LOCK):
                os.kill(pid, signal.SIGTERM)


def read_job(folder: Path) -> Job | None:
    """Return the job in a folder; None if there is none, or it is damaged."""
    try:
        about = json.loads((folder / ABOUT).read_text(encoding="utf-8"))
        return Job(
            folder, str(about["kind"]), str(about["title"]), tuple(about["command"]), Path(about["output"]),
            float(about["asked"]), dict(about.get("options", {})),
        )  # fmt: skip
    except (OSError, ValueError, KeyError, TypeError):
        return None


def all_jobs(home: Path) -> list[Job]:
    """Return the jobs in the folder ``home``, in the order in which they were asked for."""
    try:
        folders = sorted(one for one in home.iterdir() if one.is_dir())
    except OSError:
        return []
    return [job for folder in folders if (job := read_job(folder))]


def unended(home: Path) -> int:
    """Return how many jobs wait or run."""
    return sum(job.state in ("waiting", "running") for job in all_jobs(home))


def job_of(home: Path, output: Path) -> Job | None:
    """Return the last job that writes to ``output``."""
    return next((job for job in reversed(all_jobs(home)) if job.output == output), None)


def begin(
    home: Path,
    kind: str,
    title: str,
    arguments: Sequence[str],
    output: Path,
    *,
    files: dict[str, str] | None = None,
    **options: Any,
) -> Job:
    """Ask for a job.

    Args:
        home: the folder of all jobs.
        kind: what it does.
        title: what it is called.
        arguments: of ``halfbyte``; ``{folder}`` in them is the job's own.
        output: the folder that it writes to.
        files: by their names, to be written to its folder before.
        **options: kept for the page.

    Raises:
        InputError: another job that has not ended writes to the same folder.
    """
    before = job_of(home, output)
    if before and before.state in ("waiting", "running"):
        raise InputError(f"{output.name} is being written by another job; wait for it, or give another name.")
    home.mkdir(parents=True, exist_ok=True)
    asked = time.time()
    folder = home / f"{time.strftime('%Y%m%d-%H%M%S', time.gmtime(asked))}-{asked % 1:.6f}-{secrets.token_hex(3)}"
    folder.mkdir()
    try:
        for name, text in (files or {}).items():
            write_text(folder / name, text)
        words = [sys.executable, "-m", "halfbyte", *(word.replace("{folder}", str(folder)) for word in arguments)]
        about = {"kind": kind, "title": title, "command": words, "output": str(output), "asked": asked}
        handle = os.open(folder / LOCK, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
        try:
            fcntl.flock(handle, fcntl.LOCK_EX)
            write_text(folder / ABOUT, json.dumps(about | {"options": options}, indent=1) + "\n")
            process = subprocess.Popen(
                [sys.executable, "-m", "halfbyte.deploy.ui.job_process", str(folder)],
                pass_fds=[handle], start_new_session=True, stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL,
                stderr=subprocess.DEVNULL, close_fds=True,
            )  # fmt: skip
            os.pwrite(handle, f"{process.pid}\n".encode(), 0)
            threading.Thread(target=process.wait, daemon=True).start()  # so that it leaves no zombie
        finally:
            os.close(handle)
    except BaseException:
        shutil.rmtree(folder, ignore_errors=True)
        raise
    job = read_job(folder)
    assert job
    return job


def put_card(folder: Path, output: Path) -> None:
    """Put the card that was edited in the place of the one that was made, but for how the model is run."""
    card = folder / CARD
    if card.is_file() and output.is_dir():
        made = (output / CARD).read_text(encoding="utf-8") if (output / CARD).is_file() else ""
        _, heading, use = made.partition(USE)
        write_text(output / CARD, card.read_text(encoding="utf-8").rstrip() + "\n" + heading + use)

"""The server's log: a JSON object a line, for each request and for whatever else happens.

What is asked and answered is not in it, nor keys, nor what stands behind a path's question mark.
"""

import json
import logging
import sys
import threading
import time
import traceback
from collections.abc import Sequence
from dataclasses import dataclass, field
from datetime import UTC, datetime
from typing import Any, TextIO

from halfbyte.generate.answers import Usage

LONGEST_PATH = 200


@dataclass
class Record:
    """What is known of a request.

    Attributes:
        id: told to the client as ``x-request-id``.
        began: of ``time.perf_counter``.
        first_token: when it came.
        error: what the client was told.
    """

    id: str
    method: str
    path: str
    client: str
    began: float = field(default_factory=time.perf_counter)
    model: str | None = None
    stream: bool = False
    status: int = 0
    first_token: float | None = None
    prompt_tokens: int = 0
    cached_tokens: int = 0
    written_tokens: int = 0
    finish: str | None = None
    error: str | None = None

    def took(self, usages: Sequence[Usage]) -> None:
        """Note the tokens of a request's answers."""
        self.prompt_tokens = sum(usage.prompt for usage in usages)
        self.cached_tokens = sum(usage.cached for usage in usages)
        self.written_tokens = sum(usage.written for usage in usages)


class Log:
    """Writes lines; from any thread.

    Args:
        stream: to write to, or None for silence.
    """

    def __init__(self, stream: TextIO | None) -> None:
        self._stream = stream
        self._lock = threading.Lock()

    def request(self, record: Record) -> None:
        """Write the line of a request that has ended."""
        first = None if record.first_token is None else round(record.first_token - record.began, 4)
        self.write(
            "request", id=record.id, client=record.client, method=record.method[:20], path=record.path[:LONGEST_PATH],
            status=record.status, seconds=round(time.perf_counter() - record.began, 4), first_token_seconds=first,
            model=record.model, stream=record.stream or None, prompt_tokens=record.prompt_tokens or None,
            cached_tokens=record.cached_tokens or None, written_tokens=record.written_tokens or None,
            finish=record.finish, error=record.error,
        )  # fmt: skip

    def failure(self, record: Record | None, error: BaseException) -> None:
        """Write an error of ours, with its traceback; to standard error where there is no log."""
        lines = "".join(traceback.format_exception(error))
        if self._stream is None:
            sys.stderr.write(lines)
        self.write("failure", id=record and record.id, error=repr(error), traceback=lines)

    def write(self, event: str, **about: Any) -> None:
        """Write a line; what is None is left away."""
        if self._stream is None:
            return
        known = {name: value for name, value in about.items() if value is not None}
        now = datetime.now(UTC).isoformat(timespec="milliseconds")
        line = json.dumps({"time": now, "event": event} | known, default=str) + "\n"
        with self._lock:
            try:
                self._stream.write(line)
                self._stream.flush()
            except (OSError, ValueError):  # a log that cannot be written ends no answer
                self._stream = None


class Handler(logging.Handler):
    """Hands what a library logs to a log of ours."""

    def __init__(self, log: Log) -> None:
        super().__init__(logging.WARNING)
        self._log = log

    def emit(self, record: logging.LogRecord) -> None:
        """Write a line."""
        about = "".join(traceback.format_exception(*record.exc_info)) if record.exc_info else None
        self._log.write("server", level=record.levelname.lower(), message=record.getMessage(), traceback=about)

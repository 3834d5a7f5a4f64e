"""Many prompts answered by an engine, in order, into a file that can be gone on with.

Each answer is a line: the row's own columns, and two more.

    generated    the answer's text; of several samples a list
    generation   {row, finish, tokens, settings, thought, rouge_l, exact_match}

``row`` counts from 1 in what was read, ``finish`` says why the answer ended, ``settings`` is a digest of all that
decides what is generated. The last two are there where the row says what should come (:mod:`evaluate.references`), and
are means over the samples.

As many rows are under way as the engine takes; lines are written in the rows' order, whole and synced, so that a file
holds the answers of the first rows at any time, and going on means to leave these out.
"""

import hashlib
import json
import os
import random
from collections import deque
from collections.abc import Callable, Generator, Iterable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from halfbyte.data.bad_rows import BadRows
from halfbyte.data.examples import BadRow
from halfbyte.data.prompts import Asked
from halfbyte.errors import DecodingError, InputError
from halfbyte.evaluate.references import reference_scores
from halfbyte.files import append, read_lines
from halfbyte.generate.answers import Request
from halfbyte.generate.engine import Engine
from halfbyte.generate.thoughts import Thoughts, opened_by

TOGETHER = 256
"""Requests under way or waiting, at most."""
GENERATED, GENERATION = "generated", "generation"
TAIL = 16
"""Tokens of a prompt among which it may open a thought."""


@dataclass(frozen=True)
class Job:
    """A row to be answered.

    Attributes:
        row: its number from 1.
        asked: what it asks.
        request: its prompt; the seeds of its samples are made of the run's and its number.
    """

    row: int
    asked: Asked
    request: Request


def jobs_of(
    rows: Iterable[Asked | BadRow], request_of: Callable[[Asked], Request], engine: Engine
) -> tuple[list[Job], BadRows, int]:
    """Return the rows that can be answered, those that cannot, and how many there are in all.

    Args:
        rows: as they are read.
        request_of: makes a request of one, or raises an ``InputError``.
        engine: that will answer them.
    """
    jobs: list[Job] = []
    bad, count = BadRows(), 0
    for asked in rows:
        count += 1
        if isinstance(asked, BadRow):
            bad.add(asked)
            continue
        try:
            for name in (GENERATED, GENERATION):
                if name in asked.row:
                    raise BadRow(
                        asked.where, f"has a column {name}", f"has a column {name}, where the answer goes; rename it."
                    )
            request = request_of(asked)
            engine.check(request)
        except BadRow as error:
            bad.add(error)
        except InputError as error:
            bad.add(BadRow(asked.where, "the model cannot read it", f": {error}"))
        else:
            jobs.append(Job(count, asked, request))
    return jobs, bad, count


def settings_of(about: Any) -> str:
    """Return twelve digits that are others for other settings."""
    return hashlib.sha256(json.dumps(about, sort_keys=True, default=str).encode()).hexdigest()[:12]


def answered(
    engine: Engine, jobs: Iterable[Job], *, samples: int, seed: int, settings: str
) -> Generator[dict[str, Any]]:
    """Yield the line of each job, in their order.

    Args:
        engine: answers; ``TOGETHER`` may wait.
        jobs: are asked as the engine has places.
        samples: answers to each.
        seed: of the seeds of all.
        settings: a digest, for the lines.
    """
    rest, under_way = iter(jobs), deque[tuple[Job, list[Any]]]()
    most = max(1, TOGETHER // samples)
    try:
        while True:
            while len(under_way) < most and (job := next(rest, None)) is not None:
                under_way.append((job, []))
                for sample in range(samples):
                    under_way[-1][1].append(engine.submit(_drawn(job, seed, sample)))
            if not under_way:
                return
            job, streams = under_way[0]
            tag = opened_by(str(engine.tokenizer.decode(job.request.ids[-TAIL:])))
            parts = []
            for stream in streams:
                parts.append(Thoughts(tag))
                try:
                    parts[-1].add(stream.text())
                except DecodingError as error:
                    raise InputError(f"{job.asked.where} got no answer: {error}") from error
                parts[-1].end()
            under_way.popleft()
            yield _line(job, parts, streams, settings)
    finally:
        for _, streams in under_way:
            for stream in streams:
                stream.cancel()


def _drawn(job: Job, seed: int, sample: int) -> Request:
    """Return the request of one sample, whose seed does not depend on which rows were answered before."""
    own = random.Random(f"{seed} {job.row} {sample}").getrandbits(63)
    return replace(job.request, sampling=replace(job.request.sampling, seed=own))


def _line(job: Job, parts: Sequence[Thoughts], streams: Sequence[Any], settings: str) -> dict[str, Any]:
    texts = [part.answer for part in parts]
    about: dict[str, Any] = {
        "row": job.row,
        "finish": _one([stream.finish for stream in streams]),
        "tokens": _one([stream.usage.written for stream in streams]),
        "settings": settings,
    }
    if any(part.thought for part in parts):
        about["thought"] = _one([part.thought.strip() for part in parts])
    if job.asked.reference is not None:
        about |= reference_scores(texts, [job.asked.reference] * len(texts))
    return {**job.asked.row, GENERATED: _one(texts), GENERATION: about}


def _one(values: list[Any]) -> Any:
    return values[0] if len(values) == 1 else values


def text_of(line: dict[str, Any]) -> str:
    """Return a line as JSON; what JSON has no word for (dates of a Parquet file) is text."""
    return json.dumps(line, ensure_ascii=False, default=str)


class AnswersFile:
    """The file of answers: what it holds, and what is appended.

    Args:
        path: the file, which need not be there.
        settings: of what is generated now.

    Raises:
        InputError: it holds something else than answers, or such of other settings.
    """

    def __init__(self, path: Path, settings: str) -> None:
        self.path = path
        self.lines: dict[int, dict[str, Any]] = {}
        """The answers that it holds, by the numbers of their rows."""
        if path.is_dir():
            raise InputError(f"{path} is a folder; name a file for the answers.")
        try:
            lines = read_lines(path) if path.exists() else []
        except OSError as error:
            raise InputError(f"{path} cannot be read ({error.strerror}); name another file.") from None
        if not lines and path.exists() and path.stat().st_size:
            self._check_torn()
        for number, text in enumerate(lines, start=1):
            try:
                line = json.loads(text)
                about = line[GENERATION]
                row, theirs, _ = int(about["row"]), about["settings"], line[GENERATED]
            except (ValueError, TypeError, KeyError):
                raise InputError(
                    f"{path}, line {number} is no answer that generate has written; name another file with --out."
                ) from None
            if theirs != settings:
                raise InputError(
                    f"{path} holds answers of another model or other options (line {number}: {theirs}, now {settings});"
                    " name another file with --out, or remove it."
                )
            self.lines[row] = line

    def _check_torn(self) -> None:
        """See that a file without a whole line is the beginning of one of ours.

        Raises:
            InputError: it is not.
        """
        text = self.path.read_text(encoding="utf-8", errors="replace")
        try:
            is_ours = GENERATION in json.loads(text)
        except (ValueError, TypeError):
            is_ours = text.startswith("{")
        if not is_ours:
            raise InputError(f"{self.path} holds no answers that generate has written; name another file with --out.")

    def check(self, jobs: Iterable[Job]) -> None:
        """See that the answers are to these rows.

        Raises:
            InputError: they are not.
        """
        rows = {job.row: job.asked.row for job in jobs}
        for row, line in self.lines.items():
            own = {name: value for name, value in line.items() if name not in (GENERATED, GENERATION)}
            if row not in rows or text_of(own) != text_of(json.loads(text_of(dict(rows[row])))):
                raise InputError(
                    f"{self.path} holds an answer to another row {row} than there is now; name another file with --out."
                )

    def add(self, line: dict[str, Any]) -> None:
        """Append a line, whole and on the disk.

        Raises:
            InputError: the file cannot be written.
        """
        try:
            append(self.path, text_of(line))
        except PermissionError as error:
            raise InputError(f"{self.path} cannot be written ({error.strerror}); name another file.") from None
        self.lines[line[GENERATION]["row"]] = line


def scores_of(lines: Iterable[dict[str, Any]]) -> tuple[dict[str, float], int]:
    """Return the means of the scores of lines that have them, and how many have."""
    scored = [line[GENERATION] for line in lines if "rouge_l" in line[GENERATION]]
    names = ("rouge_l", "exact_match") if scored else ()
    return {name: sum(about[name] for about in scored) / len(scored) for name in names}, len(scored)


def writable(path: Path) -> None:
    """See that a file can be appended to, before the work that ends in it.

    Raises:
        InputError: it cannot.
    """
    folder = path.parent
    if not folder.is_dir():
        raise InputError(f"There is no folder {folder} for {path.name}; make it, or name another file.")
    if not os.access(path if path.exists() else folder, os.W_OK):
        raise InputError(f"{path} may not be written; name another file, or change its permissions.")

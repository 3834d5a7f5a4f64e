"""Who meets whom on which question, and the file of what the judge said: a line as each judgement comes.

    question, first, second   whose answers stood first and second
    scale                     classes or scores
    verdict                   1, 2 or 3 (a tie); of scores two numbers; null where the reply holds none
    reply, finish             what the judge wrote, and why it ended
    key                       a digest of all that was asked, of whom and how

Each pair meets twice on each question, once in either order. A line is whole and on the disk before the next thing is
asked for, so who was interrupted goes on without asking again. A reply that holds no verdict is kept as it is, counted,
and not asked again: with a temperature of 0 it would be the same.
"""

import hashlib
import itertools
import json
import queue
import threading
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

from halfbyte.errors import InputError, counted
from halfbyte.evaluate.judge.endpoint import Endpoint, EndpointError, Reply
from halfbyte.evaluate.judge.prompts import SYSTEM, Scale, ask, class_of, scores_of
from halfbyte.files import append, read_lines

OTHER = "name another folder with --output, or remove the file"


@dataclass(frozen=True)
class Question:
    """What was asked.

    Attributes:
        name: tells it from others.
        text: of it; of a conversation all turns.
        category: general, coding or math; others are general.
    """

    name: str
    text: str
    category: str = "general"


class Match(NamedTuple):
    """Two answers to be judged, in this order."""

    question: Question
    first: str
    second: str
    prompt: str

    @property
    def place(self) -> tuple[str, str, str]:
        """What tells it from others of one scale."""
        return self.question.name, self.first, self.second


Judgement = Mapping[str, Any]
"""A line of the file."""


def matches(
    questions: Sequence[Question], answers: Mapping[str, Mapping[str, str]], scale: Scale, baseline: str | None = None
) -> list[Match]:
    """Return all matches, question by question.

    Args:
        questions: all of them are judged.
        answers: of each contestant to each question, by names.
        scale: of the verdicts.
        baseline: a contestant that each other one meets; None: everybody meets everybody.
    """
    pairs = [pair for pair in itertools.combinations(answers, 2) if baseline is None or baseline in pair]
    return [
        Match(
            question,
            one,
            other,
            ask(scale, question.text, answers[one][question.name], answers[other][question.name], question.category),
        )
        for question in questions
        for pair in pairs
        for one, other in (pair, pair[::-1])
    ]


def key_of(match: Match, endpoint: Endpoint, scale: Scale) -> str:
    """Return a digest of all that decides a judgement."""
    about = [endpoint.model, endpoint.temperature, endpoint.max_tokens, scale, SYSTEM, match.prompt]
    return hashlib.sha256(json.dumps(about).encode()).hexdigest()[:16]


class JudgementsFile:
    """The file of judgements: what it holds, and what is appended.

    Args:
        path: the file, which need not be there.

    Raises:
        InputError: it holds something else.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self.lines: dict[tuple[Any, ...], Judgement] = {}
        """By question, first, second and scale."""
        for line in read_judgements(path) if path.exists() else ():
            self.lines[line["question"], line["first"], line["second"], line["scale"]] = line

    def missing(self, wanted: Sequence[Match], endpoint: Endpoint, scale: Scale) -> list[Match]:
        """Return the matches that are not judged yet.

        Raises:
            InputError: one was judged that was another then, by another judge, or in another way.
        """
        missing = []
        for match in wanted:
            line = self.lines.get((*match.place, scale))
            if line is None:
                missing.append(match)
            elif line.get("key") != key_of(match, endpoint, scale):
                raise InputError(
                    f"{self.path} holds judgements of other answers, by another judge or with other options (question "
                    f"{match.question.name}, {match.first} and {match.second}); {OTHER}."
                )
        return missing

    def add(self, match: Match, reply: Reply, endpoint: Endpoint, scale: Scale) -> Judgement:
        """Append what the judge replied, and return it as a line."""
        scores = scores_of(reply.text) if scale == "scores" else None
        line: Judgement = {
            "question": match.question.name,
            "first": match.first,
            "second": match.second,
            "scale": scale,
            "verdict": class_of(reply.text) if scale == "classes" else list(scores) if scores else None,
            "reply": reply.text,
            "finish": reply.finish,
            "judge": endpoint.model,
            "key": key_of(match, endpoint, scale),
        }
        append(self.path, json.dumps(line, ensure_ascii=False))
        self.lines[(*match.place, scale)] = line
        return line


def read_judgements(path: Path) -> list[Judgement]:
    """Return the lines of a file of judgements; ours, or anybody's with question, first, second and verdict.

    Raises:
        InputError: it is not there, or a line is none.
    """
    try:
        lines = read_lines(path)
        rest = path.read_bytes().rpartition(b"\n")[2].decode(errors="replace")
    except OSError as error:
        raise InputError(f"{path} cannot be read as a file of judgements ({error.strerror}); name another.") from None
    if _is_json(rest):  # written by somebody who ends a file without a newline; else it was torn
        lines.append(rest)
    return [_judgement(text, f"{path}, line {number}") for number, text in enumerate(lines, start=1) if text.strip()]


def _is_json(text: str) -> bool:
    try:
        json.loads(text)
    except ValueError:
        return False
    return True


def _judgement(text: str, where: str) -> Judgement:
    try:
        line = json.loads(text)
        line = {"scale": "scores" if isinstance(line["verdict"], list) else "classes", **line}
        verdict = line["verdict"]
        is_good = verdict in (1, 2, 3, None) or (len(verdict) == 2 and all(isinstance(x, int | float) for x in verdict))
        is_good = is_good and line["first"] != line["second"] and "question" in line
    except (ValueError, TypeError, KeyError):
        is_good = False
    if not is_good:
        raise InputError(
            f"{where} is no judgement: it needs question, first, second (two different names) and verdict (1, 2, or 3 "
            f"for a tie; null for none); {OTHER}."
        )
    found: Judgement = line
    return found


def judge(
    file: JudgementsFile, wanted: Sequence[Match], endpoint: Endpoint, scale: Scale, together: int
) -> Iterator[Judgement]:
    """Ask for the matches that are not judged yet, and yield each judgement when it is in the file.

    Args:
        file: of what is judged by now.
        wanted: all matches.
        endpoint: of the judge.
        scale: of verdicts.
        together: things that are asked at once.

    Raises:
        EndpointError: the endpoint fails; what has come is in the file.
    """
    failed: EndpointError | None = None
    for match, reply in _replies(endpoint, file.missing(wanted, endpoint, scale), together):
        if isinstance(reply, EndpointError):
            failed = failed or reply
        else:
            yield file.add(match, reply, endpoint, scale)
    if failed:
        done = sum((*match.place, scale) in file.lines for match in wanted)
        kept = f" {counted(done, 'judgement')} of {len(wanted):,} are in {file.path}; the same command goes on."
        raise EndpointError(f"{failed}{kept if done else ''}") from failed


def _replies(
    endpoint: Endpoint, missing: Sequence[Match], together: int
) -> Iterator[tuple[Match, Reply | EndpointError]]:
    """Ask in so many threads at once, and yield replies as they come; after an error nothing more is asked.

    The threads end with the process: who interrupts it does not wait for an answer.
    """
    asked: queue.SimpleQueue[Match | None] = queue.SimpleQueue()
    came: queue.SimpleQueue[tuple[Match, Reply | Exception]] = queue.SimpleQueue()

    def work() -> None:
        while (match := asked.get()) is not None:
            try:
                came.put((match, endpoint.ask(SYSTEM, match.prompt)))
            except Exception as error:  # carried to the reader
                came.put((match, error))

    rest, under_way = iter(missing), 0
    for _ in range(together):
        threading.Thread(target=work, daemon=True).start()
    try:
        for match in itertools.islice(rest, together):
            asked.put(match)
            under_way += 1
        while under_way:
            match, reply = came.get()
            under_way -= 1
            if isinstance(reply, EndpointError):
                rest = iter(())
            elif isinstance(reply, Exception):
                raise reply
            yield match, reply
            if (following := next(rest, None)) is not None:
                asked.put(following)
                under_way += 1
    finally:
        for _ in range(together):
            asked.put(None)

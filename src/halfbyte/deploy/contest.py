"""A contest from its files to its summary: questions, contestants and their answers, the judge's verdicts, ratings.

    name=answers.jsonl        a line an answer: ``generated`` (as ``halfbyte generate`` writes), ``answer``, ``output``,
                              ``generation`` or ``text`` (as artidoro/qlora's files have them)
    name=runs/mine            a run, an adapter or a model: opened one after the other, each answers into a file

Questions are rows as :mod:`halfbyte.data.prompts` reads them. A row's ``question_id`` or ``id`` tells it from others
and finds its answers; where there is none, its number does. In the folder of a contest:

    answers-NAME.jsonl        of each contestant that is a model
    judgements.jsonl          :mod:`halfbyte.evaluate.judge.contest`
    judged.json               what came of it

Both kinds of lines can be gone on with. Whether the endpoint is there is looked at before a model is opened.
"""

import contextlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from pydantic import BaseModel, ConfigDict

from halfbyte import hf
from halfbyte.choices import Device
from halfbyte.data.examples import BadRow
from halfbyte.data.prompts import Asked, asked_of
from halfbyte.data.readers import kind_of
from halfbyte.data.sources import read_source, resolve
from halfbyte.errors import InputError, check_writable, counted, named, nearest
from halfbyte.evaluate.answered import GENERATED, GENERATION, TOGETHER, AnswersFile, answered, jobs_of, settings_of
from halfbyte.evaluate.asking import Asking
from halfbyte.evaluate.judge.contest import JudgementsFile, Question, judge, matches
from halfbyte.evaluate.judge.endpoint import Endpoint
from halfbyte.evaluate.judge.prompts import Scale
from halfbyte.evaluate.judge.summary import Summary, summary_of
from halfbyte.evaluate.sides import sides_of
from halfbyte.files import absolute, model_path
from halfbyte.generate.engines import engine_over
from halfbyte.generate.sampling import Sampling
from halfbyte.generate.stream import check_generates
from halfbyte.locks import Locked, lock

NAMES = ("question_id", "id")
TEXTS = (GENERATED, "answer", "output", "generation_truncated", GENERATION, "text", "response", "completion")
JUDGEMENTS, SUMMARY = "judgements.jsonl", "judged.json"
Progress = Callable[[str, int, int], None]


class Contest(BaseModel):
    """Who is judged by whom, and how.

    Attributes:
        questions: the file of them.
        contestants: as ``NAME=WHERE``.
        endpoint: the address of an API; ``judge``: its model, None if it is a single one.
        scale: of verdicts.
        baseline: a contestant that each other one meets; None: all meet all, of scores the first.
        limit: questions, the first ones.
        together: things that the judge is asked at once.
        judge_temperature, judge_tokens: of the judge.
        temperature, top_p, max_new_tokens: of models that answer.
        seed: of what they draw, and of the orders of games.
        orders: for Elo.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    questions: str
    contestants: list[str]
    endpoint: str
    judge: str | None = None
    scale: Scale = "classes"
    baseline: str | None = None
    limit: int | None = None
    together: int = 4
    judge_temperature: float = 0.0
    judge_tokens: int = 1024
    temperature: float = 0.7
    top_p: float = 0.9
    max_new_tokens: int = 512
    seed: int = 0
    orders: int = 10_000


def hold(
    contest: Contest,
    output: Path,
    *,
    device: Device = "auto",
    trust_remote_code: bool = False,
    progress: Progress = lambda *_: None,
) -> tuple[Summary, Path]:
    """Hold a contest, or go on with it; return what came of it, and its folder.

    Args:
        contest: which.
        output: the folder.
        device: where models run that answer.
        trust_remote_code: run code that comes with them.
        progress: told what is being done, how many of it are done, and how many there are.

    Raises:
        InputError: an input is not there or cannot be used; the endpoint is not there, or fails. What has come by then
            is kept.
    """
    folder = absolute(output)
    check_writable(folder)
    places = contestants_of(contest.contestants)
    baseline = contest.baseline
    if baseline is not None and baseline not in places:
        raise InputError(f"--baseline {baseline!r} is no contestant{nearest(baseline, places)}.")
    if baseline is None and contest.scale == "scores":
        baseline = next(iter(places))
    questions, rows = questions_in(contest.questions, contest.limit)
    answers = {name: answers_in(where, questions) if is_file(where) else {} for name, where in places.items()}
    endpoint = Endpoint(
        contest.endpoint, contest.judge, temperature=contest.judge_temperature, max_tokens=contest.judge_tokens
    )
    sampling = Sampling(
        temperature=contest.temperature,
        top_p=contest.top_p,
        max_new_tokens=contest.max_new_tokens,
        seed=contest.seed,
    )
    with _held(folder):
        for name, where in places.items():
            if not answers[name]:
                answers[name] = generated(
                    name,
                    where,
                    questions,
                    rows,
                    sampling,
                    folder / f"answers-{name}.jsonl",
                    device=device,
                    trust_remote_code=trust_remote_code,
                    progress=progress,
                )
        wanted = matches(questions, answers, contest.scale, baseline)
        file = JudgementsFile(folder / JUDGEMENTS)
        done = len(wanted) - len(file.missing(wanted, endpoint, contest.scale))
        progress("judgements", done, len(wanted))
        for _ in judge(file, wanted, endpoint, contest.scale, contest.together):
            done += 1
            progress("judgements", done, len(wanted))
        lines = [file.lines[(*match.place, contest.scale)] for match in wanted]
        progress("ratings", 0, 0)
        summary = summary_of(lines, contest.scale, baseline=baseline, orders=contest.orders, seed=contest.seed)
        summary.write(folder / SUMMARY)
    return summary, folder


@contextlib.contextmanager
def _held(folder: Path) -> Iterator[None]:
    """Hold the folder of a contest for this process alone; gone again if nothing comes into it.

    Raises:
        InputError: another process holds it.
    """
    made = [path for path in (folder, *folder.parents) if not path.exists()]
    try:
        with lock(folder / ".lock"):
            yield
    except Locked as error:
        raise InputError(
            f"Another contest (process {error.pid or 'unknown'}) writes to {folder}; wait for it, or name another "
            "folder."
        ) from None
    finally:
        with contextlib.suppress(OSError):  # as soon as one is not empty
            for path in made:
                path.rmdir()


def questions_in(name: str, limit: int | None = None) -> tuple[list[Question], list[Asked]]:
    """Return the questions of a file, and the rows that they are.

    Raises:
        InputError: it is not there, or a row asks nothing or has the name of another one.
    """
    questions: dict[str, Question] = {}
    rows = []
    for asked in asked_of(row for source in resolve(name) for row in read_source(source)):
        if isinstance(asked, BadRow):
            raise asked
        own = _name_of(asked.row, len(questions) + 1)
        if own in questions:
            raise InputError(f"{asked.where} has the name {own}, as another question has; give each one of its own.")
        questions[own] = Question(own, _written(asked), str(asked.row.get("category", "general")))
        rows.append(asked)
        if len(rows) == limit:
            break
    return list(questions.values()), rows


def contestants_of(words: Sequence[str]) -> dict[str, str]:
    """Return where the answers of each contestant come from, by their names.

    Raises:
        InputError: a word names none, two have one name, or there are fewer than two.
    """
    found: dict[str, str] = {}
    for word in words:
        name, _, where = word.partition("=")
        if not name or not where or "/" in name:
            raise InputError(
                f"{word!r} is no contestant; write NAME=FILE of answers or NAME=MODEL, as in mine=runs/mine."
            )
        if name in found:
            raise InputError(f"Two contestants are called {name!r}; give each a name of its own.")
        found[name] = where
    if len(found) < 2:
        raise InputError("A contest takes two contestants or more; name each as NAME=FILE or NAME=MODEL.")
    return found


def is_file(where: str) -> bool:
    """Tell whether a contestant's answers are in a file, or would be: its name says so."""
    return kind_of(Path(where)) is not None or (absolute(where).is_file() and not where.endswith(".gguf"))


def answers_in(where: str, questions: Sequence[Question]) -> dict[str, str]:
    """Return the answers of a file to questions, by their names.

    Raises:
        InputError: a line is no answer, or a question has none.
    """
    answers: dict[str, str] = {}
    count = 0
    for source in resolve(where):
        for place, row in read_source(source):
            count += 1
            if isinstance(row, BadRow):
                raise row
            if not isinstance(row, Mapping):
                raise InputError(f"{place} is no answer; write a JSON object for each.")
            about = row.get(GENERATION)
            number = about.get("row", count) if isinstance(about, Mapping) else count
            text = next((row[name] for name in TEXTS if isinstance(row.get(name), str)), None)
            if text is None:
                raise InputError(f"{place} holds no answer; it needs a text in one of the columns {named(TEXTS)}.")
            answers.setdefault(_name_of(row, number), text)
    lacking = [question.name for question in questions if question.name not in answers]
    if lacking:
        raise InputError(
            f"{where} has no answer to {counted(len(lacking), 'question')} of {len(questions):,} (the first: "
            f"{lacking[0]}); it needs one to each, told by {NAMES[0]} or {NAMES[1]}, or in the questions' order."
        )
    return answers


def generated(
    name: str,
    where: str,
    questions: Sequence[Question],
    rows: Sequence[Asked],
    sampling: Sampling,
    file: Path,
    *,
    device: Device = "auto",
    trust_remote_code: bool = False,
    progress: Progress = lambda *_: None,
) -> dict[str, str]:
    """Return the answers of a model to questions, which are kept in ``file``; the model is not opened if all are there.

    Args:
        name: of the contestant.
        where: the model.
        questions: that are answered.
        rows: the same, as they were read.
        sampling: how answers are drawn; its seed is that of all.
        file: of the answers.
        device: where the model runs.
        trust_remote_code: run code that comes with the model.
        progress: told what is done, how many answers are there, and how many there will be.

    Raises:
        InputError: there is no such model, it cannot read a question, or the file holds other answers.
    """
    about = vars(sampling) | {"logit_bias": dict(sampling.logit_bias), "model": model_path(where)}
    kept = AnswersFile(file, settings_of(about))
    if len(kept.lines) < len(rows):
        with contextlib.ExitStack() as stack:
            tokenizer = hf.load_tokenizer(where, trust_remote_code=trust_remote_code)
            model: Any = hf.load(where, device=device, trust_remote_code=trust_remote_code)
            check_generates(model)
            engine = stack.enter_context(engine_over(model, tokenizer, most_waiting=TOGETHER))
            asking = Asking(sampling, sides_of(model)[-1].adapter)
            jobs, bad, count = jobs_of(rows, asking.requests(tokenizer, model), engine)
            bad.check(count, False, "answer", "answered")
            kept.check(jobs)
            rest = [job for job in jobs if job.row not in kept.lines]
            made = answered(engine, rest, samples=1, seed=sampling.seed or 0, settings=settings_of(about))
            stack.callback(made.close)
            for line in made:
                kept.add(line)
                progress(f"{name} answers", len(kept.lines), len(jobs))
    return {question.name: str(kept.lines[number][GENERATED]) for number, question in enumerate(questions, start=1)}


def _name_of(row: Mapping[str, Any], number: int) -> str:
    return next((str(row[name]) for name in NAMES if isinstance(row.get(name), str | int)), str(number))


def _written(asked: Asked) -> str:
    """Return a question as a text: what was asked, or the turns of a conversation."""
    if isinstance(asked.prompt, str):
        return asked.prompt
    turns = [(turn["role"], str(turn["content"])) for turn in asked.prompt]
    if len(turns) == 1:
        return turns[0][1]
    return "\n\n".join(f"{role}: {text}" for role, text in turns)

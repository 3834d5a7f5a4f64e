"""MMLU (arXiv 2009.03300) as QLoRA's paper measures it: the likeliest of A, B, C and D behind each question.

    accuracy of a subject = share of its questions in which P(right letter) is the greatest of the four
    accuracy              = mean over subjects;  loss = mean of −log P over letter and eos, in nats

Five answered questions of the subject stand before each one. Questions come from

    the files of the paper's script (artidoro/qlora, data/mmlu/five_shot_mmlu_test.json): JSON lines with ``input``,
        the whole prompt, ``output``, a letter, and ``subject``
    rows of ``cais/mmlu`` (question, choices, answer, subject), and others, such as its split dev, that are answered
        before them; written as Hendrycks' evaluation does (hendrycks/test), which is how the script's files are:

            The following are multiple choice questions (with answers) about  SUBJECT.

            five times: QUESTION, A. to D., "Answer: B", an empty line
            QUESTION, A. to D., "Answer:"
    the hub, which has these rows

A prompt is cut at its end after 2,048 tokens, as the script does it, though that takes the question itself away.
"""

from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from halfbyte.choices import IGNORED
from halfbyte.data import Row, hub
from halfbyte.data.sources import Source, read_source, resolve
from halfbyte.errors import InputError, nearest
from halfbyte.evaluate.choices import ChoiceScore, score_choices
from halfbyte.files import absolute

LETTERS = "ABCD"
HUB = "cais/mmlu"
ON_THE_HUB = "hub"
"""What a user says for it."""
HEAD = "The following are multiple choice questions (with answers) about  {}.\n\n"
SHOTS = 5
LONGEST = 2048
FILE = "five_shot_mmlu_test.json"
PROMPTS, QUESTIONS = {"input", "output", "subject"}, {"question", "choices", "answer", "subject"}
"""Columns of the script's rows, and of the hub's."""

Question = dict[str, str]
"""``input``, ``output`` and ``subject``."""


def read_mmlu(where: str, shots: str | None = None) -> list[Question]:
    """Return the questions that a user names: the hub, a file, or a folder with the script's file.

    Args:
        where: ``hub``, a file, or a folder.
        shots: of rows like the hub's, a file of those that are answered before them.

    Raises:
        InputError: there are none, or they are none of MMLU; rows like the hub's lack ``shots``.
    """
    if where == ON_THE_HUB:
        if shots is not None:
            raise InputError("The hub has the answered questions itself; leave --mmlu-shots out.")
        return questions_on_hub("test", with_shots=True)
    path = absolute(where)
    if path.is_dir():
        if not (path / FILE).is_file():
            there = sorted(file.name for file in path.glob("*mmlu*.json"))
            raise InputError(f"{path} has no {FILE}{nearest(FILE, there)}; name a file, or {ON_THE_HUB}.")
        path = path / FILE
    elif not path.exists():
        raise InputError(
            f"There is no file {where} of MMLU's questions; name the script's ({FILE}), one of rows with question, "
            f"choices, answer and subject, or {ON_THE_HUB}."
        )
    rows = list(read_source(Source(path=str(path))))
    if rows and isinstance(rows[0][1], Mapping) and rows[0][1].keys() >= QUESTIONS:
        before = (
            [_checked(place, row) for source in resolve(shots) for place, row in read_source(source)] if shots else []
        )
        asked = [_checked(place, row) for place, row in rows]
        lacking = sorted({row["subject"] for row in asked} - {row["subject"] for row in before})
        if lacking:
            raise InputError(
                f"{path.name} has questions alone, and MMLU is asked behind {SHOTS} that are answered: name a file of "
                f"such with --mmlu-shots (none is about {lacking[0]})."
            )
        return questions_of(asked, before)
    if shots is not None:
        raise InputError(f"The prompts of {path.name} are whole; leave --mmlu-shots out.")
    return prompts_in(path)


def prompts_in(path: Path) -> list[Question]:
    """Return the questions of a file of the script's.

    Raises:
        InputError: it is none.
    """
    questions = []
    for where, row in read_source(Source(path=str(path))):
        if not isinstance(row, dict) or not row.keys() >= PROMPTS or row["output"] not in tuple(LETTERS):
            raise InputError(f"{where} is no question of MMLU: it needs input, output (A, B, C or D) and subject.")
        questions.append({name: row[name] for name in ("input", "output", "subject")})
    return questions


def questions_on_hub(split: str, *, with_shots: bool) -> list[Question]:
    """Return the questions of a split of the hub's, behind those of ``dev`` or behind none.

    Raises:
        InputError: the hub cannot be reached.
    """
    rows = [row for _, row in hub.read(HUB, "all", split)]
    return questions_of(rows, [row for _, row in hub.read(HUB, "all", "dev")] if with_shots else [])


def questions_of(rows: Iterable[Mapping[str, Any]], before: Iterable[Mapping[str, Any]] = ()) -> list[Question]:
    """Return rows of ``cais/mmlu`` as questions, behind the first five answered ones of their subject."""
    solved: dict[str, list[str]] = {}
    for row in before:
        solved.setdefault(row["subject"], []).append(f"{_asked(row)} {LETTERS[row['answer']]}\n\n")
    return [
        {
            "subject": row["subject"],
            "input": HEAD.format(row["subject"].replace("_", " "))
            + "".join(solved.get(row["subject"], [])[:SHOTS])
            + _asked(row),
            "output": LETTERS[row["answer"]],
        }
        for row in rows
    ]


def _asked(row: Mapping[str, Any]) -> str:
    choices = "".join(f"\n{letter}. {choice}" for letter, choice in zip(LETTERS, row["choices"], strict=True))
    return f"{row['question']}{choices}\nAnswer:"


def _checked(where: str, row: Any) -> dict[str, Any]:
    """Return a row like the hub's, its answer a number.

    Raises:
        InputError: it is none.
    """
    if isinstance(row, Mapping) and row.keys() >= QUESTIONS:
        choices, answer = row["choices"], row["answer"]
        if isinstance(answer, str) and answer in tuple(LETTERS):
            answer = LETTERS.index(answer)
        if isinstance(choices, list) and len(choices) == len(LETTERS) and answer in range(len(LETTERS)):
            return {**row, "answer": int(answer)}
    raise InputError(
        f"{where} is no question of MMLU: it needs question, four choices, answer (0 to 3, or A to D) and subject."
    )


def encode(questions: Sequence[Question], tokenizer: Any, longest: int = LONGEST) -> tuple[list[Row], int]:
    """Return the questions as rows of token ids, and how many were cut: bos and input, then output and eos.

    As the script does it, the two are tokenized apart, and nothing else is added to either.

    Raises:
        InputError: the tokenizer has no eos token.
    """
    if tokenizer.eos_token is None:
        raise InputError("The tokenizer has no eos token, which an answer to MMLU ends with; choose another model.")
    bos = tokenizer.bos_token or ""
    sources = tokenizer([bos + question["input"] for question in questions], add_special_tokens=False)["input_ids"]
    ends = tokenizer([question["output"] + tokenizer.eos_token for question in questions], add_special_tokens=False)
    rows: list[Row] = []
    for source, target in zip(sources, ends["input_ids"], strict=True):
        read = source[:longest]
        rows.append({"input_ids": [*read, *target], "labels": [IGNORED] * len(read) + target})
    return rows, sum(len(source) > longest for source in sources)


def score(
    model: Any,
    rows: Sequence[Row],
    tokenizer: Any,
    *,
    batch_size: int = 8,
    progress: Callable[[int, int], None] | None = None,
) -> ChoiceScore:
    """Return how often each question's right letter is the likeliest of the four; and the loss."""
    letters = [tokenizer(letter, add_special_tokens=False)["input_ids"][0] for letter in LETTERS]
    return score_choices(model, rows, batch_size=batch_size, choices=letters, progress=progress)


def by_subject(right: Sequence[bool], subjects: Sequence[str]) -> dict[str, float]:
    """Return the accuracy of each subject, in the order in which they come."""
    hits = np.array(right, float)
    names = np.array(subjects)
    return {name: float(hits[names == name].mean()) for name in dict.fromkeys(subjects)}

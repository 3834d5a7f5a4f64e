"""A file of rows as a task of lm-eval: multiple choice, or an answer to be written.

    question, choices, answer   the likeliest of the choices behind "question\\nAnswer:"; ``choices`` is a list of
                                texts, or ARC's {"text": [...], "label": [...]}; ``answer`` its number from 0, its
                                label, its letter or its text
    question, answer            (or any row that training reads: prompt and completion, instruction and output ...)
                                what is written behind it, to the end of the line, is compared with the answer

Solved examples come from another file of such rows.
"""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from halfbyte.data.examples import BadRow
from halfbyte.data.prompts import asked_of
from halfbyte.data.sources import read_source, resolve
from halfbyte.errors import InputError

LETTERS = "ABCDEFGHIJKLMNOPQRSTUVWXYZ"
QUESTIONS = ("question", "query", "prompt", "text")
"""Columns of a question with choices."""
CHOICES = ("choices", "options")
TEXT = "{{question}}\nAnswer:"
Row = dict[str, Any]


def task_of(path: str, shots: str | None = None) -> dict[str, Any]:
    """Return the configuration of a file's task, named after the file.

    Args:
        path: of the file.
        shots: a file of solved examples.

    Raises:
        InputError: the rows are none of a task, or are some of one kind and some of the other.
    """
    rows, examples = _read(path), [] if shots is None else _read(shots)
    kinds = {"choices" in row for row in [*rows, *examples]}
    if len(kinds) > 1:
        raise InputError(f"Some rows of {path}{f' and {shots}' if shots else ''} have choices and some have none.")
    splits = {"test": rows, **({"train": examples} if examples else {})}

    def dataset(**_: Any) -> Mapping[str, Any]:
        from datasets import Dataset

        return {name: Dataset.from_list(found) for name, found in splits.items()}

    about: dict[str, Any] = {
        "task": Path(path).stem,
        "custom_dataset": dataset,
        "test_split": "test",
        "doc_to_text": TEXT,
        "metadata": {"version": 1.0},
    }
    if examples:
        about |= {"training_split": "train", "fewshot_split": "train"}
    if kinds == {True}:
        metrics = [{"metric": name, "aggregation": "mean", "higher_is_better": True} for name in ("acc", "acc_norm")]
        return about | {
            "output_type": "multiple_choice",
            "doc_to_choice": "choices",
            "doc_to_target": "answer",
            "metric_list": metrics,
        }
    exact = {"metric": "exact_match", "aggregation": "mean", "higher_is_better": True}
    return about | {
        "output_type": "generate_until",
        "doc_to_target": "answer",
        "generation_kwargs": {"until": ["\n"], "do_sample": False, "max_gen_toks": 64},
        "filter_list": [{"name": "none", "filter": [{"function": "remove_whitespace"}, {"function": "take_first"}]}],
        "metric_list": [exact | {"ignore_case": True, "ignore_punctuation": True}],
    }


def _read(path: str) -> list[Row]:
    return [_row(where, row) for source in resolve(path) for where, row in read_source(source)]


def _row(where: str, row: Any) -> Row:
    """Return a row as ``question`` and ``answer``, and ``choices`` if it has some.

    Raises:
        BadRow: it says no such things.
    """
    if isinstance(row, BadRow):
        raise row
    found = next((name for name in CHOICES if isinstance(row, Mapping) and row.get(name)), None)
    if found is None:
        [asked] = asked_of([(where, row)])
        if isinstance(asked, BadRow):
            raise asked
        if asked.reference is None or not asked.reference.strip():
            raise BadRow(where, "no answer", "says no answer that should come; add one.")
        turns = [str(turn["content"]) for turn in asked.turns]
        return {"question": "\n\n".join(turns), "answer": asked.reference.strip()}
    question = next((row[name] for name in QUESTIONS if isinstance(row.get(name), str) and row[name].strip()), None)
    if question is None:
        raise BadRow(where, "no question", f"has choices and no question; write it into a column {QUESTIONS[0]}.")
    given = row[found]
    texts = given.get("text") if isinstance(given, Mapping) else given
    if not isinstance(texts, list) or len(texts) < 2 or not all(isinstance(x, str) and x for x in texts):
        raise BadRow(where, "no choices", f"has {found} that is no list of two texts or more; write one.")
    labels = list(map(str, given.get("label") or ())) if isinstance(given, Mapping) else []
    answer = next((row[name] for name in ("answer", "answerKey", "label", "target") if row.get(name) is not None), None)
    place = _place(answer, texts, labels)
    if place is None:
        raise BadRow(
            where,
            "no answer among the choices",
            f"has the answer {answer!r}, which is none of its {len(texts)} choices; give its number from 0, its letter "
            "or its text.",
        )
    return {"question": question, "choices": texts, "answer": place}


def _place(answer: Any, texts: list[str], labels: list[str]) -> int | None:
    """Return which of the choices an answer means."""
    if isinstance(answer, int) and not isinstance(answer, bool):
        return answer if 0 <= answer < len(texts) and str(answer) not in labels else _at(labels, str(answer))
    if not isinstance(answer, str):
        return None
    for known in (labels, texts, list(LETTERS[: len(texts)])):
        if (place := _at(known, answer.strip())) is not None:
            return place
    return int(answer) if answer.isdecimal() and int(answer) < len(texts) else None


def _at(known: list[str], word: str) -> int | None:
    return known.index(word) if word in known else None

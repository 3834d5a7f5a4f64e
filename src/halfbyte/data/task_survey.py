"""What classifiers and sequence-to-sequence models are trained on, in numbers: classes, lengths, repetitions."""

import dataclasses
from typing import TYPE_CHECKING, Any

import numpy as np

from halfbyte import tables
from halfbyte.choices import Task
from halfbyte.data.prepared import Prepared
from halfbyte.errors import counted

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

QUANTILES = (50, 90, 99, 100)
RARE = 8
"""Fewer examples of a class than this are hardly enough to learn it."""
UNEVEN = 0.8
"""A share of the commonest class from which accuracy alone says little."""


@dataclasses.dataclass(frozen=True)
class TaskSurvey:
    """Numbers of the training rows.

    Attributes:
        task: what they are for.
        rows: how many there are.
        evaluation_rows: rows for evaluation.
        truncated: rows that are cut.
        classes: examples of each class, held-out ones included; empty for sequence-to-sequence.
        tokens: the lengths that 50, 90, 99 and 100 % of the inputs do not exceed.
        target_tokens: the same of the targets; empty for classification.
        repeated: rows whose input an earlier row has too.
        contradicting: rows whose input an earlier row has with another class or target.
        bad: rows that are left out, by kind.
        first_bad: the sentence about the first of each kind.
        unused: columns that have no part in it.
        notes: what was made of rows.
        said: what was found out about files.
    """

    task: Task
    rows: int
    evaluation_rows: int
    truncated: int
    classes: dict[str, int]
    tokens: dict[str, int]
    target_tokens: dict[str, int]
    repeated: int
    contradicting: int
    bad: dict[str, int]
    first_bad: dict[str, str]
    unused: dict[str, int]
    notes: dict[str, int]
    said: list[str]

    def hints(self) -> list[str]:
        """Return what should be looked at before training, a sentence each."""
        lines = list(self.said)
        lines += [f"In {count:,} of the examples: {note}." for note, count in self.notes.items()]
        lines += [
            f"Left out, {counted(count, 'row')}: {kind}. {self.first_bad[kind]}" for kind, count in self.bad.items()
        ]
        total = sum(self.classes.values())
        if few := [name for name, count in self.classes.items() if count < RARE]:
            more = f" and {len(few) - 5} more classes" if len(few) > 5 else ""
            lines.append(f"Under {RARE} examples: {', '.join(few[:5])}{more}; that is hardly enough to learn them.")
        if self.classes and (most := max(self.classes.values())) >= UNEVEN * total:
            lines.append(f"{most / total:.0%} of the examples are of one class: look at f1 and matthews, not accuracy.")
        if self.contradicting:
            lines.append(f"Of {counted(self.contradicting, 'row')} the input has another answer in an earlier row.")
        if self.truncated:
            lines.append(f"Cut: {counted(self.truncated, 'row')}; raise max_length if the model reads more.")
        return lines


def survey_task(data: Prepared, said: list[str]) -> TaskSurvey:
    """Count the rows that are trained on; ``said`` comes before what the preparation said."""
    rows, counts = data.train.rows, data.train.counts
    repeated = contradicting = 0
    answers: dict[bytes, bytes] = {}
    for row in rows.with_format("numpy"):
        ids, labels = (np.asarray(row[name], np.int32).tobytes() for name in ("input_ids", "labels"))
        before = answers.setdefault(ids, labels)
        repeated += before is not labels
        contradicting += before != labels
    return TaskSurvey(
        task=data.task,
        rows=counts.rows,
        evaluation_rows=data.evaluation.counts.rows if data.evaluation else 0,
        truncated=counts.truncated,
        classes=data.classes,
        tokens=_quantiles(rows, "input_ids"),
        target_tokens=_quantiles(rows, "labels") if data.task == "seq2seq" else {},
        repeated=repeated,
        contradicting=contradicting,
        bad=data.bad.counts,
        first_bad=data.bad.first,
        unused=counts.unused,
        notes=counts.notes,
        said=[*said, *data.said],
    )


def shown_row(data: Prepared, number: int, tokenizer: "PreTrainedTokenizerBase") -> tuple[str, str, str]:
    """Return where row ``number``, from 0, comes from, its input with control tokens, and its class or target."""
    row: Any = data.train.rows[number]
    answer = list(data.classes)[row["labels"][0]] if data.classes else str(tokenizer.decode(row["labels"]))
    return str(row[tables.WHERE]), str(tokenizer.decode(row["input_ids"])), answer


def _quantiles(rows: Any, column: str) -> dict[str, int]:
    lengths = tables.lengths(rows, column)
    return {str(q): int(np.percentile(lengths, q, method="inverted_cdf")) for q in QUANTILES}

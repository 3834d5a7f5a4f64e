"""The parts of an evaluation: texts, MMLU, rows with references, tasks of lm-eval. All work alike.

Each reads its inputs when it is made, before a model is opened. :meth:`Part.measure` then measures one side of a model,
:meth:`Part.texts` has what is looked for in training data, and ``kept`` the lines that are kept beside the figures.
"""

import abc
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

from halfbyte.data import read_examples
from halfbyte.data.bad_rows import BadRows, Skip
from halfbyte.data.examples import BadRow, Text
from halfbyte.data.prompts import Asked, asked_of
from halfbyte.data.sources import read_source, resolve
from halfbyte.errors import InputError, counted
from halfbyte.evaluate import mmlu
from halfbyte.evaluate.answered import GENERATED, TOGETHER, answered, jobs_of
from halfbyte.evaluate.asking import Asking
from halfbyte.evaluate.estimates import Estimate, Rows
from halfbyte.evaluate.perplexity import losses, metrics_of, prefix_of
from halfbyte.evaluate.references import METRICS, best_scores, references_of
from halfbyte.evaluate.sides import Side, computing
from halfbyte.generate.engines import engine_over
from halfbyte.generate.sampling import Sampling

if TYPE_CHECKING:
    from halfbyte.evaluate.tasks.named import Loaded

Progress = Callable[[str, int, int], None]
"""Told what is being done, how many of it are done, and how many there are."""


class Opened(NamedTuple):
    """A model: how many tokens it reads of a text at most, and of a task's question."""

    model: Any
    tokenizer: Any
    window: int
    length: int


@dataclass(frozen=True)
class Value:
    """A metric of one side.

    Attributes:
        estimate: its value.
        count: of rows.
        rows: what each adds, where that is known.
        better: whether more is better.
        is_inner: whether it is a part of something that is told as a whole.
    """

    estimate: Estimate
    count: int
    rows: Rows | None = None
    better: bool | None = True
    is_inner: bool = False

    @classmethod
    def of(cls, rows: Rows, **about: Any) -> "Value":
        """Return the value over rows."""
        return cls(rows.estimate(), len(rows), rows, **about)


Values = dict[tuple[str, str], Value]
"""By what was measured on, and the name of the metric."""
Placed = tuple[str, str]
"""Where a row stands, and its text."""


class Part(abc.ABC):
    """A part of an evaluation."""

    takes_sources = False
    """Whether encoders with decoders can be measured too."""

    def __init__(self) -> None:
        self.kept: dict[str, list[dict[str, Any]]] = {}
        self.notes: list[str] = []

    @abc.abstractmethod
    def measure(self, opened: Opened, side: Side, progress: Progress) -> Values:
        """Measure one side of a model."""

    @abc.abstractmethod
    def texts(self) -> dict[str, list[Placed]]:
        """Return the rows' texts by what was measured on, after the first side."""


class TextsPart(Part):
    """Perplexity of the texts of a file."""

    def __init__(self, name: str, limit: int | None) -> None:
        super().__init__()
        self.name = Path(name).name
        self._texts: list[Text] = []
        for example in read_examples(name):
            if isinstance(example, BadRow):
                raise example
            if not isinstance(example, Text):
                raise InputError(
                    f"{example.where} is no text but a question with its answer; perplexity (--data) is of texts, and "
                    "answers are compared with --references."
                )
            if example.text:
                self._texts.append(example)
            if len(self._texts) == limit:
                break
        if not self._texts:
            raise InputError(f"{name} holds no text; give a file with some.")

    def measure(self, opened: Opened, side: Side, progress: Progress) -> Values:
        """Read all texts."""
        model, tokenizer, window, _ = opened
        texts = [text.text for text in self._texts]
        ids = [tokenizer(text, add_special_tokens=False)["input_ids"] for text in texts]
        told = f"{self.name}, {side.name}"
        with computing(model, side.adapter):
            found = losses(model, ids, prefix_of(tokenizer), window, lambda done, total: progress(told, done, total))
        return {(self.name, metric): Value.of(rows, better=False) for metric, rows in metrics_of(found, texts).items()}

    def texts(self) -> dict[str, list[Placed]]:
        """Return them."""
        return {self.name: [(text.where, text.text) for text in self._texts]}


class MmluPart(Part):
    """MMLU as the paper takes it."""

    NAME = "mmlu"

    def __init__(self, where: str, shots: str | None, limit: int | None, longest: int | None, batch_size: int) -> None:
        super().__init__()
        self._questions = mmlu.read_mmlu(where, shots)[:limit]
        self._longest = longest or mmlu.LONGEST
        self._batch_size = batch_size

    def measure(self, opened: Opened, side: Side, progress: Progress) -> Values:
        """Ask all questions."""
        rows, cut = mmlu.encode(self._questions, opened.tokenizer, self._longest)
        self.notes = [
            f"{counted(cut, 'question')} of MMLU were longer than {self._longest:,} tokens and lost their end, as in "
            "the paper's script; --max-length raises that."
        ][: bool(cut)]
        subjects = [question["subject"] for question in self._questions]
        with computing(opened.model, side.adapter):
            found = mmlu.score(
                opened.model,
                rows,
                opened.tokenizer,
                batch_size=self._batch_size,
                progress=lambda done, total: progress(f"MMLU, {side.name}", done, total),
            )
        right = np.array(found.right, float)
        values = {(self.NAME, "accuracy"): Value.of(Rows(right, groups=subjects))}
        for subject in dict.fromkeys(subjects):
            own = np.array([name == subject for name in subjects])
            values[f"{self.NAME}: {subject}", "accuracy"] = Value.of(Rows(right[own]), is_inner=True)
        return values

    def texts(self) -> dict[str, list[Placed]]:
        """Return the questions, without those that are answered before them."""
        return {
            self.NAME: [
                (f"question {number} ({question['subject']})", question["input"].rpartition("\n\n")[2])
                for number, question in enumerate(self._questions, start=1)
            ]
        }


class ReferencesPart(Part):
    """Greedy answers to the rows of a file, compared with what should come."""

    takes_sources = True

    def __init__(self, name: str, limit: int | None, skip: Skip, *, system: str | None, max_new_tokens: int) -> None:
        super().__init__()
        self.name = Path(name).name
        self._system, self._most = system, max_new_tokens
        self._skip: Skip = skip
        self._asked: list[Asked] = []
        self._references: dict[str, list[str]] = {}
        bad, count = BadRows(), 0
        for asked in asked_of(row for source in resolve(name) for row in read_source(source)):
            count += 1
            if isinstance(asked, BadRow):
                bad.add(asked)
                continue
            try:
                self._references[asked.where] = references_of(asked)
            except BadRow as error:
                bad.add(error)
                continue
            self._asked.append(asked)
            if len(self._asked) == limit:
                break
        self._check(bad, count)

    def _check(self, bad: BadRows, count: int) -> None:
        bad.check(count, self._skip, "measure on", "measured on")
        if bad.total:
            self.notes.append(f"{self.name}: {counted(bad.total, 'row')} left out.\n{bad.told()}")

    def measure(self, opened: Opened, side: Side, progress: Progress) -> Values:
        """Have all rows answered."""
        asking = Asking(Sampling(max_new_tokens=self._most), side.adapter, system=self._system)
        lines = []
        with engine_over(opened.model, opened.tokenizer, most_waiting=TOGETHER) as engine:
            jobs, bad, count = jobs_of(self._asked, asking.requests(opened.tokenizer, opened.model), engine)
            self._check(bad, count)
            self._asked = [job.asked for job in jobs]
            for line in answered(engine, jobs, samples=1, seed=0, settings=""):
                lines.append(line)
                progress(f"{self.name}, {side.name}", len(lines), len(jobs))
        scores = [
            best_scores(line[GENERATED], self._references[job.asked.where])
            for line, job in zip(lines, jobs, strict=True)
        ]
        self.kept[f"{self.name}-{side.name}.jsonl"] = [
            {
                GENERATED: line[GENERATED],
                "references": self._references[job.asked.where],
                **found,
                "where": job.asked.where,
            }
            for line, job, found in zip(lines, jobs, scores, strict=True)
        ]
        return {
            (self.name, metric): Value.of(Rows(np.array([found[metric] for found in scores]))) for metric in METRICS
        }

    def texts(self) -> dict[str, list[Placed]]:
        """Return what the user says last in each row."""
        return {self.name: [(asked.where, _last_question(asked)) for asked in self._asked]}


def _last_question(asked: Asked) -> str:
    return next((str(turn["content"]) for turn in reversed(asked.turns) if turn["role"] == "user"), "")


class TasksPart(Part):
    """Tasks of lm-eval."""

    def __init__(self, loaded: "Loaded", limit: int | None, apply_chat_template: bool, keeps_samples: bool) -> None:
        super().__init__()
        self._loaded, self._limit = loaded, limit
        self._chat, self._keeps = apply_chat_template, keeps_samples
        self._samples: dict[str, list[dict[str, Any]]] = {}

    def measure(self, opened: Opened, side: Side, progress: Progress) -> Values:
        """Ask all of them."""
        from halfbyte.evaluate.tasks.harness import HalfbyteLM
        from halfbyte.evaluate.tasks.measured import measure

        if self._chat and not opened.tokenizer.chat_template:
            raise InputError("--apply-chat-template needs a model with a chat template, and this one has none.")
        lm = HalfbyteLM(
            opened.model,
            opened.tokenizer,
            side.adapter,
            opened.length,
            lambda done, total: progress(f"tasks, {side.name}", done, total),
        )
        metrics, self._samples = measure(lm, self._loaded, limit=self._limit, apply_chat_template=self._chat)
        if self._keeps:
            self.kept |= {f"{name}-{side.name}.jsonl": rows for name, rows in self._samples.items()}
        return {
            (one.task, one.name): Value(one.estimate, one.count, one.rows, one.higher_is_better, one.is_inner)
            for one in metrics
        }

    def texts(self) -> dict[str, list[Placed]]:
        """Return their questions."""
        from halfbyte.evaluate.tasks.measured import texts_of

        found = texts_of(self._loaded, self._samples)
        return {name: list(_numbered(name, texts)) for name, texts in found.items()}


def _numbered(name: str, texts: Sequence[str]) -> Iterator[Placed]:
    return ((f"{name}, question {number}", text) for number, text in enumerate(texts, start=1))

"""What a run tells while it goes: typed records, and their one form as a line of JSON.

The run tells events to whoever listens; a listener is a function of one event. The terminal, ``metrics.jsonl``, the
benchmark, a report and a page in another process all read these records and nothing else. ``metrics.jsonl`` begins with
a :class:`Header`; a reader leaves out kinds and fields that it does not know, and says when a file is of a newer
version.
"""

import functools
import json
from collections.abc import Callable, Iterable, Iterator
from typing import Annotated, ClassVar, Literal

from pydantic import BaseModel, ConfigDict, Field, TypeAdapter, ValidationError

VERSION = 1
"""Of the file form; counted up when a reader of the old form would misread the new one."""
LONGEST_COUNT = 19
"""Digits that no count has; a damaged file may have more than a float has room for."""


class Event(BaseModel):
    """One thing that happened."""

    model_config = ConfigDict(frozen=True, extra="ignore", defer_build=True)

    kept: ClassVar[bool] = True
    """Whether it belongs into ``metrics.jsonl``."""


class Header(Event):
    """The first line of a file: the version of its form, and who wrote it."""

    kind: Literal["header"] = "header"
    version: int = VERSION
    halfbyte: str = ""


class Stage(Event):
    """A part of the run begins: reading data, loading the model, planning its memory."""

    kept: ClassVar[bool] = False
    kind: Literal["stage"] = "stage"
    name: Literal["data", "model", "plan"]
    text: str


class Progress(Event):
    """How far the stage under way has come."""

    kept: ClassVar[bool] = False
    kind: Literal["progress"] = "progress"
    done: int
    total: int
    unit: str = ""


class Note(Event):
    """A fact for whoever watches, as a sentence.

    Attributes:
        step: after which it was seen, if it is of one.
        trouble: whether something should be done about it.
    """

    kind: Literal["note"] = "note"
    text: str
    step: int | None = None
    trouble: bool = False

    @property
    def told(self) -> str:
        """The sentence with its step."""
        return f"After step {self.step:,}: {self.text}" if self.step else self.text


class DataSummary(Event):
    """What is trained on.

    Attributes:
        examples: that were read, those that are left out apart; rows, tokens: what became of them.
        trained_tokens: tokens that have a label.
        truncated: examples that were cut to the greatest length.
        longest: tokens of the longest row.
        repeated: rows that are equal to an earlier one; None if nobody counted.
        near: rows that are nearly equal to an earlier one, among ``near_of`` different ones; None if nobody counted.
        evaluation: examples for evaluation.
        left_out: rows that were left out, by kind.
        notes: what was made of examples that their author might not expect, with the number of examples.
    """

    kind: Literal["data"] = "data"
    examples: int
    rows: int
    tokens: int
    trained_tokens: int
    truncated: int = 0
    longest: int = 0
    repeated: int | None = None
    near: int | None = None
    near_of: int = 0
    evaluation: int = 0
    left_out: dict[str, int] = Field(default_factory=dict)
    notes: dict[str, int] = Field(default_factory=dict)


class Begin(Event):
    """Training starts after ``step`` steps (0, or those of the checkpoint) of ``total_steps``."""

    kind: Literal["begin"] = "begin"
    step: int
    total_steps: int


class StepMetrics(Event):
    """One optimizer step.

    Attributes:
        step: number of the step, from 1.
        epoch: passes over the data so far.
        loss: mean negative log-likelihood of the step's trained tokens, in nats.
        learning_rate: the one the step was made with.
        grad_norm: L2 norm of the gradient before clipping.
        trained_tokens: tokens with a label, since the start of the run.
        tokens_per_second: trained tokens of this step over its seconds.
        memory_bytes: resident memory of the process at the end of the step, mapped files included; 0: not told.
        gpu_memory_bytes: what the process has of its GPU, CUDA's context apart; 0: it uses none.
        elapsed: seconds of training since the start of the run, the time between an interruption and resuming apart.
        figures: what the method tells beside the loss, by TRL's names, such as ``rewards/accuracies``.
    """

    kind: Literal["step"] = "step"
    step: int
    epoch: float
    loss: float
    learning_rate: float
    grad_norm: float
    trained_tokens: int
    tokens_per_second: float
    elapsed: float
    memory_bytes: int = 0
    gpu_memory_bytes: int = 0
    figures: dict[str, float] = Field(default_factory=dict)


class Evaluation(Event):
    """What was measured on held-out rows after ``step`` steps; figures by their names, such as ``loss``.

    Attributes:
        not_finite: figures that came out infinite or as no number, which ``figures`` lacks.
    """

    kind: Literal["evaluation"] = "evaluation"
    step: int
    figures: dict[str, float]
    not_finite: list[str] = Field(default_factory=list)


class Sample(Event):
    """How the model answered ``prompt`` after ``step`` steps."""

    kind: Literal["sample"] = "sample"
    step: int
    prompt: str
    answer: str


class Checkpoint(Event):
    """The state after ``step`` steps is on the disk, in ``folder`` of the run."""

    kind: Literal["checkpoint"] = "checkpoint"
    step: int
    folder: str


class End(Event):
    """Training is over, for whatever reason, after ``step`` steps; ``error`` says why it failed."""

    kind: Literal["end"] = "end"
    step: int
    reason: Literal["finished", "interrupted", "failed"]
    error: str = ""


AnyEvent = Annotated[
    Header | Stage | Progress | Note | DataSummary | Begin | StepMetrics | Evaluation | Sample | Checkpoint | End,
    Field(discriminator="kind"),
]
Listener = Callable[[Event], None]


@functools.cache
def _reader() -> TypeAdapter[Event]:
    return TypeAdapter(AnyEvent)


def whole_number(digits: str) -> float:
    """Return a number that JSON writes without a fraction; one that counts nothing in this world as no integer."""
    return int(digits) if len(digits) < LONGEST_COUNT else float(digits)


def to_line(event: Event) -> str:
    """Return ``event`` as one line of JSON, without its end of line."""
    return event.model_dump_json()


def from_lines(lines: Iterable[str], name: str = "This file") -> Iterator[Event]:
    """Yield the events of ``lines``, without the header; kinds and fields that are not known are left out.

    Of a file of a newer version that is said first, by a :class:`Note` that names the file as ``name``.
    """
    for line in lines:
        try:
            values = json.loads(line, parse_int=whole_number)
            event = _reader().validate_python(values)
        except (ValueError, RecursionError, ValidationError):
            continue
        if not isinstance(event, Header):
            yield event
        elif event.version > VERSION:
            yield Note(
                text=f"{name} was written by a newer halfbyte ({event.halfbyte or 'version unknown'}): what this one "
                "does not know is left out."
            )

"""What an evaluation found: figures of a model, or of a base and an adapter beside each other; what overlaps."""

import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from pydantic import BaseModel, Field
from rich.table import Table

from halfbyte.evaluate.contamination import COMMON
from halfbyte.evaluate.estimates import Estimate
from halfbyte.files import write_text
from halfbyte.runs.report.words import FIGURES

ARROWS = {True: " ↑", False: " ↓", None: ""}
MOST_DIGITS = 6
"""Behind the point, of a value whose error is tiny."""


class Figure(BaseModel):
    """A value and its standard error."""

    value: float
    stderr: float | None = None

    @classmethod
    def of(cls, estimate: Estimate) -> "Figure":
        """Return an estimate as it is written."""
        return cls(value=estimate.value, stderr=estimate.stderr)

    def shown(self, sign: str = "") -> str:
        """Return it as a person reads it: two digits of the error, the value to the same place."""
        if not math.isfinite(self.value):
            return str(self.value)
        if not self.stderr:
            return f"{self.value:{sign}.4f}" if abs(self.value) < 1e4 else f"{self.value:{sign}.4g}"
        digits = min(MOST_DIGITS, max(0, 1 - math.floor(math.log10(self.stderr))))
        return f"{self.value:{sign},.{digits}f} ± {self.stderr:,.{digits}f}"


class Measured(BaseModel):
    """A metric on something.

    Attributes:
        task: on what: a task's name, or a file's.
        metric: its name.
        count: of rows.
        higher_is_better: None where nobody says.
        figures: by side: ``base`` and ``adapter``, or ``model``.
        difference: the adapter's less the base's; its standard error is that of a paired difference, where each row's
            part in the metric is known.
        is_inner: whether it is a part of something else that is told as a whole, and left out of the table.
    """

    task: str
    metric: str
    count: int
    higher_is_better: bool | None = None
    figures: dict[str, Figure]
    difference: Figure | None = None
    is_inner: bool = False


class Example(BaseModel):
    """A row that overlaps: where it stands, words of it, where they were trained, and how much of it is covered."""

    where: str
    words: str
    trained: str
    covered: float


class Overlap(BaseModel):
    """How much of the rows of something was trained on; see :mod:`halfbyte.evaluate.contamination`.

    Attributes:
        task: on what.
        ngram: words in a row that were looked for.
        rows: how many there are; ``overlapping``: that overlap; ``covered``: their words that are covered, on average.
        examples: some of them.
        clean: the metrics on the others alone, where each row's part in them is known.
    """

    task: str
    ngram: int
    rows: int
    overlapping: int
    covered: float = 0.0
    examples: list[Example] = Field(default_factory=list)
    clean: list[Measured] = Field(default_factory=list)


class EvaluationReport(BaseModel):
    """Everything that was found.

    Attributes:
        model: as it was named.
        sides: what was measured, in order.
        weights: how the base is held.
        date: UTC, ISO 8601.
        versions: of halfbyte and of what measured.
        options: that decide the figures.
        measured: the figures.
        overlaps: if they were looked for.
        notes: what somebody should know, a sentence each.
    """

    model: str
    sides: list[str]
    weights: str
    date: str
    versions: dict[str, str]
    options: dict[str, Any]
    measured: list[Measured] = Field(default_factory=list)
    overlaps: list[Overlap] = Field(default_factory=list)
    notes: list[str] = Field(default_factory=list)

    def write(self, file: Path) -> None:
        """Write all of it as JSON."""
        write_text(file, self.model_dump_json(indent=1) + "\n")

    def table(self) -> Table:
        """Return the figures for the terminal."""
        shown = [one for one in self.measured if not one.is_inner]
        return self._table(f"{Path(self.model).name}", shown)

    def overlap_table(self) -> Table:
        """Return what overlaps for the terminal."""
        words = max((one.ngram for one in self.overlaps), default=0)
        table = Table(
            title="Rows that overlap with the training data",
            caption=f"{words} words in a row, or all of a shorter text, in at most {COMMON} different rows that were "
            "trained on; words of a template apart. covered: of their words.",
        )
        for column, justify in (("", "left"), ("rows", "right"), ("overlap", "right"), ("covered", "right")):
            table.add_column(column, justify=justify)  # type: ignore[arg-type]
        for one in self.overlaps:
            share = f"{one.overlapping:,} ({one.overlapping / max(1, one.rows):.1%})"
            table.add_row(one.task, f"{one.rows:,}", share, f"{one.covered:.0%}" if one.overlapping else "")
        return table

    def clean_table(self) -> Table | None:
        """Return the figures on rows that do not overlap, or None where none overlaps."""
        clean = [one for overlap in self.overlaps if overlap.overlapping for one in overlap.clean]
        return self._table("On the rows that do not overlap", clean) if clean else None

    def _table(self, title: str, measured: Sequence[Measured]) -> Table:
        table = Table(title=title, caption="± standard error.")
        table.add_column("")
        table.add_column("metric")
        differ = len(self.sides) > 1
        for column in ("rows", *self.sides, *(["difference"] if differ else [])):
            table.add_column(column, justify="right")
        for one in measured:
            figures = [one.figures[side].shown() if side in one.figures else "" for side in self.sides]
            apart = [one.difference.shown("+") if one.difference else ""] if differ else []
            name = FIGURES.get(one.metric, one.metric) + ARROWS[one.higher_is_better]
            table.add_row(one.task, name, f"{one.count:,}", *figures, *apart)
        return table

"""What a plan knows of the rows: their number and lengths, from the data, or from the options where there is none."""

from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from halfbyte import data, tables
from halfbyte.plan.times import Pass
from halfbyte.runs.config import TrainConfig

MOST_COUNTED = 20_000_000
"""Tokens of data up to which the different ones are counted."""


@dataclass(frozen=True)
class RowFacts:
    """Rows that are trained on.

    Attributes:
        lengths: tokens of each, or of one that stands for all.
        count: how many there are; None: nobody knows.
        trained: tokens with a label, of all ``lengths``.
        distinct: different tokens, or None.
        evaluated: tokens of the rows for evaluation.
    """

    lengths: Any
    count: int | None
    trained: int
    distinct: int | None = None
    evaluated: int = 0

    @property
    def longest(self) -> int:
        """Tokens of the longest row."""
        return int(np.max(self.lengths))

    @property
    def tokens(self) -> int:
        """Of all ``lengths``."""
        return int(np.sum(self.lengths))

    @property
    def squares(self) -> float:
        """Σ length² of all ``lengths``."""
        return float((np.asarray(self.lengths, dtype=np.float64) ** 2).sum())

    def times(self, factor: float) -> "RowFacts":
        """Return so many times as many rows, of these lengths over and over: these are a part of the data."""
        if factor == 1 or self.count is None:
            return self
        count = round(factor * self.count)
        trained, evaluated = round(factor * self.trained), round(factor * self.evaluated)
        lengths = np.resize(self.lengths, count)
        return replace(self, lengths=lengths, count=count, trained=trained, evaluated=evaluated)


def full_rows(length: int) -> RowFacts:
    """Return rows of which each has ``length`` tokens, all but the first trained."""
    return RowFacts(np.array([length]), None, length - 1)


def facts_of(rows: Any) -> RowFacts:
    """Return what is known of prepared data (:class:`halfbyte.data.Prepared`)."""
    lengths = tables.lengths(rows.train.rows)
    distinct = None
    if int(lengths.sum()) <= MOST_COUNTED and "input_ids" in rows.train.rows.column_names:
        column = rows.train.rows.data.column("input_ids").combine_chunks()
        distinct = len(np.unique(column.flatten().to_numpy(zero_copy_only=False)))
    evaluated = int(tables.lengths(rows.evaluation.rows).sum()) if rows.evaluation else 0
    return RowFacts(lengths, len(lengths), rows.train.counts.trained_tokens, distinct, evaluated)


def packing_of(config: TrainConfig, facts: RowFacts, packs: bool, max_length: int) -> data.PackingPlan | None:
    """Return how the rows of a step are packed, if they are, as the run would choose."""
    if not packs or facts.count is None or config.packing is False or config.task != "lm" or config.neftune_noise_alpha:
        return None
    plan = data.plan_packing(
        facts.lengths, config.rows_a_pass, config.gradient_accumulation_steps, max_length, config.group_by_length
    )
    return plan if config.packing or plan.pays else None


def work_of(
    config: TrainConfig, facts: RowFacts, packed: data.PackingPlan | None, sequences: int
) -> tuple[Pass, float]:
    """Return an average pass, and how many a step has."""
    rows = min(config.rows_a_step, facts.count or config.rows_a_step)
    share = rows / len(facts.lengths)  # of all that a step has
    passes = packed.packed_passes if packed else -(-rows // config.rows_a_pass)
    padded = share * facts.tokens
    if packed is None and facts.count:
        plan = data.plan_packing(
            facts.lengths, config.rows_a_pass, config.gradient_accumulation_steps, facts.longest, config.group_by_length
        )
        padded = plan.padded_tokens
    tokens = (packed.packed_tokens if packed else padded) * sequences
    return (
        Pass(
            tokens=tokens / passes,
            squares=share * facts.squares * sequences / passes,
            trained=share * facts.trained * sequences / passes,
            longest=facts.longest,
        ),
        passes,
    )


def steps_of(config: TrainConfig, facts: RowFacts) -> int | None:
    """Return the optimizer steps of the run, or None where the rows are not known."""
    if config.max_steps:
        return config.max_steps
    if facts.count is None:
        return None
    return max(1, round(config.epochs * -(-facts.count // config.rows_a_step)))

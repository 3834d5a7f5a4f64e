"""What came of a contest: wins and ties of each pair, the judge's bias and silence, Elo ratings; or scores.

    agreed      questions on which a pair got the same verdict in both orders, of those that were judged in both
    first       judgements for the answer that stood first, of those for either: ½ without bias
    relative    Σ scores of a contestant / Σ scores of the baseline, over the judgements of the two; its standard error
                is that of a ratio over questions (:mod:`halfbyte.evaluate.estimates`)

A judgement without a verdict counts nowhere but as such.
"""

import itertools
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from pydantic import BaseModel, Field
from rich.table import Table

from halfbyte.evaluate.estimates import Rows
from halfbyte.evaluate.judge.contest import Judgement
from halfbyte.evaluate.judge.elo import Game, elo
from halfbyte.evaluate.judge.prompts import TIE, Scale
from halfbyte.files import write_text


class Pair(BaseModel):
    """What became of two contestants on all questions.

    Attributes:
        one, other: their names.
        wins: judgements for ``one``; ``losses`` for ``other``; ``ties`` for neither.
        unreadable: judgements without a verdict.
        both_orders: questions with a verdict in both orders; ``agreed``: those of them where it was the same.
    """

    one: str
    other: str
    wins: int = 0
    ties: int = 0
    losses: int = 0
    unreadable: int = 0
    both_orders: int = 0
    agreed: int = 0


class Rated(BaseModel):
    """A contestant's Elo rating; see :mod:`halfbyte.evaluate.judge.elo`."""

    name: str
    rating: float
    order: float
    low: float | None
    high: float | None


class Scored(BaseModel):
    """A contestant's scores: their mean, how many, and relative to the baseline."""

    name: str
    mean: float
    judgements: int
    relative: float | None = None
    stderr: float | None = None


class Summary(BaseModel):
    """Everything that came of a contest.

    Attributes:
        judge: the model, if a single one is known.
        scale: of its verdicts.
        judgements: how many there are; ``unreadable``: those without a verdict.
        first: the share of verdicts for the answer that stood first.
        pairs, ratings: of classes.
        scores: of scores; ``baseline``: what they are relative to.
    """

    judge: str | None
    scale: Scale
    judgements: int
    unreadable: int
    first: float | None = None
    pairs: list[Pair] = Field(default_factory=list)
    ratings: list[Rated] = Field(default_factory=list)
    scores: list[Scored] = Field(default_factory=list)
    baseline: str | None = None
    orders: int = 0
    seed: int = 0

    def write(self, file: Path) -> None:
        """Write all of it as JSON."""
        write_text(file, self.model_dump_json(indent=1) + "\n")

    def tables(self) -> list[Table]:
        """Return all of it for the terminal; nothing where no reply holds a verdict."""
        if self.unreadable == self.judgements:
            return []
        return [self._scores()] if self.scale == "scores" else [self._ratings(), self._pairs()]

    @property
    def notes(self) -> list[str]:
        """What somebody should know of the judgements, a sentence each."""
        lines = []
        if self.unreadable:
            lines.append(
                f"{self.unreadable:,} of {self.judgements:,} replies hold no verdict where it belongs; they count for "
                "nobody."
            )
        if self.first is not None:
            lines.append(f"{self.first:.1%} of the verdicts for one answer are for the first one (50% without bias).")
        return lines

    def _ratings(self) -> Table:
        table = Table(
            title="Elo ratings",
            caption=f"From 1000 with K = 32: means over {self.orders:,} orders of the games, and 95 % of that mean; "
            "interval: 95 % had other questions been asked.",
        )
        table.add_column("")
        for column in ("rating", "order", "interval"):
            table.add_column(column, justify="right")
        for one in self.ratings:
            interval = "" if one.low is None else f"{one.low:.0f} to {one.high:.0f}"
            table.add_row(one.name, f"{one.rating:.0f}", f"± {one.order:.1f}", interval)
        return table

    def _pairs(self) -> Table:
        table = Table(
            title="Pairs", caption="agreed: the same verdict in both orders, of the questions that have one in both."
        )
        table.add_column("")
        table.add_column("against")
        for column in ("won", "tied", "lost", "unreadable", "agreed"):
            table.add_column(column, justify="right")
        for pair in self.pairs:
            agreed = f"{pair.agreed / pair.both_orders:.1%}" if pair.both_orders else ""
            numbers = (pair.wins, pair.ties, pair.losses, pair.unreadable)
            table.add_row(pair.one, pair.other, *(f"{number:,}" for number in numbers), agreed)
        return table

    def _scores(self) -> Table:
        table = Table(
            title="Scores from 1 to 10", caption=f"relative: to the scores of {self.baseline}, ± standard error."
        )
        table.add_column("")
        for column in ("mean", "judgements", "relative"):
            table.add_column(column, justify="right")
        for one in self.scores:
            error = "" if one.stderr is None else f" ± {one.stderr:.1%}"
            relative = "" if one.relative is None else f"{one.relative:.1%}{error}"
            table.add_row(one.name, f"{one.mean:.2f}", f"{one.judgements:,}", relative)
        return table


def summary_of(
    lines: Sequence[Judgement], scale: Scale, *, baseline: str | None = None, orders: int, seed: int
) -> Summary:
    """Return what came of judgements, one at least.

    Args:
        lines: of one scale.
        scale: which.
        baseline: of scores, what they are relative to.
        orders: of the games, for Elo.
        seed: of these.
    """
    names = list(dict.fromkeys(name for line in lines for name in (line["first"], line["second"])))
    judges = {line.get("judge") for line in lines}
    unreadable = sum(line["verdict"] is None for line in lines)
    summary = Summary(
        judge=judges.pop() if len(judges) == 1 else None,
        scale=scale,
        judgements=len(lines),
        unreadable=unreadable,
        baseline=baseline,
    )
    if unreadable == len(lines):
        return summary
    if scale == "scores":
        summary.scores = _scores(lines, names, baseline)
        return summary
    decided = [line["verdict"] for line in lines if line["verdict"] in (1, 2)]
    summary.first = decided.count(1) / len(decided) if decided else None
    summary.pairs = [_pair(lines, *pair) for pair in itertools.combinations(names, 2)]
    summary.pairs = [pair for pair in summary.pairs if pair.wins + pair.ties + pair.losses + pair.unreadable]
    found = elo(games_of(lines, names), len(names), orders=orders, seed=seed)
    summary.ratings = [
        Rated(name=name, rating=one.mean, order=one.order, low=one.low, high=one.high)
        for name, one in sorted(zip(names, found, strict=True), key=lambda pair: -pair[1].mean)
    ]
    summary.orders, summary.seed = orders, seed
    return summary


def games_of(lines: Sequence[Judgement], names: Sequence[str]) -> list[Game]:
    """Return the judgements that have a verdict as games of ``names``."""
    questions = {name: number for number, name in enumerate(dict.fromkeys(line["question"] for line in lines))}
    return [
        Game(
            names.index(line["first"]),
            names.index(line["second"]),
            {1: 1.0, 2: 0.0, TIE: 0.5}[line["verdict"]],
            questions[line["question"]],
        )
        for line in lines
        if line["verdict"] is not None
    ]


def _pair(lines: Sequence[Judgement], one: str, other: str) -> Pair:
    pair = Pair(one=one, other=other)
    verdicts: dict[Any, dict[str, str | None]] = {}
    for line in lines:
        names = {1: line["first"], 2: line["second"], TIE: ""}
        if {line["first"], line["second"]} != {one, other}:
            continue
        if line["verdict"] is None:
            pair.unreadable += 1
            continue
        winner = names[line["verdict"]]
        pair.wins += winner == one
        pair.losses += winner == other
        pair.ties += winner == ""
        verdicts.setdefault((line["question"], line.get("judge")), {})[line["first"]] = winner
    both = [found for found in verdicts.values() if len(found) == 2]
    pair.both_orders = len(both)
    pair.agreed = sum(found[one] == found[other] for found in both)
    return pair


def _scores(lines: Sequence[Judgement], names: Sequence[str], baseline: str | None) -> list[Scored]:
    read = [line for line in lines if line["verdict"] is not None]
    found = []
    for name in names:
        own = [_score(line, name) for line in read if name in (line["first"], line["second"])]
        scored = Scored(name=name, mean=float(np.mean(own)) if own else float("nan"), judgements=len(own))
        beside = [line for line in read if {line["first"], line["second"]} == {name, baseline}]
        if baseline and name != baseline and beside:
            sums: dict[Any, list[float]] = {}
            for line in beside:
                both = sums.setdefault(line["question"], [0.0, 0.0])
                both[0] += _score(line, name)
                both[1] += _score(line, baseline)
            table = np.array(list(sums.values()))
            scored.relative, scored.stderr = Rows(table[:, 0], table[:, 1]).estimate()
        found.append(scored)
    return found


def _score(line: Mapping[str, Any], name: str) -> float:
    return float(line["verdict"][0 if line["first"] == name else 1])

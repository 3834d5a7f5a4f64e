"""What will be trained, in numbers: how much, how long, what of it twice, what is odd.

Counts and exact comparisons are of all rows, in one pass over the mapped table (:mod:`halfbyte.data.measure`), which
for a million rows takes some tens of megabytes; what needs texts or pairs of rows looks at a sample drawn with
``seed``, and says so. ``dataclasses.asdict`` of a survey is JSON.
"""

import dataclasses
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from halfbyte import tables
from halfbyte.choices import IGNORED
from halfbyte.data import duplicates, scripts
from halfbyte.data.duplicates import Contradictions, Duplicates, Near, Pair
from halfbyte.data.forms import GOOD, REJECTED_IDS
from halfbyte.data.measure import OPENING, Measured, Progress, measure
from halfbyte.data.scripts import Texts
from halfbyte.data.stops import stop_ids
from halfbyte.errors import InputError, counted

if TYPE_CHECKING:
    import datasets
    from transformers import PreTrainedTokenizerBase

    from halfbyte.data.table import Tokenized

QUANTILES = (0, 5, 25, 50, 75, 95, 100)
"""Per cent of the rows that are at most so long."""
LITTLE, NEARLY_ALL = 0.01, 0.99
"""Shares of a row's tokens; rows with less or more than that trained are counted."""
OPENING_SHARE = 0.2
"""Share of the rows from which on an opening is told."""
TOLD = 3
EVALUATION_SAMPLE = 5_000
"""Rows of evaluation data that are compared with those like them, at most."""


@dataclasses.dataclass(frozen=True)
class Spread:
    """How long the rows are, in tokens: the mean, and the lengths that ``QUANTILES`` per cent of them do not exceed."""

    mean: float
    quantiles: dict[str, int]


@dataclasses.dataclass(frozen=True)
class Bin:
    """Rows with ``least`` to ``most`` tokens, and rows of which so many tokens are trained."""

    least: int
    most: int
    rows: int
    trained: int


@dataclasses.dataclass(frozen=True)
class Opening:
    """The first tokens of an answer as text, and how many rows have an answer that begins with them.

    Attributes:
        whole: whether these rows are texts, trained from their beginning.
    """

    text: str
    rows: int
    share: float
    whole: bool = False


@dataclasses.dataclass(frozen=True)
class Answers:
    """Stretches of trained tokens.

    Attributes:
        count: how many there are.
        stopped: those that end with a stop token.
        stop_token: the tokenizer's own, as text; empty if it has none.
        other_stops: further tokens at which generation stops, since the chat template ends answers with them.
        ends: the tokens that most of them end with, as text, with the number of answers.
    """

    count: int
    stopped: int
    stop_token: str
    ends: dict[str, int]
    other_stops: list[str] = dataclasses.field(default_factory=list)


@dataclasses.dataclass(frozen=True)
class Overlap:
    """Evaluation rows that are among the training rows too.

    Attributes:
        rows: of the evaluation data.
        equal: those that are in the training data, token by token.
        same_prompt: those whose prompt is there.
        sampled, of: how many of them were compared with how many training rows for being nearly equal.
        near: those of the sample that are.
        pairs: of an evaluation row and a training row (``other``), equal ones first.
    """

    rows: int
    equal: int
    same_prompt: int
    sampled: int
    of: int
    near: int
    pairs: list[Pair]


@dataclasses.dataclass(frozen=True)
class Survey:
    """What will be trained. Rows are those of the table; a conversation may take several.

    Attributes:
        rows, tokens, trained_tokens: how many there are.
        trained_share: of the tokens.
        max_length: tokens that a row may have.
        truncated: examples that lost tokens to it.
        lengths, trained_lengths: of rows, and of what is trained of each.
        histogram: both, by lengths.
        little_trained, nearly_all_trained: rows by the share of their tokens that is trained.
        duplicates, contradictions: among all rows.
        near: among a sample.
        overlap: with the evaluation data.
        texts: of a sample.
        openings: with which many answers begin.
        answers: how they end.
        notes, unused: what was made of examples, and columns that had no part in them.
        rejected_lengths: of the rejected answers with their prompts, where rows are pairs; all else is of the chosen.
        good: rows whose answer was judged good, where they are judged.
        shapes, bad, first_bad, said: how many examples had which shape; kinds of rows that are left out, and the first
            of each; what was said of files. Of :class:`halfbyte.data.Prepared`, for whoever has one to put in.
    """

    rows: int
    tokens: int
    trained_tokens: int
    trained_share: float
    max_length: int
    truncated: int
    lengths: Spread
    trained_lengths: Spread
    histogram: list[Bin]
    little_trained: int
    nearly_all_trained: int
    duplicates: Duplicates
    contradictions: Contradictions
    near: Near
    overlap: Overlap | None
    texts: Texts
    openings: list[Opening]
    answers: Answers
    rejected_lengths: Spread | None = None
    good: int | None = None
    shapes: dict[str, int] = dataclasses.field(default_factory=dict)
    notes: dict[str, int] = dataclasses.field(default_factory=dict)
    bad: dict[str, int] = dataclasses.field(default_factory=dict)
    first_bad: dict[str, str] = dataclasses.field(default_factory=dict)
    unused: dict[str, int] = dataclasses.field(default_factory=dict)
    said: list[str] = dataclasses.field(default_factory=list)


def survey(
    rows: "Tokenized",
    tokenizer: "PreTrainedTokenizerBase",
    *,
    against: "Tokenized | None" = None,
    max_length: int | None = None,
    seed: int = 0,
    progress: Progress | None = None,
) -> Survey:
    """Look at rows that will be trained on.

    Args:
        rows: from :func:`halfbyte.data.tokenize` or :func:`halfbyte.data.prepare`.
        tokenizer: that made them.
        against: evaluation rows, to be compared with them.
        max_length: tokens a row may have, for the histogram's last bin; without it the longest row's.
        seed: of the samples.
        progress: called now and then with the rows that are done, and all of them.

    Raises:
        InputError: nothing would be learnt: there are no rows, or none has a trained token.
    """
    counts, table = rows.counts, rows.rows
    if not len(table):
        raise InputError("Nothing would be learnt: there are no rows to train on; name other data.")
    measured = measure(table, counts.longest, progress)
    trained = int(measured.trained.sum(dtype=np.int64))
    if not trained:
        raise InputError(
            f"Nothing would be learnt: none of the {counted(counts.tokens, 'token')} of {counted(counts.rows, 'row')} "
            "is trained; look at which turns of the data are answers, and at max_length."
        )
    longest = int(measured.lengths.max())
    limit = max_length or longest
    tokens = int(measured.lengths.sum(dtype=np.int64))
    shares = measured.trained / np.maximum(measured.lengths, 1)
    equal = _placed_groups(duplicates.duplicates(measured), table)
    contradicting = _placed(duplicates.contradictions(measured), table)
    # last, since its index takes the most memory
    near, index = duplicates.nearly_equal(table, measured, longest, seed)
    return Survey(
        rows=len(table),
        tokens=tokens,
        trained_tokens=trained,
        trained_share=trained / tokens,
        max_length=limit,
        truncated=counts.truncated,
        lengths=_spread(measured.lengths),
        trained_lengths=_spread(measured.trained),
        histogram=histogram(measured.lengths, measured.trained, max(limit, longest)),
        little_trained=int((shares < LITTLE).sum()),
        nearly_all_trained=int((shares > NEARLY_ALL).sum()),
        duplicates=equal,
        contradictions=contradicting,
        near=_placed(near, table),
        overlap=_overlap(measured, table, index, near.sampled, against, seed) if against else None,
        texts=scripts.look_at(table, tokenizer, seed),
        openings=_openings(measured, table, tokenizer),
        answers=_answers(measured, tokenizer),
        rejected_lengths=_spread(tables.lengths(table, REJECTED_IDS)) if REJECTED_IDS in table.column_names else None,
        good=int(sum(table[GOOD])) if GOOD in table.column_names else None,
        notes=dict(counts.notes),
        unused=dict(counts.unused),
    )


def edges(limit: int) -> list[int]:
    """Return the least lengths of the histogram's bins: 1, 2, 4, 8, 12, 16, 24, 32 ... below ``limit``, and it."""
    powers = [1 << power for power in range(limit.bit_length())]
    halves = [3 * power // 2 for power in powers if power >= 8]
    return [edge for edge in sorted([*powers, *halves]) if edge < limit] + [limit]


def histogram(lengths: NDArray[np.int32], trained: NDArray[np.int32], limit: int) -> list[Bin]:
    """Count rows by length; the last bin is of those that have ``limit`` tokens, none has more."""
    least = edges(limit)
    bounds = [*least, limit + 1]
    rows, labels = (np.histogram(values, bounds)[0].tolist() for values in (lengths, trained))
    return [
        Bin(first, behind - 1, *numbers)
        for first, behind, *numbers in zip(least, bounds[1:], rows, labels, strict=True)
    ]


def _spread(values: NDArray[Any]) -> Spread:
    found = np.percentile(values, QUANTILES, method="inverted_cdf")
    return Spread(float(values.mean()), {str(share): int(value) for share, value in zip(QUANTILES, found, strict=True)})


def _openings(measured: Measured, table: "datasets.Dataset", tokenizer: "PreTrainedTokenizerBase") -> list[Opening]:
    with_answer = measured.opening_hashes[measured.trained > 0]
    hashes, times = np.unique(with_answer, return_counts=True)
    order = np.argsort(-times, kind="stable")[:TOLD]
    found = []
    for at in order:
        if times[at] > OPENING_SHARE * len(with_answer) and times[at] > 1:
            row = table[int(np.argmax(measured.opening_hashes == hashes[at]))]
            labels = np.array(row["labels"], int)
            first = int(np.argmax(labels != IGNORED))
            whole = first <= 1
            read = first if whole else 0  # tokens before the trained ones that are told with them
            answer = labels[first : first + OPENING - read]
            behind = np.flatnonzero(answer == IGNORED)
            ids = [*row["input_ids"][:read], *answer[: behind[0] if len(behind) else OPENING].tolist()]
            begin = read if ids[0] == tokenizer.bos_token_id else 0
            text = tokenizer.decode(ids[begin:])
            found.append(Opening(text, int(times[at]), int(times[at]) / len(with_answer), whole))
    return found


def _answers(measured: Measured, tokenizer: "PreTrainedTokenizerBase") -> Answers:
    stops = stop_ids(tokenizer)
    others = [tokenizer.decode([token]) for token in stops if token != tokenizer.eos_token_id]
    ends = {tokenizer.decode([token]): times for token, times in measured.ends.most_common(TOLD)}
    stopped = sum(measured.ends[token] for token in stops)
    return Answers(measured.answers, stopped, tokenizer.eos_token or "", ends, others)


def _overlap(
    measured: Measured,
    table: "datasets.Dataset",
    index: duplicates.Index,
    of: int,
    against: "Tokenized",
    seed: int,
) -> Overlap:
    other = against.rows
    evaluated = measure(other, against.counts.longest)
    equal = np.isin(evaluated.hashes, measured.hashes)
    asked = measured.prompt_hashes[measured.prompts > 1]
    same_prompt = np.isin(evaluated.prompt_hashes, asked)
    pairs = []
    for number in np.flatnonzero(equal)[: duplicates.SHOWN].tolist():
        twin = int(np.argmax(measured.hashes == evaluated.hashes[number]))
        pairs.append(Pair(number + 1, twin + 1, 1.0))
    numbers = duplicates.draw(evaluated, EVALUATION_SAMPLE, seed)
    numbers = numbers[~equal[numbers]]
    near = index.near(other, numbers, against.counts.longest)
    pairs += sorted(near, key=lambda pair: -(pair.similarity or 0))[: duplicates.SHOWN]
    return Overlap(
        rows=len(other),
        equal=int(equal.sum()),
        same_prompt=int(same_prompt.sum()),
        sampled=len(numbers),
        of=of,
        near=len(near),
        pairs=[_placed_pair(pair, other, table) for pair in pairs],
    )


def _placed(found: Any, table: "datasets.Dataset") -> Any:
    return dataclasses.replace(found, pairs=[_placed_pair(pair, table, table) for pair in found.pairs])


def _placed_groups(found: Duplicates, table: "datasets.Dataset") -> Duplicates:
    groups = [dataclasses.replace(group, where=_where(table, group.row)) for group in found.groups]
    return dataclasses.replace(found, groups=groups)


def _placed_pair(pair: Pair, table: "datasets.Dataset", other: "datasets.Dataset") -> Pair:
    return dataclasses.replace(pair, where=_where(table, pair.row), other_where=_where(other, pair.other))


def _where(table: "datasets.Dataset", number: int) -> str:
    return str(table[number - 1].get("where", ""))

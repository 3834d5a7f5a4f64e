"""How far a model is from another one that it should be, on the same rows.

At each position that has a label, with p of the reference and q of the other:

    divergence   KL(p ‖ q) = Σ p (log p - log q), in nats; the mean over positions
    agreement    share of positions where both have the same first choice
    loss         mean of -log q(label)
    accuracy     share of positions where the first choice is the label
    apart        of each layer, ‖h_q - h_p‖² summed over positions, h what it hands on

What the reference says is kept, in fp32: positions times the vocabulary, and times layers and channels. Rows of a
causal model are read several at a time, filled up behind their ends, which nothing before sees.
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor

from halfbyte.choices import IGNORED, Task

Row = Mapping[str, Any]
TOGETHER = 512
"""Tokens of rows that are read together at most, what fills them up included."""


@dataclass(frozen=True)
class Figures:
    """What was found; see the head of this file.

    Attributes:
        positions: that were compared.
    """

    divergence: float
    agreement: float
    loss: float
    accuracy: float
    apart: list[float]
    positions: int


class _Seen(NamedTuple):
    """What a model says about a row: log-probabilities ``[n, V]``, labels ``[n]``, and of each layer ``[m, H]``."""

    logits: Tensor
    labels: Tensor
    states: list[Tensor]


class Reference:
    """What a model says about rows, for others to be compared with.

    Args:
        model: in evaluation mode; how it computes is its own.
        rows: of token ids and labels, as :func:`halfbyte.data.prepare` makes them.
        task: what the model does.
        positions: labelled ones that are taken at most; a row is taken whole or not at all, but for the first one.
        tokens: of the rows together, at most, likewise.
    """

    def __init__(
        self, model: Any, rows: Sequence[Row], task: Task = "lm", positions: int = 2048, tokens: int = 16384
    ) -> None:
        self._task = task
        self._rows: list[Row] = []
        found = 0
        for row in rows:
            count = 1 if task == "classify" else _labelled(row, task)
            if count == 0 or (self._rows and (found + count > positions or len(row["input_ids"]) > tokens)):
                continue
            tokens -= len(row["input_ids"])
            self._rows.append(row)
            found += count
            if found >= positions or tokens <= 0:
                break
        self._seen = list(_see_all(model, self._rows, task))

    @property
    def is_empty(self) -> bool:
        """Whether no row has a labelled token."""
        return not self._rows

    def compare(self, model: Any = None) -> Figures:
        """Return how far ``model`` is from the reference; without one, the reference from itself."""
        divergence = loss = 0.0
        agree = right = count = 0
        apart: list[float] = []
        others = self._seen if model is None else _see_all(model, self._rows, self._task)
        for seen, exact in zip(others, self._seen, strict=True):
            other = seen.logits
            divergence += float((exact.logits.exp() * (exact.logits - other)).double().sum())
            loss -= float(other.gather(1, seen.labels.unsqueeze(1)).double().sum())
            first = other.argmax(-1)
            agree += int((first == exact.logits.argmax(-1)).sum())
            right += int((first == seen.labels).sum())
            count += len(first)
            squares = [float((one - two).square().sum()) for one, two in zip(seen.states, exact.states, strict=True)]
            apart = [a + b for a, b in zip(apart or [0.0] * len(squares), squares, strict=True)]
        return Figures(divergence / count, agree / count, loss / count, right / count, apart, count)


def _labelled(row: Row, task: Task) -> int:
    labels = torch.as_tensor(row["labels"])
    return int((labels[1 if task == "lm" else 0 :] != IGNORED).sum())


@torch.no_grad()
def _see_all(model: Any, rows: Sequence[Row], task: Task) -> Iterator[_Seen]:
    if task == "lm":
        found = (seen for group in _groups(rows) for seen in _see_together(model, group))
    else:
        found = (_see(model, row, task) for row in rows)
    for seen in found:
        yield seen._replace(logits=seen.logits.log_softmax(-1))


def _groups(rows: Sequence[Row]) -> Iterator[list[Row]]:
    """Yield rows that come one after the other, as many as fill ``TOGETHER`` tokens."""
    group: list[Row] = []
    longest = 0
    for row in rows:
        longest = max(longest, len(row["input_ids"]))
        if group and longest * (len(group) + 1) > TOGETHER:
            yield group
            group, longest = [], len(row["input_ids"])
        group.append(row)
    if group:
        yield group


def _see_together(model: Any, rows: Sequence[Row]) -> list[_Seen]:
    ids = [torch.as_tensor(row["input_ids"], dtype=torch.int64) for row in rows]
    filled = torch.nn.utils.rnn.pad_sequence(ids, batch_first=True)
    output = model(input_ids=filled.to(model.device), use_cache=False, output_hidden_states=True)
    found = []
    for number, row in enumerate(rows):
        labels = torch.as_tensor(row["labels"], dtype=torch.int64)
        places = (labels[1:] != IGNORED).nonzero().squeeze(1)
        states = [x[number, places].float() for x in output.hidden_states[1:]]
        found.append(_Seen(output.logits[number, places].float(), labels[places + 1], states))
    return found


def _see(model: Any, row: Row, task: Task) -> _Seen:
    ids = torch.as_tensor(row["input_ids"], dtype=torch.int64, device=model.device).unsqueeze(0)
    labels = torch.as_tensor(row["labels"], dtype=torch.int64)
    if task == "classify":
        output = model(input_ids=ids, output_hidden_states=True)
        return _Seen(output.logits.float(), labels.view(1), [x[0].float() for x in output.hidden_states[1:]])
    output = model(input_ids=ids, labels=labels.unsqueeze(0).to(ids.device), output_hidden_states=True)
    places = (labels != IGNORED).nonzero().squeeze(1)
    states = output.decoder_hidden_states
    return _Seen(output.logits[0, places].float(), labels[places], [x[0, places].float() for x in states[1:]])


def rows_of(table: Any) -> Iterator[Row]:
    """Yield the rows of a table of tokens, the ids and labels alone."""
    for row in table:
        yield {"input_ids": row["input_ids"], "labels": row["labels"]}

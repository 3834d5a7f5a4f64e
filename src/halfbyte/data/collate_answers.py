"""Rows of preferences to batches, as TRL's (1.16) trainers take them: the answers' tokens marked, padded on the right.

``input_ids``, ``attention_mask``, ``completion_mask``   int64 ``[N, L]``; the mask is 1 where a token is trained
"""

import dataclasses
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from halfbyte.choices import IGNORED
from halfbyte.data.forms import GOOD, REJECTED_IDS, REJECTED_LABELS

REFERENCE_PAIR = ("ref_chosen_logps", "ref_rejected_logps")
"""Columns with the answers' log-probabilities under the model as it was, where they were computed beforehand."""


@dataclasses.dataclass(frozen=True)
class PairCollator:
    """Called with ``B`` rows of pairs, returns ``N = 2 B`` sequences: the better answers, then the others."""

    pad_token_id: int | None

    def __call__(self, rows: Iterable[Mapping[str, Any]]) -> dict[str, Tensor]:
        rows = list(rows)
        chosen = [(row["input_ids"], row["labels"]) for row in rows]
        batch = _padded(chosen + [(row[REJECTED_IDS], row[REJECTED_LABELS]) for row in rows], self.pad_token_id)
        known = (name for name in REFERENCE_PAIR if name in rows[0])
        return batch | {name: torch.tensor([float(row[name]) for row in rows], dtype=torch.float32) for name in known}


@dataclasses.dataclass(frozen=True)
class JudgedCollator:
    """Called with ``B`` rows of judged answers, returns them with ``label``, bool ``[B]``.

    And under ``KL_input_ids`` and so on each prompt with the answer of the row before it in the batch (the first with
    the last's), from which KTO (arXiv 2402.01306, section 4.1) estimates how far the model has moved. TRL makes these
    once, so it needs the rows always in one order; made here, they may be shuffled.

    Attributes:
        max_length: tokens that such a sequence may have.
    """

    pad_token_id: int | None
    max_length: int
    mismatches: bool = True
    """Whether there are such; read by :class:`halfbyte.hf.trainers.KTOTrainer`."""

    def __call__(self, rows: Iterable[Mapping[str, Any]]) -> dict[str, Tensor]:
        rows = list(rows)
        sequences = [(list(row["input_ids"]), list(row["labels"])) for row in rows]
        batch = _padded(sequences, self.pad_token_id) | {"label": torch.tensor([bool(row[GOOD]) for row in rows])}
        return batch | self._mismatched(sequences, sequences[-1]) if self.mismatches else batch

    def row(self, batch: Mapping[str, Tensor], place: int) -> tuple[list[int], list[int]]:
        """Return the tokens and labels of a row of a batch."""
        length = int(batch["attention_mask"][place].sum())
        ids, trained = batch["input_ids"][place, :length], batch["completion_mask"][place, :length].bool()
        return ids.tolist(), ids.masked_fill(~trained, IGNORED).tolist()

    def after(self, batch: Mapping[str, Tensor], before: tuple[list[int], list[int]]) -> dict[str, Tensor]:
        """Return a batch in which the row ``before`` comes before the first one, in place of its last one."""
        rows = [self.row(batch, place) for place in range(len(batch["input_ids"]))]
        return {**batch, **self._mismatched(rows, before)}

    def _mismatched(self, rows: Sequence[tuple[list[int], list[int]]], before: tuple[Any, Any]) -> dict[str, Tensor]:
        others = [self._mismatch(one, other) for one, other in zip(rows, [before, *rows[:-1]], strict=True)]
        return {f"KL_{name}": values for name, values in _padded(others, self.pad_token_id).items()}

    def _mismatch(self, asked: tuple[list[int], list[int]], answered: tuple[list[int], list[int]]) -> tuple[Any, Any]:
        """Return the prompt of one row with the answer of another."""
        (ids, labels), (others, other_labels) = asked, answered
        prompt, start = _prompt(labels), _prompt(other_labels)
        both = ids[:prompt] + others[start:], labels[:prompt] + other_labels[start:]
        return both[0][: self.max_length], both[1][: self.max_length]


def _prompt(labels: Sequence[int]) -> int:
    return next(place for place, label in enumerate(labels) if label != IGNORED)


def _padded(sequences: Sequence[tuple[Any, Any]], pad: int | None) -> dict[str, Tensor]:
    shape = len(sequences), max(len(ids) for ids, _ in sequences)
    batch = {
        "input_ids": torch.full(shape, pad or 0),
        "attention_mask": torch.zeros(shape, dtype=torch.int64),
        "completion_mask": torch.zeros(shape, dtype=torch.int64),
    }
    for index, (ids, labels) in enumerate(sequences):
        batch["input_ids"][index, : len(ids)] = torch.as_tensor(ids)
        batch["attention_mask"][index, : len(ids)] = 1
        batch["completion_mask"][index, : len(ids)] = torch.as_tensor(labels) != IGNORED
    return batch

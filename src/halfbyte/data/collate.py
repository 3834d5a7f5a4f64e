"""Rows to a batch: padded on the right to one length, the padding neither attended to nor trained."""

import dataclasses
from collections.abc import Iterable

import torch
from torch import Tensor

from halfbyte.choices import IGNORED
from halfbyte.data.tokens import Row


@dataclasses.dataclass(frozen=True)
class Collator:
    """Called with ``B`` rows, returns ``input_ids``, ``attention_mask`` and ``labels``, int64 ``[B, L]``.

    What else a row has is left out.

    ``L`` is the longest row's length, rounded up to a multiple of ``pad_to_multiple_of``. What the padding holds
    makes no difference to a causal model, so a tokenizer without a pad token (None) is padded with id 0.
    """

    pad_token_id: int | None
    pad_to_multiple_of: int = 1

    def __call__(self, rows: Iterable[Row]) -> dict[str, Tensor]:
        rows = list(rows)
        longest = max(len(row["input_ids"]) for row in rows)
        shape = len(rows), -(-longest // self.pad_to_multiple_of) * self.pad_to_multiple_of
        batch = {
            "input_ids": torch.full(shape, self.pad_token_id or 0),
            "attention_mask": torch.zeros(shape, dtype=torch.int64),
            "labels": torch.full(shape, IGNORED),
        }
        for index, row in enumerate(rows):
            length = len(row["input_ids"])
            batch["input_ids"][index, :length] = torch.as_tensor(row["input_ids"])
            batch["attention_mask"][index, :length] = 1
            batch["labels"][index, :length] = torch.as_tensor(row["labels"])
        return batch

"""Rows to a batch: padded on the right to one length, or laid one behind the other without padding."""

import dataclasses
from collections.abc import Callable, Iterable, Mapping, Sequence

import torch
from torch import Tensor

from halfbyte.choices import IGNORED
from halfbyte.data.packing import best_fit_decreasing, divide
from halfbyte.data.tokens import Row
from halfbyte.errors import InputError

Batch = dict[str, Tensor]

PADDED = {"input_ids", "attention_mask", "labels"}
"""What a padded batch holds."""


@dataclasses.dataclass(frozen=True)
class Collator:
    """Called with ``B`` rows, returns ``input_ids``, ``attention_mask`` and ``labels``, int64 ``[B, L]``.

    What else a row has is left out.

    ``L`` is the longest row's length, rounded up to a multiple of ``pad_to_multiple_of``. What the padding holds
    makes no difference to a causal model, so a tokenizer without a pad token (None) is padded with id 0.
    """

    pad_token_id: int | None
    pad_to_multiple_of: int = 1

    def __call__(self, rows: Iterable[Row]) -> Batch:
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


def pack(rows: Sequence[Row]) -> Batch:
    """Lay rows one behind the other: ``input_ids``, ``labels`` and ``position_ids``, int64 ``[1, T]``.

    Positions begin anew with each row, by which transformers (5.23) tells the rows apart where there is no
    ``attention_mask``. The first token of a row has no label: what stands before it is another row.
    """
    batch = {name: torch.cat([torch.as_tensor(row[name]).long() for row in rows]) for name in ("input_ids", "labels")}
    batch["position_ids"] = torch.cat([torch.arange(len(row["input_ids"])) for row in rows])
    batch["labels"].masked_fill_(batch["position_ids"] == 0, IGNORED)
    return {name: values.unsqueeze(0) for name, values in batch.items()}


@dataclasses.dataclass(frozen=True)
class Packer:
    """Makes of the padded batches of one optimizer step as many packed ones or fewer, over the same samples.

    Attributes:
        tokens: the most that a packed batch may hold, of :class:`halfbyte.data.PackingPlan`. What is more in one of the
            padded batches stays so.
    """

    tokens: int

    def __call__(
        self, batches: Sequence[Mapping[str, Tensor]], agree: Callable[[int], int] | None = None
    ) -> list[Batch]:
        """Pack a step.

        Args:
            batches: what a collator made, padded on the right: ``input_ids``, ``attention_mask``, ``labels``
                ``[B, L]``.
            agree: told how many batches there would be, returns how many there should be if that can be done: as many
                in each of several processes.

        Raises:
            InputError: a batch holds something else, or its padding is not on the right.
        """
        rows: list[Row] = []
        before: list[list[int]] = []
        for batch in batches:
            new = _unpadded(batch)
            before.append(list(range(len(rows), len(rows) + len(new))))
            rows += new
        lengths = [len(row["input_ids"]) for row in rows]
        bins = best_fit_decreasing(lengths, self.tokens)
        if len(bins) > len(batches):
            bins = before
        if agree:
            bins = divide(bins, lengths, agree(len(bins)))
        return [pack([rows[index] for index in members]) for members in bins]


def _unpadded(batch: Mapping[str, Tensor]) -> list[Row]:
    if batch.keys() != PADDED:
        raise InputError(
            f"A batch of {', '.join(batch)} cannot be packed: it must hold {', '.join(sorted(PADDED))} and nothing "
            "else; leave packing out, or use another data_collator."
        )
    lengths = batch["attention_mask"].sum(1)
    real = torch.arange(batch["attention_mask"].shape[1]) < lengths[:, None].cpu()
    if not torch.equal(batch["attention_mask"].cpu().bool(), real):
        raise InputError(
            "A batch that is not padded on the right alone cannot be packed; leave packing out, or use another "
            "data_collator."
        )
    return [
        {name: batch[name][index, :length] for name in ("input_ids", "labels")}
        for index, length in enumerate(lengths.tolist())
    ]

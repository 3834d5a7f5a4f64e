"""One pass over pairs or judged answers in several processes, as one process makes it that has all of its rows.

DPO's and KTO's loss of a pass is the mean over its rows. A process has its own B rows, and what DistributedDataParallel
takes is the mean over the N processes of their losses: the same, as long as all have as many rows. In the last pass of
an epoch or an evaluation they have not; accelerate (1.15) repeats rows of the beginning there, which are cut off here:

    T of N B rows are left, n of them here        loss = n N / T × mean over the n rows        (0 where n is 0)

and what TRL (1.16) gathers beside the loss is gathered from the rows that are left. An evaluation's loss is the mean
over all its rows. With one process nothing changes but that.
"""

import contextlib
from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from transformers.trainer_pt_utils import LengthGroupedSampler
from transformers.trainer_utils import has_length

from halfbyte.hf.trainers import distributed

if TYPE_CHECKING:
    from transformers import Trainer as _Theirs  # one of the classes that this one stands before
else:
    _Theirs = object

SHARE = "share of the pass"
"""The entry of a batch that holds its :class:`Share`, between its coming and its loss."""


@dataclass(frozen=True)
class Share:
    """What part of a pass this process has.

    Attributes:
        own: its rows.
        total: those of all processes.
        even: whether all have as many.
    """

    own: int = 1
    total: int = 1
    even: bool = True

    @property
    def weight(self) -> float:
        """What multiplies a mean over the own rows, so that the mean over the processes is the mean over all rows."""
        return 1.0 if self.even else self.own * distributed.world_size() / self.total


class Shared(_Theirs):
    """Stands before a trainer whose loss is a mean over rows."""

    _share = Share()
    _weighs_itself = False
    """Whether the loss that the trainer computes has :attr:`Share.weight` in it already."""
    _passes: list[tuple[float, int]]  # of an evaluation: this process's loss, and the rows of all

    def get_batch_samples(self, epoch_iterator: Any, num_batches: int, device: Any) -> Any:
        """Take a step's batches, as Trainer does, without the rows that are repeated to fill the last ones."""
        # accelerate does not count them in an epoch that a run goes on in
        sized = has_length(self.train_dataset) and not self.args.dataloader_drop_last
        remainder = len(self.train_dataset) % (self.args.train_batch_size * distributed.world_size()) if sized else 0
        own = (self._cut(batch, remainder) for batch in epoch_iterator)
        return super().get_batch_samples(own, num_batches, device)

    def compute_loss(
        self, model: Any, inputs: dict[str, Any], return_outputs: bool = False, num_items_in_batch: Any = None
    ) -> Any:
        """Return this process's part of the loss of a pass: the mean over the processes is the loss."""
        batch = {name: value for name, value in inputs.items() if name != SHARE}
        with self._within(inputs.get(SHARE, self._share)) as share:
            result = super().compute_loss(model, batch, return_outputs, num_items_in_batch)
        if share.even or self._weighs_itself:
            return result
        return (result[0] * share.weight, result[1]) if return_outputs else result * share.weight

    def prediction_step(self, model: Any, inputs: dict[str, Any], *args: Any, **kwargs: Any) -> Any:
        """Predict a batch, as TRL does; its loss is kept with the number of rows that it is the mean of."""
        batch = self._cut(inputs, int(self.accelerator.gradient_state.remainder))
        with self._within(batch.pop(SHARE)) as share:
            result = super().prediction_step(model, batch, *args, **kwargs)
        self._passes.append((float(result[0]), share.total))
        return result

    def evaluation_loop(self, *args: Any, metric_key_prefix: str = "eval", **kwargs: Any) -> Any:
        """Evaluate, as Trainer does but for the loss, which is the mean over all rows."""
        self._passes = []
        output = super().evaluation_loop(*args, metric_key_prefix=metric_key_prefix, **kwargs)
        everywhere = distributed.gather(self._passes)
        sums = [sum(loss * rows for loss, rows in passes) for passes in everywhere]
        if rows := sum(rows for _, rows in self._passes):
            output.metrics[f"{metric_key_prefix}_loss"] = sum(sums) / len(sums) / rows
        return output

    def _get_eval_sampler(self, *args: Any, **kwargs: Any) -> Any:
        sampler = super()._get_eval_sampler(*args, **kwargs)
        if isinstance(sampler, LengthGroupedSampler):  # which rows are in a pass together: as with one process
            sampler.batch_size *= distributed.world_size()
        return sampler

    def _cut(self, batch: dict[str, Any], remainder: int) -> dict[str, Any]:
        """Return a batch without rows that are repeated, and with its :class:`Share`; one row stays in any case.

        ``remainder`` is the number of rows that all processes together have in their last batches, if these are not
        full, or else below 1.
        """
        rows, world = _rows(batch), distributed.world_size()
        if world == 1:
            return {**batch, SHARE: Share(rows, rows)}
        if not self.accelerator.gradient_state.end_of_dataloader or not 0 < remainder < rows * world:
            return self._joined({**batch, SHARE: Share(rows, rows * world)})
        own = max(0, min(rows, remainder - distributed.rank() * rows))
        left = {name: _first(value, max(1, own), rows) for name, value in batch.items()}
        return self._joined({**left, SHARE: Share(own, remainder, even=False)})

    def _joined(self, batch: dict[str, Any]) -> dict[str, Any]:
        """Return a batch whose rows know of those of other processes, where they have to."""
        return batch

    @contextlib.contextmanager
    def _within(self, share: Share) -> Iterator[Share]:
        """Have what is gathered come from the rows that each process has of this pass."""
        before, self._share = self._share, share
        names = () if share.even else ("gather", "gather_for_metrics")
        for name in names:
            setattr(self.accelerator, name, self._gathered)
        try:
            yield share
        finally:
            self._share = before
            for name in names:
                self.accelerator.__dict__.pop(name, None)

    def _gathered(self, values: Tensor, *_: Any, **__: Any) -> Tensor:
        """Return values of the rows of all processes, or one value of each: 0 of a process that has no rows."""
        own = self._share.own
        here = values.detach()[:own] if values.ndim else values.detach() * bool(own)
        parts = [part.to(values.device) for part in distributed.gather(here.cpu())]
        return torch.cat(parts) if values.ndim else torch.stack(parts)


def _rows(batch: dict[str, Any]) -> int:
    """Return how many pairs, or judged answers, a batch has."""
    if "label" in batch:
        return len(batch["label"])
    return len(batch["input_ids"]) // 2 if "input_ids" in batch else len(batch["chosen_labels"])


def _first(value: Any, own: int, rows: int) -> Any:
    """Return of a batch's entry what is of its first ``own`` rows: of pairs that is both of their sequences."""
    if not isinstance(value, (Tensor, list)) or len(value) not in (rows, 2 * rows):
        return value
    if len(value) == rows:
        return value[:own]
    kept = [*range(own), *range(rows, rows + own)]
    return value[kept] if isinstance(value, Tensor) else [value[place] for place in kept]

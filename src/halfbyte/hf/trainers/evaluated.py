"""An evaluation's loss as the mean over its labels, where Trainer (transformers 5.23) takes that of batches' means.

Where rows do not divide among several processes, accelerate (1.15) repeats the first ones to fill the last batches;
what is repeated does not count here, nor in the last step of an epoch: its labels are taken away.
"""

from typing import TYPE_CHECKING, Any

from transformers.trainer_utils import has_length

from halfbyte.choices import IGNORED
from halfbyte.hf.trainers import distributed

if TYPE_CHECKING:
    from transformers import Trainer as _Theirs  # one of the classes that this one stands before
else:
    _Theirs = object


class MeanOverLabels(_Theirs):
    """A trainer whose evaluation keeps of each batch its loss and the number of labels that it is the mean of."""

    _evaluated: list[tuple[float, int]]
    _is_predicting = False

    def evaluation_loop(self, *args: Any, metric_key_prefix: str = "eval", **kwargs: Any) -> Any:
        """Evaluate, as Trainer does but for the loss."""
        self._evaluated = []
        output = super().evaluation_loop(*args, metric_key_prefix=metric_key_prefix, **kwargs)
        parts = [part for parts in distributed.gather(self._evaluated) for part in parts if part[1]]
        if parts:
            labels = sum(count for _, count in parts)
            output.metrics[f"{metric_key_prefix}_loss"] = sum(loss * count for loss, count in parts) / labels
        return output

    def prediction_step(self, model: Any, inputs: dict[str, Any], *args: Any, **kwargs: Any) -> Any:
        """Predict a batch, as Trainer does; its loss is kept with the number of labels that it is the mean of."""
        own = self._rows_of_its_own(len(inputs["labels"]), int(self.accelerator.gradient_state.remainder))
        inputs = _first(own, inputs)
        count = int((self._counted(inputs["labels"]) != IGNORED).sum())
        self._is_predicting = True
        try:
            result = super().prediction_step(model, inputs, *args, **kwargs)
        finally:
            self._is_predicting = False
        if result[0] is not None:
            self._evaluated.append((float(result[0]), count))
        return result

    def get_batch_samples(self, epoch_iterator: Any, num_batches: int, device: Any) -> Any:
        """Take a step's batches, as Trainer does; rows that are repeated to fill the last ones train nothing."""
        # accelerate does not count them in an epoch that a run goes on in
        sized = has_length(self.train_dataset) and not self.args.dataloader_drop_last
        remainder = len(self.train_dataset) % (self.args.train_batch_size * distributed.world_size()) if sized else 0
        own = (_first(self._rows_of_its_own(len(batch["labels"]), remainder), batch) for batch in epoch_iterator)
        return super().get_batch_samples(own, num_batches, device)

    def _counted(self, labels: Any) -> Any:
        """Return those of a batch's labels that its loss is the mean of, but for ``IGNORED``."""
        return labels

    def _rows_of_its_own(self, rows: int, remainder: int) -> int:
        """Return how many of a batch's ``rows``, the first ones, are not repeated.

        ``remainder`` is the number of rows that all processes together have in their last batches, if these are not
        full, or else below 1.
        """
        if distributed.world_size() == 1 or not self.accelerator.gradient_state.end_of_dataloader or remainder < 1:
            return rows
        return max(0, min(rows, remainder - distributed.rank() * rows))

    def _get_num_items_in_batch(self, *args: Any, **kwargs: Any) -> Any:
        # Trainer asks for it in evaluation too: that of all processes, with which a loss is no mean over its own labels
        return None if self._is_predicting else super()._get_num_items_in_batch(*args, **kwargs)


def _first(rows: int, inputs: dict[str, Any]) -> dict[str, Any]:
    """Return a batch in which the first ``rows`` have their labels, and the others none."""
    if rows == len(inputs["labels"]):
        return inputs
    labels = inputs["labels"].clone()
    labels[rows:] = IGNORED
    return {**inputs, "labels": labels}

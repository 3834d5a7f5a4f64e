"""An evaluation's loss as the mean over its labels, where Trainer (transformers 5.23) takes that of batches' means."""

from typing import Any

from halfbyte.hf.trainers import distributed


class MeanOverLabels:
    """A trainer whose evaluation keeps of each batch its loss and the number of labels that it is the mean of."""

    _evaluated: list[tuple[float, int]]

    def evaluation_loop(self, *args: Any, metric_key_prefix: str = "eval", **kwargs: Any) -> Any:
        """Evaluate, as Trainer does but for the loss."""
        self._evaluated = []
        output = super().evaluation_loop(*args, metric_key_prefix=metric_key_prefix, **kwargs)  # type: ignore[misc]
        parts = [part for parts in distributed.gather(self._evaluated) for part in parts if part[1]]
        if parts:
            labels = sum(count for _, count in parts)
            output.metrics[f"{metric_key_prefix}_loss"] = sum(loss * count for loss, count in parts) / labels
        return output

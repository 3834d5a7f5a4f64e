"""Trainers of classifiers and of sequence-to-sequence models: transformers' own, on our ground.

They are ``transformers.Trainer`` and ``Seq2SeqTrainer`` (5.23) with all that :mod:`halfbyte.hf.trainers.base` says:
checkpoints, order, optimizers, divergence, processes. The loss of a step is

    L = 1/N Σ −log softmax(z)[y]    over the N labels of all its micro-batches

with a label a row for a classifier, and one a token of the target for a sequence-to-sequence model, whose decoder reads
the target moved by one place (``decoder_input_ids``). In evaluation it is the mean over the labels of all rows.
"""

import inspect
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
import transformers
from torch import Tensor, nn

from halfbyte.choices import IGNORED
from halfbyte.hf.layers.head import base_of
from halfbyte.hf.trainers import distributed
from halfbyte.hf.trainers.base import BaseTrainer
from halfbyte.hf.trainers.evaluated import MeanOverLabels
from halfbyte.hf.trainers.methods import _Joined


@dataclass
class ClassifyConfig(_Joined, transformers.TrainingArguments):
    """``transformers.TrainingArguments``; two checkpoints are kept."""

    save_total_limit: int | None = field(
        default=2, metadata={"help": "How many checkpoints are kept, beside the best one; None keeps all."}
    )


@dataclass
class Seq2SeqConfig(_Joined, transformers.Seq2SeqTrainingArguments):
    """``transformers.Seq2SeqTrainingArguments``; two checkpoints are kept."""

    save_total_limit: int | None = field(
        default=2, metadata={"help": "How many checkpoints are kept, beside the best one; None keeps all."}
    )


class _TaskTrainer(MeanOverLabels, BaseTrainer):
    """What both share: the loss, and the count of labels.

    Attributes:
        trained_tokens: labels that all processes together have trained on.
    """

    def __init__(self, model: Any, *args: Any, **kwargs: Any) -> None:
        super().__init__(model, *args, compute_loss_func=label_loss, **kwargs)
        self.trained_tokens = 0
        self._evaluated: list[tuple[float, int]] = []  # loss of each batch, and the labels that it is the mean of
        # The count of a step's labels is asked of neither the model's signature nor its class's name.
        self.model_accepts_loss_kwargs = False
        self._loss_shifts_labels = False

    def get_batch_samples(self, epoch_iterator: Any, num_batches: int, device: Any) -> Any:
        """Take a step's batches, as Trainer does, and count their labels."""
        batches, count = super().get_batch_samples(epoch_iterator, num_batches, device)
        self.trained_tokens += distributed.total(sum(int((batch["labels"] != IGNORED).sum()) for batch in batches))
        return batches, count


class ClassifyTrainer(_TaskTrainer, transformers.Trainer):
    """``transformers.Trainer`` for a classifier with an adapter; see :mod:`halfbyte.hf.trainers.base`."""

    _config = ClassifyConfig
    _tag_names = ("classify",)


class Seq2SeqTrainer(_TaskTrainer, transformers.Seq2SeqTrainer):
    """``transformers.Seq2SeqTrainer`` for a model with an adapter; see :mod:`halfbyte.hf.trainers.base`."""

    _config = Seq2SeqConfig
    _tag_names = ("seq2seq",)


def label_loss(outputs: Any, labels: Tensor, num_items_in_batch: Any = None) -> Tensor:
    """Return the negative log-likelihood of ``labels``, summed over them and divided by the count of the whole step.

    Args:
        outputs: with ``logits``, ``[B, C]`` or ``[B, L, C]``.
        labels: int64, ``[B]`` or ``[B, L]``; ``IGNORED`` does not count.
        num_items_in_batch: labels of the step; None: those of this batch.
    """
    logits = outputs.logits
    count = (labels != IGNORED).sum().clamp(min=1) if num_items_in_batch is None else num_items_in_batch
    flat = logits.reshape(-1, logits.shape[-1]).float()
    return nn.functional.cross_entropy(flat, labels.reshape(-1), ignore_index=IGNORED, reduction="sum") / count


class TaskCollator:
    """Called with ``B`` rows, returns a batch for a model of one of these tasks, int64.

    ``input_ids`` and ``attention_mask`` are ``[B, L]``, padded on the right; likewise what else a row has and the model
    takes (``token_type_ids``). ``labels`` are ``[B]`` for a classifier; for a sequence-to-sequence model they are
    ``[B, T]``, and ``decoder_input_ids`` are the same moved by one place, as the model itself does it.

    Args:
        model: that is trained.
        pad_token_id: of the tokenizer; None pads with 0, which is masked.
    """

    def __init__(self, model: nn.Module, pad_token_id: int | None) -> None:
        base: Any = base_of(model)
        self._takes = frozenset(inspect.signature(type(base).forward).parameters)
        self._pad = pad_token_id or 0
        self._shift: Callable[..., Tensor] | None = (
            base.prepare_decoder_input_ids_from_labels if base.config.is_encoder_decoder else None
        )
        self._classifies = base.config.problem_type == "single_label_classification"

    def __call__(self, rows: Iterable[Mapping[str, Any]]) -> dict[str, Tensor]:
        """Return the batch."""
        rows = list(rows)
        batch = {
            "input_ids": _padded([row["input_ids"] for row in rows], self._pad),
            "attention_mask": _padded([[1] * len(row["input_ids"]) for row in rows], 0),
        }
        if "token_type_ids" in rows[0] and "token_type_ids" in self._takes:
            batch["token_type_ids"] = _padded([row["token_type_ids"] for row in rows], 0)
        if self._classifies:
            batch["labels"] = torch.tensor([int(row["labels"][0]) for row in rows])
        else:
            batch["labels"] = _padded([row["labels"] for row in rows], IGNORED)
            if self._shift is not None:
                batch["decoder_input_ids"] = self._shift(labels=batch["labels"])
        return batch


def _padded(lists: list[Any], value: int) -> Tensor:
    batch = torch.full((len(lists), max(map(len, lists))), value)
    for number, one in enumerate(lists):
        batch[number, : len(one)] = torch.as_tensor(one)
    return batch

"""What our trainers of preferences share: rows that have their tokens, and the reference without a second model.

The reference of DPO and KTO is the model before training. Where the adapter is new, that is the base with the adapter
switched off; TRL (1.16) copies the adapter all the same, as ``ref``, which takes memory, multiplies by zeros in each
reference pass and is saved with the adapter. So a copy that changes nothing is removed. Where the adapter was trained
before, or begins with more than factors whose product is zero, the copy stays: then it is the reference. It is not
saved: who goes on begins with the same adapter, and copies it again.

DPO's reference log-probabilities can be had in advance (``precompute_ref_log_probs``), with our layers and our head and
in memory: 8 bytes a pair. TRL does it before they are in place, and hashes the model to keep the numbers in a file.
"""

import contextlib
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import torch
from peft import PeftModel
from peft.tuners.lora import Linear as LoraLinear
from torch.utils.data import DataLoader

from halfbyte.hf.layers.expert_targets import has_experts, own_words
from halfbyte.hf.layers.starts import starts_of, untrained
from halfbyte.hf.trainers import distributed
from halfbyte.hf.trainers.base import BaseTrainer
from halfbyte.hf.trainers.shares import SHARE, Shared

if TYPE_CHECKING:
    from trl import DPOTrainer as _Theirs  # one of the classes that this one stands before
else:
    _Theirs = object

REFERENCE = "ref"
"""TRL's name of the adapter's copy."""
IN_ADVANCE = ("ref_chosen_logps", "ref_rejected_logps")
"""TRL's names of the columns with the log-probabilities of a pair's answers."""


class Preferences(Shared, BaseTrainer, _Theirs):
    """Stands before TRL's DPO, KTO and ORPO trainers.

    Rows with ``input_ids`` and ``labels`` (:mod:`halfbyte.data.forms`) are taken as they are, with a ``data_collator``
    that makes TRL's batches of them; other rows are tokenized by TRL.

    Attributes:
        trained_tokens: tokens of answers that all processes together have trained on.
    """

    train_dataset: Any
    eval_dataset: Any
    _made_again = (REFERENCE,)

    def __init__(self, model: Any, *args: Any, **kwargs: Any) -> None:
        self._is_built = False
        experts = isinstance(model, PeftModel) and has_experts(model)
        with own_words(model.peft_config.values()) if experts else contextlib.nullcontext():
            super().__init__(model, *args, **kwargs)
        self._is_built = True
        self.trained_tokens = 0
        if isinstance(self.model, PeftModel) and REFERENCE in self.model.peft_config:
            if is_new(self.model):
                self.model.delete_adapter(REFERENCE)
            else:
                subtract_from_reference(self.model)
        if getattr(self, "precompute_ref_logps", False):
            size = self.args.precompute_ref_batch_size or self.args.per_device_train_batch_size
            self.train_dataset = self._precompute_ref_logps(self.train_dataset, "train", size)
            if isinstance(self.eval_dataset, dict):
                known = {name: self._precompute_ref_logps(rows, name, size) for name, rows in self.eval_dataset.items()}
                self.eval_dataset = known
            elif self.eval_dataset is not None:
                self.eval_dataset = self._precompute_ref_logps(self.eval_dataset, "eval", size)

    def _prepare_dataset(self, dataset: Any, *args: Any, **kwargs: Any) -> Any:
        return dataset if is_tokenized(dataset) else super()._prepare_dataset(dataset, *args, **kwargs)

    def get_batch_samples(self, epoch_iterator: Any, num_batches: int, device: Any) -> Any:
        """Take a step's batches, as Trainer does, and count the tokens of their answers."""
        batches, count = super().get_batch_samples(epoch_iterator, num_batches, device)
        self.trained_tokens += distributed.total(sum(_answer_tokens(batch) for batch in batches))
        return batches, count

    def _precompute_ref_logps(self, dataset: Any, name: str, batch_size: int) -> Any:
        if not self._is_built:
            return dataset  # our layers are not in place yet
        if set(IN_ADVANCE) <= set(dataset.column_names):
            return dataset
        loader = DataLoader(dataset, batch_size, collate_fn=self.data_collator)
        trained = self.model.training
        self.model.eval()
        found = []
        for batch in self.accelerator.prepare(loader):
            pair = self.accelerator.gather_for_metrics(self.compute_ref_log_probs(self.model, batch))
            found.append(torch.stack(list(pair)).float().cpu())
        self.model.train(trained)
        for column, values in zip(IN_ADVANCE, torch.cat(found, 1).numpy(), strict=True):
            dataset = dataset.add_column(column, values)
        return dataset

    @property
    def _digested_rows(self) -> Any:
        # what is computed beforehand may differ in its last bits where a run goes on
        columns = getattr(self.train_dataset, "column_names", None) or ()
        known = [name for name in IN_ADVANCE if name in columns]
        return self.train_dataset.remove_columns(known) if known else self.train_dataset


def is_tokenized(dataset: Any) -> bool:
    """Return whether the rows have their tokens and labels."""
    return {"input_ids", "labels"} <= set(getattr(dataset, "column_names", None) or ())


def is_new(model: PeftModel) -> bool:
    """Return whether an adapter that is trained changes nothing yet: each of its products is zero, or subtracted."""
    begun = {id(factor) for factor in untrained(model)}
    zero = {"lora_B": False, "lora_embedding_A": False}
    for name, parameter in model.named_parameters():
        if not parameter.requires_grad or id(parameter) in begun:
            continue
        parts = name.split(".")
        if {"lora_A", "lora_embedding_B"} & set(parts):
            continue
        if not zero.keys() & set(parts) or bool(parameter.any()):
            return False
    return True


@torch.no_grad()
def subtract_from_reference(model: PeftModel) -> None:
    """Take from the copy what is subtracted for the adapter that began with it (PiSSA): then its product is zero."""
    for layer in (layer for layer in model.modules() if isinstance(layer, LoraLinear)):
        if starts_of(layer, ["default"]) and not starts_of(layer, [REFERENCE]) and REFERENCE in layer.lora_B:
            layer.lora_B[REFERENCE].weight.zero_()


def _answer_tokens(batch: dict[str, Any]) -> int:
    """Count the tokens of a batch that are an answer's and have something before them."""
    if not batch[SHARE].own:
        return 0  # its row is another process's
    masks: Sequence[Any] = [batch["completion_mask"]] if "completion_mask" in batch else []
    labels = [batch[name] for name in ("chosen_labels", "rejected_labels") if name in batch]
    return sum(int(mask[:, 1:].sum()) for mask in masks) + sum(int((x[:, 1:] != -100).sum()) for x in labels)

"""TRL's SFT, DPO and KTO trainers and their configurations, as ours: see :mod:`halfbyte.hf.trainers.base`."""

import functools
import logging
import math
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
import trl
from torch import Tensor
from transformers.trainer_utils import has_length

from halfbyte import tables
from halfbyte.choices import IGNORED
from halfbyte.errors import InputError
from halfbyte.hf.layers import separation
from halfbyte.hf.layers.head import base_of
from halfbyte.hf.trainers import distributed
from halfbyte.hf.trainers.base import BaseTrainer
from halfbyte.hf.trainers.evaluated import MeanOverLabels
from halfbyte.hf.trainers.layer_major import LayerMajor
from halfbyte.hf.trainers.preference import Preferences
from halfbyte.hf.trainers.shares import SHARE

logger = logging.getLogger(__name__)

Packer = Callable[[Sequence[dict[str, Tensor]], Callable[[int], int]], list[dict[str, Tensor]]]
"""Makes of a step's padded batches as many packed ones or fewer, as :class:`halfbyte.data.Packer` does."""

MOST_NATS = 700.0
"""Above, e to the power of it is no double."""

LEFT_OUT: dict[str, Any] = {}
"""Stands for a micro-batch whose samples are in others."""


class _Joined:
    """A configuration that makes the group of several processes, where TRL's leaves each alone without a GPU."""

    use_cpu: bool
    ddp_backend: str | None
    ddp_timeout: int

    def __post_init__(self) -> None:
        self.use_cpu = self.use_cpu or (distributed.launched() > 1 and not torch.accelerator.is_available())
        distributed.join(self.use_cpu, self.ddp_backend, self.ddp_timeout)
        super().__post_init__()  # type: ignore[misc]


@dataclass
class SFTConfig(_Joined, trl.SFTConfig):
    """``trl.SFTConfig`` with bf16 autocast and gradient checkpointing off unless asked for, and two checkpoints kept.

    The model runs in its own dtype and computes its 4-bit layers in ``compute_dtype``. TRL turns both on by default;
    in one of its own configurations a default cannot be told from a wish, so those are taken at their word.
    """

    bf16: bool | None = field(default=False, metadata={"help": "Whether to run the model under bf16 autocast."})
    gradient_checkpointing: bool | None = field(
        default=None, metadata={"help": "Deprecated alias of `activation_checkpointing`."}
    )
    save_total_limit: int | None = field(
        default=2, metadata={"help": "How many checkpoints are kept, beside the best one; None keeps all."}
    )


@dataclass
class DPOConfig(_Joined, trl.DPOConfig):
    """``trl.DPOConfig`` with the defaults of :class:`SFTConfig`."""

    bf16: bool | None = field(default=False, metadata={"help": "Whether to run the model under bf16 autocast."})
    gradient_checkpointing: bool | None = field(
        default=None, metadata={"help": "Deprecated alias of `activation_checkpointing`."}
    )
    save_total_limit: int | None = field(
        default=2, metadata={"help": "How many checkpoints are kept, beside the best one; None keeps all."}
    )


@dataclass
class KTOConfig(_Joined, trl.KTOConfig):
    """``trl.KTOConfig`` with the defaults of :class:`SFTConfig`."""

    bf16: bool | None = field(default=False, metadata={"help": "Whether to run the model under bf16 autocast."})
    gradient_checkpointing: bool | None = field(
        default=None, metadata={"help": "Deprecated alias of `activation_checkpointing`."}
    )
    save_total_limit: int | None = field(
        default=2, metadata={"help": "How many checkpoints are kept, beside the best one; None keeps all."}
    )


class SFTTrainer(MeanOverLabels, BaseTrainer, trl.SFTTrainer):
    """``trl.SFTTrainer`` for a PEFT model: same arguments, see :mod:`halfbyte.hf.trainers.base` for what differs.

    And one more, ``packer``. TRL's ``packing=True`` joins samples before the run, so that a step trains on more of
    them; a packer joins those of one step, which stays the same but for rounding and for the random numbers of dropout.
    What TRL logs beside the loss (entropy, accuracy) is the mean over the micro-batches, so it is weighted otherwise.

    Attributes:
        trained_tokens: tokens with a label that all processes together have trained on.
        layer_major: takes the micro-batches of a step through the model together; None: one after the other.
    """

    _config = SFTConfig
    aux_loss_enabled: bool

    def __init__(self, model: Any, *args: Any, packer: Packer | None = None, **kwargs: Any) -> None:
        super().__init__(model, *args, **kwargs)
        self.packer = packer
        self.layer_major: LayerMajor | None = None
        self._waiting: list[dict[str, Any]] = []
        self.trained_tokens = 0
        self._evaluated: list[tuple[float, int]] = []  # loss of each batch, and the tokens that it is the mean of
        self._right: list[float] = []  # share of each batch's tokens that are the likeliest
        # Trainer counts a step's trained tokens only for classes that accept loss arguments (Gemma 4 says no), and
        # leaves the first position out only where the class's name tells its loss (GPT2LMHeadModel does not). The
        # loss is computed by the head, which takes the count and shifts the labels for any class.
        self.model_accepts_loss_kwargs = True
        self._loss_shifts_labels = True
        self._check_balance()
        if packer and (obstacle := self.packing_obstacle()):
            raise InputError(f"The samples of a step cannot be packed: {obstacle}; leave packing out.")

    def packing_obstacle(self) -> str | None:
        """Return why a step's samples cannot be packed without changing what is trained, as a clause, or None."""
        if self.args.neftune_noise_alpha:
            return "neftune_noise_alpha makes noise that depends on the length of a row"
        if self.aux_loss_enabled:
            return separation.BALANCE
        if self.padding_free:
            return "packing and padding_free of TRL's configuration have packed the rows already"
        columns = getattr(self.train_dataset, "column_names", None) or ()
        sized = has_length(self.train_dataset) and "input_ids" in columns
        longest = int(tables.lengths(self.train_dataset).max()) if sized else sys.maxsize
        return separation.obstacle(self.model, longest)

    def _check_balance(self) -> None:
        """Do without the loss that balances experts where TRL (1.16) cannot compute it from the configuration."""
        base: Any = base_of(self.model)
        config = base.config.get_text_config()
        if not self.aux_loss_enabled or (hasattr(config, "num_experts") and hasattr(config, "num_experts_per_tok")):
            return
        kind = type(config).__name__
        if self.args.router_aux_loss_coef:
            raise InputError(
                f"router_aux_loss_coef={self.args.router_aux_loss_coef} cannot be obeyed: TRL (1.16) does not find the "
                f"number of experts in a {kind}; leave it out."
            )
        logger.warning("Experts are trained without TRL's loss that balances them, which does not know %s.", kind)
        self.aux_loss_enabled = config.output_router_logits = False

    def get_batch_samples(self, epoch_iterator: Any, num_batches: int, device: Any) -> Any:
        """Take a step's batches, as Trainer does, and count their trained tokens."""
        batches, count = super().get_batch_samples(epoch_iterator, num_batches, device)
        own = sum(int((batch["labels"][:, 1:] != IGNORED).sum()) for batch in batches)
        self.trained_tokens += distributed.total(own)
        if self.packer and batches:
            packed = self.packer(batches, lambda number: self._agreed(number, batches))
            # Trainer counts its steps in batches. The last one is where processes exchange gradients.
            batches = [LEFT_OUT] * (len(batches) - len(packed)) + packed
        return batches, count

    def _agreed(self, number: int, batches: Sequence[dict[str, Tensor]]) -> int:
        """Return how many micro-batches all processes make of this step: TRL exchanges metrics in each of them."""
        samples = sum(len(batch["labels"]) for batch in batches)
        most, fewest = distributed.largest([number, -samples])
        if most > -fewest:
            raise InputError(
                f"A process has {-fewest} samples in a step that another one packs into {most} rows: set even_batches, "
                "or leave packing out."
            )
        return most

    def training_step(self, model: Any, inputs: dict[str, Any], *args: Any, **kwargs: Any) -> Any:
        """Make the gradients of a micro-batch, as Trainer does, or with the last of a step those of all together."""
        if inputs is LEFT_OUT:
            return torch.zeros((), dtype=torch.float32, device=self.args.device)
        if self.layer_major is None:
            return super().training_step(model, inputs, *args, **kwargs)
        self._waiting.append(inputs)
        if not self.accelerator.sync_gradients:
            return torch.zeros((), dtype=torch.float32, device=self.args.device)
        return self._together(self.layer_major, model, *args, **kwargs)

    def _together(self, layer_major: LayerMajor, model: Any, num_items_in_batch: Any = None) -> Tensor:
        model.train()
        waiting, self._waiting = [self._prepare_inputs(inputs) for inputs in self._waiting], []

        def loss_of(inputs: dict[str, Any]) -> Tensor:
            with self.compute_loss_context_manager():
                loss: Tensor = self.compute_loss(model, inputs, num_items_in_batch=num_items_in_batch)
            return loss

        self._forward_is_taken = True
        try:
            losses = layer_major.losses([functools.partial(loss_of, inputs) for inputs in waiting])
        finally:
            self._forward_is_taken = False
        self._step_batches.reverse()
        total = functools.reduce(torch.add, losses)
        self._check_loss(total)
        self.accelerator.backward(total)
        return total.detach()

    def _track_num_input_tokens(self, inputs: dict[str, Any]) -> None:
        if inputs is not LEFT_OUT:
            super()._track_num_input_tokens(inputs)

    def compute_loss(
        self, model: Any, inputs: dict[str, Any], return_outputs: bool = False, num_items_in_batch: Any = None
    ) -> Any:
        """Return the loss of a batch, as TRL does; in evaluation its share of right tokens is kept."""
        result = super().compute_loss(model, inputs, return_outputs, num_items_in_batch)
        if self._is_predicting:
            # of the batches of all processes together: weighted by each one's tokens it sums to the right ones
            self._right.append(self._metrics["eval"]["mean_token_accuracy"][-1])
        return result

    def _counted(self, labels: Any) -> Any:
        return labels[:, 1:]  # nothing stands before the first one

    def evaluation_loop(self, *args: Any, metric_key_prefix: str = "eval", **kwargs: Any) -> Any:
        """Evaluate, as Trainer does; with the perplexity and the share of tokens that are the likeliest ones."""
        self._right = []
        output = super().evaluation_loop(*args, metric_key_prefix=metric_key_prefix, **kwargs)
        own = [(right * count, count) for right, (_, count) in zip(self._right, self._evaluated, strict=True)]
        parts = [part for parts in distributed.gather(own) for part in parts]
        tokens = sum(count for _, count in parts)
        if tokens:
            loss = output.metrics[f"{metric_key_prefix}_loss"]
            perplexity = math.exp(loss) if loss < MOST_NATS else math.inf
            right = sum(right for right, _ in parts) / tokens
            output.metrics[f"{metric_key_prefix}_perplexity"] = perplexity
            output.metrics[f"{metric_key_prefix}_token_accuracy"] = right
        return output


class DPOTrainer(Preferences, trl.DPOTrainer):
    """``trl.DPOTrainer`` for a PEFT model: same arguments, see :mod:`halfbyte.hf.trainers.base` for what differs."""

    _config = DPOConfig


class KTOTrainer(Preferences, trl.KTOTrainer):
    """``trl.KTOTrainer`` for a PEFT model: same arguments, see :mod:`halfbyte.hf.trainers.base` for what differs.

    With a collator that makes the mismatched answers of a batch itself (it has the attribute ``mismatches``), rows may
    come in any order; TRL's are made beforehand, for one order. In several processes such a collator's are those of the
    whole pass: the row before the first of a process is the last of the process before it.
    """

    _config = KTOConfig

    def __init__(self, model: Any, *args: Any, **kwargs: Any) -> None:
        own, arguments = hasattr(kwargs.get("data_collator"), "mismatches"), kwargs.get("args")
        wanted = arguments.train_sampling_strategy if own and arguments else None
        if own and arguments:
            arguments.train_sampling_strategy = "sequential"
        super().__init__(model, *args, **kwargs)
        if wanted is not None:
            self.args.train_sampling_strategy = wanted

    def _joined(self, batch: dict[str, Any]) -> dict[str, Any]:
        if not getattr(self.data_collator, "mismatches", False):
            return batch
        own = batch[SHARE].own
        lasts = distributed.gather(self.data_collator.row(batch, own - 1) if own else None)
        rank = distributed.rank()
        before = next(row for row in [*lasts[:rank][::-1], *lasts[::-1]] if row)
        return self.data_collator.after(batch, before) if own else batch

    def _compute_kl_logps(self, *args: Any, **kwargs: Any) -> Any:
        # TRL takes the mean of their differences from the reference's, and then the mean over the processes
        logps = super()._compute_kl_logps(*args, **kwargs)
        return logps if logps is None or self._share.even else logps * self._share.weight

    def _compute_loss(self, model: Any, inputs: dict[str, Any], return_outputs: bool) -> Any:
        if "ref_KL_logps" in inputs and not self._share.even:
            inputs = inputs | {"ref_KL_logps": inputs["ref_KL_logps"] * self._share.weight}
        return super()._compute_loss(model, inputs, return_outputs)

    def log(self, logs: dict[str, float], *args: Any, **kwargs: Any) -> None:
        """Log as TRL does, but the margin of what is logged beside it: TRL's leaves out batches of one kind alone."""
        metrics = self._metrics["train" if self.model.training else "eval"]
        chosen, rejected = metrics.get("rewards/chosen"), metrics.get("rewards/rejected")
        if chosen and rejected:
            metrics["rewards/margins"] = [sum(chosen) / len(chosen) - sum(rejected) / len(rejected)]
        super().log(logs, *args, **kwargs)

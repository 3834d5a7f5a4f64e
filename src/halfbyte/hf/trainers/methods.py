"""TRL's SFT, DPO and KTO trainers and their configurations, as ours: see :mod:`halfbyte.hf.trainers.base`."""

import logging
from dataclasses import dataclass, field
from typing import Any

import torch
import trl

from halfbyte.choices import IGNORED
from halfbyte.errors import InputError
from halfbyte.hf.layers.head import base_of
from halfbyte.hf.trainers import distributed
from halfbyte.hf.trainers.base import BaseTrainer

logger = logging.getLogger(__name__)


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


class SFTTrainer(BaseTrainer, trl.SFTTrainer):
    """``trl.SFTTrainer`` for a PEFT model: same arguments, see :mod:`halfbyte.hf.trainers.base` for what differs.

    Attributes:
        trained_tokens: tokens with a label that all processes together have trained on.
    """

    _config = SFTConfig
    aux_loss_enabled: bool

    def __init__(self, model: Any, *args: Any, **kwargs: Any) -> None:
        super().__init__(model, *args, **kwargs)
        self.trained_tokens = 0
        # Trainer counts a step's trained tokens only for classes that accept loss arguments (Gemma 4 says no), and
        # leaves the first position out only where the class's name tells its loss (GPT2LMHeadModel does not). The
        # loss is computed by the head, which takes the count and shifts the labels for any class.
        self.model_accepts_loss_kwargs = True
        self._loss_shifts_labels = True
        self._check_balance()

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
        return batches, count


class DPOTrainer(BaseTrainer, trl.DPOTrainer):
    """``trl.DPOTrainer`` for a PEFT model: same arguments, see :mod:`halfbyte.hf.trainers.base` for what differs."""

    _config = DPOConfig


class KTOTrainer(BaseTrainer, trl.KTOTrainer):
    """``trl.KTOTrainer`` for a PEFT model: same arguments, see :mod:`halfbyte.hf.trainers.base` for what differs."""

    _config = KTOConfig

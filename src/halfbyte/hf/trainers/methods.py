"""TRL's SFT, DPO and KTO trainers and their configurations, as ours: see :mod:`halfbyte.hf.trainers.base`."""

from dataclasses import dataclass, field
from typing import Any

import trl

from halfbyte.choices import IGNORED
from halfbyte.hf.trainers.base import BaseTrainer


@dataclass
class SFTConfig(trl.SFTConfig):
    """``trl.SFTConfig`` with bf16 autocast and gradient checkpointing off unless asked for.

    The model runs in its own dtype and computes its 4-bit layers in ``compute_dtype``. TRL turns both on by default;
    in one of its own configurations a default cannot be told from a wish, so those are taken at their word.
    """

    bf16: bool | None = field(default=False, metadata={"help": "Whether to run the model under bf16 autocast."})
    gradient_checkpointing: bool | None = field(
        default=None, metadata={"help": "Deprecated alias of `activation_checkpointing`."}
    )


@dataclass
class DPOConfig(trl.DPOConfig):
    """``trl.DPOConfig`` with the defaults of :class:`SFTConfig`."""

    bf16: bool | None = field(default=False, metadata={"help": "Whether to run the model under bf16 autocast."})
    gradient_checkpointing: bool | None = field(
        default=None, metadata={"help": "Deprecated alias of `activation_checkpointing`."}
    )


@dataclass
class KTOConfig(trl.KTOConfig):
    """``trl.KTOConfig`` with the defaults of :class:`SFTConfig`."""

    bf16: bool | None = field(default=False, metadata={"help": "Whether to run the model under bf16 autocast."})
    gradient_checkpointing: bool | None = field(
        default=None, metadata={"help": "Deprecated alias of `activation_checkpointing`."}
    )


class SFTTrainer(BaseTrainer, trl.SFTTrainer):
    """``trl.SFTTrainer`` for a PEFT model: same arguments, see :mod:`halfbyte.hf.trainers.base` for what differs.

    Attributes:
        trained_tokens: tokens with a label that this process has trained on.
    """

    _config = SFTConfig

    def __init__(self, model: Any, *args: Any, **kwargs: Any) -> None:
        super().__init__(model, *args, **kwargs)
        self.trained_tokens = 0
        # Trainer counts a step's trained tokens only for classes that accept loss arguments (Gemma 4 says no), and
        # leaves the first position out only where the class's name tells its loss (GPT2LMHeadModel does not). The
        # loss is computed by the head, which takes the count and shifts the labels for any class.
        self.model_accepts_loss_kwargs = True
        self._loss_shifts_labels = True

    def compute_loss(
        self, model: Any, inputs: dict[str, Any], return_outputs: bool = False, num_items_in_batch: Any = None
    ) -> Any:
        if self.model.training:
            self.trained_tokens += int((inputs["labels"][:, 1:] != IGNORED).sum())
        return super().compute_loss(model, inputs, return_outputs, num_items_in_batch)


class DPOTrainer(BaseTrainer, trl.DPOTrainer):
    """``trl.DPOTrainer`` for a PEFT model: same arguments, see :mod:`halfbyte.hf.trainers.base` for what differs."""

    _config = DPOConfig


class KTOTrainer(BaseTrainer, trl.KTOTrainer):
    """``trl.KTOTrainer`` for a PEFT model: same arguments, see :mod:`halfbyte.hf.trainers.base` for what differs."""

    _config = KTOConfig

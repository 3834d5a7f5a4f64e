"""TRL's SFT, DPO and KTO trainers without pickle, and with a resume that gives the same bits.

What differs from TRL's own (1.16, over transformers 5.23), whose loops, schedules and callbacks stay:

- A checkpoint is a folder of safetensors and JSON, complete or absent: the adapter as PEFT saves it, the tokenizer,
  ``state.safetensors`` (optimizer tensors, torch's random state), ``state.json`` (the optimizer's numbers, the
  schedule, Python's and NumPy's random state, a checksum of the data) and ``trainer_state.json``. Transformers
  pickles the optimizer, the schedule, the random state and its arguments. The last two checkpoints are kept.
- The data order is a function of the seed and the epoch alone. Transformers draws it from the global random state
  when lengths are grouped, so a run resumed within an epoch would go on through another order.
- The output head is ours (:mod:`halfbyte.hf.layers.head`): evaluated at trained positions only, its logits never whole.
- bf16 autocast and gradient checkpointing are off unless asked for: see :class:`SFTConfig` and its sisters.
- The loss of a step is the sum over its trained tokens divided by their count, for every model. Transformers goes by
  what the model's class declares: some get the mean of the micro-batches' means, some a count that is too large.
- A step whose loss or gradient is not finite stops the run before it touches the weights, and is run again to name the
  samples and the module.
- Nothing is reported to anybody: TRL's telemetry, the model card and the printed log lines are gone.

Left out: evaluation within the loop, and checkpoints of more than one process.
"""

import contextlib
import functools
import inspect
import json
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from accelerate import DistributedType
from peft import get_peft_model_state_dict, set_peft_model_state_dict
from peft.tuners.lora import Linear as LoraLinear
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.utils.data import Sampler
from transformers import PreTrainedModel, PrinterCallback, TrainingArguments
from transformers.trainer import TRAINER_STATE_NAME

from halfbyte import tables
from halfbyte.errors import InputError
from halfbyte.files import whole_folder
from halfbyte.hf.layers.head import base_of, bind_head
from halfbyte.hf.layers.prepare import prepare_for_training
from halfbyte.hf.trainers.diverged import describe
from halfbyte.hf.trainers.sampler import EpochSampler
from halfbyte.hf.trainers.state import (
    flatten,
    random_state,
    read_state,
    saved_states,
    set_random_state,
    state_folder,
    unflatten,
)
from halfbyte.nn import Linear4bit

if TYPE_CHECKING:
    from trl import SFTTrainer as _Theirs  # one of the classes that our shared one stands before
else:
    _Theirs = object

CHECKPOINTS_KEPT = 2
WHOLE = (DistributedType.NO, DistributedType.MULTI_CPU, DistributedType.MULTI_GPU)


class BaseTrainer(_Theirs):
    """What our trainers share; stands before TRL's class in theirs."""

    _config: type[TrainingArguments]

    def __init__(self, model: Any, *args: Any, **kwargs: Any) -> None:
        given = inspect.signature(super().__init__).bind(model, *args, **kwargs).arguments
        if given.get("args") is None:
            name = model if isinstance(model, str) else model.config._name_or_path
            given["args"] = self._config(f"{name.split('/')[-1]}-{self._tag_names[-1].upper()}")
        super().__init__(**given)
        if any(
            type(module) is LoraLinear and isinstance(module.base_layer, Linear4bit) for module in self.model.modules()
        ):
            prepare_for_training(self.model)  # TRL put the adapter on, or the script left this to us
        for model in (self.model, getattr(self, "ref_model", None)):
            if model is not None and isinstance(base_of(model), PreTrainedModel):
                bind_head(base_of(model))
        self._step_batches: list[dict[str, Any]] = []
        self.remove_callback(PrinterCallback)

    def _send_telemetry(self) -> None:
        pass

    def floating_point_ops(self, inputs: dict[str, Any]) -> int:
        return 0  # Trainer's estimate, which nobody reads, walks through all parameters for every batch.

    def compute_loss(
        self, model: Any, inputs: dict[str, Any], return_outputs: bool = False, num_items_in_batch: Any = None
    ) -> Any:
        result = super().compute_loss(model, dict(inputs), return_outputs, num_items_in_batch)
        loss = result[0] if return_outputs else result
        if self.model.training:
            self._step_batches.append(inputs)
            if not loss.isfinite():
                raise self._diverged("loss and with it the gradient")
        return result

    def train(self, *args: Any, **kwargs: Any) -> Any:
        """Train; arguments and result are Trainer's."""
        self._parameters = list(self.model.parameters())
        with _few_walks(self.model, self._parameters):
            return super().train(*args, **kwargs)

    def _clip_grad_norm(self, model: Any) -> Any:
        if not self._is_plain:
            return super()._clip_grad_norm(model)
        return torch.nn.utils.clip_grad_norm_(self._parameters, self.args.max_grad_norm)

    @property
    def _is_plain(self) -> bool:
        """Whether parameters and gradients are ordinary tensors, unscaled and whole in this process."""
        return self.accelerator.scaler is None and self.accelerator.distributed_type in WHOLE

    def _get_grad_norm(self, model: Any, grad_norm: Any = None) -> Any:
        if grad_norm is None and self._is_plain:
            grad_norm = torch.nn.utils.get_total_norm([p.grad for p in self._parameters if p.grad is not None])
        norm = super()._get_grad_norm(model, grad_norm)
        if not torch.as_tensor(norm).isfinite():
            raise self._diverged("gradient")
        self._step_batches.clear()
        return norm

    def _diverged(self, what: str) -> InputError:
        batches, rate = self._step_batches, self._get_learning_rate()
        self._step_batches = []

        def loss_of(batch: dict[str, Any]) -> Tensor:
            loss: Tensor = super(BaseTrainer, self).compute_loss(self.model, dict(batch))
            return loss

        place = describe(self.model, loss_of, batches, self.train_dataset)
        return InputError(
            f"Training diverged: the {what} of step {self.state.global_step + 1} is not finite, {place}. The "
            f"checkpoints before it are kept; use a lower learning_rate than {rate:g}."
        )

    @functools.cached_property
    def _data_digest(self) -> str:
        return tables.digest(self.train_dataset)

    def _get_train_sampler(self, train_dataset: Any = None) -> Sampler[int]:
        rows = train_dataset or self.train_dataset
        if self.args.train_sampling_strategy != "group_by_length":
            return EpochSampler(np.ones(len(rows), np.int8), None, self.args.seed)
        lengths = tables.lengths(rows)
        batch = self.args.train_batch_size * self.args.gradient_accumulation_steps
        return EpochSampler(lengths, batch, self.args.seed)

    def _save_checkpoint(self, model: Any, trial: Any) -> None:
        folder = state_folder(Path(self.args.output_dir), self.state.global_step)
        with whole_folder(folder) as part:
            self._save(str(part))
            tensors, numbers = flatten(self.optimizer.state_dict())
            numbers["scheduler"] = self.lr_scheduler.state_dict()
            numbers["data"] = self._data_digest
            random_tensors, numbers["random"] = random_state()
            save_file(tensors | random_tensors, part / "state.safetensors")
            (part / "state.json").write_text(json.dumps(numbers))
            self.state.save_to_json(str(part / TRAINER_STATE_NAME))
        for old in saved_states(Path(self.args.output_dir))[:-CHECKPOINTS_KEPT]:
            shutil.rmtree(old)

    def _save(self, output_dir: str | None = None, state_dict: Any = None) -> None:
        folder = Path(output_dir or self.args.output_dir)
        self.model.save_pretrained(folder, save_embedding_layers=False)
        (folder / "README.md").unlink()  # PEFT's card, a form that nobody has filled in
        self.processing_class.save_pretrained(folder)

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: Any = None) -> None:
        weights = load_file(Path(resume_from_checkpoint) / "adapter_model.safetensors")
        expected = get_peft_model_state_dict(self.model, save_embedding_layers=False)
        if {k: v.shape for k, v in weights.items()} != {k: v.shape for k, v in expected.items()}:
            raise InputError(f"{resume_from_checkpoint}: this adapter is not one of the model that is to be trained.")
        set_peft_model_state_dict(self.model, weights)

    def _load_optimizer_and_scheduler(self, checkpoint: str | None) -> None:
        if checkpoint is not None:
            tensors, numbers = read_state(Path(checkpoint))
            if numbers["data"] != self._data_digest:
                raise InputError(f"{checkpoint} was made with other training data; restore it, or begin another run.")
            self.optimizer.load_state_dict(unflatten(tensors, numbers))
            self.lr_scheduler.load_state_dict(numbers["scheduler"])

    def _load_rng_state(self, checkpoint: str | None) -> None:
        if checkpoint is not None:
            tensors, numbers = read_state(Path(checkpoint))
            set_random_state(tensors, numbers["random"])


@contextlib.contextmanager
def _few_walks(model: nn.Module, parameters: list[Tensor]) -> Iterator[None]:
    """Spare the walks through all modules that Trainer (transformers 5.23) makes in each step.

    A model of thirty layers has some three thousand modules with PEFT's, and each walk takes milliseconds: for
    ``model.train()``, which changes nothing from the second time on, and for ``model.zero_grad()``.
    """
    model.train()

    def train(mode: bool = True) -> nn.Module:
        return model if model.training == mode else type(model).train(model, mode)

    def zero_grad(set_to_none: bool = True) -> None:
        for parameter in parameters:
            parameter.grad = None

    model.train, model.zero_grad = train, zero_grad  # type: ignore[method-assign]
    try:
        yield
    finally:
        del model.train, model.zero_grad

"""TRL's SFT, DPO and KTO trainers without pickle, and with a resume that gives the same bits.

What differs from TRL's own (1.16, over transformers 5.23), whose loops, schedules and callbacks stay:

- A checkpoint is a folder of safetensors and JSON, complete or absent: the adapter as PEFT saves it, the tokenizer,
  ``state.safetensors`` (optimizer tensors, torch's random state), ``state.json`` (the optimizer's numbers, the
  schedule, Python's and NumPy's random state, a checksum of the data) and ``trainer_state.json``. Transformers
  pickles the optimizer, the schedule, the random state and its arguments. Two are kept unless ``save_total_limit``
  says otherwise; ``load_best_model_at_end`` and ``resume_from_checkpoint=True`` find them.
- An argument is obeyed or refused by name (:mod:`halfbyte.hf.trainers.arguments`).
- The data order is a function of ``data_seed`` (or ``seed``) and the epoch alone. Transformers draws it from the
  global random state when lengths are grouped, so a run resumed within an epoch would go on through another order.
- The output head is ours (:mod:`halfbyte.hf.layers.head`): evaluated at trained positions only, its logits never whole.
- bf16 autocast and gradient checkpointing are off unless asked for: see :class:`SFTConfig` and its sisters.
- The loss of a step is the sum over its trained tokens divided by their count, for every model. Transformers goes by
  what the model's class declares: some get the mean of the micro-batches' means, some a count that is too large.
- The loss of an evaluation is the mean over tokens too (SFT), and evaluating changes no bit of the training.
- A step whose loss or gradient is not finite stops the run before it touches the weights, and is run again to name the
  samples and the module.
- Of several processes (torchrun) the first writes; a stop or an error of one is a stop or an error of all
  (:mod:`halfbyte.hf.trainers.distributed`). An epoch whose rows do not divide repeats its first ones, as in accelerate,
  but these train nothing.
- Nothing is reported to anybody: TRL's telemetry, the model card and the printed log lines are gone.
"""

import contextlib
import functools
import inspect
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from accelerate import DistributedType
from peft import PeftModel
from torch import Tensor, nn
from torch.utils.data import Sampler, SequentialSampler
from transformers import PreTrainedModel, PrinterCallback, Trainer, TrainingArguments, set_seed
from transformers.trainer_utils import has_length

from halfbyte import tables
from halfbyte.errors import InputError
from halfbyte.hf.layers.head import base_of, bind_head
from halfbyte.hf.layers.prepare import prepare
from halfbyte.hf.trainers import arguments, distributed
from halfbyte.hf.trainers.checkpoints import Checkpoints, unsaved
from halfbyte.hf.trainers.diverged import describe
from halfbyte.hf.trainers.sampler import EpochSampler
from halfbyte.hf.trainers.sharded import is_sharded
from halfbyte.nn import FrozenLinear, Linear4bit
from halfbyte.optim import KINDS, LIONS, AdamW, Lion

WHOLE = (DistributedType.NO, DistributedType.MULTI_CPU, DistributedType.MULTI_GPU)


BITSANDBYTES_NAMES = {"adamw_bnb_8bit": KINDS["adamw_8bit"]} | {
    name: kind for name, kind in KINDS.items() if name != "adamw_torch"
}
LION_NAMES: dict[str, dict[str, Any]] = dict(LIONS.items())

UNSEEN = "and where it began cannot be looked for with fsdp"

REJECTED = "rejected_ids"
"""The column of a pair's other sequence, beside ``input_ids``."""


class BaseTrainer(Checkpoints):
    """What our trainers share; stands before TRL's class in theirs."""

    _config: type[TrainingArguments]
    beside: Callable[[], dict[str, float]] | None = None
    """What an evaluation measures besides, the model being in evaluation mode: figures by name."""
    _order: EpochSampler | None = None
    _is_alone = False
    """Whether other processes do not compute the same loss at this time."""
    _forward_is_taken = False
    """Whether the model's forward stands in the middle of a step, so that it cannot be run for a look at it."""

    def __init__(self, model: Any, *args: Any, **kwargs: Any) -> None:
        given = inspect.signature(super().__init__).bind(model, *args, **kwargs).arguments
        if given.get("args") is None:
            name = model if isinstance(model, str) else model.config._name_or_path
            given["args"] = self._config(f"{name.split('/')[-1]}-{self._tag_names[-1].upper()}")
        if distributed.launched() > given["args"].world_size:
            raise InputError(
                f"There are {distributed.launched()} processes, but {type(given['args']).__module__}."
                f"{type(given['args']).__name__} is for one, so each would train alone: build it with "
                "use_cpu=True, or use the configurations of halfbyte.hf.trainers."
            )
        arguments.check(given["args"])
        # transformers would divide each batch over all GPUs it sees (DataParallel), copying the model for each
        given["args"]._n_gpu = min(given["args"].n_gpu, 1)
        super().__init__(**given)
        self._check_built()
        if any(isinstance(module, FrozenLinear) for module in self.model.modules()):
            prepare(self.model)  # TRL put the adapter on, or the script left this to us
        for model in (self.model, getattr(self, "ref_model", None)):
            if model is not None and isinstance(base_of(model), PreTrainedModel):
                bind_head(base_of(model))
        self._step_batches: list[dict[str, Any]] = []
        self.remove_callback(PrinterCallback)

    def _send_telemetry(self) -> None:
        pass

    def evaluate(self, *args: Any, **kwargs: Any) -> Any:
        with torch.random.fork_rng():  # what is evaluated, and when, makes no difference to what is trained
            return super().evaluate(*args, **kwargs)

    def evaluation_loop(self, *args: Any, metric_key_prefix: str = "eval", **kwargs: Any) -> Any:
        output = super().evaluation_loop(*args, metric_key_prefix=metric_key_prefix, **kwargs)
        if self.beside is not None:
            output.metrics.update({f"{metric_key_prefix}_{name}": value for name, value in self.beside().items()})
        return output

    def floating_point_ops(self, inputs: dict[str, Any]) -> int:
        return 0  # Trainer's estimate, which nobody reads, walks through all parameters for every batch.

    def compute_loss(
        self, model: Any, inputs: dict[str, Any], return_outputs: bool = False, num_items_in_batch: Any = None
    ) -> Any:
        with self._gathered_whole() if self.model.training else contextlib.nullcontext():
            result = super().compute_loss(model, dict(inputs), return_outputs, num_items_in_batch)
        loss = result[0] if return_outputs else result
        if self.model.training:
            self._step_batches.append(inputs)
            if not self._forward_is_taken:
                self._check_loss(loss)
        return result

    def _check_loss(self, loss: Tensor) -> None:
        if not loss.isfinite() and distributed.world_size() == 1:  # the gradient tells it to all processes
            raise self._diverged("loss and with it the gradient")

    def _check_built(self) -> None:
        """Refuse what only the trainer that TRL has built shows."""
        if not isinstance(self.model, PeftModel):
            raise InputError(
                f"{type(self).__name__} trains adapters, and {type(self.model).__name__} has none: hand it "
                "peft_config=LoraConfig(...), or call get_peft_model first."
            )
        if self.is_fsdp_enabled or self.is_deepspeed_enabled:
            raise InputError(
                "ACCELERATE_USE_FSDP or ACCELERATE_USE_DEEPSPEED is set, but accelerate does not divide these 4-bit "
                "weights; unset it for data parallelism, or use halfbyte train --fsdp."
            )
        columns = getattr(self.train_dataset, "column_names", None) or ["input_ids"]
        if self.args.train_sampling_strategy == "group_by_length" and "input_ids" not in columns:
            raise InputError(
                "train_sampling_strategy='group_by_length' needs rows with input_ids, and the rows of "
                f"{type(self).__name__} have {', '.join(columns)}; use 'random'."
            )

    @staticmethod
    def get_optimizer_cls_and_kwargs(args: TrainingArguments, model: Any = None) -> tuple[Any, dict[str, Any]]:
        """Return Trainer's optimizers, but our AdamW and Lion under bitsandbytes' names (same state, no GPU needed)."""
        name = args.optim.value
        kind = LION_NAMES.get(name, BITSANDBYTES_NAMES.get(name))
        if kind is None:
            theirs: tuple[Any, dict[str, Any]] = Trainer.get_optimizer_cls_and_kwargs(args, model)
            return theirs
        if args.optim_args:
            raise InputError(f"optim={args.optim.value!r} takes no optim_args, and there is {args.optim_args!r}.")
        folder = Path(args.output_dir)
        options = {"lr": args.learning_rate, "betas": (args.adam_beta1, args.adam_beta2)} | kind
        options |= {"page_dir": folder if folder.is_dir() else None}
        return (Lion, options) if name in LION_NAMES else (AdamW, options | {"eps": args.adam_epsilon})

    def train(self, resume_from_checkpoint: Any = None, *args: Any, **kwargs: Any) -> Any:
        """Train; arguments and result are Trainer's, ``True`` being the newest checkpoint of ``output_dir``."""
        if resume_from_checkpoint is True:
            resume_from_checkpoint = self._last_checkpoint()
        if resume_from_checkpoint:
            self._check_whole(str(resume_from_checkpoint))
        lost = unsaved(self.model)
        if lost:
            more = f" and {len(lost) - 1} more" if len(lost) > 1 else ""
            raise InputError(
                f"{lost[0]}{more} would be trained, but not saved with the adapter: name the layer in "
                "LoraConfig(modules_to_save=[...]), or freeze it (requires_grad_(False))."
            )
        self._parameters = list(self.model.parameters())
        if distributed.world_size() > 1:
            distributed.ignore_frozen(self.model)
        if not distributed.is_first():
            set_seed(self.args.seed + distributed.rank())  # each process drops other values
        with _few_walks(self.model, self._parameters), distributed.ended_by_others():
            return super().train(resume_from_checkpoint, *args, **kwargs)

    def _init_training_state(self, max_steps: int, *args: Any, **kwargs: Any) -> Any:
        begun = super()._init_training_state(max_steps, *args, **kwargs)
        self.state.compute_steps(self.args, max_steps)  # Trainer (5.23) keeps the checkpoint's save_steps, eval_steps
        return begun

    def _run_epoch(self, *args: Any, epoch: int, **kwargs: Any) -> None:
        if self.state.global_step >= self.state.max_steps:  # resumed at its end: Trainer would make one step more
            self.control.should_training_stop = True
            return
        # accelerate (1.15) does not reach the sampler of several processes where it skips the batches of before
        if self._order is not None:
            self._order.set_epoch(epoch)
        super()._run_epoch(*args, epoch=epoch, **kwargs)

    def _build_accelerator_args(self, **kwargs: Any) -> dict[str, Any]:
        # asked for by nobody, Trainer (5.23) looks for unused parameters in each step and sends the buffers
        for name in ("ddp_find_unused_parameters", "ddp_broadcast_buffers"):
            if getattr(self.args, name) is None:
                setattr(self.args, name, False)
        built: dict[str, Any] = super()._build_accelerator_args(**kwargs)
        return built

    def _maybe_log_save_evaluate(self, *args: Any, **kwargs: Any) -> None:
        # what a callback wants in one process, such as a stop after a signal, all do, after the same step
        wishes = [name for name, value in vars(self.control).items() if isinstance(value, bool)]
        agreed = distributed.largest([getattr(self.control, name) for name in wishes])
        for name, wish in zip(wishes, agreed, strict=True):
            setattr(self.control, name, bool(wish))
        super()._maybe_log_save_evaluate(*args, **kwargs)

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
            with distributed.agreed_errors():
                raise self._diverged("gradient")
        self._step_batches.clear()
        return norm

    def _diverged(self, what: str) -> InputError:
        batches, rate = self._step_batches, self._get_learning_rate()
        self._step_batches = []

        def loss_of(batch: dict[str, Any]) -> Tensor:
            loss: Tensor = super(BaseTrainer, self).compute_loss(self.model, dict(batch))
            return loss

        with self._metrics_alone():
            # processes among which the base is divided cannot run it each for itself
            looked_at = UNSEEN if is_sharded(self.model) else describe(self.model, loss_of, batches, self.train_dataset)
            places = distributed.gather(looked_at)
        place = next((place for place in places if not place.startswith("not again")), places[0])
        return InputError(
            f"Training diverged: the {what} of step {self.state.global_step + 1} is not finite, {place}. The "
            f"checkpoints before it are kept; use a lower learning_rate than {rate:g}{self._other_bases()}."
        )

    def _other_bases(self) -> str:
        if not any(isinstance(module, Linear4bit) for module in self.model.modules()):
            return ""
        return ", or hold the base in more than 4 bits (quant_type int8, or none for 16 bits)"

    @contextlib.contextmanager
    def _gathered_whole(self) -> Iterator[None]:
        """Gather what each process tells of a batch that is trained on, also where it repeats rows.

        Of the last batches of an epoch accelerate (1.15) leaves out what is repeated, taking one value a process for
        one a row: of the divergence that KTO's loss holds too. In an epoch that was gone on with it leaves out none,
        so that losses would be others. Evaluations are never gone on with.
        """
        gather = self.accelerator.gather if distributed.world_size() > 1 else lambda x: x
        self.accelerator.gather_for_metrics = lambda x, *_, **__: gather(x)
        try:
            yield
        finally:
            self.accelerator.__dict__.pop("gather_for_metrics", None)

    @contextlib.contextmanager
    def _metrics_alone(self) -> Iterator[None]:
        """Compute losses that other processes do not compute at the same time: TRL gathers metrics in each."""
        names = ("gather", "gather_for_metrics")
        for name in names:
            setattr(self.accelerator, name, lambda x, *_, **__: x)
        self._is_alone = True
        try:
            yield
        finally:
            self._is_alone = False
            for name in names:
                self.accelerator.__dict__.pop(name, None)

    @functools.cached_property
    def _data_digest(self) -> str:
        return tables.digest(self._digested_rows)

    @property
    def _digested_rows(self) -> Any:
        """The rows that a resumed run must have again."""
        return self.train_dataset

    def _get_train_sampler(self, train_dataset: Any = None) -> Sampler[int] | None:
        rows = self.train_dataset if train_dataset is None else train_dataset
        if not has_length(rows):
            return None  # a stream, in its own order
        seed = self.args.seed if self.args.data_seed is None else self.args.data_seed
        if self.args.train_sampling_strategy == "sequential":
            return SequentialSampler(rows)
        if self.args.train_sampling_strategy != "group_by_length":
            self._order = EpochSampler(np.ones(len(rows), np.int8), None, seed)
        else:
            self._order = EpochSampler(_lengths(rows), self._rows_a_step, seed)
        return self._order


def _lengths(rows: Any) -> Any:
    """Return the tokens of each row's longest sequence."""
    lengths = tables.lengths(rows)
    if REJECTED not in (getattr(rows, "column_names", None) or ()):
        return lengths
    return np.maximum(lengths, tables.lengths(rows, REJECTED))


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

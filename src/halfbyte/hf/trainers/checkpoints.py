"""What a trainer leaves on the disk and goes on from, without pickle: see :mod:`halfbyte.hf.trainers.state`.

Of several processes one writes and the others wait; each has random numbers of its own, which the one writes too.
"""

import json
import logging
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from peft import PeftModel, get_peft_model_state_dict, set_peft_model_state_dict
from safetensors.torch import load_file, save_file
from torch.optim.lr_scheduler import LambdaLR
from transformers import set_seed
from transformers.trainer import TRAINER_STATE_NAME
from transformers.trainer_callback import ExportableState
from transformers.trainer_utils import has_length

from halfbyte import checksums
from halfbyte.checksums import step_of
from halfbyte.errors import InputError
from halfbyte.files import remove_folder, whole_folder
from halfbyte.hf.layers.adapters import vocabulary_resized
from halfbyte.hf.layers.starts import split
from halfbyte.hf.trainers import distributed
from halfbyte.hf.trainers.state import (
    flatten,
    random_state,
    read_state,
    saved_states,
    set_random_state,
    state_folder,
    steps_planned,
    unflatten,
)

if TYPE_CHECKING:
    from trl import SFTTrainer as _Theirs  # one of the classes that this one stands before
else:
    _Theirs = object

logger = logging.getLogger(__name__)


def unsaved(model: PeftModel) -> list[str]:
    """Return the names of what is trained in ``model`` and would not be saved with its adapter."""
    if any(config.is_prompt_learning for config in model.peft_config.values()):
        return []
    resized = vocabulary_resized(model)
    states = [get_peft_model_state_dict(model, None, name, save_embedding_layers=resized) for name in model.peft_config]
    saved = {tensor.data_ptr() for state in states for tensor in state.values()}
    trained = [(name, p) for name, p in model.named_parameters() if p.requires_grad and p.numel()]
    return [name for name, parameter in trained if parameter.data_ptr() not in saved]


def surplus(states: list[Path], last: Path, limit: int | None, best: str | None) -> list[Path]:
    """Return the checkpoints beside ``last`` that are more than ``limit``, oldest first, but never it nor the best one.

    Args:
        states: all of them, oldest first.
        last: the newest checkpoint.
        limit: how many to keep; None and what is below 1 keep all.
        best: the checkpoint of the best model, if there is one.
    """
    kept = {last, Path(best) if best else last}
    if limit is None or limit < 1:
        return []
    others = [state for state in states if state not in kept]
    # what is ahead of the newest was damaged: the run went back behind it
    others.sort(key=lambda state: (step_of(state) < step_of(last), step_of(state)))
    return others[: max(0, len(others) - max(0, limit - len(kept)))]


def set_rates(scheduler: Any, optimizer: Any) -> None:
    """Give an optimizer the learning rates that its schedule has now, after its course was laid out anew."""
    if isinstance(scheduler, LambdaLR):
        lambdas = zip(scheduler.base_lrs, scheduler.lr_lambdas, strict=True)
        rates = [base * rate(scheduler.last_epoch) for base, rate in lambdas]
        for group, rate in zip(optimizer.param_groups, rates, strict=True):
            group["lr"] = rate
        scheduler._last_lr = rates


class Checkpoints(_Theirs):
    """Checkpoints of safetensors and JSON, complete or absent, in place of Trainer's own.

    Attributes:
        beside_it: what else the list of checksums says about the run, as JSON.
        run_id: of the run that its checkpoints belong to, if that has one.
        keep_best: whether each best evaluation gets a checkpoint, whatever ``save_steps`` is.
        saved_beside: each is called with the folder of an adapter that was saved.
        passed_over: damaged checkpoints of later steps than that which was gone on from; the next one replaces them.
    """

    run_id: str | None = None
    keep_best = False
    passed_over: Sequence[Path] = ()
    beside_it: Callable[[], dict[str, Any]] = dict
    saved_beside: Sequence[Callable[[Path], None]] = ()
    _made_again: tuple[str, ...] = ()
    """Adapters that are not saved, since whoever goes on makes them again."""

    @property
    def _data_digest(self) -> str:
        """A checksum of the training data."""
        raise NotImplementedError

    def state_folder(self, step: int) -> Path:
        """The folder of the checkpoint after ``step`` steps."""
        return state_folder(self.args.output_dir, step)

    def _saved_states(self) -> list[Path]:
        """The checkpoints that are there, oldest first."""
        return saved_states(Path(self.args.output_dir))

    def _save_checkpoint(self, model: Any, trial: Any) -> None:
        random_tensors, random_numbers = self._random_states()
        best = self.state.best_global_step
        folder = self.state_folder(self.state.global_step)
        if best and (best == self.state.global_step or self.state_folder(best).is_dir()):
            self.state.best_model_checkpoint = str(self.state_folder(best))
        with distributed.first_writes(self.args.should_save) as writes:
            if writes:
                with whole_folder(folder) as part:
                    self._write_checkpoint(part, random_tensors, random_numbers)
                    checksums.write(part, step=self.state.global_step, run=self.run_id, **self.beside_it())
                best_folder, limit = self.state.best_model_checkpoint, self.args.save_total_limit
                passed_over, self.passed_over = [path for path in self.passed_over if path != folder], ()
                for old in passed_over:
                    remove_folder(old)
                for old in surplus(self._saved_states(), folder, limit, best_folder):
                    remove_folder(old)

    def _write_checkpoint(
        self, part: Path, random_tensors: dict[str, Any], random_numbers: list[dict[str, Any]]
    ) -> None:
        self._save(str(part))
        if not self.args.save_only_model:
            rows = self.train_dataset
            state = {"optimizer": self.optimizer.state_dict(), "scheduler": self.lr_scheduler.state_dict()}
            tensors, numbers = flatten(state)
            numbers["data"] = self._data_digest if has_length(rows) else None
            numbers["random"] = random_numbers
            numbers["rows"] = self._rows_a_step
            save_file(tensors | random_tensors, part / "state.safetensors")
            (part / "state.json").write_text(json.dumps(numbers))
        callbacks = self.callback_handler.callbacks
        with_state = [callback for callback in [*callbacks, self.control] if isinstance(callback, ExportableState)]
        states: dict[str, list[dict[str, Any]]] = {}
        for callback in with_state:
            states.setdefault(type(callback).__name__, []).append(callback.state())
        self.state.stateful_callbacks = {name: own[0] if len(own) == 1 else own for name, own in states.items()}
        self.state.save_to_json(str(part / TRAINER_STATE_NAME))

    def save_model(self, output_dir: str | None = None, _internal_call: bool = False) -> None:
        """Save the adapter and the tokenizer in ``output_dir``; of several processes one does, the others wait."""
        with distributed.first_writes(self.args.should_save) as writes:
            if writes:
                self._save(output_dir)

    def _save(self, output_dir: str | None = None, state_dict: Any = None) -> None:
        folder = Path(output_dir or self.args.output_dir)
        kept = [name for name in self.model.peft_config if name not in self._made_again]
        resized = vocabulary_resized(self.model)
        self.model.save_pretrained(folder, save_embedding_layers=resized, selected_adapters=kept)
        (folder / "README.md").unlink()  # PEFT's card, a form that nobody has filled in
        self.processing_class.save_pretrained(folder)
        for save in self.saved_beside:
            save(folder)

    def _random_states(self) -> tuple[dict[str, Any], list[dict[str, Any]]]:
        """The random states of all processes: tensors as ``process.name``, and for each process its numbers."""
        states = distributed.gather(random_state())
        tensors = {f"random.{i}.{name}": x for i, (own, _) in enumerate(states) for name, x in own.items()}
        return tensors, [numbers for _, numbers in states]

    @property
    def _rows_a_step(self) -> int:
        args = self.args
        return int(args.train_batch_size * args.gradient_accumulation_steps * distributed.world_size())

    def _last_checkpoint(self) -> str:
        """Return the newest checkpoint of ``output_dir``.

        Raises:
            InputError: there is none.
        """
        states = self._saved_states()
        last, damaged = checksums.newest_good(states)
        for line in damaged if last else ():
            logger.warning("%s; the checkpoint before it is taken.", line)
        if last is None and damaged:
            raise InputError(checksums.none_is_good(Path(self.args.output_dir), damaged))
        if last is None:
            raise InputError(f"{self.args.output_dir} holds no checkpoint to go on from (checkpoints/step-...).")
        return str(last)

    def _determine_best_metric(self, *args: Any, **kwargs: Any) -> bool:
        is_best = bool(super()._determine_best_metric(*args, **kwargs))
        if is_best and self.keep_best:
            self.control.should_save = True
        return is_best

    def _check_whole(self, checkpoint: str) -> None:
        """Hold a checkpoint to its checksums; what has no adapter at all is told when that is loaded.

        Raises:
            InputError: something of it is damaged.
        """
        with distributed.agreed_errors():
            try:
                if (Path(checkpoint) / "adapter_model.safetensors").is_file():
                    checksums.check(Path(checkpoint))
            except checksums.Damaged as error:
                raise InputError(f"{checkpoint} cannot be gone on from: {error}.") from None

    def _load_best_model(self) -> None:
        self._check_whole(str(self.state.best_model_checkpoint))
        self._load_from_checkpoint(self.state.best_model_checkpoint)

    def _finalize_training(self, *args: Any, **kwargs: Any) -> Any:
        result = super()._finalize_training(*args, **kwargs)
        best = self.state.best_model_checkpoint
        if best is not None and self.args.save_total_limit == 1:  # the last one is not needed any more
            with distributed.first_writes(self.args.should_save) as writes:
                for old in self._saved_states() if writes else ():
                    if old != Path(best):
                        remove_folder(old)
        return result

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: Any = None) -> None:
        with distributed.agreed_errors():
            file = Path(resume_from_checkpoint) / "adapter_model.safetensors"
            if not file.is_file():
                raise InputError(f"{resume_from_checkpoint} holds no {file.name}: it is no checkpoint to go on from.")
            weights = split(self.model, load_file(file))
            expected = get_peft_model_state_dict(self.model, save_embedding_layers=vocabulary_resized(self.model))
            if {k: v.shape for k, v in weights.items()} != {k: v.shape for k, v in expected.items()}:
                raise InputError(
                    f"{resume_from_checkpoint}: this adapter is not one of the model that is to be trained."
                )
            set_peft_model_state_dict(self.model, weights)

    def _load_optimizer_and_scheduler(self, checkpoint: str | None) -> None:
        if checkpoint is None:
            return
        with distributed.agreed_errors():
            tensors, numbers = read_state(Path(checkpoint))
            if numbers["data"] is not None and numbers["data"] != self._data_digest:
                raise InputError(f"{checkpoint} was made with other training data; restore it, or begin another run.")
            processes, rows = len(numbers["random"]), numbers.get("rows")
            if processes != distributed.world_size() and rows != self._rows_a_step:
                raise InputError(
                    f"{checkpoint} was made by {processes} process{'es' * (processes > 1)} with steps of {rows} rows, "
                    f"and {distributed.world_size()} would have {self._rows_a_step}; change the rows of a pass or "
                    "gradient_accumulation_steps, or start as many."
                )
            self.optimizer.load_state_dict(unflatten(tensors, numbers["optimizer"]))
            self.lr_scheduler.load_state_dict(unflatten(tensors, numbers["scheduler"]))
            if steps_planned(Path(checkpoint)) != self.state.max_steps:
                set_rates(self.lr_scheduler, self.optimizer)

    def _load_rng_state(self, checkpoint: str | None) -> None:
        if checkpoint is not None:
            tensors, numbers = read_state(Path(checkpoint))
            if len(numbers["random"]) != distributed.world_size():
                # the values of others: each process gets a seed of its own, a function of the run's, step and number
                parts = (self.args.seed, self.state.global_step, distributed.rank(), distributed.world_size())
                set_seed(int(np.random.SeedSequence(parts).generate_state(1)[0]))
                return
            own = f"random.{distributed.rank()}."
            mine = {key.removeprefix(own): tensor for key, tensor in tensors.items() if key.startswith(own)}
            set_random_state(mine, numbers["random"][distributed.rank()])

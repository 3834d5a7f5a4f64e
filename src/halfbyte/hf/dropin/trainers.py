"""Trainers as scripts make them, over our 4-bit weights through ours: TRL's SFT, DPO, KTO and ORPO, and the Trainer.

A trainer's constructor looks at its model. Over our weights the object becomes one of a class of ours, which stands
behind the script's own class, if there is one, and before the library's; over any other model it stays the library's.
So a script's subclass keeps its overrides, and names imported before :func:`halfbyte.install` are served as well.

What differs from :mod:`halfbyte.hf.trainers`, so that a script finds what it expects:

- rows come in the order that accelerate gives them (a function of the seed and the epoch too);
- checkpoints are found as ``checkpoint-10`` too, a link to ``checkpoints/step-000010``;
- the plain Trainer's checkpoints are transformers' own;
- gradient checkpointing is as memory needs it (:mod:`halfbyte.hf.dropin.memory`);
- bf16 autocast is off where the model computes in bf16 anyway.
"""

import dataclasses
import functools
import inspect
import warnings
from pathlib import Path
from typing import Any, ClassVar

import torch
from peft import PeftModel
from torch.utils.data import RandomSampler
from transformers import AutoConfig, BitsAndBytesConfig, Trainer, TrainingArguments
from transformers.trainer_utils import HubStrategy

from halfbyte.hf.dropin import arguments, memory
from halfbyte.hf.dropin.adapters import is_ours
from halfbyte.hf.dropin.collator import DataCollatorForCompletionOnlyLM
from halfbyte.hf.dropin.formatting import by_example, texts_alone
from halfbyte.hf.dropin.old_names import TO_CONFIGURATION
from halfbyte.hf.dropin.said import say
from halfbyte.hf.layers.head import base_of
from halfbyte.hf.layers.prepare import prepare
from halfbyte.hf.models.config import QUANT_METHOD, HalfbyteConfig
from halfbyte.hf.replacement import MISSING, Replacement
from halfbyte.hf.trainers import distributed, methods
from halfbyte.hf.trainers.base import BaseTrainer, _few_walks
from halfbyte.hf.trainers.state import saved_states

WISHES = ("quantization_config", "load_in_4bit", "load_in_8bit")
"""Arguments of ``from_pretrained`` that ask for a quantized model."""


class FromScript:
    """What a trainer of ours does otherwise when a script has made it by the library's name."""

    sequences: ClassVar[int] = 1
    """How many sequences a row brings to a batch."""
    mean_of_batches: ClassVar[bool] = False
    """Whether the script's own loss is the mean of a batch, not the share of a step."""
    model_accepts_loss_kwargs: bool

    def __init__(self, model: Any, **given: Any) -> None:
        args: Any = given.get("args")
        self._recompute = args is not None and settle(args, model)
        pushes = args is not None and args.push_to_hub
        if pushes:
            args.push_to_hub = False  # ours refuse it: their checkpoints are not transformers'
        super().__init__(model, **given)  # type: ignore[call-arg]
        if pushes:
            args.push_to_hub = True
            super().init_hf_repo()  # type: ignore[misc]
            if args.push_to_hub:
                say("push_to_hub=True: the model is uploaded when it is trained or saved; checkpoints are not.")
        self.model_accepts_loss_kwargs = self.model_accepts_loss_kwargs and not self.mean_of_batches

    def train(self, *args: Any, **kwargs: Any) -> Any:
        own: Any = self
        if own._recompute:
            memory.plan(own.model, own.train_dataset, own.args, self.sequences)
        result = super().train(*args, **kwargs)  # type: ignore[misc]
        if own.args.push_to_hub and own.args.hub_strategy != HubStrategy.END:
            own.push_to_hub(commit_message="Training in progress, the last step")
        return result

    def save_model(self, output_dir: str | None = None, _internal_call: bool = False) -> None:
        super().save_model(output_dir, _internal_call)  # type: ignore[misc]
        own: Any = self
        if own.args.push_to_hub and not _internal_call:
            own.push_to_hub(commit_message="Model save")

    def _get_train_sampler(self, train_dataset: Any = None) -> Any:
        own: Any = self
        sampler = super()._get_train_sampler(train_dataset)  # type: ignore[misc]
        if sampler is None or own.args.train_sampling_strategy != "random":
            return sampler
        if own.args.data_seed is None and distributed.world_size() > 1:
            # ours seed each process apart, and accelerate (1.15) would take that as the seed of the order
            own.accelerator.dataloader_config.data_seed = own.args.seed
        return RandomSampler(own.train_dataset if train_dataset is None else train_dataset)

    def _save_checkpoint(self, *args: Any, **kwargs: Any) -> None:
        super()._save_checkpoint(*args, **kwargs)  # type: ignore[misc]
        own: Any = self
        if own.args.should_save:
            link_checkpoints(Path(own.args.output_dir))


class FastTrainer(Trainer):
    """transformers' Trainer over our weights: its own checkpoints and order of rows; our head and memory plan."""

    mean_of_batches: ClassVar[bool] = False
    model_accepts_loss_kwargs: bool
    _is_plain = BaseTrainer._is_plain
    _clip_grad_norm = BaseTrainer._clip_grad_norm

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        given = inspect.signature(Trainer.__init__).bind(self, *args, **kwargs).arguments
        model = given["model"]
        self._recompute = settle(given["args"], model) if given.get("args") is not None else False
        if isinstance(model, PeftModel):
            prepare(model)  # the adapter may be older than install()
        super().__init__(*args, **kwargs)
        self.model_accepts_loss_kwargs = self.model_accepts_loss_kwargs and not self.mean_of_batches

    def floating_point_ops(self, inputs: dict[str, Any]) -> int:
        """Return nothing: Trainer's estimate walks through all parameters for every batch."""
        return 0

    def _get_grad_norm(self, model: Any, grad_norm: Any = None) -> Any:
        if grad_norm is None and self._is_plain:
            grad_norm = torch.nn.utils.get_total_norm([p.grad for p in self._parameters if p.grad is not None])
        return super()._get_grad_norm(model, grad_norm)

    def train(self, *args: Any, **kwargs: Any) -> Any:
        """Train, as Trainer does."""
        self._parameters = list(self.model.parameters())
        if self._recompute:
            memory.plan(self.model, self.train_dataset, self.args, collate=self.data_collator)
        with _few_walks(self.model, self._parameters):
            return super().train(*args, **kwargs)


def settle(args: TrainingArguments, model: Any) -> bool:
    """Take out of ``args`` what ours do otherwise; return whether recomputing of activations was asked for."""
    wished = args.bf16 or args.mixed_precision == "bf16"  # accelerate launch wishes it by the environment
    if wished and getattr(base_of(model), "dtype", None) == torch.bfloat16:
        args.bf16, args.mixed_precision = False, "no"
        say("bf16: the model computes in bfloat16 already, so there is no autocast.")
    return memory.take_wish(args, model)


def link_checkpoints(folder: Path) -> None:
    """Let the checkpoints of the run in ``folder`` be found by the names that transformers gives them."""
    for link in folder.glob("checkpoint-*"):
        if link.is_symlink() and not link.exists():
            link.unlink()
    for state in saved_states(folder):
        link = folder / f"checkpoint-{int(state.name.removeprefix('step-'))}"
        if not link.exists():
            link.symlink_to(state.relative_to(folder), target_is_directory=True)


_joined: dict[tuple[Any, Any], Any] = {}


def joined(script: Any, ours: Any) -> Any:
    """Return the class that is the script's first and ``ours`` behind it."""
    if issubclass(ours, script):
        return ours
    if (script, ours) not in _joined:
        _joined[script, ours] = _join(script, ours)
    return _joined[script, ours]


def _join(script: Any, ours: Any) -> Any:
    own: dict[str, Any] = {"__module__": script.__module__, "__qualname__": script.__qualname__}
    loss = script.compute_loss
    parameters = inspect.signature(loss).parameters
    if "num_items_in_batch" not in parameters and all(p.kind != p.VAR_KEYWORD for p in parameters.values()):

        def compute_loss(
            self: Any, model: Any, inputs: Any, return_outputs: bool = False, num_items_in_batch: Any = None
        ) -> Any:
            return loss(self, model, inputs, return_outputs)

        own["mean_of_batches"] = True
        own["compute_loss"] = compute_loss
        say(f"{script.__name__}.compute_loss takes no num_items_in_batch: a step's loss is its batches' mean.")
    return type(script.__name__, (script, ours), own)


def _tokenizer(kwargs: dict[str, Any], kind: str) -> dict[str, Any]:
    if "tokenizer" not in kwargs:
        return kwargs
    kwargs = dict(kwargs)
    kwargs.setdefault("processing_class", kwargs.pop("tokenizer"))
    say(f"{kind}(tokenizer=...) is processing_class= now.")
    return kwargs


def _plain(old: Any) -> Any:
    """The constructor of transformers' Trainer."""

    @functools.wraps(old)
    def __init__(self: Any, *args: Any, **kwargs: Any) -> None:
        kwargs = _tokenizer(kwargs, type(self).__name__)
        model = args[0] if args else kwargs.get("model")
        theirs = any(cls.__module__.partition(".")[0] == "trl" for cls in type(self).__mro__)
        if theirs or isinstance(self, BaseTrainer | FastTrainer) or not is_ours(model):
            old(self, *args, **kwargs)
            return
        self.__class__ = joined(type(self), FastTrainer)
        FastTrainer.__init__(self, *args, **kwargs)

    return __init__


def _with_tokenizer(old: Any) -> Any:
    @functools.wraps(old)
    def __init__(self: Any, *args: Any, **kwargs: Any) -> None:
        old(self, *args, **_tokenizer(kwargs, type(self).__name__))

    return __init__


def _trl(ours: type, config: type[TrainingArguments]) -> Any:
    """Make the constructor of a trainer of TRL's."""

    def make(old: Any) -> Any:
        signature = inspect.signature(old)

        @functools.wraps(old)
        def __init__(self: Any, *args: Any, **kwargs: Any) -> None:
            if isinstance(self, BaseTrainer):
                old(self, *args, **kwargs)  # called by ours
                return
            kind = type(self).__name__
            kwargs = _tokenizer(kwargs, kind)
            moved = {name: kwargs.pop(name) for name in TO_CONFIGURATION if name in kwargs}
            given = signature.bind(self, *args, **kwargs).arguments
            del given["self"]
            model = given.pop("model", None)
            given["args"] = _configuration(config, given.get("args"), moved, kind, model)
            if (field := getattr(given["args"], "dataset_text_field", None)) and not given.get("formatting_func"):
                for name in ("train_dataset", "eval_dataset"):
                    given[name] = texts_alone(given.get(name), field)
            if given.get("formatting_func") is not None:
                given["formatting_func"] = by_example(given["formatting_func"], given.get("train_dataset"))
            if isinstance(model, PeftModel) and given.get("peft_config") is not None:
                del given["peft_config"]
                say(f"{kind}(peft_config=...): the model has its adapter already, which is trained.")
            if is_ours(model) or (isinstance(model, str) and _opens_quantized(model, given)):
                self.__class__ = joined(type(self), ours)
                ours.__init__(self, model, **given)  # type: ignore[misc]
            else:
                old(self, model, **given)

        return __init__

    return make


def _configuration(
    config: type[TrainingArguments], args: TrainingArguments | None, moved: dict[str, Any], kind: str, model: Any
) -> TrainingArguments:
    """Return the configuration of a trainer, from what the script handed it and from the trainer's old arguments."""
    known = {field.name for field in dataclasses.fields(config)}
    if moved:
        say(f"{kind}({', '.join(moved)}) belongs to {config.__name__} now.")
        moved = arguments.translated(moved, known, config.__name__)
    if isinstance(args, config):
        for name, value in moved.items():
            setattr(args, name, value)
        return args
    if args is None:
        name = model if isinstance(model, str) else getattr(getattr(model, "config", None), "_name_or_path", "")
        return config(**{"output_dir": f"{str(name).split('/')[-1]}-{config.__name__[:-6]}"} | moved)
    held = {field.name: getattr(args, field.name) for field in dataclasses.fields(args) if field.init}
    return config(**{name: value for name, value in held.items() if name in known} | moved)


def _opens_quantized(name: str, given: dict[str, Any]) -> bool:
    options = getattr(given["args"], "model_init_kwargs", None) or {}
    wishes = (given.get("quantization_config"), *map(options.get, WISHES))
    if any(wish is True or isinstance(wish, BitsAndBytesConfig | HalfbyteConfig) for wish in wishes):
        return True
    places = {key: options[key] for key in ("trust_remote_code", "revision", "token", "cache_dir") if key in options}
    held: Any = getattr(AutoConfig.from_pretrained(name, **places), "quantization_config", None) or {}
    about = held if isinstance(held, dict) else held.to_dict()
    return about.get("quant_method") in ("bitsandbytes", QUANT_METHOD)


def _ours(name: str, theirs: type, sequences: int = 1) -> type:
    """Return our trainer of the method ``name`` as a script meets it; one that is TRL's alone stands on our base."""
    known = getattr(methods, f"{name}Trainer", None)
    bases = (FromScript, known) if known else (FromScript, BaseTrainer, theirs)
    return type(f"{name}Trainer", bases, {"sequences": sequences})


def _tokenizer_of(old: Any) -> Any:
    return property(lambda self: self.processing_class) if old is MISSING else old


def rows() -> list[Replacement]:
    """What trainers replace."""
    import trl

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # that it is experimental
        from trl.experimental.orpo import ORPOConfig, ORPOTrainer
    theirs = ("trl", ">=1.16,<1.17")
    served = (
        ("SFT", trl.SFTTrainer, trl.SFTConfig, 1),
        ("DPO", trl.DPOTrainer, trl.DPOConfig, 2),
        ("KTO", trl.KTOTrainer, trl.KTOConfig, 2),
        ("ORPO", ORPOTrainer, ORPOConfig, 2),
    )
    gone = "the name of 2024, which is in trl.experimental now"
    return [
        Replacement(
            "transformers.trainer:Trainer.__init__",
            _plain,
            "the plain Trainer over our weights: head, optimizer, memory plan; tokenizer=",
            "transformers",
            ">=5.23,<5.24",
        ),
        Replacement(
            "transformers.trainer_seq2seq:Seq2SeqTrainer.__init__",
            _with_tokenizer,
            "tokenizer=, which is processing_class now",
            "transformers",
            ">=5.23,<5.24",
        ),
        Replacement(
            "transformers.trainer:Trainer.tokenizer",
            _tokenizer_of,
            "trainer.tokenizer, which is processing_class now",
            "transformers",
            ">=5.23,<5.24",
        ),
        *(
            Replacement(
                f"{trainer.__module__}:{trainer.__name__}.__init__",
                _trl(_ours(name, trainer, sequences), config),
                "ours over our weights; tokenizer=, and the arguments that its configuration took over",
                *theirs,
            )
            for name, trainer, config, sequences in served
        ),
        Replacement("trl:ORPOTrainer", lambda old: ORPOTrainer, gone, *theirs),
        Replacement("trl:ORPOConfig", lambda old: ORPOConfig, gone, *theirs),
        *(
            Replacement(
                f"{module}:DataCollatorForCompletionOnlyLM",
                lambda old: DataCollatorForCompletionOnlyLM,
                "gone since TRL 0.20; labels begin after the template of the answer",
                *theirs,
            )
            for module in ("trl", "trl.trainer", "trl.trainer.utils")
        ),
    ]

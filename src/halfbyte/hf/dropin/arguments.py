"""transformers' and TRL's configurations with the arguments that they once had, on a machine without a GPU.

Old names are translated when a configuration is made (``__init__``) or read from a command line (HfArgumentParser);
what an argument means without a GPU, when it is complete (``__post_init__``): scripts derive classes of their own.
"""

import argparse
import dataclasses
import functools
import os
import sys
from collections.abc import Iterable
from typing import Any

import torch
from transformers import TrainingArguments
from transformers.integrations import get_available_reporting_integrations

from halfbyte.hf.dropin.old_names import RENAMED, WITHOUT_MEANING
from halfbyte.hf.dropin.said import say
from halfbyte.hf.replacement import Replacement

TRL_CONFIGS = {
    "trl.trainer.sft_config:SFTConfig": "trl",
    "trl.trainer.dpo_config:DPOConfig": "trl",
    "trl.trainer.kto_config:KTOConfig": "trl",
    "trl.experimental.orpo.orpo_config:ORPOConfig": "trl",
}
OURS_TO_CHOOSE = ("none", "all")


def translated(given: dict[str, Any], known: Iterable[str], kind: str) -> dict[str, Any]:
    """Return a configuration's arguments under the names of today.

    Args:
        given: by whatever name; not changed.
        known: the names that the configuration has.
        kind: the name of its class, for what is said.
    """
    known = set(known)
    new: dict[str, Any] = {}
    # An old name beside the one of today counts where that says nothing: warmup_steps=0 beside a ratio.
    for name, value in sorted(given.items(), key=lambda item: item[0] not in known):
        if name in known:
            new[name] = value
        elif RENAMED.get(name) in known:
            new.setdefault(RENAMED[name], value)
            say(f"{kind}({name}=...) is {RENAMED[name]}= now.")
        elif name in SPECIAL and SPECIAL[name][0] in known:
            if value and not new.get(SPECIAL[name][0]):
                new[SPECIAL[name][0]] = SPECIAL[name][1](value)
            say(f"{kind}({name}={value!r}) is {SPECIAL[name][0]}={new.get(SPECIAL[name][0])!r} now.")
        elif name == "logging_dir":
            if value is not None:
                os.environ["TENSORBOARD_LOGGING_DIR"] = str(value)
                say(f"{kind}(logging_dir={value!r}) is TENSORBOARD_LOGGING_DIR in the environment now, and is set.")
        elif name in WITHOUT_MEANING:
            say(f"{kind}({name}=...) is gone: {WITHOUT_MEANING[name]}.")
        else:
            new[name] = value  # the library's own error
    return new


SPECIAL: dict[str, tuple[str, Any]] = {
    "group_by_length": ("train_sampling_strategy", lambda value: "group_by_length"),
    "warmup_ratio": ("warmup_steps", float),
    "adafactor": ("optim", lambda value: "adafactor"),
    "include_inputs_for_metrics": ("include_for_metrics", lambda value: ["inputs"]),
}
"""Old name: the argument that says it now, and its value for an old one that is true."""


def _taking_old(old: Any) -> Any:
    """The constructor of a configuration, with old names too."""

    @functools.wraps(old)
    def __init__(self: Any, *args: Any, **kwargs: Any) -> None:
        known = [field.name for field in dataclasses.fields(self)]
        kwargs = translated(kwargs, known, type(self).__name__)
        if type(self).__module__.startswith("trl.") and not torch.cuda.is_available() and kwargs.get("bf16") is None:
            kwargs["bf16"] = False  # TRL's default is a GPU's
        old(self, *args, **kwargs)

    return __init__


def _without_gpu(old: Any) -> Any:
    """``__post_init__``: what the arguments mean on this machine."""

    @functools.wraps(old)
    def __post_init__(self: Any) -> None:
        _fields_of_subclasses(self)
        if not torch.accelerator.is_available():
            if self.fp16:
                self.fp16 = False
                say("fp16=True: a CPU has units for bfloat16, in which a model over 4 bits computes anyway.")
            if self.tf32:
                self.tf32 = None
                say("tf32=True: it is a GPU's way to multiply in float32, and there is none.")
            self.use_cpu = True  # bf16=True is an error without
        if self.report_to is None:
            self.report_to = "none"
        wished = [self.report_to] if isinstance(self.report_to, str) else list(self.report_to or ())
        if wished and not any(name in OURS_TO_CHOOSE for name in wished):
            there = get_available_reporting_integrations()
            for name in wished:
                if name not in there:
                    say(f"report_to={name!r}: the package is not installed, so nothing is reported to it.")
            self.report_to = [name for name in wished if name in there] or "none"
        old(self)
        if self.mixed_precision == "fp16" and not torch.accelerator.is_available():
            self.mixed_precision = "no"
            say(
                "mixed_precision fp16 of accelerate's launcher: a CPU has none, so the model computes as it was loaded."
            )

    return __post_init__


def _fields_of_subclasses(self: Any) -> None:
    """Obey old names that a script's own subclass still has as fields, as qlora.py's has ``group_by_length``."""
    own = {name for name in SPECIAL if name in vars(self)}
    for name in sorted(own):
        new, value_of = SPECIAL[name]
        default = TrainingArguments.__dataclass_fields__[new].default
        if vars(self)[name] and getattr(self, new) == default:
            setattr(self, new, value_of(vars(self)[name]))
            say(f"{type(self).__name__}.{name} is {new}={getattr(self, new)!r} now.")


def _parsing_old(old: Any) -> Any:
    """``HfArgumentParser.parse_args_into_dataclasses`` that takes the old names of flags."""

    @functools.wraps(old)
    def parse_args_into_dataclasses(self: Any, args: Any = None, *more: Any, **kwargs: Any) -> Any:
        known = {name for action in self._actions for name in action.option_strings}
        words = list(sys.argv[1:] if args is None else args)
        parse = self.parse_known_args
        self.parse_known_args = lambda *args, **kwargs: _shared(*parse(*args, **kwargs))
        try:
            return old(self, _flags(words, known), *more, **kwargs)
        finally:
            del self.parse_known_args

    return parse_args_into_dataclasses


class _Shared(argparse.Namespace):
    """The values of flags, each taken out once, though a second class has a field of that name (see :func:`_once`)."""

    def __delattr__(self, name: str) -> None:
        vars(self).pop(name, None)


def _shared(values: argparse.Namespace, rest: list[str]) -> tuple[argparse.Namespace, list[str]]:
    return _Shared(**vars(values)), rest


def _once(old: Any) -> Any:
    """``HfArgumentParser._parse_dataclass_field`` that leaves a flag to the class that had it first."""
    original = old.__func__

    @functools.wraps(original)
    def _parse_dataclass_field(parser: Any, field: Any) -> None:
        if f"--{field.name}" in parser._option_string_actions:
            say(f"--{field.name} is an argument of transformers' now, and taken for that one.")
            return
        original(parser, field)

    return staticmethod(_parse_dataclass_field)


def _flags(words: list[str], known: set[str]) -> list[str]:
    """Return the words of a command line with the flags of today."""
    new: list[str] = []
    position = 0
    while position < len(words):
        word = words[position]
        position += 1
        flag, equals, value = word.partition("=")
        name = flag.removeprefix("--")
        if not flag.startswith("--") or flag in known or not (name in RENAMED or name in SPECIAL or name in GONE):
            new.append(word)
            continue
        if not equals and position < len(words) and not words[position].startswith("--"):
            value = words[position]
            position += 1
        truth = value.lower() not in ("false", "0", "no", "0.0")
        if name in RENAMED:
            new += [f"--{RENAMED[name]}", *([value] if value else [])]
            say(f"--{name} is --{RENAMED[name]} now.")
        elif name in SPECIAL:
            to, value_of = SPECIAL[name]
            if truth:
                made = value_of(value or True)
                new += [f"--{to}", *(made if isinstance(made, list) else [str(made)])]
            say(f"--{name} is --{to} now.")
        else:
            say(f"--{name} is gone: {GONE[name]}.")
    return new


GONE = {**WITHOUT_MEANING, "logging_dir": "TENSORBOARD_LOGGING_DIR in the environment says it"}


def rows() -> list[Replacement]:
    """What configurations replace."""
    transformers = ("transformers", ">=5.23,<5.24")
    old = "evaluation_strategy, group_by_length, warmup_ratio, no_cuda, logging_dir and other names of 2023"
    return [
        Replacement("transformers.training_args:TrainingArguments.__init__", _taking_old, old, *transformers),
        Replacement(
            "transformers.training_args:TrainingArguments.__post_init__",
            _without_gpu,
            "bf16=True and fp16=True without a GPU, report_to of packages that are not installed",
            *transformers,
        ),
        Replacement(
            "transformers.training_args_seq2seq:Seq2SeqTrainingArguments.__init__", _taking_old, old, *transformers
        ),
        Replacement(
            "transformers.hf_argparser:HfArgumentParser.parse_args_into_dataclasses",
            _parsing_old,
            "the same names as flags of a script's command line",
            *transformers,
        ),
        Replacement(
            "transformers.hf_argparser:HfArgumentParser._parse_dataclass_field",
            _once,
            "a flag of a script's that TrainingArguments has got since, as --use_cache of qlora.py",
            *transformers,
        ),
        *(
            Replacement(f"{where}.__init__", _taking_old, f"max_seq_length, {old}", library, ">=1.16,<1.17")
            for where, library in TRL_CONFIGS.items()
        ),
    ]

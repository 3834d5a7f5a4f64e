"""What flags mean together, and the same run as a configuration of ours. Imports no torch."""

import dataclasses
import shlex
from collections.abc import Mapping, Sequence
from typing import Any

import yaml

from halfbyte.choices import QUANT_TYPES
from halfbyte.errors import InputError, nearest
from halfbyte.runs.config import TrainConfig
from halfbyte.train.qlora.flags import Flags, Only
from halfbyte.train.qlora.formats import OWN_COLUMNS, format_of, source_of
from halfbyte.train.qlora.table import GENERATION, SAMPLING

INTERVALS = ("no", "steps", "epoch")
OPTIMS = {
    "paged_adamw_32bit": "paged_adamw_32bit", "paged_adamw_8bit": "paged_adamw_8bit",
    "adamw_bnb_8bit": "adamw_8bit", "adamw_8bit": "adamw_8bit", "adamw_torch": "adamw_torch",
    "adamw_torch_fused": "adamw_torch",
} | {
    name: name
    for name in (
        "lion_8bit", "lion_32bit", "paged_lion_8bit", "paged_lion_32bit", "adafactor", "sgd", "adagrad", "rmsprop",
    )
}  # fmt: skip
"""What ``optim`` may be, and our own name for it; ``fused`` is a matter of speed. ``rmsprop`` came after 4.31."""
NO_OPTIMS = {
    "adamw_hf": "transformers has it no more; use adamw_torch",
    "adamw_apex_fused": "it is Apex', for GPUs; use adamw_torch",
    "adamw_torch_xla": "it is for TPUs; use adamw_torch",
    "adamw_anyprecision": "it needs torchdistx, which is archived; use adamw_torch",
}
SCHEDULES = (
    "linear", "cosine", "cosine_with_restarts", "polynomial", "constant", "constant_with_warmup", "inverse_sqrt",
    "reduce_lr_on_plateau",
)  # fmt: skip
"""Those of transformers 4.31."""
BASES = {4: None, 8: "int8", 16: "none", 32: "none"}
"""``--bits``: the base's number format, None being that of ``quant_type``."""
MMLU = {"mmlu-zs": "zero_shot_mmlu", "mmlu-fs": "five_shot_mmlu", "mmlu": "five_shot_mmlu"}
SPLITS = {"eval": "val", "test": "test"}

METRICS = tuple(f"{part}{name}" for name in ("loss", "entropy", "mean_token_accuracy") for part in ("", "eval_"))
"""What an evaluation measures; MMLU is logged apart."""
LOG_LEVELS = ("debug", "info", "warning", "error", "critical", "passive")
SMALL, MANY = 1e-12, float("inf")
BOUNDS = {
    "source_max_len target_max_len eval_dataset_size max_train_samples max_eval_samples max_mmlu_samples": (1, MANY),
    "mmlu_source_max_len per_device_eval_batch_size logging_steps save_steps max_new_tokens max_memory_MB": (1, MANY),
    "num_beams eval_accumulation_steps": (1, MANY),
    "dataloader_num_workers eval_delay min_new_tokens top_k no_repeat_ngram_size warmup_steps": (0, MANY),
    "temperature repetition_penalty adam_epsilon eval_steps": (SMALL, MANY),
    "top_p typical_p": (SMALL, 1),
    "label_smoothing_factor": (0, 1),
}
"""Flags, and the least and the greatest value of each, where no option of ours has bounds of its own."""

VOID = {
    "do_eval": "eval_delay",
    "do_eval or --do_predict": "eval_dataset_size max_eval_samples per_device_eval_batch_size",
    "do_mmlu_eval": "mmlu_dataset mmlu_split mmlu_source_max_len max_mmlu_samples",
    "do_train": "max_train_samples",
}
"""Flags that say nothing unless another one is on."""

OPTIONS = {
    "model_name_or_path": "model", "dataset": "data", "output_dir": "output", "trust_remote_code": "trust_remote_code",
    "quant_type": "quant_type", "double_quant": "double_quant", "bf16": "compute_dtype", "lora_r": "rank",
    "lora_alpha": "lora_alpha", "lora_dropout": "lora_dropout", "lora_modules": "target_modules",
    "max_steps": "max_steps", "num_train_epochs": "epochs", "per_device_train_batch_size": "batch_size",
    "gradient_accumulation_steps": "gradient_accumulation_steps", "group_by_length": "group_by_length",
    "max_memory_MB": "memory", "gradient_checkpointing": "gradient_checkpointing", "optim": "optimizer",
    "learning_rate": "learning_rate", "lr_scheduler_type": "lr_scheduler_type", "warmup_ratio": "warmup_ratio",
    "weight_decay": "weight_decay", "adam_beta1": "adam_beta1", "adam_beta2": "adam_beta2",
    "max_grad_norm": "max_grad_norm", "save_steps": "save_steps", "seed": "seed", "processes": "processes",
    "max_restarts": "max_restarts",
}  # fmt: skip
"""A flag, and the option of ours that it becomes."""

SAYS_NOTHING = {
    "do_train", "bits", "use_auth_token", "adafactor", "adam8bit", "overwrite_output_dir", "dataset_format",
    "per_gpu_train_batch_size", "disable_tqdm",
}  # fmt: skip
"""Flags that other options hold, or that no configuration says."""
INSTEAD = {
    "do_eval": "write eval_share (of the rows) or eval_data (a file)",
    "evaluation_strategy": "rows are evaluated every eval_steps where there are any",
    "eval_dataset_size": "write eval_share, the share of the rows that are held out",
    "max_eval_samples": "write eval_share",
    "per_device_eval_batch_size": "batch_size serves for both",
    "source_max_len": "max_length is that of source and target together, cut at the end",
    "target_max_len": "max_length is that of source and target together, cut at the end",
    "train_on_source": "format: text trains whole texts",
    "logging_steps": "every step is logged",
    "logging_strategy": "every step is logged",
    "save_total_limit": "two checkpoints are kept while a run lasts",
    "save_strategy": "checkpoints come every save_steps",
    "warmup_steps": "write warmup_ratio, a share of the steps",
    "do_predict": "ask the run afterwards with halfbyte generate",
    "predict_with_generate": "ask the run afterwards with halfbyte generate",
    "run_name": "a run is called by its folder",
}
"""What to write for a flag that has no counterpart."""


@dataclasses.dataclass(frozen=True)
class Translated:
    """A run as ours.

    Attributes:
        flags: with what follows from others filled in.
        values: options of :class:`TrainConfig`, apart from those at their default.
        lacking: given flags without a counterpart: what to write instead, or why there is nothing.
        notes: what somebody might not expect of the flags, a sentence each.
    """

    flags: Flags
    values: dict[str, Any]
    lacking: dict[str, str]
    notes: list[str]

    def config(self) -> TrainConfig:
        """Return the configuration; an option that is wrong is told by the flag's name.

        Raises:
            InputError: an option is out of its bounds.
        """
        try:
            return TrainConfig.from_yaml(None, self.values)
        except InputError as error:
            text = str(error)
            for flag, option in OPTIONS.items():
                text = text.replace(f"option {option!r}:", f"--{flag}:")
            raise InputError(text) from None

    def to_yaml(self, words: Sequence[str]) -> str:
        """Return the configuration as YAML; ``words`` are the command line that it was."""
        config = self.config()
        head = [f"# halfbyte qlora {shlex.join(words)}"]
        head += [f"# no counterpart: --{name} {self.flags[name]} ({why})" for name, why in self.lacking.items()]
        head += [f"# {note}" for note in self.notes]
        dumped = config.model_dump(mode="json", include=set(self.values))
        dumped |= {"model": self.values["model"], "output": self.values["output"]}  # as they were named
        return "\n".join(head) + "\n" + yaml.safe_dump(dumped, sort_keys=False, allow_unicode=True)


def translate(given: Flags) -> Translated:
    """Return what ``given`` means, with what 4.31's ``TrainingArguments`` make of it.

    Raises:
        InputError: a value is none that there is, or flags contradict each other.
    """
    flags = _settled(given)
    _check(flags)
    notes = _notes(flags)
    values = {
        "model": flags["model_name_or_path"],
        "data": source_of(flags["dataset"]),
        "output": flags["output_dir"],
        "max_length": flags["source_max_len"] + flags["target_max_len"],
        "compute_dtype": "bfloat16" if flags["bf16"] else "float32",
        "quant_type": base_type(flags),
        "target_modules": _targets(flags["lora_modules"]),
        "double_quant": flags["double_quant"] if flags["bits"] == 4 else None,
        **{name: flags[name] for name in ("lora_alpha", "lora_dropout", "trust_remote_code", "seed")},
        "rank": flags["lora_r"],
        "batch_size": flags["per_device_train_batch_size"],
        **{
            name: flags[name]
            for name in (
                "gradient_accumulation_steps", "group_by_length", "learning_rate", "weight_decay", "adam_beta1",
                "adam_beta2", "max_grad_norm",
            )
        },
        **({"max_steps": flags["max_steps"]} if flags["max_steps"] > 0 else {"epochs": flags["num_train_epochs"]}),
    }  # fmt: skip
    lacking = {
        name: INSTEAD.get(name, "there is no such option")
        for name in flags.given
        if name not in OPTIONS.keys() | SAYS_NOTHING and not isinstance(flags.known[name].fate, Only)
    }
    if "max_memory_MB" in flags.given:
        values["memory"] = f"{flags['max_memory_MB']}MB"
    if flags["no_cuda"]:
        values["device"] = "cpu"
        lacking.pop("no_cuda", None)
    if "gradient_checkpointing" in flags.given:
        values["gradient_checkpointing"] = flags["gradient_checkpointing"]
    if flags["save_strategy"] == "steps":
        values["save_steps"] = flags["save_steps"]
    if flags["evaluation_strategy"] == "steps" and flags["eval_steps"] >= 1:
        values["eval_steps"] = int(flags["eval_steps"])
        lacking.pop("eval_steps", None)
    _shape(flags, values, lacking)
    _schedule(flags, values, lacking)
    values["optimizer"] = OPTIMS[flags["optim"]]
    values |= {name: flags[name] for name in ("processes", "max_restarts") if name in flags.given}
    return Translated(flags, values, lacking, notes)


def base_type(flags: Flags) -> str:
    """Return the number format of the base that ``bits`` and ``quant_type`` name.

    Raises:
        InputError: there is no such base.
    """
    bits, word = flags["bits"], flags["quant_type"]
    if bits not in BASES:
        raise InputError(f"--bits {bits}: a base has 4, 8 or 16 bits.")
    known = [name for name in QUANT_TYPES if name not in BASES.values()]
    if word not in known:
        raise InputError(f"--quant_type {word}: there is no such format{nearest(word, known)}; choose nf4 or fp4.")
    return BASES[bits] or word


def _settled(given: Flags) -> Flags:
    """Fill in what follows from other flags, as ``TrainingArguments.__post_init__`` (4.31) does."""
    derived: dict[str, Any] = {}
    for part in ("train", "eval"):
        if given[f"per_gpu_{part}_batch_size"] is not None:
            derived[f"per_device_{part}_batch_size"] = given[f"per_gpu_{part}_batch_size"]
    for name, optim in (("adafactor", "adafactor"), ("adam8bit", "adamw_bnb_8bit")):
        if given[name]:
            if given.given.get("optim", optim) != optim:
                raise InputError(f"--{name} and --optim {given['optim']} exclude each other; choose one.")
            derived["optim"] = optim
    if given["evaluation_strategy"] != "no":
        derived["do_eval"] = True
    if not given["eval_steps"]:
        derived["eval_steps"] = given["logging_steps"]
    if given["run_name"] is None:
        derived["run_name"] = given["output_dir"]
    return given.but(**derived)


def _check(flags: Flags) -> None:
    _one_of(flags, "optim", OPTIMS, NO_OPTIMS)
    _one_of(flags, "lr_scheduler_type", SCHEDULES)
    for name in ("evaluation_strategy", "logging_strategy", "save_strategy"):
        _one_of(flags, name, INTERVALS)
    format_of(flags["dataset"], flags["dataset_format"])
    if flags["metric_for_best_model"] is not None:
        _one_of(flags, "metric_for_best_model", METRICS)
    if "log_level" in flags.given:
        _one_of(flags, "log_level", LOG_LEVELS)
    _one_of(flags, "log_level_replica", LOG_LEVELS)
    for names, (least, most) in BOUNDS.items():
        for name in names.split():
            value = flags[name]
            if value is not None and not least <= value <= most:
                bound = f"at least {least:g}" if value < least else f"at most {most:g}"
                raise InputError(f"--{name} {value} is wrong, it should be {bound}.")
    if (flags["min_new_tokens"] or 0) > flags["max_new_tokens"]:
        raise InputError(f"--min_new_tokens {flags['min_new_tokens']} is more than --max_new_tokens.")
    if not _targets(flags["lora_modules"]):
        raise InputError("--lora_modules names no layers; write all, or names with commas between them.")
    if flags["do_predict"] and not flags["predict_with_generate"]:
        raise InputError("--do_predict needs --predict_with_generate: predictions are texts.")
    if flags["do_mmlu_eval"]:
        if not flags["do_eval"]:
            raise InputError("--do_mmlu_eval measures at each evaluation; set --do_eval too.")
        _one_of(flags, "mmlu_dataset", MMLU)
        _one_of(flags, "mmlu_split", SPLITS)
    if not (flags["do_train"] or flags["do_eval"] or flags["do_predict"]):
        raise InputError("There is nothing to do; set --do_train, --do_eval or --do_predict.")


def _one_of(flags: Flags, name: str, known: Sequence[str] | Mapping[str, Any], refused: Mapping[str, str] = {}) -> None:
    word = flags[name]
    if word in refused:
        raise InputError(f"--{name} {word} is refused: {refused[word]}.")
    if word not in known:
        raise InputError(f"--{name} {word}: there is no such word{nearest(word, known)}; choose {', '.join(known)}.")


def _notes(flags: Flags) -> list[str]:
    notes = []
    if flags["lr_scheduler_type"] == "constant" and {"warmup_ratio", "warmup_steps"} & flags.given.keys():
        notes.append("lr_scheduler_type constant has no warm-up, in transformers too; constant_with_warmup has")
    generation = [flag.name for flag in GENERATION if flag.name in flags.given]
    if generation and not flags["do_predict"]:
        notes.append(f"Without --do_predict nothing is generated, so these do nothing: --{', --'.join(generation)}")
    elif not flags["do_sample"] and (unused := [name for name in SAMPLING if name in flags.given]):
        notes.append(f"Without --do_sample the likeliest token is taken, so these do nothing: --{', --'.join(unused)}")
    for part, strategy in (("eval", "evaluation"), ("save", "save"), ("logging", "logging")):
        if f"{part}_steps" in flags.given and flags[f"{strategy}_strategy"] != "steps":
            notes.append(f"--{part}_steps does nothing without --{strategy}_strategy steps")
    for without, void in VOID.items():
        unused = [name for name in void.split() if name in flags.given]
        if unused and not any(flags[name] for name in without.split(" or --")):
            notes.append(f"Without --{without} these do nothing: --{', --'.join(unused)}")
    if not flags["load_best_model_at_end"] and flags["lr_scheduler_type"] != "reduce_lr_on_plateau":
        unused = [name for name in ("metric_for_best_model", "greater_is_better") if name in flags.given]
        if unused:
            notes.append(f"Without --load_best_model_at_end these do nothing: --{', --'.join(unused)}")
    if "num_train_epochs" in flags.given and flags["max_steps"] > 0:
        notes.append(f"max_steps {flags['max_steps']} wins over num_train_epochs; with --max_steps -1 epochs count")
    if flags["predict_with_generate"] and not flags["do_predict"]:
        notes.append("Without --do_predict nothing is generated: --predict_with_generate does nothing")
    if "logging_dir" in flags.given and flags["report_to"] not in ("tensorboard", "all"):
        notes.append("Without --report_to tensorboard there are no files for --logging_dir")
    if flags["bits"] != 4 and (unused := [name for name in ("double_quant", "quant_type") if name in flags.given]):
        notes.append(f"With --bits {flags['bits']} these do nothing: --{', --'.join(unused)}")
    return notes


def _targets(modules: str) -> Any:
    names = [name.strip() for name in modules.split(",") if name.strip()]
    return "all-linear" if names == ["all"] else names


def _shape(flags: Flags, values: dict[str, Any], lacking: dict[str, str]) -> None:
    """Say how our own data part reads the rows; prompts are the model's chat template there."""
    form = format_of(flags["dataset"], flags["dataset_format"])
    if form not in ("oasst1", "hh-rlhf"):
        lacking["dataset"] = "its sources are written in the model's own chat template, not in the script's words"
    if form in ("alpaca", "alpaca-clean"):
        values["format"] = "alpaca"
    elif form in ("oasst1", "hh-rlhf"):
        values |= {"format": "text", "columns": {"text": "text" if form == "oasst1" else "chosen"}}
    elif form in ("self-instruct", OWN_COLUMNS):
        names = ("prompt", "completion") if form == "self-instruct" else ("input", "output")
        values["columns"] = {"prompt": names[0], "completion": names[1]}


def _schedule(flags: Flags, values: dict[str, Any], lacking: dict[str, str]) -> None:
    word = flags["lr_scheduler_type"]
    if flags["warmup_steps"] and flags["max_steps"] > 0:
        ratio = flags["warmup_steps"] / flags["max_steps"]
        lacking.pop("warmup_steps", None)
    else:
        ratio = flags["warmup_ratio"]
    values |= {"lr_scheduler_type": word, "warmup_ratio": 0.0 if word == "constant" else ratio}

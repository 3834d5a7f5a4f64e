"""Flags as arguments of our trainer (transformers 5.23 under TRL 1.16), and of transformers' generation."""

import os
from pathlib import Path
from typing import Any

import torch
from transformers import GenerationConfig, PreTrainedTokenizerBase
from transformers.integrations import get_reporting_integration_callbacks

from halfbyte.errors import InputError
from halfbyte.hf.trainers import SFTConfig, distributed
from halfbyte.train.qlora.flags import Flags, To
from halfbyte.train.qlora.inherited import INHERITED
from halfbyte.train.qlora.table import GENERATION, SAMPLING


def trainer_arguments(flags: Flags, output: Path) -> SFTConfig:
    """Return the trainer's arguments.

    Args:
        flags: of the run, settled.
        output: its folder.

    Raises:
        InputError: transformers finds that they do not fit together, or lacks what one of them needs.
    """
    values: dict[str, Any] = {
        flag.fate.name: flags[flag.name]
        for flag in INHERITED
        if isinstance(flag.fate, To) and flags[flag.name] is not None
    }
    values |= {
        "output_dir": str(output),
        "run_name": flags["run_name"],
        "num_train_epochs": flags["num_train_epochs"],
        "max_steps": flags["max_steps"] if flags["max_steps"] > 0 else -1,  # today 0 is a step, in 4.31 it was none
        "warmup_steps": flags["warmup_steps"] or flags["warmup_ratio"],
        "optim": flags["optim"],
        "train_sampling_strategy": "group_by_length" if flags["group_by_length"] else "random",
        "dataloader_pin_memory": flags["dataloader_pin_memory"] and torch.cuda.is_available(),
        "log_level": flags.given.get("log_level", "error"),
        "eval_strategy": flags["evaluation_strategy"] if flags["do_train"] else "no",
        "load_best_model_at_end": flags["load_best_model_at_end"] and flags["do_train"],
        "logging_nan_inf_filter": False,
        "activation_checkpointing": False,  # the layers have been told (hf/layers/activations.py)
        "disable_tqdm": True,  # the listeners show a bar
        "dataset_kwargs": {"skip_prepare_dataset": True},
        "remove_unused_columns": False,
    }
    if distributed.launched() <= 1:
        values.pop("ddp_backend", None)  # of what joins several
    if flags["logging_dir"]:
        os.environ["TENSORBOARD_LOGGING_DIR"] = flags["logging_dir"]
    try:
        for callback in get_reporting_integration_callbacks(flags["report_to"]):
            callback()  # raises where its package is not installed
        return SFTConfig(**values)
    except (ValueError, ImportError, RuntimeError) as error:
        raise InputError(f"These flags do not fit together: {' '.join(str(error).split()).rstrip('.')}.") from error


def generation_settings(flags: Flags, tokenizer: PreTrainedTokenizerBase) -> GenerationConfig:
    """Return how answers are generated.

    The script's own end nowhere before ``max_new_tokens``, since it names no eos token; these do.
    """
    values = {
        flag.fate.name: flags[flag.name]
        for flag in GENERATION
        if isinstance(flag.fate, To)
        and flags[flag.name] is not None
        and (flags["do_sample"] or flag.name not in SAMPLING)
    }
    pad = tokenizer.eos_token_id if tokenizer.pad_token_id is None else tokenizer.pad_token_id
    return GenerationConfig(
        **values, eos_token_id=tokenizer.eos_token_id, bos_token_id=tokenizer.bos_token_id, pad_token_id=pad
    )

"""From the options of a run to its model, its optimizer and its trainer."""

from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedTokenizerBase

from halfbyte import data, hf, optim
from halfbyte.errors import InputError
from halfbyte.hf.layers import activations
from halfbyte.hf.trainers import distributed
from halfbyte.plan.machine import anonymous_memory, free_memory
from halfbyte.runs.config import TrainConfig
from halfbyte.train.adapters import Beginning, parameter_groups
from halfbyte.train.methods import Method

FREE_SHARE = 0.9
"""Of the memory that is free, what a run takes where no budget was given."""


def build_model(config: TrainConfig, beginning: Beginning | None = None) -> Any:
    """Load the base model in 4 bits and put an adapter on it, begun as ``beginning`` says, ready to train.

    Raises:
        InputError: it cannot be loaded, is no causal language model, or has no layers by that name.
    """
    quantization = hf.HalfbyteConfig(
        quant_type=config.quant_type,
        blocksize=config.blocksize,
        double_quant=config.double_quant,
        compute_dtype=config.compute_dtype,
    )
    beginning = beginning or Beginning(config)
    with beginning.loading():
        model = hf.load(config.model, quantization_config=quantization, trust_remote_code=config.trust_remote_code)
    if hasattr(model, "peft_config"):
        raise InputError(f"{config.model} is an adapter; name its base model, and it as the adapter to train on from.")
    if model.config.is_encoder_decoder or not model.can_generate():
        raise InputError(f"{config.model} ({type(model).__name__}) is not a causal language model.")
    return hf.prepare_for_training(beginning.put(model))


def plan_activations(config: TrainConfig, model: Any, longest: int, tokens: int | None = None) -> activations.Policy:
    """Choose which layers' activations are kept, as the memory allows, for rows of at most ``longest`` tokens.

    Of several processes, as the one with the least memory allows: all keep the same. Of a pass that is packed,
    ``tokens`` are the most that it may hold; padded batches, which are evaluated too, have ``batch_size`` rows.

    Raises:
        InputError: nothing fits.
    """
    free = (
        int(FREE_SHARE * free_memory()) // distributed.on_this_machine()
        if config.memory is None
        else config.memory - anonymous_memory()
    )
    [lacking] = distributed.largest([-free])
    recompute = config.gradient_checkpointing
    rows = max(config.batch_size, -(-(tokens or 0) // longest))
    return activations.plan(model, length=longest, batch_size=rows, free=-lacking, recompute=recompute)


def build_trainer(
    config: TrainConfig,
    method: Method,
    model: Any,
    tokenizer: PreTrainedTokenizerBase,
    rows: data.Prepared,
    *,
    begin: bool = True,
    packer: data.Packer | None = None,
) -> Any:
    """Return the method's trainer over ``rows``, which writes its checkpoints to ``config.output``.

    It evaluates, if there is data for that, every ``eval_steps``, and first of all where the run is to ``begin``. A
    ``packer`` packs the samples of each step.
    """
    warm_constant = config.lr_scheduler_type == "constant" and config.warmup_ratio > 0
    common = {
        "output_dir": str(config.output),
        "per_device_train_batch_size": config.batch_size,
        "gradient_accumulation_steps": config.gradient_accumulation_steps,
        "num_train_epochs": config.epochs,
        "max_steps": config.max_steps or -1,
        "learning_rate": config.learning_rate,
        "lr_scheduler_type": "constant_with_warmup" if warm_constant else config.lr_scheduler_type,
        "warmup_steps": config.warmup_ratio,
        "max_grad_norm": config.max_grad_norm,
        "neftune_noise_alpha": config.neftune_noise_alpha,
        "train_sampling_strategy": "group_by_length" if config.group_by_length else "random",
        "activation_checkpointing": False,  # the layers have been told (hf/layers/activations.py)
        "seed": config.seed,
        "save_steps": config.save_steps,
        "per_device_eval_batch_size": config.batch_size,
        "eval_strategy": "steps" if rows.evaluation else "no",
        "eval_steps": config.eval_steps or config.save_steps,
        "eval_on_start": begin and rows.evaluation is not None,
        "logging_steps": 1,
        "logging_nan_inf_filter": False,
        "dataloader_pin_memory": torch.cuda.is_available(),
        "report_to": "none",
        "disable_tqdm": True,
        "log_level": "error",
    }
    return method.trainer(
        model=model,
        args=method.arguments(config, common),
        train_dataset=rows.train.rows,
        eval_dataset=rows.evaluation.rows if rows.evaluation else None,
        data_collator=data.Collator(tokenizer.pad_token_id),
        processing_class=tokenizer,
        optimizers=(build_optimizer(config, model, config.output), None),
        **({"packer": packer} if packer else {}),
    )


def build_optimizer(config: TrainConfig, model: Any, page_dir: Path) -> optim.AdamW:
    """Return the optimizer over the trained parameters; paged state lies in ``page_dir``."""
    return optim.create(
        config.optimizer,
        parameter_groups(config, model),
        lr=config.learning_rate,
        betas=(config.adam_beta1, config.adam_beta2),
        eps=1e-8,
        weight_decay=config.weight_decay,
        page_dir=page_dir,
    )

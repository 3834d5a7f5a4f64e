"""From the options of a run to its model, its optimizer and its trainer."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from transformers import PreTrainedTokenizerBase, Trainer, set_seed

from halfbyte import data, devices, hf, optim, tables
from halfbyte.choices import TRANSFORMERS_OPTIMIZERS
from halfbyte.errors import InputError, size_text
from halfbyte.hf.layers import activations
from halfbyte.hf.models import paging
from halfbyte.hf.models.heads import TASK_TYPES, head_names, modules_within
from halfbyte.hf.trainers import distributed, sharded
from halfbyte.hf.trainers.layer_major import LayerMajor
from halfbyte.memory import anonymous_memory, free_memory
from halfbyte.nn import QuantizedLinear
from halfbyte.plan import calibrate
from halfbyte.plan.estimate import FREE_SHARE, KEPT_CHECKPOINTS, layer_by_layer
from halfbyte.plan.memory import resident_state
from halfbyte.plan.times import pace_of
from halfbyte.runs.config import TrainConfig
from halfbyte.train import loggers, schedules
from halfbyte.train.adapters import Beginning, loraplus_groups
from halfbyte.train.best import metric_arguments
from halfbyte.train.methods import Method
from halfbyte.train.shared_base import shared_base
from halfbyte.train.tasks import build_task_trainer, logits_bytes


def build_model(config: TrainConfig, beginning: Beginning | None = None, classes: Sequence[str] = ()) -> Any:
    """Load the base model in 4 bits and put an adapter on it, begun as ``beginning`` says, ready to train.

    A classifier tells ``classes`` apart.

    Raises:
        InputError: it cannot be loaded, is no model for the task, or has no layers by that name.
    """
    beginning = beginning or Beginning(config)
    if classes:
        set_seed(config.seed)  # of the head's first values
    base = shared_base(config, quantization(config), free_for(config, torch.device("cpu")))
    with beginning.loading():
        model = hf.load(
            base,
            quantization_config=quantization(config),
            trust_remote_code=config.trust_remote_code,
            task=config.task,
            classes=classes or None,
            device="cpu" if config.fsdp else config.device,
        )
    if base != config.model:
        model.name_or_path = model.config._name_or_path = config.model  # what adapters call their base
    if hasattr(model, "peft_config"):
        raise InputError(f"{config.model} is an adapter; name its base model, and it as the adapter to train on from.")
    if config.task == "lm" and (model.config.is_encoder_decoder or not model.can_generate()):
        raise InputError(
            f"{config.model} ({type(model).__name__}) is not a causal language model; set task to "
            f"{'seq2seq or classify' if model.config.is_encoder_decoder else 'classify'}, or name another model."
        )
    heads = head_names(model) if config.task == "classify" else []
    kept = modules_within(model, heads)
    adapted = beginning.put(model, never=kept, modules_to_save=heads, task_type=TASK_TYPES[config.task])
    prepared = hf.prepare_for_training(adapted)
    if config.fsdp:  # at the end: from here on no process can run the model alone
        sharded.shard(prepared, config.fsdp, devices.choose(config.device))
    return prepared


def quantization(config: TrainConfig) -> hf.HalfbyteConfig:
    """Return how the base is held."""
    return hf.HalfbyteConfig(
        quant_type=config.quant_type,
        blocksize=config.blocksize,
        double_quant=config.double_quant,
        compute_dtype=config.compute_dtype,
    )


def plan_activations(
    config: TrainConfig, model: Any, longest: int, tokens: int | None = None, sequences: int = 1
) -> activations.Policy:
    """Choose which layers' activations are kept, as the memory allows, for rows of at most ``longest`` tokens.

    Of several processes, as the one with the least memory allows: all keep the same. Of a pass that is packed,
    ``tokens`` are the most that it may hold; padded batches, which are evaluated too, have ``batch_size`` rows, each of
    so many ``sequences``.

    Raises:
        InputError: nothing fits.
    """
    logits = logits_bytes(config, model, longest)
    free = free_for(config, next(model.parameters()).device)
    gathered = sharded.gathered_bytes(model) if config.fsdp else 0
    [lacking] = distributed.largest([logits + gathered - free])
    recompute = config.gradient_checkpointing
    rows = max(config.rows_a_pass * sequences, -(-(tokens or 0) // longest))
    sharing = distributed.on_this_machine()  # of one copy in the page cache
    base = activations.Base()
    if not config.fsdp:  # a base that is divided is memory of the processes
        sizes = paging.mapped_bytes(model), paging.least_bytes(model), paging.beside_bytes(model)
        base = activations.Base(*(size // sharing for size in sizes))
    passes = config.gradient_accumulation_steps if _goes_together(config) else 1
    state = resident_state([p.numel() for p in model.parameters() if p.requires_grad], config.optimizer)
    parts = (part for layer in activations.recomputable_layers(model) for part in layer.modules())
    weights = sum(part.in_features * part.out_features for part in parts if isinstance(part, QuantizedLinear))
    pace = pace_of(calibrate.known().rates, weights, rows * longest, base.all)
    options: dict[str, Any] = {"recompute": recompute, "base": base, "passes": passes, "state": state, "pace": pace}
    return activations.plan(model, length=longest, batch_size=rows, free=-lacking, **options)


def paging_told(model: Any, seconds: float) -> str | None:
    """Return what paging a base has cost in so many seconds of training, or None if it was not paged."""
    pager = paging.pager_of(model)
    if pager is None:
        return None
    read, waited = pager.traffic.read, pager.traffic.waited
    return (
        f"{size_text(read)} of the base were read while it was used, at {size_text(int(read / max(seconds, 1e-9)))}/s; "
        f"{waited / max(seconds, 1e-9):.1%} of the time was spent waiting for them"
    )


def _goes_together(config: TrainConfig) -> bool:
    return layer_by_layer(config) and distributed.world_size() == 1  # torchrun's processes are not in the options


def page(config: TrainConfig, model: Any, trainer: Any, policy: activations.Policy) -> None:
    """Let a base that does not fit be read as it is used, and micro-batches go through it together, as planned."""
    if policy.paged is None:
        return paging.detach(model)
    paging.attach(model, policy.paged * distributed.on_this_machine())
    if policy.together and policy.draws is not None:
        trainer.layer_major = LayerMajor(model, policy.draws)


def free_for(config: TrainConfig, device: torch.device) -> int:
    """Return the bytes that training may still take: on a GPU of the GPU's memory, or else of the machine's."""
    share = FREE_SHARE if config.memory is None else 1.0
    if device.type == "cuda":
        return int(share * devices.free_on(device, config.memory))
    if config.memory is None:
        return int(share * free_memory()) // distributed.on_this_machine()
    return config.memory - anonymous_memory()


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
    device = next(model.parameters()).device.type
    common = {
        "output_dir": str(config.output),
        "per_device_train_batch_size": config.rows_a_pass,
        "gradient_accumulation_steps": config.gradient_accumulation_steps,
        "num_train_epochs": config.epochs,
        "max_steps": config.max_steps or -1,
        "learning_rate": config.learning_rate,
        "lr_scheduler_type": schedules.name_of(config),
        "lr_scheduler_kwargs": config.lr_scheduler_kwargs,
        "warmup_steps": config.warmup_ratio,
        "max_grad_norm": config.max_grad_norm,
        "neftune_noise_alpha": config.neftune_noise_alpha,
        "train_sampling_strategy": "group_by_length" if config.group_by_length else "random",
        "activation_checkpointing": False,  # the layers have been told (hf/layers/activations.py)
        "seed": config.seed,
        "save_steps": config.save_steps,
        "save_total_limit": (config.keep or KEPT_CHECKPOINTS) + config.keep_best,
        "per_device_eval_batch_size": config.rows_a_pass,
        "eval_strategy": "steps" if rows.evaluation else "no",
        "eval_steps": config.eval_steps or config.save_steps,
        "eval_on_start": begin and rows.evaluation is not None and config.eval_before,
        "logging_steps": 1,
        "logging_nan_inf_filter": False,
        "use_cpu": device == "cpu",
        "dataloader_pin_memory": device == "cuda",
        "disable_tqdm": True,
        "log_level": "error",
    }
    common |= loggers.arguments(config) | metric_arguments(config)
    optimizer = None
    if config.optimizer in TRANSFORMERS_OPTIMIZERS:
        common |= {"optim": config.optimizer, "weight_decay": config.weight_decay}
    else:
        optimizer = build_optimizer(config, model, config.output)
    if config.task != "lm":
        return build_task_trainer(config, common, model, tokenizer, rows, optimizer)
    return method.trainer(
        model=model,
        args=method.arguments(config, common),
        train_dataset=rows.train.rows,
        eval_dataset=_alike_together(rows.evaluation.rows, method) if rows.evaluation else None,
        data_collator=method.collator(config, tokenizer.pad_token_id),
        processing_class=tokenizer,
        optimizers=(optimizer, None),
        **({"packer": packer} if packer else {}),
    )


def _alike_together(rows: Any, method: Method) -> Any:
    """Return ``rows`` with the longest first where the mean over tokens is all that is taken: less is padded then."""
    return rows.select(np.argsort(-tables.lengths(rows), kind="stable")) if method.packs else rows


def _groups(config: TrainConfig, model: Any) -> list[dict[str, Any]]:
    """Return the trained parameters, in two groups where some do not decay: those of norms, and biases."""
    trained = {name: parameter for name, parameter in model.named_parameters() if parameter.requires_grad}
    # a function of the model alone, though it is a method
    decaying = set(Trainer.get_decay_parameter_names(None, model)) if config.weight_decay else set(trained)
    groups = [
        {"params": [p for name, p in trained.items() if name in decaying], "weight_decay": config.weight_decay},
        {"params": [p for name, p in trained.items() if name not in decaying], "weight_decay": 0.0},
    ]
    return [group for group in groups if group["params"]]


def build_optimizer(config: TrainConfig, model: Any, page_dir: Path) -> optim.AdamW:
    """Return the optimizer over the trained parameters; paged state lies in ``page_dir``."""
    return optim.create(
        config.optimizer,
        loraplus_groups(config, model) if config.loraplus_lr_ratio else _groups(config, model),
        lr=config.learning_rate,
        betas=(config.adam_beta1, config.adam_beta2),
        eps=1e-8,
        weight_decay=config.weight_decay,
        page_dir=page_dir,
    )

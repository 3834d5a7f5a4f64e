"""Every argument of TRL's configurations: obeyed as TRL obeys it, refused by name, or none of a trainer's business."""

import dataclasses
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import trl
from torch import Tensor

from halfbyte.errors import InputError
from halfbyte.hf import trainers as ours
from halfbyte.hf.trainers import arguments

CONFIGS = {"sft": trl.SFTConfig, "dpo": trl.DPOConfig, "kto": trl.KTOConfig}
EVALUATED = {"eval_strategy": "steps", "eval_steps": 1, "prediction_loss_only": False}
# Kind of trainer, rows, arguments: each is set as in a run of TRL's own trainer, which must come to the same.
COMPARED: dict[str, tuple[str, str, dict[str, Any]]] = {
    "optimizer": (
        "sft",
        "sft",
        {
            "output_dir": None,
            "learning_rate": 3e-3,
            "adam_beta1": 0.8,
            "adam_beta2": 0.9,
            "adam_epsilon": 1e-3,
            "weight_decay": 0.1,
            "max_grad_norm": 0.5,
            "max_steps": 3,
            "lr_scheduler_type": "cosine_with_min_lr",
            "lr_scheduler_kwargs": {"min_lr": 1e-3},
            "warmup_steps": 1,
            "gradient_accumulation_steps": 2,
            "per_device_train_batch_size": 1,
            "average_tokens_across_devices": False,
            "logging_first_step": True,
            "include_num_input_tokens_seen": "non_padding",
        },
    ),
    "epochs": (
        "sft",
        "sft",
        {
            "num_train_epochs": 2,
            "max_steps": -1,
            "optim": "sgd",
            "logging_strategy": "epoch",
            "dataloader_drop_last": True,
            "dataloader_num_workers": 1,
            "dataloader_prefetch_factor": 1,
            "dataloader_persistent_workers": True,
            "dataloader_in_order": True,
            "dataloader_multiprocessing_context": "fork",
            "remove_unused_columns": False,
            "label_names": ["labels"],
            "neftune_noise_alpha": 5.0,
            "torch_empty_cache_steps": 1,
            "seed": 3,
            "skip_memory_metrics": False,
            "debug": "underflow_overflow",
        },
    ),
    "smoothed, checkpointed": (
        "sft",
        "sft",
        {
            "label_smoothing_factor": 0.2,
            "activation_checkpointing": True,
            "activation_checkpointing_kwargs": {"every_n_layers": 2},
            "full_determinism": True,
            "use_cache": True,
            "accelerator_config": {"split_batches": True},
            "disable_tqdm": False,
            "pad_to_multiple_of": 16,
        },
    ),
    "checkpointed by the old name": (
        "sft",
        "sft",
        {"gradient_checkpointing": True, "gradient_checkpointing_kwargs": {"use_reentrant": True}, "bf16": True},
    ),
    "evaluated": (
        "sft",
        "sft",
        EVALUATED
        | {
            "per_device_eval_batch_size": 2,
            "eval_delay": 1,
            "eval_on_start": True,
            "eval_accumulation_steps": 1,
            "eval_do_concat_batches": False,
            "eval_use_gather_object": True,
            "include_for_metrics": ["inputs", "loss"],
            "logging_steps": 1,
            "lr_scheduler_type": "reduce_lr_on_plateau",
        },
    ),
    "evaluated batch by batch": (
        "sft",
        "sft",
        EVALUATED | {"batch_eval_metrics": True, "lr_scheduler_type": "greedy"},
    ),
    "the best kept": (
        "sft",
        "sft",
        EVALUATED
        | {
            "prediction_loss_only": True,
            "save_strategy": "steps",
            "save_steps": 1,
            "save_total_limit": 2,
            "max_steps": 4,
            "load_best_model_at_end": True,
            "metric_for_best_model": "loss",
            "greater_is_better": True,
        },
    ),
    "packed": (
        "sft",
        "texts",
        {
            "dataset_text_field": "text",
            "packing": True,
            "packing_strategy": "wrapped",
            "eval_packing": False,
            "max_length": 24,
            "shuffle_dataset": True,
            "dataset_num_proc": 1,
            "loss_type": "dft",
        }
        | EVALUATED,
    ),
    "without padding": (
        "sft",
        "sft",
        {
            "padding_free": True,
            "max_length": None,
            "completion_only_loss": False,
            "pad_token": "<|im_start|>",
            "eos_token": "<|im_start|>",
        },
    ),
    "chats": (
        "sft",
        "chats",
        {"assistant_only_loss": True, "truncation_mode": "keep_end", "max_length": 20, "chat_template_path": "jinja"},
    ),
    "dpo": (
        "dpo",
        "dpo",
        {
            "beta": 0.5,
            "loss_type": ["sigmoid", "discopop"],
            "loss_weights": [0.5, 1.0],
            "discopop_tau": 0.1,
            "label_smoothing": 0.1,
            "ld_alpha": 0.5,
            "use_weighting": True,
            "disable_dropout": False,
            "precompute_ref_log_probs": True,
            "precompute_ref_batch_size": 1,
            "f_divergence_type": "reverse_kl",
        },
    ),
    "dpo by another divergence": (
        "dpo",
        "dpo",
        {
            "f_divergence_type": "alpha_divergence",
            "f_alpha_divergence_coef": 0.3,
            "padding_free": True,
            "max_length": None,
        },
    ),
    "kto": ("kto", "kto", {"beta": 0.5, "desirable_weight": 2.0, "undesirable_weight": 0.5, "loss_type": "kto"}),
}

ELSEWHERE = {
    "average_tokens_across_devices": "test_distributed.test_two_processes_train_as_one_with_twice_the_batch",
    "data_seed": "test_the_data_seed_orders_the_rows",
    "dataset_kwargs": "test_trainers.test_loss_and_gradients_are_those_of_the_mean_over_trained_tokens",
    "ddp_backend": "test_the_group_is_made_as_the_arguments_say",
    "ddp_broadcast_buffers": "test_what_the_arguments_say_of_data_parallelism_reaches_it",
    "ddp_bucket_cap_mb": "test_what_the_arguments_say_of_data_parallelism_reaches_it",
    "ddp_find_unused_parameters": "test_what_the_arguments_say_of_data_parallelism_reaches_it",
    "ddp_static_graph": "test_what_the_arguments_say_of_data_parallelism_reaches_it",
    "ddp_timeout": "test_the_group_is_made_as_the_arguments_say",
    "ignore_data_skip": "test_a_resumed_run_may_begin_the_epoch_anew",
    "model_init_kwargs": "test_a_model_s_name_is_opened_as_the_arguments_say",
    "optim_args": "test_optimizers_of_other_names_are_transformers_own",
    "optim_target_modules": "test_optimizers_of_other_names_are_transformers_own",
    "restore_callback_states_from_checkpoint": "test_callbacks_go_on_from_their_states",
    "router_aux_loss_coef": "test_a_router_s_loss_needs_a_router",
    "save_on_each_node": "test_a_checkpoint_may_be_written_on_each_node",
    "save_only_model": "test_a_checkpoint_of_the_model_alone_is_not_resumed",
    "train_sampling_strategy": "test_rows_come_in_their_order_where_that_is_asked_for",
    "trust_remote_code": "test_a_model_s_name_is_opened_as_the_arguments_say",
    "use_cpu": "test_distributed.test_two_processes_train_as_one_with_twice_the_batch",
}
"""Arguments that a test of their own shows to be obeyed."""

HARMLESS = {
    "dataloader_pin_memory": "moves no value",
    "do_eval": "for scripts",
    "do_predict": "for scripts",
    "do_train": "for scripts",
    "fsdp_config": "read with fsdp, which is refused",
    "hub_always_push": "read with push_to_hub, which is refused",
    "hub_model_id": "read with push_to_hub, which is refused",
    "hub_private_repo": "read with push_to_hub, which is refused",
    "hub_revision": "read with push_to_hub, which is refused",
    "hub_strategy": "read with push_to_hub, which is refused",
    "hub_token": "read with push_to_hub, which is refused",
    "liger_kernel_config": "read with use_liger_kernel, which is refused",
    "local_rank": "torchrun's environment tells it",
    "log_level": "of transformers' own lines",
    "log_level_replica": "of transformers' own lines",
    "log_on_each_node": "of transformers' own lines",
    "logging_nan_inf_filter": "a loss that is not finite stops the run",
    "project": "read by reporters",
    "ref_model_mixup_alpha": "read with sync_ref_model, which is refused",
    "ref_model_sync_steps": "read with sync_ref_model, which is refused",
    "report_to": "reporters are transformers' callbacks, which stay",
    "resume_from_checkpoint": "for scripts, which hand it to train()",
    "run_name": "read by reporters",
    "tf32": "a mode of GPUs, set while the configuration is built",
    "torch_compile_backend": "sets torch_compile, which is refused",
    "torch_compile_mode": "sets torch_compile, which is refused",
    "trackio_bucket_id": "read by reporters",
    "trackio_space_id": "read by reporters",
    "trackio_static_space_id": "read by reporters",
}

REFUSED: dict[str, dict[str, Any]] = {
    "activation_offloading": {"activation_offloading": True},
    "auto_find_batch_size": {"auto_find_batch_size": True},
    "bf16_full_eval": {"bf16_full_eval": True},
    "deepspeed": {"deepspeed": "x.json"},
    "enable_jit_checkpoint": {"enable_jit_checkpoint": True},
    "fp16": {"fp16": True},
    "fp16_full_eval": {"fp16_full_eval": True},
    "fsdp": {"fsdp": True},
    "length_column_name": {"length_column_name": "size"},
    "parallelism_config": {"parallelism_config": object()},
    "push_to_hub": {"push_to_hub": True},
    "sync_ref_model": {"sync_ref_model": True},
    "torch_compile": {"torch_compile": True},
    "use_liger_kernel": {"use_liger_kernel": True},
}


def weights(trainer: Any) -> dict[str, Tensor]:
    return {name: p.detach() for name, p in trainer.model.named_parameters() if p.requires_grad}


def measured(prediction: Any, compute_result: bool = True) -> dict[str, float]:
    """What an evaluation is given, as numbers."""

    def numbers(x: Any) -> float:
        if isinstance(x, (list, tuple)):
            return len(x) + sum(map(numbers, x))
        return 0.0 if x is None else float(np.abs(np.asarray(x, dtype=np.float64)).mean())

    found = {"predictions": numbers(prediction.predictions), "labels": numbers(prediction.label_ids)}
    return found | {"inputs": numbers(prediction.inputs), "losses": numbers(prediction.losses)}


def fields() -> set[str]:
    return {field.name for config in CONFIGS.values() for field in dataclasses.fields(config)}


def test_every_argument_is_obeyed_or_refused_or_harmless() -> None:
    compared = {name for _, _, values in COMPARED.values() for name in values}
    elsewhere = set(ELSEWHERE) | {"save_strategy"}
    groups = {"compared": compared - elsewhere, "elsewhere": elsewhere, "harmless": {*HARMLESS}, "refused": {*REFUSED}}
    for name in sorted(fields()):
        assert sum(name in group for group in groups.values()) == 1, name
    assert fields() == set().union(*groups.values())
    assert arguments.REFUSED.keys() | {"activation_offloading", "length_column_name"} == REFUSED.keys()
    sources = {file.stem: file.read_text() for file in Path(__file__).parent.glob("test_*.py")}
    for test in ELSEWHERE.values():
        module, _, function = test.rpartition(".")
        assert f"def {function}(" in sources[module or "test_checkpoints"], test


@pytest.mark.parametrize("name", REFUSED)
@pytest.mark.filterwarnings("ignore::FutureWarning")
def test_an_argument_that_is_not_obeyed_is_refused_by_name(name: str, tmp_path: Path) -> None:
    kind = "dpo" if name == "sync_ref_model" else "sft"
    for config in (getattr(of, f"{kind.upper()}Config") for of in (ours, trl)):
        args = config(output_dir=str(tmp_path), bf16=False, use_cpu=True, activation_checkpointing=False)
        for key, value in REFUSED[name].items():
            setattr(args, key, value)  # some cannot be built with it here
        with pytest.raises(InputError, match=rf"^\w+Config\({name}=.*[;:,] .*\.$"):
            arguments.check(args)


@pytest.mark.parametrize("key", arguments.CHECKPOINTING)
def test_a_way_of_checkpointing_that_does_not_work_is_refused(key: str, tmp_path: Path) -> None:
    args = ours.SFTConfig(
        output_dir=str(tmp_path), activation_checkpointing=True, activation_checkpointing_kwargs={key: True}
    )
    with pytest.raises(InputError, match=f"activation_checkpointing_kwargs={{'{key}'"):
        arguments.check(args)


def test_an_unknown_order_of_the_rows_is_refused(build: Any, tiny_model_folder: Path, tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"'batch_rebalance'.*use one of random, sequential, group_by_length"):
        build("sft", tiny_model_folder, tmp_path, train_sampling_strategy="batch_rebalance")
    with pytest.raises(InputError, match="needs rows with input_ids, and the rows of DPOTrainer have prompt"):
        build("dpo", tiny_model_folder, tmp_path, train_sampling_strategy="group_by_length")


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")
def test_the_loss_of_an_evaluation_is_the_mean_over_tokens(build: Any, tiny_model_folder: Path, tmp_path: Path) -> None:
    """As TRL's own is, where one batch holds all rows; else that is the mean of its batches' means."""

    def loss(which: str, batch_size: int) -> float:
        options = {"eval_strategy": "steps", "per_device_eval_batch_size": batch_size}
        trainer = build("sft", tiny_model_folder, tmp_path / f"{which}{batch_size}", which, "sft", **options)
        found: float = trainer.evaluate()["eval_loss"]
        return found

    whole = loss("theirs", 1000)
    assert loss("ours", 2) == pytest.approx(whole, rel=1e-3)
    assert loss("theirs", 2) != pytest.approx(whole, rel=2e-3)


@pytest.mark.slow
@pytest.mark.parametrize("bundle", COMPARED)
@pytest.mark.filterwarnings("ignore")
def test_arguments_do_what_they_do_in_trl_s_trainers(
    build: Any, bundle: str, tiny_model_folder: Path, tmp_path: Path
) -> None:
    kind, rows, values = COMPARED[bundle]
    values = {name: value for name, value in values.items() if name != "output_dir"}
    if not values.get("prediction_loss_only", True):
        values["compute_metrics"] = measured

    def run(which: str) -> Any:
        trainer = build(kind, tiny_model_folder, tmp_path / which, which, rows, **values)
        trainer.train()
        return trainer

    one, other = run("ours"), run("theirs")
    # the loss of an evaluation is not TRL's: see test_the_loss_of_an_evaluation_is_the_mean_over_tokens
    own = ["eval_loss", "eval_perplexity", "eval_token_accuracy"] if kind == "sft" else []
    ignored = ("runtime", "per_second", "flos", "mem_", "train_tokens", *own)
    logs = [
        [{k: v for k, v in line.items() if not any(part in k for part in ignored)} for line in t.state.log_history]
        for t in (one, other)
    ]
    assert len(logs[0]) == len(logs[1]) > 0
    tolerance = 2e-2 if values.get("bf16") else 1e-3  # autocast rounds TRL's logits, and our head's factors
    for ours_line, theirs_line in zip(*logs, strict=True):
        if abs(theirs_line.get("rewards/margins", 1)) < 1e-5:  # the sign of what is left by rounding
            assert all(0 <= line.pop("rewards/accuracies", 0) <= 1 for line in (ours_line, theirs_line))
        assert ours_line == pytest.approx(theirs_line, rel=tolerance, abs=1e-5)
    for name, tensor in weights(other).items():
        assert (weights(one)[name] - tensor).norm() <= tolerance * tensor.norm(), name
    kept = [sorted(int(path.name.split("-")[1]) for path in (tmp_path / "theirs").glob("checkpoint-*"))]
    kept.append(sorted(int(path.name.split("-")[1]) for path in (tmp_path / "ours/checkpoints").glob("step-*")))
    assert kept[0] == kept[1] and bool(kept[0]) == (bundle == "the best kept")
    if kept[0]:
        assert one.state.best_model_checkpoint == str(tmp_path / f"ours/checkpoints/step-{kept[0][0]:06d}")
        assert one.state.best_global_step == other.state.best_global_step

"""Every argument of TRL's configurations: obeyed as TRL obeys it, refused by name, or none of a trainer's business."""

import dataclasses
import json
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.distributed as dist
import trl
from datasets import Dataset
from peft import LoraConfig, get_peft_model
from safetensors.torch import load_file
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoTokenizer, EarlyStoppingCallback, Trainer

from halfbyte.errors import InputError
from halfbyte.hf import trainers as ours
from halfbyte.hf.trainers import arguments, distributed
from halfbyte.hf.trainers.state import flatten, unflatten
from halfbyte.optim import AdamW

ANSWERS = [" It is so.", " No, never.", " Perhaps on Sunday, if it rains.", " Yes."]
ROWS = {
    "sft": [{"prompt": f"{'Really ' * (i % 3)}{i}?", "completion": ANSWERS[i % 4]} for i in range(7)],
    "dpo": [{"prompt": f"{i}?", "chosen": ANSWERS[i % 4], "rejected": ANSWERS[(i + 1) % 4]} for i in range(6)],
    "kto": [{"prompt": f"{i}?", "completion": ANSWERS[i % 4], "label": i % 2 == 0} for i in range(6)],
    "texts": [{"text": f"{'Really ' * (i % 3)}{i}? {ANSWERS[i % 4]}"} for i in range(7)],
    "chats": [
        {"messages": [{"role": "user", "content": f"{i}?"}, {"role": "assistant", "content": ANSWERS[i % 4]}]}
        for i in range(7)
    ],
}
CONFIGS = {"sft": trl.SFTConfig, "dpo": trl.DPOConfig, "kto": trl.KTOConfig}
OURS = {
    "sft": (ours.SFTTrainer, ours.SFTConfig),
    "dpo": (ours.DPOTrainer, ours.DPOConfig),
    "kto": (ours.KTOTrainer, ours.KTOConfig),
}
THEIRS = {"sft": (trl.SFTTrainer, trl.SFTConfig), "dpo": (trl.DPOTrainer, trl.DPOConfig)}
THEIRS |= {"kto": (trl.KTOTrainer, trl.KTOConfig)}

EVALUATED = {"eval_strategy": "steps", "eval_steps": 1, "prediction_loss_only": False}
GENERATION = (
    "{% for message in messages %}{{ message.role }}\n"
    "{% if message.role == 'assistant' %}{% generation %}{{ message.content }}{% endgeneration %}"
    "{% else %}{{ message.content }}{% endif %}\n{% endfor %}"
)
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


def build(kind: str, folder: Path, output: Path, which: Any = OURS, rows: str = "", **more: Any) -> Any:
    """A trainer of ours, or of TRL's, over the tiny model in fp32 with an adapter that does something."""
    trainer, config = which[kind]
    extra = {name: more.pop(name) for name in ("compute_metrics", "callbacks", "train_dataset") if name in more}
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    torch.manual_seed(0)
    lora = LoraConfig(r=4, target_modules="all-linear", task_type="CAUSAL_LM", init_lora_weights=False)
    if more.get("chat_template_path"):
        file = output.with_suffix(".jinja")
        file.write_text(GENERATION)
        more["chat_template_path"] = str(file)
    arguments = {
        "max_steps": 2,
        "per_device_train_batch_size": 2,
        "learning_rate": 1e-2,
        "logging_steps": 1,
        "save_strategy": "no",
        "train_sampling_strategy": "sequential",
        "report_to": "none",
        "disable_tqdm": True,
        "dataloader_pin_memory": False,
        "bf16": False,
        "use_cpu": True,
    } | more
    if not any("checkpointing" in name for name in more):
        arguments["activation_checkpointing"] = False
    data = Dataset.from_list(ROWS[rows or kind])
    return trainer(
        model=get_peft_model(model, lora),
        args=config(**arguments | {"output_dir": str(output)}),
        **{"train_dataset": data} | extra,
        eval_dataset=data.select(range(3)),
        processing_class=AutoTokenizer.from_pretrained(folder),
    )


def weights(trainer: Any) -> dict[str, Tensor]:
    return {name: p.detach() for name, p in trainer.model.named_parameters() if p.requires_grad}


def weights_of(trainer: Any) -> list[Tensor]:
    return [p for p in trainer.model.parameters() if p.requires_grad]


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
        assert f"def {function}(" in sources[module or "test_arguments"], test


@pytest.mark.parametrize("name", REFUSED)
@pytest.mark.filterwarnings("ignore::FutureWarning")
def test_an_argument_that_is_not_obeyed_is_refused_by_name(name: str, tmp_path: Path) -> None:
    kind = "dpo" if name == "sync_ref_model" else "sft"
    for _, config in (OURS[kind], THEIRS[kind]):
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


def test_an_unknown_order_of_the_rows_is_refused(tiny_model_folder: Path, tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"'batch_rebalance'.*use one of random, sequential, group_by_length"):
        build("sft", tiny_model_folder, tmp_path, train_sampling_strategy="batch_rebalance")
    with pytest.raises(InputError, match="needs rows with input_ids, and the rows of DPOTrainer have prompt"):
        build("dpo", tiny_model_folder, tmp_path, train_sampling_strategy="group_by_length")


@pytest.mark.slow
@pytest.mark.parametrize("bundle", COMPARED)
@pytest.mark.filterwarnings("ignore")
def test_arguments_do_what_they_do_in_trl_s_trainers(bundle: str, tiny_model_folder: Path, tmp_path: Path) -> None:
    kind, rows, values = COMPARED[bundle]
    values = {name: value for name, value in values.items() if name != "output_dir"}
    if not values.get("prediction_loss_only", True):
        values["compute_metrics"] = measured

    def run(which: Any, name: str) -> Any:
        trainer = build(kind, tiny_model_folder, tmp_path / name, which, rows, **values)
        trainer.train()
        return trainer

    one, other = run(OURS, "ours"), run(THEIRS, "theirs")
    ignored = ("runtime", "per_second", "flos", "mem_", "train_tokens")
    logs = [
        [{k: v for k, v in line.items() if not any(part in k for part in ignored)} for line in t.state.log_history]
        for t in (one, other)
    ]
    assert len(logs[0]) == len(logs[1]) > 0
    tolerance = 2e-2 if values.get("bf16") else 1e-3  # autocast rounds TRL's logits, and our head's factors
    for ours_line, theirs_line in zip(*logs, strict=True):
        assert ours_line == pytest.approx(theirs_line, rel=tolerance, abs=1e-5)
    for name, tensor in weights(other).items():
        assert (weights(one)[name] - tensor).norm() <= tolerance * tensor.norm(), name
    kept = [sorted(int(path.name.split("-")[1]) for path in (tmp_path / "theirs").glob("checkpoint-*"))]
    kept.append(sorted(int(path.name.split("-")[1]) for path in (tmp_path / "ours/checkpoints").glob("step-*")))
    assert kept[0] == kept[1] and bool(kept[0]) == (bundle == "the best kept")
    if kept[0]:
        assert one.state.best_model_checkpoint == str(tmp_path / f"ours/checkpoints/step-{kept[0][0]:06d}")
        assert one.state.best_global_step == other.state.best_global_step


FIRST_IS_BEST = EVALUATED | {
    "prediction_loss_only": True,
    "load_best_model_at_end": True,
    "metric_for_best_model": "loss",
    "greater_is_better": True,  # while it falls
}
SAVING = {"save_strategy": "steps", "save_steps": 1, "max_steps": 4}


def steps(output: Path) -> list[int]:
    return sorted(int(path.name.removeprefix("step-")) for path in (output / "checkpoints").iterdir())


def test_two_checkpoints_are_kept_unless_the_script_says_otherwise(tiny_model_folder: Path, tmp_path: Path) -> None:
    for limit, kept in {"default": [3, 4], 1: [4], 3: [2, 3, 4], None: [1, 2, 3, 4]}.items():
        more = {} if limit == "default" else {"save_total_limit": limit}
        build("sft", tiny_model_folder, tmp_path / str(limit), **SAVING, **more).train()
        assert steps(tmp_path / str(limit)) == kept


def test_the_best_model_is_in_the_trainer_at_the_end(tiny_model_folder: Path, tmp_path: Path) -> None:
    for limit, kept in {1: [1], 2: [1, 4]}.items():
        output = tmp_path / str(limit)
        trainer = build("sft", tiny_model_folder, output, **SAVING, **FIRST_IS_BEST | {"save_total_limit": limit})
        trainer.train()
        losses = [line["eval_loss"] for line in trainer.state.log_history if "eval_loss" in line]
        assert losses == sorted(losses, reverse=True) and losses[0] > losses[-1] + 0.1
        assert trainer.evaluate()["eval_loss"] == pytest.approx(losses[0], rel=1e-5)
        assert trainer.state.best_model_checkpoint == str(output / "checkpoints/step-000001")
        assert steps(output) == kept


@pytest.mark.parametrize("strategy", ["no", "epoch", "best"])
def test_checkpoints_are_saved_when_the_strategy_says(strategy: str, tiny_model_folder: Path, tmp_path: Path) -> None:
    more = EVALUATED | {"prediction_loss_only": True, "metric_for_best_model": "loss"}
    trainer = build("sft", tiny_model_folder, tmp_path, **SAVING | {"save_strategy": strategy}, **more)
    trainer.train()
    losses = [line["eval_loss"] for line in trainer.state.log_history if "eval_loss" in line]
    best = [i + 1 for i, loss in enumerate(losses) if loss < min(losses[:i], default=np.inf)]
    expected = {"no": [], "epoch": [4], "best": best[-2:]}[strategy]
    assert (steps(tmp_path) if strategy != "no" else [*tmp_path.rglob("step-*")]) == expected


def test_true_goes_on_from_the_newest_checkpoint_and_says_where_there_is_none(
    tiny_model_folder: Path, tmp_path: Path
) -> None:
    whole = build("sft", tiny_model_folder, tmp_path / "whole")
    whole.train()
    output = tmp_path / "run"
    with pytest.raises(InputError, match=r"run holds no checkpoint to go on from \(checkpoints/step-\.\.\.\)"):
        build("sft", tiny_model_folder, output).train(resume_from_checkpoint=True)
    for folder, words in {"nowhere": "holds no adapter_model", ".": "holds no adapter_model"}.items():
        with pytest.raises(InputError, match=words):
            build("sft", tiny_model_folder, output).train(resume_from_checkpoint=str(tmp_path / folder))

    constant = {"lr_scheduler_type": "constant"}
    build("sft", tiny_model_folder, output, **SAVING | {"max_steps": 2}, **constant).train()
    resumed = build("sft", tiny_model_folder, output, max_steps=4, **constant)
    resumed.train(resume_from_checkpoint=True)
    whole = build("sft", tiny_model_folder, tmp_path / "whole", max_steps=4, **constant)
    whole.train()
    assert all(torch.equal(weights(resumed)[name], tensor) for name, tensor in weights(whole).items())


def test_a_checkpoint_of_the_model_alone_is_not_resumed(tiny_model_folder: Path, tmp_path: Path) -> None:
    build("sft", tiny_model_folder, tmp_path, **SAVING, save_only_model=True).train()
    names = {path.name for path in (tmp_path / "checkpoints/step-000004").iterdir()}
    assert {"adapter_model.safetensors", "trainer_state.json"} <= names and not {"state.json"} & names
    with pytest.raises(InputError, match=r"step-000004 holds no state of halfbyte's trainers.*save_only_model=True"):
        build("sft", tiny_model_folder, tmp_path, max_steps=6).train(resume_from_checkpoint=True)


def test_callbacks_go_on_from_their_states(tiny_model_folder: Path, tmp_path: Path) -> None:
    more = SAVING | FIRST_IS_BEST | {"restore_callback_states_from_checkpoint": True}

    def run(patience: int, most: int, resume: bool) -> Any:
        callbacks = [EarlyStoppingCallback(early_stopping_patience=patience)]
        trainer = build("sft", tiny_model_folder, tmp_path, callbacks=callbacks, **more | {"max_steps": most})
        trainer.train(resume_from_checkpoint=resume)
        return trainer

    run(3, 3, False)  # two evaluations in a row were worse
    stopped = run(3, 9, True)
    assert stopped.state.global_step == 4


def test_a_resumed_run_may_begin_the_epoch_anew(tiny_model_folder: Path, tmp_path: Path) -> None:
    build("sft", tiny_model_folder, tmp_path, **SAVING | {"max_steps": 1}).train()
    seen: list[list[int]] = []
    trainer = build("sft", tiny_model_folder, tmp_path, max_steps=2, ignore_data_skip=True)
    collate = trainer.data_collator
    trainer.data_collator = lambda rows: seen.append([len(row["input_ids"]) for row in rows]) or collate(rows)
    trainer.train(resume_from_checkpoint=True)
    assert seen[0] == [len(row["input_ids"]) for row in trainer.train_dataset.select(range(2))]


def test_rows_come_in_their_order_where_that_is_asked_for(tiny_model_folder: Path, tmp_path: Path) -> None:
    trainer = build("kto", tiny_model_folder, tmp_path)  # whose KL term pairs neighbours
    assert list(trainer._get_train_sampler()) == list(range(6))
    assert list(build("sft", tiny_model_folder, tmp_path, train_sampling_strategy="random")._get_train_sampler()) != [
        *range(7)
    ]
    stream = Dataset.from_list(ROWS["sft"]).to_iterable_dataset()
    streamed = build("sft", tiny_model_folder, tmp_path, train_dataset=stream, **SAVING)
    streamed.train()
    assert json.loads((tmp_path / "checkpoints/step-000004/state.json").read_text())["data"] is None


def test_the_data_seed_orders_the_rows(tiny_model_folder: Path, tmp_path: Path) -> None:
    def order(**more: Any) -> list[int]:
        trainer = build("sft", tiny_model_folder, tmp_path, train_sampling_strategy="random", **more)
        return list(trainer._get_train_sampler())

    assert order(data_seed=5, seed=1) == order(data_seed=5, seed=2) == order(seed=5) != order(data_seed=6)


def test_a_checkpoint_may_be_written_on_each_node(
    tiny_model_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    trainer = build("sft", tiny_model_folder, tmp_path, **SAVING | {"max_steps": 1})
    writes: list[Any] = []
    first = distributed.first_writes
    monkeypatch.setattr(distributed, "first_writes", lambda choice: writes.append(choice) or first(choice))
    monkeypatch.setattr(type(trainer.args), "process_index", 2)  # the first of the second machine
    trainer.args.save_on_each_node = True
    trainer.train()
    assert writes == [True] and steps(tmp_path) == [1]
    trainer.args.save_on_each_node = False
    trainer.save_model(str(tmp_path / "elsewhere"))
    assert writes == [True, False] and not (tmp_path / "elsewhere").exists()


def test_what_the_arguments_say_of_data_parallelism_reaches_it(tiny_model_folder: Path, tmp_path: Path) -> None:
    default = build("sft", tiny_model_folder, tmp_path).accelerator.ddp_handler
    assert (default.find_unused_parameters, default.broadcast_buffers) == (False, False)
    names = ("find_unused_parameters", "broadcast_buffers", "static_graph", "bucket_cap_mb")
    said = {f"ddp_{name}": 7 if name == "bucket_cap_mb" else True for name in names}
    handler = build("sft", tiny_model_folder, tmp_path, **said).accelerator.ddp_handler
    assert {f"ddp_{name}": getattr(handler, name) for name in names} == said


def test_the_group_is_made_as_the_arguments_say(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    class Made(Exception):
        pass

    def make(backend: str, timeout: Any) -> None:
        raise Made(backend, timeout.total_seconds())

    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setattr(dist, "init_process_group", make)
    with pytest.raises(Made) as made:
        ours.SFTConfig(output_dir=str(tmp_path), ddp_timeout=77, ddp_backend="mpi")
    assert made.value.args == ("mpi", 77)


@pytest.mark.parametrize(
    ("name", "bits", "paged"),
    [
        ("adamw_8bit", 8, False),
        ("adamw_bnb_8bit", 8, False),
        ("paged_adamw_8bit", 8, True),
        ("paged_adamw_32bit", 32, True),
    ],
)
def test_bitsandbytes_optimizers_are_ours_and_saved(
    name: str, bits: int, paged: bool, tiny_model_folder: Path, tmp_path: Path
) -> None:
    trainer = build("sft", tiny_model_folder, tmp_path, optim=name, adam_beta1=0.8, **SAVING | {"max_steps": 1})
    trainer.train()
    optimizer = trainer.optimizer.optimizer
    assert type(optimizer) is AdamW and optimizer.defaults["betas"][0] == 0.8
    assert (optimizer.state_bits, optimizer.page_dir is not None) == (bits, paged)
    resumed = build("sft", tiny_model_folder, tmp_path, optim=name, max_steps=2)
    resumed.train(resume_from_checkpoint=True)
    with pytest.raises(InputError, match=f"optim='{name}' takes no optim_args"):
        build("sft", tiny_model_folder, tmp_path, optim=name, optim_args="x=1").train()


@pytest.mark.parametrize("name", ["lion_8bit", "ademamix_8bit", "adafactor", "rmsprop", "adamw_torch_fused"])
def test_the_state_of_any_optimizer_is_resumed_bit_for_bit(name: str, tiny_model_folder: Path, tmp_path: Path) -> None:
    more = {"optim": name, "lr_scheduler_type": "constant", "learning_rate": 1e-3}
    whole = build("sft", tiny_model_folder, tmp_path / "whole", max_steps=4, **more)
    whole.train()
    build("sft", tiny_model_folder, tmp_path, **SAVING | {"max_steps": 2}, **more).train()
    resumed = build("sft", tiny_model_folder, tmp_path, max_steps=4, **more)
    resumed.train(resume_from_checkpoint=True)
    assert all(torch.equal(weights(resumed)[key], tensor) for key, tensor in weights(whole).items())


@pytest.mark.parametrize("bits", [8, 32])
@pytest.mark.filterwarnings("ignore::FutureWarning")
def test_trl_s_own_trainer_saves_and_resumes_our_optimizer(bits: int, tiny_model_folder: Path, tmp_path: Path) -> None:
    def run(name: str, steps: int, **more: Any) -> Any:
        trainer = build("sft", tiny_model_folder, tmp_path / name, THEIRS, max_steps=steps, **constant)
        trainer.optimizer = AdamW(weights_of(trainer), lr=1e-2, state_bits=bits, paged=True)
        trainer.train(**more)
        return trainer

    constant = {"lr_scheduler_type": "constant", "save_strategy": "steps", "save_steps": 2}
    run("one", 2)
    resumed, whole = run("one", 4, resume_from_checkpoint=str(tmp_path / "one/checkpoint-2")), run("whole", 4)
    assert all(torch.equal(weights(resumed)[key], tensor) for key, tensor in weights(whole).items())


def test_optimizers_of_other_names_are_transformers_own(tmp_path: Path) -> None:
    for name, more in {"adamw_torch": {}, "sgd": {}, "ademamix": {"optim_args": "beta3=0.5,alpha=2"}}.items():
        args = ours.SFTConfig(output_dir=str(tmp_path), optim=name, optim_target_modules=["q_proj"], **more)
        expected = Trainer.get_optimizer_cls_and_kwargs(args, None)
        assert ours.SFTTrainer.get_optimizer_cls_and_kwargs(args, None) == expected


def test_a_state_of_any_shape_survives_its_files() -> None:
    x, y = torch.arange(3), torch.ones(2, 2).t()
    tree = {"state": {0: {"step": 3, "nested": {"a": x}}, 12: {"list": [y, None, 1.5]}}, "param_groups": [{"lr": 0.1}]}
    tensors, rest = flatten(tree)
    assert {name: tensor.tolist() for name, tensor in tensors.items()} == {
        "state.0.nested.a": x.tolist(),
        "state.12.list.0": y.tolist(),
    }
    again = unflatten(tensors, json.loads(json.dumps(rest)))
    assert again["state"].keys() == {0, 12} and again["state"][12]["list"][1:] == [None, 1.5]
    assert torch.equal(again["state"][0]["nested"]["a"], x)


def test_a_model_s_name_is_opened_as_the_arguments_say(
    tiny_model_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: dict[str, Any] = {}
    open_: Callable[..., Any] = trl.trainer.sft_trainer.create_model_from_path
    monkeypatch.setattr(
        trl.trainer.sft_trainer, "create_model_from_path", lambda path, **kw: seen.update(kw) or open_(path, **kw)
    )
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        ours.SFTTrainer(
            model=str(tiny_model_folder),
            args=ours.SFTConfig(
                output_dir=str(tmp_path), model_init_kwargs={"dtype": "float32"}, trust_remote_code=True
            ),
            train_dataset=Dataset.from_list(ROWS["sft"]),
            processing_class=AutoTokenizer.from_pretrained(tiny_model_folder),
            peft_config=LoraConfig(r=4, target_modules="all-linear", task_type="CAUSAL_LM"),
        )
    assert seen["trust_remote_code"] is True and "float32" in str(seen["dtype"])


def test_a_router_s_loss_needs_a_router(tiny_model_folder: Path, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="not a Mixture-of-Experts"):
        build("sft", tiny_model_folder, tmp_path, router_aux_loss_coef=0.1)


def test_what_would_be_trained_and_not_saved_is_refused(tiny_model_folder: Path, tmp_path: Path) -> None:
    trainer = build("sft", tiny_model_folder, tmp_path)
    trainer.model.get_base_model().model.norm.weight.requires_grad_(True)
    with pytest.raises(InputError, match=r"model\.norm\.weight would be trained, but not saved with the adapter"):
        trainer.train()
    with pytest.raises(
        InputError, match="SFTTrainer trains adapters, and LlamaForCausalLM has none: hand it peft_config"
    ):
        ours.SFTTrainer(
            model=AutoModelForCausalLM.from_pretrained(tiny_model_folder),
            args=ours.SFTConfig(output_dir=str(tmp_path)),
            train_dataset=Dataset.from_list(ROWS["sft"]),
            processing_class=AutoTokenizer.from_pretrained(tiny_model_folder),
        )


def test_checkpoints_are_free_of_pickle(tiny_model_folder: Path, tmp_path: Path) -> None:
    build("sft", tiny_model_folder, tmp_path, **SAVING | {"max_steps": 1}).train()
    assert {path.suffix for path in tmp_path.rglob("*") if path.is_file()} <= {".json", ".safetensors", ".jinja"}
    assert load_file(tmp_path / "checkpoints/step-000001/state.safetensors")

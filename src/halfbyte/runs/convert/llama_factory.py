"""LLaMA-Factory's keys (2026-08-18, ``src/llamafactory/hparams``, and those of its version 1) as options of ours.

Names of data sets are looked up in ``dataset_info.json`` of ``dataset_dir``, from the working directory and beside the
configuration. Left out: stages and methods that train no LoRA adapter, which are refused.
"""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from halfbyte.errors import InputError
from halfbyte.runs.convert.axolotl import LOGGED, OPTIMIZERS, OWN_MEMORY, SPEED, schedule
from halfbyte.runs.convert.keys import Converted, Drop, Lack, To, Tool, bare_figure, number

STAGES = {"sft": "sft", "pt": "text", "dpo": "dpo", "kto": "kto"}
LOSSES = {"orpo": "orpo"}
"""Values of ``pref_loss`` that are methods here."""

_PATHS = Drop("it is about how LLaMA-Factory works")
COMMON: dict[str, To | Drop | Lack] = {
    "output_dir": To("output"),
    "cutoff_len": To("max_length"),
    "learning_rate": To("learning_rate", number),
    "num_train_epochs": To("epochs", number),
    "gradient_accumulation_steps": To("gradient_accumulation_steps"),
    "weight_decay": To("weight_decay", number),
    "adam_beta1": To("adam_beta1", number),
    "adam_beta2": To("adam_beta2", number),
    "max_grad_norm": To("max_grad_norm", number),
    "seed": To("seed"),
    "trust_remote_code": To("trust_remote_code", bool),
}
KEYS: dict[str, To | Drop | Lack] = COMMON | {
    "model_name_or_path": To("model"),
    "double_quantization": To("double_quant"),
    "lora_rank": To("rank"),
    "lora_dropout": To("lora_dropout", number),
    "lora_target": To("target_modules", lambda names: "all-linear" if names == "all" else _list(names)),
    "additional_target": To("modules_to_save", lambda names: _list(names)),
    "use_rslora": To("use_rslora"),
    "use_dora": To("use_dora"),
    "loraplus_lr_ratio": To("loraplus_lr_ratio", number),
    "pissa_init": To("init_lora_weights", lambda wanted: "pissa" if wanted else None),
    "neftune_noise_alpha": To("neftune_noise_alpha", number),
    "per_device_train_batch_size": To("batch_size"),
    "max_steps": To("max_steps", lambda steps: steps if steps > 0 else None),
    "optim": To("optimizer", lambda word: OPTIMIZERS.get(word, word)),
    "group_by_length": To("group_by_length"),
    "save_steps": To("save_steps"),
    "eval_steps": To("eval_steps"),
    "early_stopping_steps": To("early_stopping_patience"),
    "load_best_model_at_end": To("keep_best"),
    "metric_for_best_model": To("metric_for_best", bare_figure),
    "pref_beta": To("beta", number),
    "kto_chosen_weight": To("desirable_weight", number),
    "kto_rejected_weight": To("undesirable_weight", number),
    "mask_history": To("train_on", lambda wanted: "last" if wanted else None),
    "lr_scheduler_kwargs": To("lr_scheduler_kwargs"),
    "template": Drop("the model's own chat template is taken"),
    "enable_thinking": Lack("write thinking: on or off"),
    "adapter_name_or_path": To("adapter"),
    "add_tokens": To("new_tokens", lambda names: _list(names)),
    "resize_vocab": Drop("embeddings grow with new_tokens"),
    "train_on_prompt": Lack("format: text trains whole texts"),
    "packing": Drop("a step has batch_size rows, laid side by side where that pays; nothing joins them before"),
    "neat_packing": Drop("a step has batch_size rows, laid side by side where that pays; nothing joins them before"),
    "eval_strategy": Drop("rows are evaluated every eval_steps where there are any"),
    "save_strategy": Lack("checkpoints come every save_steps"),
    "save_total_limit": To("keep"),
    "per_device_eval_batch_size": Lack("batch_size serves for both"),
    "resume_from_checkpoint": Lack("halfbyte train --resume goes on with a run"),
    "overwrite_output_dir": Drop("halfbyte train --overwrite replaces a run"),
    "do_train": Drop("a run trains"),
    "do_eval": Drop("rows are evaluated where there are any"),
    "upcast_layernorm": Drop(OWN_MEMORY),
    "disable_gradient_checkpointing": Drop(OWN_MEMORY),
    "gradient_checkpointing": Drop(OWN_MEMORY),
    **dict.fromkeys(("logging_steps", "report_to", "plot_loss", "run_name", "logging_dir"), Drop(LOGGED)),
    **dict.fromkeys(
        ("flash_attn", "deepspeed", "fsdp", "fsdp_config", "use_unsloth", "enable_liger_kernel", "use_cpu",
         "dataloader_num_workers", "preprocessing_num_workers", "preprocessing_batch_size", "ddp_timeout",
         "use_v1_kernels", "low_cpu_mem_usage", "device_map"),
        Drop(SPEED),
    ),
    **dict.fromkeys(("overwrite_cache", "save_only_model", "tokenized_path", "cache_dir", "media_dir"), _PATHS),
}  # fmt: skip
DEFAULTS: dict[str, Any] = {
    "cutoff_len": 2048, "lora_rank": 8, "lora_dropout": 0.0, "lora_target": "all", "stage": "sft",
    "finetuning_type": "lora", "per_device_train_batch_size": 8, "gradient_accumulation_steps": 1,
    "learning_rate": 5e-5, "num_train_epochs": 3.0, "lr_scheduler_type": "linear", "optim": "adamw_torch",
    "max_grad_norm": 1.0, "seed": 42, "group_by_length": False, "save_steps": 500,
}  # fmt: skip
"""Its own, and transformers' where it leaves them."""
TOGETHER = frozenset({
    "stage", "finetuning_type", "quantization_bit", "quantization_method", "quantization_type", "lora_alpha", "dataset",
    "eval_dataset", "dataset_dir", "val_size", "bf16", "pure_bf16", "fp16", "lr_scheduler_type", "warmup_ratio",
    "warmup_steps", "pref_loss", "max_samples",
})  # fmt: skip


def _finish(given: dict[str, Any], made: Converted) -> None:
    name = made.source.name
    if given["finetuning_type"] != "lora":
        raise InputError(f"{name} has finetuning_type: {given['finetuning_type']}; halfbyte trains LoRA adapters.")
    method = LOSSES.get(given.get("pref_loss", ""), STAGES.get(given["stage"]))
    if method is None or not made.set("method", method, "stage", given["stage"]):
        raise InputError(f"{name} has stage: {given['stage']}, and this halfbyte has no such method.")
    if given.get("pref_loss") and method == "dpo":
        made.set("loss_type", given["pref_loss"], "pref_loss", given["pref_loss"])
    _base(given.get("quantization_bit"), given, made)
    made.set("lora_alpha", given.get("lora_alpha") or 2 * given["lora_rank"], "lora_alpha", given.get("lora_alpha"))
    folder = Path(str(given.get("dataset_dir", "data")))
    if not given.get("dataset"):
        raise InputError(f"{name} names no dataset.")
    made.values["data"] = _sources(given["dataset"], folder, "dataset", made)
    if most := given.get("max_samples"):
        made.values["data"] = _shortened(made.values["data"], most)
    share = given.get("val_size") or 0
    if given.get("eval_dataset"):
        made.values["eval_data"] = _sources(given["eval_dataset"], folder, "eval_dataset", made)
        if most:
            made.values["eval_data"] = _shortened(made.values["eval_data"], most)
    elif 0 < share < 1:
        made.set("eval_share", share, "val_size", share)
    elif share:
        made.lacking["val_size"] = (share, "write eval_share, the share of the rows that are held out")
    word = "bfloat16" if given.get("bf16") or given.get("pure_bf16") else "float16" if given.get("fp16") else "float32"
    made.set("compute_dtype", word, "bf16", given.get("bf16"))
    schedule(given, made, "lr_scheduler_type")


def _base(bits: Any, given: Mapping[str, Any], made: Converted) -> None:
    word = {4: given.get("quantization_type", "nf4"), 8: "int8", None: "none"}.get(bits)
    key = "quantization_bit" if bits else "finetuning_type"
    if word is None:
        made.lacking[key] = (bits, "the base is held in 4 bits")
    elif not made.set("quant_type", word, key, given[key]):
        made.notes.append(f"The base is held in 4 bits: this halfbyte has no {word} base.")
    if given.get("quantization_method", "bnb") not in ("bnb", "bitsandbytes"):
        made.lacking["quantization_method"] = (given["quantization_method"], "the base is quantized to nf4")


def _list(names: Any) -> list[str]:
    words = names.split(",") if isinstance(names, str) else names
    return [str(word).strip() for word in words if str(word).strip()]


def _sources(names: Any, folder: Path, key: str, made: Converted) -> Any:
    about = _dataset_info(folder, made.source)
    found: list[Any] = []
    for name in _list(names):
        entry = about.get(name)
        if entry is None:
            found.append(str(folder / f"{name}.json"))
            made.lacking[f"{key}: {name}"] = (
                found[-1], f"there is no {folder}/dataset_info.json that says where it lies; put the file's path"
            )  # fmt: skip
            continue
        found.append(_source(name, entry, folder, key, made))
    return found[0] if len(found) == 1 else found


def _shortened(sources: Any, most: Any) -> Any:
    """Return sources of which the first ``most`` rows are read, each."""
    if isinstance(sources, list):
        return [_shortened(source, most) for source in sources]
    return (sources if isinstance(sources, dict) else {"path": sources}) | {"max_rows": int(most)}


def _source(name: str, entry: Mapping[str, Any], folder: Path, key: str, made: Converted) -> Any:
    source: dict[str, Any] = {"path": entry.get("hf_hub_url") or str(folder / str(entry.get("file_name", name)))}
    if entry.get("subset"):
        source["config"] = entry["subset"]
    if entry.get("split"):
        source["split"] = entry["split"]
    shape = {"alpaca": "alpaca", "sharegpt": "messages"}.get(entry.get("formatting", "alpaca"))
    named = entry.get("columns", {})
    columns = {"prompt": named.get("prompt"), "completion": named.get("response")}
    if entry.get("ranking"):
        source["format"] = "preference"
    elif shape == "alpaca" and all(columns.values()) and "query" not in named:
        source["columns"] = columns
    elif shape and not named.get("kto_tag"):
        source["format"] = shape
    for other in ("images", "videos", "audios"):
        if named.get(other):
            made.lacking[f"{key}: {name}.{other}"] = (named[other], "text alone is trained")
    return source["path"] if source.keys() == {"path"} else source


def _dataset_info(folder: Path, source: Path) -> Mapping[str, Any]:
    for start in (Path(), source.parent):
        file = start / folder / "dataset_info.json"
        if file.is_file():
            try:
                found = json.loads(file.read_text(encoding="utf-8"))
            except ValueError as error:
                raise InputError(f"{file} is not JSON ({error}).") from None
            if isinstance(found, dict):
                return found
    return {}


TOOL = Tool(
    name="LLaMA-Factory",
    marks=(frozenset({"model_name_or_path", "stage"}), frozenset({"model_name_or_path", "finetuning_type"})),
    defaults=DEFAULTS,
    keys=KEYS,
    finish=_finish,
    together=TOGETHER,
    families={"kt_": SPEED, "freeze_": "text alone is trained", "image_": "text alone is trained"},
)

KEYS_1: dict[str, To | Drop | Lack] = COMMON | {
    "model": To("model"),
    "micro_batch_size": To("batch_size"),
    "max_steps": To("max_steps"),
    "save_steps": To("save_steps"),
    "bf16": Drop("it computes in bf16"),
    "model_class": Drop("classes are those that the model's configuration names"),
    "template": Drop("the model's own chat template is taken"),
    "sample_backend": Drop(_PATHS.reason),
    "max_new_tokens": Drop("it is of predicting; samples while training have a max_new_tokens of their own"),
    "global_batch_size": Lack("write gradient_accumulation_steps"),
    "batching_strategy": Drop("a step has batch_size rows, laid side by side where that pays"),
    "logging_steps": Drop(LOGGED),
    "dist_config": Drop(SPEED),
    "kernel_config": Drop(SPEED),
    "init_config": Drop(SPEED),
    "optim_config": Lack("write optimizer"),
    "lr_scheduler_config": Lack("write lr_scheduler_type"),
}
DEFAULTS_1: dict[str, Any] = {
    "cutoff_len": 2048, "micro_batch_size": 1, "learning_rate": 1e-4, "num_train_epochs": 3, "max_grad_norm": 1.0,
    "seed": 42,
}  # fmt: skip


def _finish_1(given: dict[str, Any], made: Converted) -> None:
    peft = dict(given.get("peft_config") or {})
    if peft.pop("name", None) != "lora":
        raise InputError(f"{made.source.name} has no peft_config of name: lora; halfbyte trains LoRA adapters.")
    places = {"r": "rank"} | {name: name for name in ("target_modules", "lora_alpha", "lora_dropout")}
    for name, value in ({"r": 8, "lora_alpha": 16, "lora_dropout": 0.0, "target_modules": "all"} | peft).items():
        if name in places:
            made.set(places[name], "all-linear" if value == "all" else value, f"peft_config.{name}", value)
        elif value:
            made.lacking[f"peft_config.{name}"] = (value, "halfbyte has no option for it")
    quantization = given.get("quant_config") or {}
    bits = quantization.get("quantization_bit")
    _base(bits, {"quantization_bit": bits, "finetuning_type": "lora"}, made)
    if not given.get("train_dataset"):
        raise InputError(f"{made.source.name} names no train_dataset.")
    made.values["data"] = given["train_dataset"]
    if str(given["train_dataset"]).endswith((".yaml", ".yml")):
        made.lacking["train_dataset"] = (given["train_dataset"], "name the files that this list names")
    if given.get("eval_dataset"):
        made.values["eval_data"] = given["eval_dataset"]
    made.set("compute_dtype", "bfloat16", "bf16", True)


VERSION_1 = Tool(
    name="LLaMA-Factory",
    marks=(frozenset({"model", "peft_config"}), frozenset({"model", "train_dataset"})),
    defaults=DEFAULTS_1,
    keys=KEYS_1,
    finish=_finish_1,
    together=frozenset({"peft_config", "quant_config", "train_dataset", "eval_dataset"}),
)

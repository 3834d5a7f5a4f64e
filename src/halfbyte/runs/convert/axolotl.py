"""axolotl's keys (its schema of 2026-07-24, ``src/axolotl/utils/schemas``) as options of ours.

Defaults are its own and, where it leaves them to transformers, those. Left out: full fine-tuning and other adapters
than LoRA, which are refused.
"""

from collections.abc import Mapping
from typing import Any

from halfbyte.errors import InputError
from halfbyte.runs.convert.keys import Converted, Drop, Lack, To, Tool, number

OPTIMIZERS = {
    "paged_adamw_32bit": "paged_adamw_32bit", "paged_adamw_8bit": "paged_adamw_8bit", "adamw_bnb_8bit": "adamw_8bit",
    "adamw_8bit": "adamw_8bit", "adamw_torch": "adamw_torch", "adamw_torch_fused": "adamw_torch",
    "adamw_hf": "adamw_torch",
}  # fmt: skip
"""The same AdamW by our names; ``fused`` is a matter of speed."""
TYPES = {
    "alpaca": "alpaca", "alpaca:chat": "alpaca", "alpaca_chat.load_qa": "alpaca", "gpteacher": "alpaca",
    "chat_template": "messages", "sharegpt": "messages", "chat_template.default": None, "chat_template.argilla": None,
    "completion": "text", "oasst": "oasst", "pygmalion": "messages", "llama3.ultra": None, "chatml.ultra": None,
}  # fmt: skip
"""Prompt strategies by our names of shapes; None where each row tells its own."""
HERE = {"path", "split", "name", "type", "data_files", "ds_type", "trust_remote_code"}
"""Keys of a data set that are read; shapes find the columns of messages by themselves."""
FOUND = {
    "field_messages", "message_property_mappings", "message_field_role", "message_field_content", "conversation",
    "chat_template", "field_chosen", "field_rejected", "roles", "drop_system_message",
}  # fmt: skip

SPEED = "it is about speed on GPUs"
OWN_MEMORY = "the memory plan of a run decides"
LOGGED = "every step is logged, to metrics.jsonl"

KEYS: dict[str, To | Drop | Lack] = {
    "base_model": To("model"),
    "trust_remote_code": To("trust_remote_code", bool),
    "output_dir": To("output"),
    "sequence_len": To("max_length"),
    "lora_r": To("rank"),
    "lora_alpha": To("lora_alpha"),
    "lora_dropout": To("lora_dropout"),
    "lora_modules_to_save": To("modules_to_save"),
    "lora_rank_pattern": To("rank_pattern"),
    "lora_alpha_pattern": To("alpha_pattern"),
    "peft_use_rslora": To("use_rslora"),
    "peft_use_dora": To("use_dora"),
    "loraplus_lr_ratio": To("loraplus_lr_ratio", number),
    "peft_init_lora_weights": To("init_lora_weights"),
    "neftune_noise_alpha": To("neftune_noise_alpha", number),
    "noisy_embedding_alpha": To("neftune_noise_alpha", number),
    "micro_batch_size": To("batch_size"),
    "gradient_accumulation_steps": To("gradient_accumulation_steps"),
    "num_epochs": To("epochs", number),
    "max_steps": To("max_steps"),
    "group_by_length": To("group_by_length"),
    "learning_rate": To("learning_rate", number),
    "optimizer": To("optimizer", lambda word: OPTIMIZERS.get(word, word)),
    "lr_scheduler_kwargs": To("lr_scheduler_kwargs"),
    "weight_decay": To("weight_decay", number),
    "adam_beta1": To("adam_beta1", number),
    "adam_beta2": To("adam_beta2", number),
    "max_grad_norm": To("max_grad_norm", number),
    "seed": To("seed"),
    "save_steps": To("save_steps"),
    "eval_steps": To("eval_steps"),
    "rl_beta": To("beta", number),
    "kto_desirable_weight": To("desirable_weight", number),
    "kto_undesirable_weight": To("undesirable_weight", number),
    "orpo_alpha": To("beta", number),
    "chat_template_jinja": To("chat_template"),
    "sample_packing": Drop("a step has batch_size rows, laid side by side where that pays; nothing joins them before"),
    "dataset_prepared_path": Drop("rows of tokens are kept and found again"),
    "train_on_inputs": Lack("format: text trains whole texts"),
    "evals_per_epoch": Lack("write eval_steps"),
    "saves_per_epoch": Lack("write save_steps"),
    "save_strategy": Lack("checkpoints come every save_steps"),
    "eval_strategy": Lack("rows are evaluated every eval_steps where there are any"),
    "save_total_limit": Lack("two checkpoints are kept while a run lasts"),
    "eval_batch_size": Lack("batch_size serves for both"),
    "batch_size": Lack("write gradient_accumulation_steps"),
    "resume_from_checkpoint": Lack("halfbyte train --resume goes on with a run"),
    "auto_resume_from_checkpoints": Lack("halfbyte train --resume goes on with a run"),
    "lora_model_dir": Lack("a new adapter is trained"),
    "adam_epsilon": Lack("it is 1e-8"),
    "revision_of_model": Lack("name a folder that holds that revision"),
    "hub_model_id": Lack("upload the run's folder with hf upload"),
    **dict.fromkeys(
        ("model_type", "tokenizer_type", "processor_type", "tokenizer_use_mistral_common", "tokenizer_config"),
        Drop("classes are those that the model's configuration names"),
    ),
    **dict.fromkeys(
        ("gradient_checkpointing", "gradient_checkpointing_kwargs", "activation_offloading", "low_cpu_mem_usage"),
        Drop(OWN_MEMORY),
    ),
    **dict.fromkeys(
        ("logging_steps", "use_wandb", "use_tensorboard", "use_otel_metrics", "use_mlflow"),
        Drop(LOGGED),
    ),
    **dict.fromkeys(
        (
            "attn_implementation", "tf32", "flash_attention", "sdp_attention", "xformers_attention", "eager_attention",
            "pad_to_sequence_len", "eval_sample_packing", "plugins", "torch_compile", "cut_cross_entropy", "deepspeed",
            "quantize_moe_experts", "flex_attn_compile_kwargs", "use_kernels", "use_scattermoe", "fused_attn_kernel",
            "experts_implementation", "context_parallel_size", "unsloth_lora_mlp", "dataloader_num_workers",
            "gemma4_hybrid_attn_impl", "llama4_linearized_experts", "ddp_find_unused_parameters", "ddp_timeout",
        ),
        Drop(SPEED),
    ),
    **dict.fromkeys(
        ("remove_unused_columns", "skip_prepare_dataset", "strict", "save_safetensors", "eot_tokens",
         "dataset_processes", "gptq_groupsize", "gptq_model_v1", "push_dataset_to_hub", "torchdistx_path",
         "save_first_step", "is_llama_derived_model", "is_mistral_derived_model"),
        Drop("it is about how axolotl works"),
    ),
}  # fmt: skip
FAMILIES = {
    "wandb_": LOGGED, "otel_": LOGGED, "mlflow_": LOGGED, "liger_": SPEED, "fsdp": SPEED, "lora_mlp_kernel": SPEED,
    "lora_qkv_kernel": SPEED, "lora_o_kernel": SPEED, "loss_watchdog_": "a run that diverges stops by itself",
}  # fmt: skip
DEFAULTS: dict[str, Any] = {
    "output_dir": "./model-out",
    "sequence_len": 512, "micro_batch_size": 1, "gradient_accumulation_steps": 1, "num_epochs": 1.0,
    "lora_dropout": 0.0, "optimizer": "adamw_torch_fused", "lr_scheduler": "cosine", "max_grad_norm": 1.0, "seed": 42,
    "group_by_length": False,
}  # fmt: skip
TOGETHER = frozenset({
    "adapter", "load_in_4bit", "load_in_8bit", "bnb_config_kwargs", "lora_target_linear", "lora_target_modules",
    "datasets", "test_datasets", "val_set_size", "bf16", "bfloat16", "fp16", "float16", "lr_scheduler", "warmup_ratio",
    "warmup_steps", "rl", "gptq", "chat_template", "special_tokens",
})  # fmt: skip


def _finish(given: dict[str, Any], made: Converted) -> None:
    _base(given, made)
    _targets(given, made)
    _data(given, made)
    if given.get("fp16") is True or given.get("float16"):
        made.set("compute_dtype", "float16", "fp16", True)
    elif given.get("bf16") or given.get("bfloat16"):
        made.set("compute_dtype", "bfloat16", "bf16", given.get("bf16"))
    else:
        made.set("compute_dtype", "float32", "bf16", given.get("bf16"))
    rl = given.get("rl")
    if rl and not made.set("method", str(rl), "rl", rl):
        raise InputError(f"{made.source.name} has rl: {rl}, and this halfbyte has no such method.")
    template = given.get("chat_template")
    if template and not str(template).startswith("tokenizer_default"):
        made.lacking["chat_template"] = (template, "the model's own is taken; chat_template names a Jinja file here")
    tokens = {name: token for name, token in (given.get("special_tokens") or {}).items() if token}
    if tokens.keys() - {"pad_token"}:
        made.lacking["special_tokens"] = (tokens, "the tokenizer's own are taken")
    elif tokens:
        made.dropped["special_tokens"] = "padding is masked, whatever it holds"
    if given.get("warmup_ratio") is None and given.get("warmup_steps") is None:
        given["warmup_ratio"] = 0.03
    schedule(given, made, "lr_scheduler")


def _base(given: Mapping[str, Any], made: Converted) -> None:
    adapter = given.get("adapter")
    if adapter not in ("lora", "qlora"):
        told = f"adapter: {adapter}" if adapter else "no adapter, and would train all weights"
        raise InputError(f"{made.source.name} has {told}; halfbyte trains LoRA adapters: set adapter to qlora or lora.")
    if given.get("gptq"):
        made.lacking["gptq"] = (given["gptq"], "the base is quantized anew; name the model in 16 bits")
    settings = dict(given.get("bnb_config_kwargs") or {})
    if adapter == "qlora" or given.get("load_in_4bit"):
        made.set("quant_type", settings.pop("bnb_4bit_quant_type", "nf4"), "bnb_config_kwargs", settings)
        made.set("double_quant", settings.pop("bnb_4bit_use_double_quant", True), "bnb_config_kwargs", settings)
    else:
        bits, key = ("int8", "load_in_8bit") if given.get("load_in_8bit") else ("none", "adapter")
        made.set("quant_type", bits, key, given[key])
    for name in ("llm_int8_has_fp16_weight", "bnb_4bit_compute_dtype", "llm_int8_threshold"):
        settings.pop(name, None)
    if settings and "bnb_config_kwargs" not in made.lacking:
        made.lacking["bnb_config_kwargs"] = (settings, "halfbyte has no option for it")


def _targets(given: Mapping[str, Any], made: Converted) -> None:
    named = given.get("lora_target_modules")
    if given.get("lora_target_linear") or named == "all-linear":
        made.set("target_modules", "all-linear", "lora_target_linear", True)
        if named and named != "all-linear":
            made.notes.append("lora_target_modules are among all linear layers.")
    elif named:
        made.set("target_modules", named, "lora_target_modules", named)
    else:
        raise InputError(f"{made.source.name} names no layers; set lora_target_linear: true, or lora_target_modules.")


def _data(given: Mapping[str, Any], made: Converted) -> None:
    if not given.get("datasets"):
        raise InputError(f"{made.source.name} names no datasets.")
    made.values["data"] = _one_or_all(_sources(given["datasets"], "datasets", made))
    share = given.get("val_set_size") or 0
    if given.get("test_datasets"):
        made.values["eval_data"] = _one_or_all(_sources(given["test_datasets"], "test_datasets", made))
    elif 0 < share < 1:
        made.set("eval_share", share, "val_set_size", share)
    elif share:
        made.lacking["val_set_size"] = (share, "write eval_share, the share of the rows that are held out")


def _sources(datasets: Any, key: str, made: Converted) -> list[dict[str, Any]]:
    found = []
    for place, dataset in enumerate(datasets if isinstance(datasets, list) else [datasets]):
        if not isinstance(dataset, dict) or not dataset.get("path"):
            raise InputError(f"{made.source.name}: {key}[{place}] has no path.")
        source = {"path": str(dataset["path"])}
        if split := dataset.get("split"):
            source["split"] = str(split).partition("[")[0]
            if "[" in str(split):
                made.lacking[f"{key}[{place}].split"] = (split, "write weight: 0.2 for a fifth of the rows, drawn")
        files, config = dataset.get("data_files"), dataset.get("name")
        files = files if isinstance(files, list) else [files] if files else []
        word = dataset.get("type")
        if isinstance(word, str) and TYPES.get(word.split(":")[0] if word not in TYPES else word):
            source["format"] = TYPES.get(word) or str(TYPES[word.split(":")[0]])
        elif word and not (isinstance(word, str) and word in TYPES):
            made.lacking[f"{key}[{place}].type"] = (word, "each row tells its own shape; see format, columns, template")
        for name, value in dataset.items():
            if name in FOUND and value:
                made.dropped[f"{key}[{place}].{name}"] = "columns of messages are found"
            elif name not in HERE and value:
                made.lacking[f"{key}[{place}].{name}"] = (value, "halfbyte has no option for it")
        parts = [{"config": file} for file in files] or [{"config": config} if config else {}]
        found += [source | part for part in parts]
    return found


def _one_or_all(sources: list[dict[str, Any]]) -> Any:
    words = [source["path"] if source.keys() == {"path"} else source for source in sources]
    return words[0] if len(words) == 1 else words


def schedule(given: Mapping[str, Any], made: Converted, key: str) -> None:
    """Set the schedule and its warm-up, which transformers leaves out of ``constant``."""
    word, steps = given.get(key), given.get("warmup_steps") or 0
    ratio = number(given.get("warmup_ratio") or 0)
    if steps and given.get("max_steps"):
        ratio = steps / given["max_steps"]
    elif steps:
        made.lacking["warmup_steps"] = (steps, "write warmup_ratio, a share of the steps")
    if word == "constant":
        made.set("lr_scheduler_type", "constant", key, word)
        made.set("warmup_ratio", 0.0, "warmup_ratio", ratio)
        return
    made.set("lr_scheduler_type", word, key, word)
    made.set("warmup_ratio", ratio, "warmup_ratio", ratio)


TOOL = Tool(
    name="axolotl",
    marks=(frozenset({"base_model"}),),
    defaults=DEFAULTS,
    keys=KEYS,
    finish=_finish,
    together=TOGETHER,
    families=FAMILIES,
)

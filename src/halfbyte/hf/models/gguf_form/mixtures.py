"""What a GGUF file says of a mixture of experts: written, and read as a configuration of transformers' (5.23).

transformers reads itself what files say of few mixtures, and of those not all (the width of experts is left out).
"""

import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
from transformers import AutoConfig, PreTrainedConfig

from halfbyte.errors import InputError
from halfbyte.hf.models.gguf_form.family import FORMS, Form

MODEL = {
    "context_length": "max_position_embeddings", "embedding_length": "hidden_size", "block_count": "num_hidden_layers",
    "feed_forward_length": "intermediate_size", "attention.head_count": "num_attention_heads",
    "attention.head_count_kv": "num_key_value_heads", "attention.key_length": "head_dim",
    "attention.layer_norm_rms_epsilon": "rms_norm_eps", "vocab_size": "vocab_size",
}  # fmt: skip
"""What files say of every model, by keys without the architecture's name."""
_USED, _WIDE = {"expert_used_count": "num_experts_per_tok"}, {"expert_feed_forward_length": "moe_intermediate_size"}
_LOCAL = _USED | {"expert_count": "num_local_experts"}
_NUMBERED = _USED | {"expert_count": "num_experts"}
_AS_FFN = {"expert_feed_forward_length": "intermediate_size"}
_TOLD = _USED | _WIDE | {
    "expert_count": "n_routed_experts", "expert_shared_count": "n_shared_experts",
    "leading_dense_block_count": "first_k_dense_replace", "expert_weights_scale": "routed_scaling_factor",
}  # fmt: skip
_GROUPED = {
    "expert_weights_norm": "norm_topk_prob", "expert_group_count": "n_group", "expert_group_used_count": "topk_group",
}  # fmt: skip
_MLA = {"attention.q_lora_rank": "q_lora_rank", "attention.kv_lora_rank": "kv_lora_rank"}
EXPERTS: dict[str, dict[str, str]] = {
    "mixtral": _LOCAL,
    "qwen2_moe": _NUMBERED | _WIDE | {"expert_shared_feed_forward_length": "shared_expert_intermediate_size"},
    "qwen3_moe": _NUMBERED | _WIDE,
    "olmoe": _NUMBERED,
    "granitemoe": _LOCAL,
    "granitemoeshared": _LOCAL | {"expert_shared_feed_forward_length": "shared_intermediate_size"},
    "gpt_oss": _LOCAL | _AS_FFN,
    "glm4_moe": _TOLD | _GROUPED,
    "dots1": _TOLD | _GROUPED,
    "llama4_text": _LOCAL | _AS_FFN | {"interleave_moe_layer_step": "interleave_moe_layer_step"},
    "deepseek_v2": _TOLD | _MLA,
    "deepseek_v3": _TOLD | _GROUPED | _MLA,
}
"""What they say of a mixture, by ``model_type``."""
SCALES = {
    "attention.scale": "attention_multiplier", "embedding_scale": "embedding_multiplier",
    "residual_scale": "residual_multiplier", "logit_scale": "logits_scaling",
}  # fmt: skip
"""Of Granite."""
SPECIAL = {"bos_token_id": "bos", "eos_token_id": "eos", "pad_token_id": "padding"}


def say_experts(writer: Any, config: Any, form: Form) -> None:
    """Say in a file what a model's experts are like; nothing where it has none."""
    text = config.get_text_config()
    for key, attribute in EXPERTS.get(text.model_type, {}).items():
        value, name = getattr(text, attribute), f"{form.arch}.{key}"
        if isinstance(value, bool):
            writer.add_bool(name, value)
        elif key.endswith("scale"):
            writer.add_float32(name, float(value))
        elif value is not None:
            writer.add_uint32(name, value)
    if form.gating:
        writer.add_uint32(f"{form.arch}.expert_gating_func", form.gating)
    if form.arch == "deepseek2":
        writer.add_key_length_mla(text.qk_nope_head_dim + text.qk_rope_head_dim)
        writer.add_value_length_mla(text.v_head_dim)


def family_of(fields: Mapping[str, Any]) -> str | None:
    """Return the ``model_type`` of the mixture that a file holds, or None where it is none that is known."""
    arch, said = _said(fields)
    if not said("expert_count"):
        return None
    fitting = [name for name, form in FORMS.items() if form.experts and form.arch == arch]
    if arch == "granitemoe":
        return "granitemoeshared" if said("expert_shared_feed_forward_length") else "granitemoe"
    if arch == "deepseek2":
        sigmoid = FORMS["deepseek_v3"].gating
        return "deepseek_v3" if said("expert_gating_func") == sigmoid else "deepseek_v2"
    return fitting[0] if fitting else None


def config_of(file: Path, fields: Mapping[str, Any], tensors: frozenset[str]) -> PreTrainedConfig | None:
    """Return the configuration of the mixture that a file holds, or None where it is none that is known.

    Args:
        file: for what is said of it.
        fields: the file's.
        tensors: the names of its tensors.

    Raises:
        InputError: its tensors, or its positions, are of a kind that is not read.
    """
    family = family_of(fields)
    if family is None:
        return None
    form, (arch, said) = FORMS[family], _said(fields)
    own = EXPERTS[family] | (SCALES if arch == "granitemoe" else {})
    found: dict[str, Any] = {attribute: said(key) for key, attribute in (MODEL | own).items()}
    found["vocab_size"] = len(fields["tokenizer.ggml.tokens"].data)
    found["rope_parameters"] = _positions(file, arch, said, tensors)
    found["tie_word_embeddings"] = "output.weight" not in tensors
    found["attention_bias"] = found["qkv_bias"] = "blk.0.attn_q.bias" in tensors
    for attribute, key in SPECIAL.items():
        field = fields.get(f"tokenizer.ggml.{key}_token_id")
        found[attribute] = None if field is None else int(field.contents())
    if form.experts != "told":
        found["norm_topk_prob"] = form.experts == "normed"
    if arch == "glm4moe":
        found["use_qk_norm"] = "blk.0.attn_q_norm.weight" in tensors
        found["num_hidden_layers"] -= said("nextn_predict_layers") or 0
    if arch == "gpt-oss":
        found["sliding_window"] = said("attention.sliding_window")
        period = said("attention.sliding_window_pattern") or form.windows
        found["layer_types"] = [
            "full_attention" if (i + 1) % period == 0 else "sliding_attention"
            for i in range(found["num_hidden_layers"])
        ]
    if family == "deepseek_v2" and (said("expert_weights_norm") or (said("expert_group_count") or 1) > 1):
        raise InputError(
            f"{file} is a deepseek2 whose experts are chosen in groups, or weighed to a sum of 1, after a softmax, "
            "which transformers does not compute so; take the model's folder with safetensors."
        )
    if arch == "llama4":
        found["intermediate_size_mlp"] = said("feed_forward_length")
        found["use_qk_norm"] = said("expert_count") != 128
    if arch == "deepseek2":
        if said("attention.key_length_mla") is None:
            raise InputError(
                f"{file} is of the time before llama.cpp took kv_b_proj apart (it has no attention.key_length_mla); "
                "take a newer file, or the model's folder with safetensors."
            )
        rotary = int(said("rope.dimension_count"))
        found |= {
            "qk_rope_head_dim": rotary, "qk_nope_head_dim": said("attention.key_length_mla") - rotary,
            "v_head_dim": said("attention.value_length_mla"), "q_lora_rank": said("attention.q_lora_rank"),
            "num_key_value_heads": found["num_attention_heads"],
        }  # fmt: skip
        del found["head_dim"]
    known = {"rope_parameters", "q_lora_rank"}
    found = {key: value for key, value in found.items() if value is not None or key in known or key in SPECIAL}
    empty = AutoConfig.for_model(family)
    made: PreTrainedConfig = type(empty)(**{key: value for key, value in found.items() if hasattr(empty, key)})
    return made


def _said(fields: Mapping[str, Any]) -> tuple[str, Any]:
    arch = str(fields["general.architecture"].contents())

    def said(key: str) -> Any:
        field = fields.get(f"{arch}.{key}")
        value = None if field is None else field.contents()
        return float(str(np.float32(value))) if isinstance(value, float) else value  # 1e-05 and not 9.99999975e-06

    return arch, said


def _positions(file: Path, arch: str, said: Any, tensors: frozenset[str]) -> dict[str, Any]:
    """Undo :func:`halfbyte.hf.models.gguf_form.positions.positions`."""
    found: dict[str, Any] = {"rope_type": "default", "rope_theta": float(said("rope.freq_base") or 10000.0)}
    if "rope_freqs.weight" in tensors:
        raise InputError(
            f"{file} is a {arch} with a factor for each frequency of its positions (rope_freqs.weight), which is not "
            "read of a mixture; take the model's folder with safetensors."
        )
    width = said("attention.key_length") or said("embedding_length") // said("attention.head_count")
    if arch == "glm4moe":
        found["partial_rotary_factor"] = said("rope.dimension_count") / width
    kind = said("rope.scaling.type")
    if kind in ("linear", "yarn"):
        found |= {"rope_type": kind, "factor": float(said("rope.scaling.factor"))}
    if kind == "yarn":
        found["original_max_position_embeddings"] = said("rope.scaling.original_context_length")
        if factor := said("rope.scaling.yarn_log_multiplier"):
            found["mscale"] = found["mscale_all_dim"] = round(10 * float(factor), 6)
        elif factor := said("rope.scaling.attn_factor"):
            found["attention_factor"] = float(factor) * (0.1 * math.log(found["factor"]) + 1.0)
        if arch == "gpt-oss":  # as OpenAI's; no file says it
            found |= {"beta_fast": 32.0, "beta_slow": 1.0, "truncate": False}
    return found

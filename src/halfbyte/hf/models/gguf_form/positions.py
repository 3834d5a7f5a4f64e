"""Rotary positions as llama.cpp has them.

    default, dynamic    the base frequency; a dynamic scaling changes nothing within the context that the file names
    linear              with a factor
    yarn                with factor, original length, and what cosines and sines are multiplied by; the paper's betas
    llama3              a factor for each frequency, as a tensor: what transformers divides the frequencies by
    longrope            two factors for each frequency, for short and for long contexts, as tensors

transformers (5.23) may have a set of parameters for each kind of layer; llama.cpp scales those that see all of the
text, and has another base frequency for the others where the family has one.
"""

from typing import Any

import torch
from gguf import RopeScalingType
from torch import Tensor
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

from halfbyte.errors import InputError
from halfbyte.hf.models.gguf_form.family import Form
from halfbyte.hf.models.gguf_scale import head_size

FACTORS = "rope_freqs.weight"
SHORT, LONG = "rope_factors_short.weight", "rope_factors_long.weight"
PARTIAL = ("phi3", "glm4moe")
"""Architectures that may turn a part of each head."""
LOCAL_BASE = ("gemma3",)
"""Architectures whose layers with a window have a base frequency of their own."""


def positions(writer: Any, config: Any, form: Form) -> dict[str, Tensor]:
    """Say in the file where the model's tokens are, and return the tensors that it takes.

    Raises:
        InputError: llama.cpp has no such scaling for the family.
    """
    text = config.get_text_config()
    held = text.rope_parameters
    local = held.get("sliding_attention")
    layer = "full_attention" if "full_attention" in held else None
    rope = held[layer] if layer else held
    kind, theta = rope.get("rope_type", "default"), rope["rope_theta"]
    part = float(rope.get("partial_rotary_factor") or 1.0)
    if part != 1.0 and form.arch not in PARTIAL:
        raise _refused(form, f"positions on {part} of each head")
    writer.add_rope_dimension_count(int(head_size(text) * part))
    writer.add_rope_freq_base(theta)
    if local is not None:
        if local.get("rope_type", "default") != "default":
            raise _refused(form, f"positions of the type {local['rope_type']} in layers with a window")
        if form.arch in LOCAL_BASE:
            writer.add_rope_freq_base_swa(local["rope_theta"])
        elif local["rope_theta"] != theta:
            raise _refused(form, "another rope_theta in layers with a window")
    if kind == "linear":
        writer.add_rope_scaling_type(RopeScalingType.LINEAR)
        writer.add_rope_scaling_factor(rope["factor"])
    elif kind == "yarn" and form.yarn:
        _yarn(writer, text, rope, layer, form)
    elif kind == "llama3" and form.frequencies:
        return {FACTORS: _factors(text, rope, kind, layer)}
    elif kind == "longrope" and form.arch == "phi3":
        _, attention = ROPE_INIT_FUNCTIONS[kind](text, None, layer_type=layer)
        writer.add_rope_scaling_orig_ctx_len(rope["original_max_position_embeddings"])
        writer.add_rope_scaling_attn_factors(attention)
        return {LONG: torch.tensor(rope["long_factor"]).float(), SHORT: torch.tensor(rope["short_factor"]).float()}
    elif kind not in ("default", "dynamic"):
        raise _refused(form, f"positions of the type {kind}")
    elif form.arch == "phi3":
        writer.add_rope_scaling_orig_ctx_len(getattr(text, "original_max_position_embeddings", 4096))
    return {}


def _yarn(writer: Any, text: Any, rope: dict[str, Any], layer: str | None, form: Form) -> None:
    original = rope["original_max_position_embeddings"]
    own, attention = ROPE_INIT_FUNCTIONS["yarn"](text, None, layer_type=layer)
    keys = ["rope_type", "rope_theta", "factor", "original_max_position_embeddings"]
    if form.arch == "gpt-oss" and "truncate" in rope:  # of which there is a note
        keys.append("truncate")
    plain = {key: rope[key] for key in keys}
    held = text.rope_parameters | {layer: plain} if layer else plain
    taken, usual = ROPE_INIT_FUNCTIONS["yarn"](
        type(text).from_dict(text.to_dict() | {"rope_parameters": held}), None, layer_type=layer
    )
    if not torch.equal(own, taken):
        raise _refused(form, "other betas of YaRN than 32 and 1")
    writer.add_rope_scaling_type(RopeScalingType.YARN)
    writer.add_rope_scaling_factor(rope["factor"] or text.max_position_embeddings / original)
    writer.add_rope_scaling_orig_ctx_len(original)
    if form.arch == "deepseek2" and rope.get("mscale_all_dim"):  # scales the products of queries and keys
        if attention != 1.0:
            raise _refused(form, "other mscale of YaRN than mscale_all_dim")
        writer.add_rope_scaling_yarn_log_mul(0.1 * rope["mscale_all_dim"])
    elif attention != usual:
        writer.add_rope_scaling_attn_factors(attention / usual)


def _factors(text: Any, rope: dict[str, Any], kind: str, layer: str | None) -> Tensor:
    scaled, _ = ROPE_INIT_FUNCTIONS[kind](text, None, layer_type=layer)
    size = 2 * len(scaled)
    plain = 1.0 / (rope["rope_theta"] ** (torch.arange(0, size, 2, dtype=torch.float32) / size))
    factors: Tensor = plain / scaled
    return factors


def _refused(form: Form, what: str) -> InputError:
    return InputError(f"llama.cpp has no {what} for {form.arch}; keep the model in the format hf.")

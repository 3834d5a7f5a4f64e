"""The families of transformers (5.23) that llama.cpp (0.5) computes, and what its files say of each.

llama.cpp has one piece of code for each architecture, which takes widths, constants and windows from the file's
metadata; what it takes for granted, a model must have. The facts are those of its loading code; the keys are gguf's
(0.19).

    paired      its rotary embedding turns neighbouring values where transformers turns halves, so rows of queries and
                keys lie in another order
    windows     whether layers that see a window are told by the file; elsewhere every layer sees all of the text
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

from gguf import ExpertGatingFuncType

from halfbyte.errors import InputError
from halfbyte.hf.models.gguf_scale import head_size, scaled_by

SWIGLU = ("silu", "swish")
GEGLU = ("gelu_pytorch_tanh", "gelu_new")
ALL = frozenset(("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"))
"""Layers that may have a bias in Llama's code."""


@dataclass(frozen=True)
class Form:
    """How llama.cpp holds a family.

    Attributes:
        arch: its name of the architecture.
        paired: see above.
        windows: how many layers make a round of which all but the last see a window, unless the file says otherwise;
            0 where windows are not looked at.
        frequencies: whether it reads a factor for each frequency (Llama 3's scaling).
        yarn: whether YaRN is computed as transformers does.
        head: whether a head of its own may be there, must be, or is never read.
        biases: layers that may have one.
        offset: what its norms' weights lack.
        activations: of the gated layer.
        experts: of a mixture, whether llama.cpp makes the chosen experts' weights sum to 1 (``normed``), leaves them as
            they are (``plain``), or is told by the file, as much else (``told``); empty where there are none.
        gating: what the file says of how experts are scored (gguf's ``ExpertGatingFuncType``); 0 where it says nothing.
    """

    arch: str
    paired: bool = False
    windows: int = 0
    frequencies: bool = False
    yarn: bool = True
    head: Literal["may", "must", "never"] = "may"
    biases: frozenset[str] = frozenset()
    offset: float = 0.0
    activations: tuple[str, ...] = SWIGLU
    experts: Literal["", "normed", "plain", "told"] = ""
    gating: int = 0


_QKV = frozenset(("q_proj", "k_proj", "v_proj"))
LITE = (26, 27)
"""Layers of those of DeepSeek's models whose queries are of one matrix, by which llama.cpp tells them."""
_OSS = frozenset(("o_proj", "router", "gate_proj", "up_proj", "down_proj"))
_SOFTMAX, _SIGMOID = int(ExpertGatingFuncType.SOFTMAX), int(ExpertGatingFuncType.SIGMOID)
FORMS = {
    "llama": Form("llama", paired=True, frequencies=True, biases=ALL),
    "mistral": Form("llama", paired=True, frequencies=True),
    "ministral": Form("llama", paired=True, frequencies=True),
    "qwen2": Form("qwen2", biases=_QKV),
    "qwen3": Form("qwen3"),
    "mixtral": Form("llama", paired=True, frequencies=True, experts="normed"),
    "qwen2_moe": Form("qwen2moe", biases=_QKV, experts="plain"),
    "qwen3_moe": Form("qwen3moe", experts="normed"),
    "olmoe": Form("olmoe", head="must", experts="plain"),
    "granitemoe": Form("granitemoe", paired=True, frequencies=True, biases=ALL, experts="normed"),
    "granitemoeshared": Form("granitemoe", paired=True, frequencies=True, biases=ALL, experts="normed"),
    "gpt_oss": Form("gpt-oss", windows=2, head="must", biases=_QKV | _OSS, experts="normed"),
    "glm4_moe": Form("glm4moe", biases=_QKV, experts="told", gating=_SIGMOID),
    "dots1": Form("dots1", experts="told", gating=_SIGMOID),
    "llama4_text": Form("llama4", frequencies=True, experts="plain"),
    "deepseek_v2": Form("deepseek2", experts="told", gating=_SOFTMAX),
    "deepseek_v3": Form("deepseek2", experts="told", gating=_SIGMOID),
    "smollm3": Form("smollm3", paired=True),
    "phi3": Form("phi3", yarn=False),
    "gemma": Form("gemma", yarn=False, head="never", offset=1.0, activations=GEGLU),
    "gemma2": Form("gemma2", windows=2, yarn=False, head="never", offset=1.0, activations=GEGLU),
    "gemma3_text": Form("gemma3", windows=6, yarn=False, offset=1.0, activations=GEGLU),
    "olmo": Form("olmo", paired=True),
    "olmo2": Form("olmo2", head="must"),
    "olmo3": Form("olmo2", windows=4, head="must"),
    "granite": Form("granite", paired=True, frequencies=True, biases=ALL),
}
"""By transformers' ``model_type``."""


def form_of(config: Any, architecture: str) -> Form:
    """Return how llama.cpp holds the model that ``config`` describes.

    Raises:
        InputError: it does not, or something that it takes for granted is otherwise.
    """
    text = config.get_text_config()
    form = FORMS.get(text.model_type)
    if form is None:
        raise InputError(
            f"A {text.model_type} model is not written as GGUF; {', '.join(sorted(FORMS))} are. Its folder of "
            "safetensors (format hf) may be converted by llama.cpp's own convert_hf_to_gguf.py."
        )
    if not architecture.endswith(("ForCausalLM", "ForConditionalGeneration")):
        raise InputError(f"{architecture} is no language model, and llama.cpp writes text; keep it in the format hf.")
    for problem in _problems(text, form):
        raise InputError(f"llama.cpp does not compute this {text.model_type} as it is: {problem}; keep the format hf.")
    return form


def notes_of(config: Any, form: Form) -> list[str]:
    """Return in sentences where llama.cpp computes something else than the model does."""
    text = config.get_text_config()
    if form.arch == "gpt-oss" and text.rope_parameters.get("truncate") is False:
        return [
            "llama.cpp rounds the ends of YaRN's ramp to whole dimensions, which the model does not: its logits differ "
            "slightly."
        ]
    window = getattr(text, "sliding_window", None)
    if form.windows or window is None or window >= text.max_position_embeddings:
        return []
    if "sliding_attention" not in (getattr(text, "layer_types", None) or ["sliding_attention"]):
        return []
    return [
        f"llama.cpp lets every layer of this family see all of the text, where the model's layers see {window:,} tokens"
        f": beyond {window:,} tokens its answers differ."
    ]


def metadata(writer: Any, config: Any, form: Form, rows: int) -> None:
    """Say in the file what the model is like; positions are :mod:`halfbyte.hf.models.gguf_form.positions`.

    Args:
        writer: gguf's.
        config: of the model.
        form: its.
        rows: of the embedding.
    """
    text = config.get_text_config()
    size = head_size(text)
    writer.add_context_length(text.max_position_embeddings)
    writer.add_embedding_length(text.hidden_size)
    writer.add_block_count(text.num_hidden_layers)
    writer.add_feed_forward_length(getattr(text, "intermediate_size_mlp", text.intermediate_size))
    writer.add_head_count(text.num_attention_heads)
    if form.arch == "deepseek2":  # what is kept of keys and values is one vector for all heads
        writer.add_head_count_kv(1)
        writer.add_key_length(text.kv_lora_rank + text.qk_rope_head_dim)
        writer.add_value_length(text.kv_lora_rank)
    else:
        writer.add_head_count_kv(text.num_key_value_heads)
        writer.add_key_length(size)
        writer.add_value_length(size)
    writer.add_vocab_size(rows)
    if form.arch == "olmo":
        writer.add_layer_norm_eps(1e-5)  # transformers' OlmoLayerNorm has no other
        if text.clip_qkv is not None:
            writer.add_clamp_kqv(text.clip_qkv)
    else:
        writer.add_layer_norm_rms_eps(text.rms_norm_eps)
    if form.arch == "gemma2":
        writer.add_attn_logit_softcapping(text.attn_logit_softcapping)
        writer.add_final_logit_softcapping(text.final_logit_softcapping)
    elif form.arch == "gemma3" and text.final_logit_softcapping:
        writer.add_final_logit_softcapping(text.final_logit_softcapping)
    elif form.arch == "phi3":
        writer.add_sliding_window(text.sliding_window or 0)  # 0 tells Phi-4 from Phi-3
    elif form.arch in ("granite", "granitemoe"):
        writer.add_attention_scale(text.attention_multiplier)
        writer.add_embedding_scale(text.embedding_multiplier)
        writer.add_residual_scale(text.residual_multiplier)
        writer.add_logit_scale(text.logits_scaling)
    if form.windows:
        period = _period(text.layer_types)
        if text.sliding_window is not None and (period != 1 or form.arch == "gpt-oss"):
            writer.add_sliding_window(text.sliding_window)
        if period != 1 or form.arch in ("gemma2", "gpt-oss"):
            writer.add_sliding_window_pattern(period)


def _problems(text: Any, form: Form) -> Sequence[str]:
    found = []
    size = head_size(text)
    layers = text.num_hidden_layers
    named = getattr(text, "hidden_activation", None) or getattr(text, "hidden_act", None)
    if named not in form.activations:
        found.append(f"its activation is {named!r}, and {form.activations[0]} is computed")
    if form.arch in ("phi3", "olmo", "olmo2", "olmoe") and size * text.num_attention_heads != text.hidden_size:
        found.append(f"its heads are {size} wide, and {text.hidden_size // text.num_attention_heads} is taken")
    if form.experts in ("normed", "plain"):
        taken = form.experts == "normed"
        if getattr(text, "norm_topk_prob", taken) != taken:
            found.append(f"its norm_topk_prob is {text.norm_topk_prob}, and {taken} is taken")
        if getattr(text, "decoder_sparse_step", 1) != 1 or getattr(text, "mlp_only_layers", None):
            found.append("not all of its layers have experts")
    if form.arch == "olmoe" and text.num_key_value_heads != text.num_attention_heads:
        found.append(f"it has {text.num_key_value_heads} heads of keys, and {text.num_attention_heads} are taken")
    if form.arch == "olmoe" and text.clip_qkv is not None:
        found.append(f"it clips queries, keys and values (clip_qkv {text.clip_qkv})")
    if form.arch == "gpt-oss":
        if (text.swiglu_alpha, text.swiglu_limit) != (1.702, 7.0):
            found.append(f"its swiglu_alpha and swiglu_limit are {text.swiglu_alpha} and {text.swiglu_limit}")
        if not text.attention_bias:
            found.append("its attention has no biases, and some are taken")
        if text.sliding_window is None or _period(text.layer_types) == 1:
            found.append("none of its layers sees a window, and some are taken to")
    if form.arch == "llama4":
        found += _of_llama4(text)
    if form.arch == "deepseek2":
        if (text.q_lora_rank is None) != (layers in LITE):
            found.append(f"it has {layers} layers, by which it is taken {'' if layers in LITE else 'not '}to be Lite")
        if getattr(text, "topk_method", None) not in (None, "greedy"):
            found.append(f"its topk_method is {text.topk_method}, and greedy is taken")
        if not getattr(text, "rope_interleave", True):
            found.append("its rotary embedding turns halves (rope_interleave)")
    if getattr(text, "use_bidirectional_attention", None):
        found.append("it sees what follows (use_bidirectional_attention)")
    if form.arch in ("gemma2", "gemma3"):
        scale = scaled_by(text)
        if not math.isclose(text.query_pre_attn_scalar, scale):
            found.append(f"its query_pre_attn_scalar is {text.query_pre_attn_scalar}, and {scale} is taken")
    if form.arch == "gemma2" and None in (text.attn_logit_softcapping, text.final_logit_softcapping):
        found.append("it has no soft caps, and some are taken")
    if form.arch == "gemma3" and text.attn_logit_softcapping is not None:
        found.append("it caps its attention (attn_logit_softcapping)")
    if form.arch == "smollm3" and [bool(x) for x in text.no_rope_layers[:layers]] != [
        (i + 1) % 4 != 0 for i in range(layers)
    ]:
        found.append("its layers without positions are not every fourth")
    if form.windows and _period(text.layer_types) is None:
        found.append("its layers with a window follow no rule")
    return found


def _of_llama4(text: Any) -> Sequence[str]:
    every = range(1, text.num_hidden_layers + 1)
    taken = {
        "attention_chunk_size": 8192, "floor_scale": 8192, "attn_scale": 0.1, "attn_temperature_tuning": True,
        "use_qk_norm": text.num_local_experts != 128, "attention_bias": False,
        "no_rope_layers": [int(i % 4 != 0) for i in every],
        "layer_types": ["chunked_attention" if i % 4 else "full_attention" for i in every],
        "moe_layers": [i - 1 for i in every if i % text.interleave_moe_layer_step == 0],
    }  # fmt: skip
    own = {key: type(value)(getattr(text, key)) for key, value in taken.items() if getattr(text, key) is not None}
    return [
        f"its {key} is {own.get(key)}, and {value} is taken" for key, value in taken.items() if own.get(key) != value
    ]


def _period(kinds: Sequence[str]) -> int | None:
    """Return n where all layers but each n-th see a window, 1 where none does; None where there is no such rule."""
    windows = [kind == "sliding_attention" for kind in kinds]
    for n in range(1, len(windows) + 2):
        if windows == [i % n < n - 1 for i in range(len(windows))]:
            return n
    return None

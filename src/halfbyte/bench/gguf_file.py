"""A Llama model as a GGUF file, so that llama.cpp can be measured beside halfbyte: layers and head in any two formats.

Rows of queries and keys are permuted, since llama.cpp turns neighbouring values where transformers turns halves; norms
are fp32. The vocabulary in the file is made up, since the model is decoded by token ids alone. Other families, biases
and scaled rotary embeddings are refused: this is for measuring, and :mod:`halfbyte.deploy.export.gguf` for export.
"""

from pathlib import Path
from typing import Any

import gguf
import torch
from torch import Tensor
from transformers import AutoModelForCausalLM

from halfbyte.deploy.export.ggml import BLOCK, packed
from halfbyte.errors import InputError
from halfbyte.hf.models.configs import read_config

NAMES = {
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
    "input_layernorm": "attn_norm",
    "post_attention_layernorm": "ffn_norm",
}
WHOLE = {
    "model.embed_tokens.weight": "token_embd.weight",
    "model.norm.weight": "output_norm.weight",
    "lm_head.weight": "output.weight",
}
HEADS = ("token_embd.weight", "output.weight")


def check(model: str) -> None:
    """Make sure that :func:`write` takes ``model``.

    Raises:
        InputError: it does not.
    """
    config = read_config(model)
    rope = (getattr(config, "rope_parameters", None) or {}).get("rope_type", "default")
    plain = config.model_type == "llama" and rope == "default" and not (config.attention_bias or config.mlp_bias)
    if not plain or config.hidden_size % BLOCK or config.intermediate_size % BLOCK:
        raise InputError(
            f"{model} cannot be measured beside llama.cpp: only models of Llama's architecture are written for it, "
            f"without biases or scaled rotary embeddings, of widths that {BLOCK} divides; leave llama.cpp away."
        )


def write(model: str, files: dict[Path, tuple[str, str]]) -> None:
    """Write ``model`` to GGUF files.

    Args:
        model: folder or hub id of a model that :func:`check` takes.
        files: of each the type of the layers' weights and that of embeddings and head, as GGUF calls them.
    """
    dense = AutoModelForCausalLM.from_pretrained(model, dtype=torch.bfloat16, device_map="cpu")
    config = dense.config
    tensors = {name: tensor for name, tensor in dense.state_dict().items() if _wanted(name, config)}
    made: dict[tuple[str, str], Any] = {}
    for file, (layers, head) in files.items():
        writer = _writer(file, config)
        for name, tensor in tensors.items():
            target = _name(name)
            kind = "F32" if tensor.dim() == 1 else head if target in HEADS else layers
            if (name, kind) not in made:
                made[name, kind] = packed(_permuted(name, tensor, config), kind.lower())
            writer.add_tensor(target, made[name, kind], raw_dtype=gguf.GGMLQuantizationType[kind])
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_tensors_to_file()
        writer.close()
        made = {key: held for key, held in made.items() if _name(key[0]) in HEADS}


def _writer(file: Path, config: Any) -> Any:
    size = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    writer = gguf.GGUFWriter(file, "llama")
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_block_count(config.num_hidden_layers)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_key_length(size)
    writer.add_value_length(size)
    writer.add_rope_dimension_count(size)
    writer.add_rope_freq_base(config.rope_parameters["rope_theta"])
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_vocab_size(config.vocab_size)
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("default")
    writer.add_token_list([f"t{number}" for number in range(config.vocab_size)])
    writer.add_token_types([gguf.TokenType.NORMAL] * config.vocab_size)
    writer.add_token_merges(["t 0"])
    writer.add_bos_token_id(0)
    writer.add_eos_token_id(0)
    writer.add_add_bos_token(False)
    return writer


def _wanted(name: str, config: Any) -> bool:
    return name != "lm_head.weight" or not config.tie_word_embeddings


def _name(name: str) -> str:
    if name in WHOLE:
        return WHOLE[name]
    _, _, layer, rest = name.split(".", 3)
    return f"blk.{layer}.{NAMES[rest.removesuffix('.weight')]}.weight"


def _permuted(name: str, tensor: Tensor, config: Any) -> Tensor:
    for part, heads in (("q_proj", config.num_attention_heads), ("k_proj", config.num_key_value_heads)):
        if part in name:
            return tensor.view(heads, 2, -1, tensor.shape[1]).transpose(1, 2).reshape(tensor.shape)
    return tensor

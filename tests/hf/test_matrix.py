"""Every architecture, the whole way: loaded in 4 bits, LoRA's gradients, adapter saved and opened again, generation.

The oracle is the dense model of transformers with PEFT's own LoRA, its weights those that the 4 bits stand for, its
attention eager. All is fp32, so that what is left are sums in another order.
"""

import copy
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers as t
from peft import LoraConfig, get_peft_model
from torch import Tensor, nn

import halfbyte
from halfbyte.hf import not_linear
from halfbyte.hf.layers.expert_targets import as_peft_reads, as_we_read, has_experts, own_words
from halfbyte.hf.layers.lora_config import lora_config

VOCABULARY = 96
# The names that most configurations have; one takes names that it does not know, and leaves them alone.
SIZES: dict[str, Any] = {
    "vocab_size": VOCABULARY, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2, "initializer_range": 0.2,
    "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 2, "head_dim": 8, "max_position_embeddings": 64,
    "attention_dropout": 0.0, "hidden_dropout": 0.0,
}  # fmt: skip
ONE_HEAD_SIZE = {key: n for key, n in SIZES.items() if key not in ("num_key_value_heads", "head_dim")}
FALCON = {key: n for key, n in ONE_HEAD_SIZE.items() if key != "intermediate_size"}
ENCODER = {key: n for key, n in ONE_HEAD_SIZE.items() if key != "hidden_dropout"}
ENCODER |= {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}
ELSE = {"vocab_size": VOCABULARY, "bos_token_id": 1, "eos_token_id": 2, "initializer_range": 0.2}
GPT = ELSE | {"n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 64}
GPT |= {"resid_pdrop": 0.0, "embd_pdrop": 0.0, "attn_pdrop": 0.0}
GPT_NEO = ELSE | {"hidden_size": 32, "num_layers": 2, "num_heads": 4, "attention_types": [[["global", "local"], 1]]}
GPT_NEO |= {"max_position_embeddings": 64, "window_size": 6}
GPT_NEO |= {"resid_dropout": 0.0, "embed_dropout": 0.0, "attention_dropout": 0.0}
OPT = ONE_HEAD_SIZE | {"ffn_dim": 48, "word_embed_proj_dim": 32, "dropout": 0.0, "init_std": 0.2}
MPT = ELSE | {"d_model": 32, "n_layers": 2, "n_heads": 4, "max_seq_len": 64, "expansion_ratio": 2}
XGLM = ELSE | {"d_model": 32, "num_layers": 2, "attention_heads": 4, "ffn_dim": 48, "max_position_embeddings": 64}
XGLM |= {"dropout": 0.0, "attention_dropout": 0.0, "init_std": 0.2}
RECURRENT = ELSE | {"hidden_size": 32, "num_hidden_layers": 2, "state_size": 8}
T5 = {"vocab_size": VOCABULARY, "d_model": 32, "d_kv": 8, "d_ff": 48, "num_layers": 2, "num_heads": 4}
T5 |= {"dropout_rate": 0.0, "decoder_start_token_id": 0}
BART = {"vocab_size": VOCABULARY, "d_model": 32, "dropout": 0.0, "init_std": 0.2, "max_position_embeddings": 64}
BART |= {f"{side}_{key}": n for side in ("encoder", "decoder") for key, n in (("layers", 1), ("ffn_dim", 48))}
BART |= {f"{side}_attention_heads": 4 for side in ("encoder", "decoder")}
EXPERTS = {"num_experts_per_tok": 2, "moe_intermediate_size": 24, "num_experts": 4, "num_local_experts": 4}
LATENT = {
    "num_key_value_heads": 4, "q_lora_rank": 16, "kv_lora_rank": 16, "qk_rope_head_dim": 8, "qk_nope_head_dim": 8,
    "v_head_dim": 8, "n_routed_experts": 4, "num_experts_per_tok": 2, "n_group": 1, "topk_group": 1,
    "moe_intermediate_size": 16, "first_k_dense_replace": 1,
}  # fmt: skip
MIXED = {"layer_types": ["sliding_attention", "full_attention"], "sliding_window": 6}

# name: class, configuration, its values
MODELS: dict[str, tuple[str, str, dict[str, Any]]] = {
    name.lower(): (f"{name}ForCausalLM", name, SIZES | more)
    for name, more in {
        "Apertus": {}, "Arcee": {}, "BitNet": {}, "Cohere": {"logit_scale": 0.25}, "Cohere2": MIXED,
        "DeepseekV3": LATENT, "Ernie4_5": {}, "Exaone4": MIXED, "Gemma": {},
        "Gemma2": {"query_pre_attn_scalar": 8, "attn_logit_softcapping": 2.0, **MIXED}, "Glm": {}, "Glm4": {},
        "GptOss": {**EXPERTS, **MIXED}, "Granite": {"logits_scaling": 2.0, "residual_multiplier": 0.5},
        "GraniteMoe": EXPERTS, "Helium": {}, "HunYuanDenseV1": {}, "Lfm2": {"layer_types": ["conv", "full_attention"]},
        "Llama": {}, "Mistral": {"sliding_window": 6}, "Mixtral": EXPERTS, "Nemotron": {}, "Olmo": {"clip_qkv": 1.0},
        "Olmo2": {}, "Olmo3": MIXED, "Olmoe": EXPERTS, "Persimmon": {}, "Phi": {}, "Phi3": {}, "Phimoe": EXPERTS,
        "Qwen2": {"use_sliding_window": True, **MIXED}, "Qwen2Moe": {**EXPERTS, "shared_expert_intermediate_size": 24},
        "Qwen3": {}, "Qwen3Moe": EXPERTS, "SeedOss": {"residual_dropout": 0.0}, "SmolLM3": {"no_rope_layers": [1, 0]},
        "StableLm": {}, "Starcoder2": {"residual_dropout": 0.0, "embedding_dropout": 0.0},
    }.items()
}  # fmt: skip
MODELS |= {
    "bart": ("BartForConditionalGeneration", "Bart", BART),
    "bert": ("BertLMHeadModel", "Bert", ENCODER | {"is_decoder": True}),
    "bloom": ("BloomForCausalLM", "Bloom", ELSE | {"hidden_size": 32, "n_layer": 2, "n_head": 4}),
    "codegen": ("CodeGenForCausalLM", "CodeGen", GPT | {"n_ctx": 64, "rotary_dim": 8}),
    "falcon": ("FalconForCausalLM", "Falcon", FALCON),
    "falcon, alibi": ("FalconForCausalLM", "Falcon", FALCON | {"alibi": True, "bias": True}),
    "falcon, new": ("FalconForCausalLM", "Falcon", FALCON | {"new_decoder_architecture": True, "num_kv_heads": 2}),
    "gemma3": ("Gemma3ForCausalLM", "Gemma3Text", SIZES | {"query_pre_attn_scalar": 8, **MIXED}),
    "gpt-bigcode": ("GPTBigCodeForCausalLM", "GPTBigCode", GPT),
    "gpt-neo": ("GPTNeoForCausalLM", "GPTNeo", GPT_NEO),
    "gpt-neox": ("GPTNeoXForCausalLM", "GPTNeoX", ONE_HEAD_SIZE),
    "gpt2": ("GPT2LMHeadModel", "GPT2", GPT),
    "gptj": ("GPTJForCausalLM", "GPTJ", GPT | {"rotary_dim": 8}),
    "jamba": (
        "JambaForCausalLM", "Jamba",
        SIZES | EXPERTS | {
            "attn_layer_period": 2, "attn_layer_offset": 1, "expert_layer_period": 2, "expert_layer_offset": 1,
            "mamba_d_state": 8, "mamba_dt_rank": 8, "use_mamba_kernels": False,
        },
    ),
    "llama4": (
        "Llama4ForCausalLM", "Llama4Text",
        SIZES | {"intermediate_size_mlp": 48, "num_local_experts": 2, "attention_chunk_size": 6},
    ),
    "mamba": ("MambaForCausalLM", "Mamba", RECURRENT),
    "mamba2": ("Mamba2ForCausalLM", "Mamba2", RECURRENT | {"num_heads": 8, "head_dim": 8, "n_groups": 1}),
    "mpt": ("MptForCausalLM", "Mpt", MPT),
    "opt": ("OPTForCausalLM", "OPT", OPT),
    "roberta": ("RobertaForMaskedLM", "Roberta", ENCODER),
    "rwkv": ("RwkvForCausalLM", "Rwkv", RECURRENT | {"attention_hidden_size": 32, "context_length": 64}),
    "t5": ("T5ForConditionalGeneration", "T5", T5),
    "xglm": ("XGLMForCausalLM", "XGLM", XGLM),
}  # fmt: skip
LORA = {"r": 4, "lora_alpha": 8, "lora_dropout": 0.0, "target_modules": "all-linear"}
# Layers that PEFT (0.21) refuses to adapt by name, besides those that only look like linear ones.
REFUSED = {"mamba": ["out_proj", "conv1d"], "mamba2": ["out_proj", "conv1d"]}


def config_for(model: nn.Module, name: str) -> LoraConfig:
    """Return a configuration for all linear layers, in PEFT's words; of experts it names the stacks."""
    excluded = [*REFUSED.get(name, []), *not_linear(model)]
    if not has_experts(model):
        return LoraConfig(**LORA, exclude_modules=excluded or None)
    config = lora_config(model, rank=LORA["r"], lora_alpha=LORA["lora_alpha"], never=excluded)
    as_peft_reads(config)
    return config


def adapted(model: nn.Module, config: LoraConfig) -> nn.Module:
    """Put LoRA on ``model``, with a B that is not 0."""
    config = copy.deepcopy(config)
    if has_experts(model):
        as_we_read(config)
        with own_words():
            wrapped = get_peft_model(model, config)
        as_peft_reads(config)
    else:
        wrapped = get_peft_model(model, config)
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for _, parameter in sorted(trained(wrapped).items()):
            parameter.copy_(0.1 * torch.randn(parameter.shape, generator=generator))
    return wrapped


def trained(model: nn.Module) -> dict[str, Tensor]:
    return {name: parameter for name, parameter in model.named_parameters() if parameter.requires_grad}


def batch(model: nn.Module) -> dict[str, Tensor]:
    ids = torch.randint(3, VOCABULARY, (2, 13), generator=torch.Generator().manual_seed(0))
    real = torch.ones_like(ids)
    real[1, 9:] = 0
    inputs = {"input_ids": ids, "labels": ids.masked_fill(real == 0, -100)}
    return inputs if model.config.model_type in ("mamba", "mamba2", "rwkv") else inputs | {"attention_mask": real}


@pytest.mark.filterwarnings("ignore:fan_in_fan_out is set to False:UserWarning")  # PEFT finds Conv1D by itself
@pytest.mark.filterwarnings("ignore:The following .*_pattern keys did not match:RuntimeWarning")  # its experts' names
@pytest.mark.parametrize("name", MODELS)
def test_an_architecture_goes_the_whole_way(
    name: str, tmp_path: Path, give_values: Callable[[nn.Module, nn.Module], None]
) -> None:
    cls, config, sizes = MODELS[name]
    torch.manual_seed(0)
    dense = getattr(t, cls)(getattr(t, f"{config}Config")(**sizes)).float().eval()
    dense.save_pretrained(tmp_path / "m")
    model = halfbyte.load(tmp_path / "m", quantization_config=halfbyte.HalfbyteConfig(compute_dtype="float32"))
    give_values(model, dense)
    if dense._can_set_attn_implementation():
        dense.set_attn_implementation("eager")

    config = config_for(model, name)
    wanted, got = adapted(dense, config), halfbyte.prepare_for_training(adapted(model, config))
    assert trained(wanted).keys() == trained(got).keys()
    inputs = batch(dense)
    losses = []
    for one in (wanted, got):
        torch.manual_seed(2)  # Phi-3.5-MoE's router draws
        losses.append(one.train()(**inputs).loss)
    for loss in losses:
        loss.backward()
    assert torch.allclose(*losses, rtol=1e-4)
    gradients = [{n: p.grad for n, p in trained(one).items()} for one in (wanted, got)]
    assert any(g is not None and g.any() for g in gradients[0].values())
    largest = max(g.norm() for g in gradients[0].values() if g is not None)
    for key, gradient in gradients[0].items():
        other = gradients[1][key]
        assert (gradient is None) == (other is None), key
        if gradient is not None and other is not None:
            # fp32: 24 bits, of which sums in another order over two layers leave some 14
            assert (other - gradient).norm() <= 1e-4 * gradient.norm() + 1e-6 * largest, key

    got.eval().save_pretrained(tmp_path / "adapter")
    again = halfbyte.load(tmp_path / "adapter", quantization_config=halfbyte.HalfbyteConfig(compute_dtype="float32"))
    with torch.no_grad():
        real = inputs.get("attention_mask", torch.ones_like(inputs["input_ids"])).bool()
        logits = [one.eval()(**inputs).logits[real] for one in (wanted, got, again)]
    assert torch.equal(logits[1], logits[2])
    assert torch.allclose(logits[0], logits[1], atol=1e-4 * float(logits[0].abs().max()))
    if dense.can_generate():
        ids = inputs["input_ids"][:1, :5]
        texts = [one.generate(input_ids=ids, max_new_tokens=6, do_sample=False) for one in (wanted, again)]
        assert torch.equal(*texts)

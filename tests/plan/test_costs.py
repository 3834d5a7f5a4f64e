"""What layers keep and what models have, by formula, against autograd's own count and the models themselves."""

from pathlib import Path
from typing import Any

import pytest
import torch
import transformers as t
from peft import get_peft_model

from halfbyte import hf
from halfbyte.errors import InputError
from halfbyte.hf.layers import activations
from halfbyte.hf.layers.attention_choice import choose_attention
from halfbyte.hf.layers.expert_adapters import set_dropout
from halfbyte.hf.layers.expert_targets import own_words
from halfbyte.hf.layers.lora_config import lora_config
from halfbyte.plan.costs import layer_costs
from halfbyte.plan.layer_overhead import adapted
from halfbyte.plan.shape import shape_from, shape_of

SMALL = {
    "hidden_size": 64, "intermediate_size": 160, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 2, "vocab_size": 96, "max_position_embeddings": 512, "pad_token_id": 0, "bos_token_id": 1,
    "eos_token_id": 2,
}  # fmt: skip
MIDDLE = SMALL | {"hidden_size": 384, "intermediate_size": 1024, "num_attention_heads": 6, "num_key_value_heads": 3}
WINDOWS = {"layer_types": ["sliding_attention", "full_attention"], "sliding_window": 16}
PARTLY = {"rope_type": "default", "rope_theta": 1e4, "partial_rotary_factor": 0.5}
FAMILIES: dict[str, Any] = {
    "Llama": lambda sizes: t.LlamaConfig(**sizes),
    "Llama with biases": lambda sizes: t.LlamaConfig(**sizes, attention_bias=True, mlp_bias=True),
    "Mistral": lambda sizes: t.MistralConfig(**sizes, sliding_window=20),
    "Qwen2": lambda sizes: t.Qwen2Config(**sizes, tie_word_embeddings=True),
    "Qwen3": lambda sizes: t.Qwen3Config(**sizes, head_dim=32),
    "Gemma2": lambda sizes: t.Gemma2Config(**sizes, **WINDOWS, head_dim=32),
    "Gemma3": lambda sizes: t.Gemma3TextConfig(**sizes, **WINDOWS, head_dim=32),
    "Phi3": lambda sizes: t.Phi3Config(**sizes, resid_pdrop=0.0, rope_parameters=PARTLY),
    "SmolLM3": lambda sizes: t.SmolLM3Config(**sizes, no_rope_layers=[1, 0]),
    "Olmo": lambda sizes: t.OlmoConfig(**sizes),
    "Olmo2": lambda sizes: t.Olmo2Config(**sizes),
    "Olmo3": lambda sizes: t.Olmo3Config(**sizes, **WINDOWS),
    "Ministral": lambda sizes: t.MinistralConfig(**sizes, **WINDOWS, head_dim=32),
}
EXPERTS = {"num_experts": 5, "num_local_experts": 5, "num_experts_per_tok": 2, "moe_intermediate_size": 96}
GROUPS = EXPERTS | {"num_experts": 6, "num_local_experts": 6, "n_routed_experts": 6, "n_group": 2, "topk_group": 1}
MIXTURES: dict[str, Any] = {
    "Mixtral": lambda sizes: t.MixtralConfig(**sizes, **EXPERTS, sliding_window=20),
    "Qwen2Moe": lambda sizes: t.Qwen2MoeConfig(**sizes, **EXPERTS, shared_expert_intermediate_size=128),
    "Qwen3Moe": lambda sizes: t.Qwen3MoeConfig(**sizes, **EXPERTS, head_dim=32, norm_topk_prob=True),
    "Olmoe": lambda sizes: t.OlmoeConfig(**sizes, **EXPERTS),
    "Qwen2Moe, dense at first": lambda sizes: t.Qwen2MoeConfig(**sizes, **EXPERTS, mlp_only_layers=[0]),
    "Qwen3Moe, every second": lambda sizes: t.Qwen3MoeConfig(**sizes, **EXPERTS, head_dim=32, decoder_sparse_step=2),
    "Glm4Moe": lambda sizes: t.Glm4MoeConfig(**sizes, **GROUPS, first_k_dense_replace=0),
    "Glm4Moe, dense at first": lambda sizes: t.Glm4MoeConfig(**sizes, **GROUPS, norm_topk_prob=False),
}


def ranks(shape: Any, rank: int) -> list[dict[str, int]]:
    return [{linear.path: rank for linear in layer.linears} for layer in shape.layers]


@pytest.mark.parametrize("sizes", [SMALL, MIDDLE], ids=["small", "middle"])
@pytest.mark.parametrize("family", FAMILIES)
def test_a_layer_keeps_what_autograd_saves_in_it(family: str, sizes: dict[str, int]) -> None:
    config = FAMILIES[family](sizes)
    model = adapted(t.AutoModelForCausalLM.from_config(config), rank=4, dropout=0.1)
    shape = shape_of(config)
    assert layer_costs(shape, ranks(shape, 4), length=48, batch=3, dropout=True) == activations.measure(model, 48, 3)


def mixture(config: Any, folder: Path, dropout: float = 0.0, **options: Any) -> Any:
    """Return a random mixture in 4 bits with an adapter, ready to train, as a run makes it."""
    t.AutoModelForCausalLM.from_config(config).bfloat16().save_pretrained(folder)
    model = hf.load(folder, quantization_config=hf.HalfbyteConfig(compute_dtype="bfloat16"))
    choose_attention(model)
    with own_words():
        wrapped = get_peft_model(model, lora_config(model, lora_alpha=8, never=hf.not_linear(model), **options))
    set_dropout(wrapped, "default", dropout)
    return hf.prepare(wrapped).train()


@pytest.mark.parametrize("sizes", [SMALL, MIDDLE], ids=["small", "middle"])
@pytest.mark.parametrize("family", MIXTURES)
def test_a_layer_of_a_mixture_keeps_what_autograd_saves_in_it(
    family: str, sizes: dict[str, int], tmp_path: Path
) -> None:
    config = MIXTURES[family](sizes)
    model = mixture(config, tmp_path, dropout=0.1, rank=4)
    shape = shape_of(config)
    assert layer_costs(shape, ranks(shape, 4), length=48, batch=3, dropout=True) == activations.measure(model, 48, 3)


@pytest.mark.parametrize("family", FAMILIES | MIXTURES)
def test_parameters_are_those_of_the_model(family: str) -> None:
    model = t.AutoModelForCausalLM.from_config((FAMILIES | MIXTURES)[family](SMALL))
    shape = shape_of(model.config)
    assert shape.parameters == model.num_parameters()
    assert shape_from(model) == shape


@pytest.mark.parametrize(
    ("config", "parameters", "active"),
    [
        (
            t.Qwen3MoeConfig(
                hidden_size=2048, num_hidden_layers=48, num_experts=128, num_experts_per_tok=8, head_dim=128,
                moe_intermediate_size=768, num_attention_heads=32, num_key_value_heads=4, vocab_size=151_936,
                tie_word_embeddings=False, pad_token_id=0,
            ),
            30_532_122_624,  # Qwen3-30B-A3B: 30.5 billion, 3.3 of them active
            3.3,
        ),
        (t.MixtralConfig(vocab_size=32_000, pad_token_id=0), 46_702_792_704, 12.9),  # 8x7B
    ],
    ids=["Qwen3-30B-A3B", "Mixtral-8x7B"],
)  # fmt: skip
def test_published_mixtures_have_the_sizes_that_are_published(config: Any, parameters: int, active: float) -> None:
    shape = shape_of(config)
    assert shape.parameters == parameters
    assert shape.active_parameters / 1e9 == pytest.approx(active, abs=0.06)


def test_a_mixture_whose_first_layer_is_dense_has_the_size_that_is_published() -> None:
    shape = shape_of(
        t.Glm4MoeConfig(  # GLM-4.5-Air: 106 billion, 12 of them active, as its card counts: without embeddings and head
            hidden_size=4096, intermediate_size=10_944, num_hidden_layers=46, num_attention_heads=96,
            num_key_value_heads=8, head_dim=128, moe_intermediate_size=1408, n_routed_experts=128,
            num_experts_per_tok=8, n_shared_experts=1, first_k_dense_replace=1, attention_bias=True,
            vocab_size=151_552, pad_token_id=0,
        )
    )  # fmt: skip
    assert int(shape.parameters / 1e9) == 106
    assert int((shape.active_parameters - shape.embedding_weights) / 1e9) == 12
    assert [layer.mixture is None for layer in shape.layers] == [True, *[False] * 45]


def test_layers_without_adapters_keep_less() -> None:
    config = FAMILIES["Llama"](SMALL)
    shape = shape_of(config)
    whole = layer_costs(shape, ranks(shape, 4), 48, 1)
    bare = layer_costs(shape, [{} for _ in shape.layers], 48, 1)
    assert all(a.kept > b.kept for a, b in zip(whole, bare, strict=True))


@pytest.mark.parametrize("config", [t.GPTNeoXConfig(hidden_size=64, num_attention_heads=4), t.T5Config()])
def test_a_family_that_is_not_known_is_refused_in_a_sentence(config: Any) -> None:
    with pytest.raises(InputError, match=r"somebody is .*; steps are foretold of the families .*Llama.* alone\.$"):
        shape_of(config, "somebody")


def test_the_largest_models_take_no_memory_to_look_at() -> None:
    config = t.LlamaConfig(
        hidden_size=8192, intermediate_size=28_672, num_hidden_layers=80, num_attention_heads=64,
        num_key_value_heads=8, vocab_size=128_256, tie_word_embeddings=False,
    )  # fmt: skip
    assert shape_of(config).parameters == 70_553_706_496  # Llama 3.1 70B, as its checkpoint's index has it
    assert not torch.cuda.is_available() or torch.cuda.memory_allocated() == 0

"""What layers keep and what models have, by formula, against autograd's own count and the models themselves."""

from typing import Any

import pytest
import torch
import transformers as t

from halfbyte.errors import InputError
from halfbyte.hf.layers import activations
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


def ranks(shape: Any, rank: int) -> list[dict[str, int]]:
    return [{linear.path: rank for linear in shape.linears} for _ in range(shape.layers)]


@pytest.mark.parametrize("sizes", [SMALL, MIDDLE], ids=["small", "middle"])
@pytest.mark.parametrize("family", FAMILIES)
def test_a_layer_keeps_what_autograd_saves_in_it(family: str, sizes: dict[str, int]) -> None:
    config = FAMILIES[family](sizes)
    model = adapted(t.AutoModelForCausalLM.from_config(config), rank=4, dropout=0.1)
    shape = shape_of(config)
    assert layer_costs(shape, ranks(shape, 4), length=48, batch=3, dropout=True) == activations.measure(model, 48, 3)


@pytest.mark.parametrize("family", FAMILIES)
def test_parameters_are_those_of_the_model(family: str) -> None:
    model = t.AutoModelForCausalLM.from_config(FAMILIES[family](SMALL))
    shape = shape_of(model.config)
    assert shape.parameters == model.num_parameters()
    assert shape_from(model) == shape


def test_layers_without_adapters_keep_less() -> None:
    config = FAMILIES["Llama"](SMALL)
    shape = shape_of(config)
    whole = layer_costs(shape, ranks(shape, 4), 48, 1)
    bare = layer_costs(shape, [{} for _ in range(shape.layers)], 48, 1)
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

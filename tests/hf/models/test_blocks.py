"""Layers run one by one over texts give what the whole model gives, before and after they are rounded."""

from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import (
    AutoModel,
    AutoModelForCausalLM,
    BertConfig,
    FalconConfig,
    Gemma2Config,
    Gemma3TextConfig,
    GPT2Config,
    LlamaConfig,
    Olmo2Config,
    Phi3Config,
    PreTrainedModel,
    Qwen3Config,
    T5Config,
)

from halfbyte.errors import InputError
from halfbyte.hf.models.blocks import Blocks
from halfbyte.quant.rounding import Compensation

SIZES = {
    "vocab_size": 101, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 3, "num_attention_heads": 4,
    "num_key_value_heads": 2, "head_dim": 8, "sliding_window": 5, "pad_token_id": 0,
}  # fmt: skip
CONFIGS = {
    "llama": LlamaConfig(**SIZES),
    "qwen3": Qwen3Config(**SIZES),
    "gemma2": Gemma2Config(**SIZES),
    "gemma3": Gemma3TextConfig(**SIZES, layer_types=["sliding_attention", "full_attention", "sliding_attention"]),
    "phi3": Phi3Config(**SIZES),
    "olmo2": Olmo2Config(**SIZES),
    "falcon": FalconConfig(vocab_size=101, hidden_size=32, num_hidden_layers=3, num_attention_heads=4),
    "gpt2": GPT2Config(vocab_size=101, n_embd=32, n_layer=3, n_head=4),
    "bert": BertConfig(
        vocab_size=101, hidden_size=32, intermediate_size=48, num_hidden_layers=3, num_attention_heads=4
    ),
}
TEXTS = [torch.randint(1, 100, (n,), generator=torch.Generator().manual_seed(n)) for n in (17, 1, 9)]


def built(config: Any) -> PreTrainedModel:
    torch.manual_seed(0)
    kind = AutoModel if config.model_type == "bert" else AutoModelForCausalLM
    model: PreTrainedModel = kind.from_config(config, dtype=torch.float32).eval()
    return model


def weights(model: PreTrainedModel) -> set[str]:
    """The weights of the linear layers that stand in a list."""
    return {
        name
        for name, x in model.named_parameters()
        if x.ndim == 2 and any(part.isdigit() for part in name.split(".")) and "norm" not in name
    }


def blocks_of(model: PreTrainedModel, round_one: Any) -> Blocks:
    state = dict(model.named_parameters()) | dict(model.named_buffers())
    return Blocks(type(model), model.config, lambda name: state[name].detach(), weights(model), TEXTS, round_one)


def states(model: PreTrainedModel, layers: int) -> list[list[Tensor]]:
    """What each layer of the whole model hands on."""
    found: list[list[Tensor]] = [[] for _ in range(layers)]
    inner: Any = getattr(model, model.base_model_prefix, model)
    stack = next(m for m in inner.modules() if isinstance(m, torch.nn.ModuleList) and len(m) == layers)
    handles = [
        layer.register_forward_hook(lambda _, __, out, n=n: found[n].append(out[0] if isinstance(out, tuple) else out))
        for n, layer in enumerate(stack)
    ]
    with torch.no_grad():
        for text in TEXTS:
            inner(input_ids=text.unsqueeze(0))
    for handle in handles:
        handle.remove()
    return found


@pytest.mark.parametrize("family", CONFIGS)
def test_both_streams_are_the_models_before_and_after(family: str) -> None:
    model = built(CONFIGS[family])
    before = states(model, 3)
    shaken: dict[str, Tensor] = {}

    def shake(name: str, weight: Tensor, inputs: Compensation | None) -> Tensor:
        assert inputs is not None
        noise = torch.randn(weight.shape, generator=torch.Generator().manual_seed(len(shaken)))
        shaken[name] = weight + 0.02 * noise
        return shaken[name]

    blocks = blocks_of(model, shake)
    exact, rounded = [], []
    for _ in range(3):
        blocks.advance()
        exact.append(list(blocks._states[0]))
        rounded.append(list(blocks._states[1]))
    assert shaken.keys() == weights(model)
    with torch.no_grad():
        for name, x in model.named_parameters():
            if name in shaken:
                x.copy_(shaken[name].T if family == "gpt2" else shaken[name])
    after = states(model, 3)
    for layer in range(3):
        for text in range(len(TEXTS)):
            assert torch.allclose(exact[layer][text], before[layer][text], atol=1e-5)
            assert torch.allclose(rounded[layer][text], after[layer][text], atol=1e-5)
            assert not torch.allclose(exact[layer][text], after[layer][text], atol=1e-4)


def test_weights_with_the_same_inputs_are_rounded_together_in_the_order_of_use() -> None:
    model = built(CONFIGS["llama"])
    seen: list[tuple[str, Any]] = []

    def watch(name: str, weight: Tensor, inputs: Compensation | None) -> Tensor:
        seen.append((name.removeprefix("model.layers.0."), inputs))
        return weight

    blocks_of(model, watch).advance()
    names = [name.rpartition(".weight")[0].rpartition(".")[2] for name, _ in seen]
    assert names == ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
    q, k, v, o, gate, up, down = (which for _, which in seen)
    assert q is k is v and gate is up and len({*map(id, (q, o, gate, down))}) == 4


def test_a_model_of_two_stacks_is_refused_in_a_sentence() -> None:
    model = built_t5()
    with pytest.raises(InputError, match=r"2 stacks of layers.*--rounding random"):
        blocks_of(model, lambda *_: None)


def built_t5() -> PreTrainedModel:
    from transformers import AutoModelForSeq2SeqLM

    config = T5Config(vocab_size=101, d_model=16, d_kv=4, d_ff=24, num_layers=2, num_heads=4, decoder_start_token_id=0)
    model: PreTrainedModel = AutoModelForSeq2SeqLM.from_config(config).eval()
    return model

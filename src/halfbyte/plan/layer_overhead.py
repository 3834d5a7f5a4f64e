"""What a decoder layer takes beside its work: Python, PEFT, autograd, the launching of small kernels.

A model of almost no size, with an adapter, is run forward and backward with few layers and with more; the difference
is the layers' own.
"""

from collections.abc import Callable
from typing import Any

import torch
from peft import LoraConfig, get_peft_model
from torch import nn
from transformers import LlamaConfig, LlamaForCausalLM

from halfbyte.hf.layers.attention_choice import choose_attention
from halfbyte.hf.layers.prepare import prepare
from halfbyte.nn import Linear4bit

FEW, MORE = 2, 10


def layer_seconds(both: Callable[[Callable[[], Callable[[], Any]]], tuple[float, float]]) -> tuple[float, float]:
    """Return the seconds of a layer's forward and backward; ``both`` times a forward and the backward it returns."""
    times = [both(_work(count)) for count in (FEW, MORE)]
    forward, backward = (max(times[1][way] - times[0][way], 0.0) / (MORE - FEW) for way in (0, 1))
    return forward, backward


def small_model(layers: int, config: Any = None) -> Any:
    """Return a random model in 4 bits with LoRA, ready to train: Llama's, or of a configuration."""
    config = config or LlamaConfig(
        vocab_size=64, hidden_size=64, intermediate_size=128, num_hidden_layers=layers, num_attention_heads=4,
        num_key_value_heads=2,
    )  # fmt: skip
    model = LlamaForCausalLM(config)
    return adapted(model)


def adapted(model: Any, rank: int = 8, dropout: float = 0.0) -> Any:
    """Quantize a model's layers, in place, and return it with LoRA on them, ready to train, in bf16."""
    model = model.to(torch.bfloat16)
    head = model.get_output_embeddings()
    for name, module in list(model.named_modules()):
        if type(module) is nn.Linear and module is not head:
            model.set_submodule(name, Linear4bit.from_linear(module, compute_dtype=torch.bfloat16))
    model.requires_grad_(False)
    choose_attention(model)
    lora = LoraConfig(r=rank, lora_dropout=dropout, target_modules="all-linear", task_type="CAUSAL_LM")
    return prepare(get_peft_model(model, lora)).train()


def _work(layers: int) -> Callable[[], Callable[[], Any]]:
    model = small_model(layers)
    parameters = [p for p in model.parameters() if p.requires_grad]
    ids = torch.zeros(1, 8, dtype=torch.long)

    def forward() -> Callable[[], Any]:
        loss = model(input_ids=ids, labels=ids, use_cache=False).loss
        return lambda: torch.autograd.grad(loss, parameters)

    return forward

"""Models as transformers with bitsandbytes opens them, on any chip."""

import bitsandbytes
import torch
from bitsandbytes.functional import QuantState, dequantize_blockwise
from torch import Tensor, nn
from torch.nn.functional import linear


def by_values(model: nn.Module) -> int:
    """Let bitsandbytes' 4-bit layers multiply by what their codes stand for; return how many there are.

    With AVX-512 its own products and ``dequantize_4bit`` (0.50) are wrong for rows shorter than a block.
    """
    layers = [module for module in model.modules() if isinstance(module, bitsandbytes.nn.Linear4bit)]
    for layer in layers:

        def forward(x: Tensor, layer: bitsandbytes.nn.Linear4bit = layer) -> Tensor:
            weight = values(layer.weight.data, layer.weight.quant_state)
            return linear(x.to(weight.dtype), weight, layer.bias).to(x.dtype)

        layer.forward = forward
    return len(layers)


def values(packed: Tensor, state: QuantState) -> Tensor:
    """Return a 4-bit weight by its formula: the code's value times its block's constant."""
    codes = torch.stack([packed.flatten() >> 4, packed.flatten() & 15], dim=1).flatten().long()
    absmax = dequantize_blockwise(state.absmax, state.state2) + state.offset if state.nested else state.absmax
    scales = absmax.flatten().repeat_interleave(state.blocksize)[: codes.numel()]
    return (state.code[codes] * scales).view(state.shape).to(state.dtype)

"""What tests of several models share."""

from collections.abc import Callable

import pytest
import torch
from torch import nn

from halfbyte.hf.layers.experts import Experts
from halfbyte.nn import FrozenLinear


def give_values(model: nn.Module, dense: nn.Module) -> None:
    """Give transformers' own model, in place, the values that the layers of ours stand for; of experts its stacks."""
    mixtures = {path: module for path, module in model.named_modules() if isinstance(module, Experts)}
    for path, module in model.named_modules():
        if isinstance(module, FrozenLinear) and not path.startswith(tuple(f"{mixture}." for mixture in mixtures)):
            weight = module.dequantize(torch.float32)
            dense.get_submodule(path).weight.data.copy_(weight.T if module.transposed else weight)
    for path, experts in mixtures.items():
        for name, layers in experts.layers_of.items():
            matrices = [
                torch.cat([experts.get_submodule(f"{number}.{layer}").dequantize(torch.float32) for layer in layers])
                for number in range(experts.num_experts)
            ]
            is_of_inputs = experts.is_transposed or experts.swapped
            held = getattr(dense.get_submodule(path), name).data
            held.copy_(torch.stack([matrix.T if is_of_inputs else matrix for matrix in matrices]))


@pytest.fixture(name="give_values")
def _give_values() -> Callable[[nn.Module, nn.Module], None]:
    return give_values

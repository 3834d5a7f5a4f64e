"""Modules that are trained as a whole (PEFT's ``modules_to_save``) in fp32, within a model that computes in 16 bits.

PEFT copies them in the dtype of the base, and a step of a small learning rate is lost in the rounding of bf16. Here the
copies of linear layers and embeddings are fp32, and rounded where they are used, as LoRA's factors are.
"""

import torch
from peft import PeftModel
from peft.utils import ModulesToSaveWrapper
from torch import Tensor, nn


class WholeLinear(nn.Linear):
    """A linear layer in fp32 that computes in the dtype of its input."""

    def forward(self, input: Tensor) -> Tensor:
        """``[..., in]`` to ``[..., out]`` in the dtype of ``input``."""
        bias = None if self.bias is None else self.bias.to(input.dtype)
        return nn.functional.linear(input, self.weight.to(input.dtype), bias)


class WholeEmbedding(nn.Embedding):
    """An embedding in fp32 that gives rows in the dtype that it had, ``given``."""

    given: torch.dtype

    def forward(self, input: Tensor) -> Tensor:
        """Ids ``[...]`` to rows ``[..., width]``."""
        return super().forward(input).to(self.given)


def train_in_fp32(model: PeftModel, adapter: str = "default") -> None:
    """Make the copies of linear layers and embeddings that ``adapter`` trains fp32, in place; others stay."""
    for wrapper in [module for module in model.modules() if isinstance(module, ModulesToSaveWrapper)]:
        for module in wrapper.modules_to_save[adapter].modules() if adapter in wrapper.modules_to_save else ():
            if type(module) is nn.Embedding:
                vars(module)["given"] = module.weight.dtype
                module.__class__ = WholeEmbedding
            elif type(module) is nn.Linear:
                module.__class__ = WholeLinear
            else:
                continue
            for parameter in module.parameters(recurse=False):
                parameter.data = parameter.data.float()

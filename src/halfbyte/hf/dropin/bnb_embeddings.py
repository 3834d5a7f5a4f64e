"""bitsandbytes' dense embeddings (0.50 ``bitsandbytes.nn``), whose optimizer state has 32 bits."""

from typing import Any

import torch
from torch import Tensor, nn

from halfbyte.hf.dropin.bnb_optimizers import GlobalOptimManager


class Embedding(nn.Embedding):
    """``nn.Embedding``, begun after Xavier; its state in our Adams has 32 bits, whatever the others' have."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        GlobalOptimManager.get_instance().register_module_override(self, "weight", {"optim_bits": 32})

    def reset_parameters(self) -> None:
        """Begin anew."""
        nn.init.xavier_uniform_(self.weight)
        self._fill_padding_idx_with_zero()


class StableEmbedding(Embedding):
    """The same with a layer norm behind it, in fp32 (arXiv 2110.02861, section 2.3)."""

    def __init__(self, num_embeddings: int, embedding_dim: int, *args: Any, **kwargs: Any) -> None:
        super().__init__(num_embeddings, embedding_dim, *args, **kwargs)
        self.norm = nn.LayerNorm(embedding_dim, device=kwargs.get("device"))

    def forward(self, input: Tensor) -> Tensor:
        """``[...]`` to ``[..., embedding_dim]`` in the dtype of the weight."""
        rows = super().forward(input).to(torch.get_default_dtype())
        normed: Tensor = self.norm(rows)
        return normed.to(self.weight.dtype)

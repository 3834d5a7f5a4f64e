"""Low-rank adaptation over a frozen linear layer (LoRA, arXiv 2106.09685; QLoRA, arXiv 2305.14314, equation 5).

    y = x dequant(W)ᵀ + b + s (x Aᵀ) Bᵀ

The first terms are :class:`halfbyte.nn.Linear4bit`; this file is the last. A and B are kept in fp32 and take part in
the dtype of the product. The scale is applied between the two products, to rank values a row instead of ``out``.
"""

from torch import Tensor
from torch.nn.functional import linear


def lora_delta(x: Tensor, a: Tensor, b: Tensor, scaling: float) -> Tensor:
    """Return ``s (x Aᵀ) Bᵀ``.

    Args:
        x: ``[..., in]``, in the dtype to compute in.
        a: ``[rank, in]``.
        b: ``[out, rank]``.
        scaling: s, ``lora_alpha / rank``.

    Returns:
        ``[..., out]`` in the dtype of ``x``.
    """
    return linear(linear(x, a.to(x.dtype)) * scaling, b.to(x.dtype))

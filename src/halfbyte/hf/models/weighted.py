"""Weighted sums of LoRA matrices by PEFT's (0.21) ways: A with A and B with B, each pruned and signed by its rule.

``linear`` adds them; ``ties`` (arXiv 2306.01708) keeps the largest values and those of the sign that wins;
``dare_linear`` and ``dare_ties`` (arXiv 2311.03099) keep values at random, by torch's generator, scaled up;
``magnitude_prune`` keeps the largest. All of them are approximations of the sum: the product of sums is not the sum of
products.
"""

from collections.abc import Sequence

import torch
from peft.utils.merge_utils import dare_linear, dare_ties, magnitude_prune, task_arithmetic, ties
from torch import Tensor

from halfbyte.choices import CombineMethod
from halfbyte.errors import InputError
from halfbyte.hf.models.low_rank import Part

DENSITY = 0.5


def weighted(parts: Sequence[Part], weights: Sequence[float], method: CombineMethod, density: float | None) -> Part:
    """Return the weighted sum of what adapters of one rank add to a module, as PEFT's ``add_weighted_adapter`` has it.

    Args:
        parts: of one rank.
        weights: of each; their signs go to A, the roots of their sizes to both.
        method: one of PEFT's that sum A and B apart.
        density: the part of the values that is kept.

    Raises:
        InputError: the density is none.
    """
    density = DENSITY if density is None else density
    if not 0 < density <= 1:
        raise InputError(f"density is {density}; it is a part of the whole, between 0 and 1.")
    factors = torch.tensor([(abs(w) * part.scaling) ** 0.5 for w, part in zip(weights, parts, strict=True)])
    signs = torch.tensor([1.0 if weight >= 0 else -1.0 for weight in weights])
    return Part(
        _summed([part.a for part in parts], factors * signs, method, density),
        _summed([part.b for part in parts], factors, method, density),
        1.0,
        parts[0].form,
    )


def _summed(tensors: list[Tensor], weights: Tensor, method: CombineMethod, density: float) -> Tensor:
    if method == "linear":
        found: Tensor = task_arithmetic(tensors, weights)
    elif method == "ties":
        found = ties(tensors, weights, density, "total")
    elif method == "magnitude_prune":
        found = magnitude_prune(tensors, weights, density)
    elif method == "dare_linear":
        found = dare_linear(tensors, weights, density)
    else:
        found = dare_ties(tensors, weights, density, "total")
    return found

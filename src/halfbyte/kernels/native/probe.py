"""The ceilings of the tier in force (csrc/probe.h), and its elementary functions (csrc/lanes.inl) by themselves."""

import torch
from torch import Tensor

from halfbyte.kernels.native.runtime import extension, threads, tier_index


def probe(rounds: int) -> int:
    """Run ``rounds`` rounds of a register-only loop of the tier's fastest arithmetic for products of bf16 matrices.

    Returns:
        the additions and multiplications done, some hundreds a round: over the time taken, the tier's ceiling.
    """
    return extension.probe(tier_index(), threads(), rounds)


def probe_lookups(rounds: int) -> int:
    """Run ``rounds`` rounds of a register-only loop of the tier's lookups of 4-bit values.

    Returns:
        the values looked up: over the time taken, the ceiling of a product of one row. 0 if the tier has no such loop.
    """
    return extension.probe_lookups(tier_index(), threads(), rounds)


def probed_arithmetic() -> str:
    """Return what :func:`probe` runs, in words."""
    return extension.probed_arithmetic(tier_index())


def elementary(name: str, x: Tensor) -> Tensor:
    """Return ``exp``, ``sigmoid`` or ``tanh`` of fp32 values as the tier's element-wise kernels have it.

    Within 2 units in the last place for ``exp``, 3 for the others; csrc/lanes.inl.
    """
    y = torch.empty(x.numel(), dtype=torch.float32, device="cpu")
    getattr(extension, name)(tier_index(), x.contiguous().data_ptr(), x.numel(), y.data_ptr())
    return y.view(x.shape)

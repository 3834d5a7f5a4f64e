"""The softmax over a vocabulary, chunk by chunk (csrc/softmax.inl)."""

import dataclasses

from torch import Tensor

from halfbyte.kernels.native.runtime import TYPES, extension, threads, tier_index
from halfbyte.kernels.softmax import RunningSoftmax


def fold_softmax(
    logits: Tensor, labels: Tensor, first: int, softmax: RunningSoftmax, scale: float, cap: float | None, gradient: bool
) -> None:
    """Take a chunk of the vocabulary into the softmax of each row; tiers differ in the last places of fp32."""
    rows, width = logits.shape
    extension.fold_softmax(
        tier_index(),
        threads(),
        logits.data_ptr(),
        TYPES[logits.dtype],
        rows,
        width,
        labels.data_ptr(),
        first,
        scale,
        0.0 if cap is None else cap,
        gradient,
        [getattr(softmax, field.name).data_ptr() for field in dataclasses.fields(softmax)],
    )

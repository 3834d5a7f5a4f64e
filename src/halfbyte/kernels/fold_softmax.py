"""The softmax over a vocabulary, chunk by chunk: arguments checked, then handed to a provider.

Formulas, shapes and dtypes are those of :mod:`halfbyte.kernels.reference`; errors as in :mod:`halfbyte.kernels.checks`.
"""

import torch
from torch import Tensor

from halfbyte.kernels.checks import check_floating
from halfbyte.kernels.provider import provider_for
from halfbyte.kernels.softmax import RunningSoftmax


def fold_softmax(
    logits: Tensor,
    labels: Tensor,
    first: int,
    softmax: RunningSoftmax,
    *,
    scale: float = 1.0,
    cap: float | None = None,
    gradient: bool = False,
) -> None:
    """Take the logits ``[n, width]`` of a chunk of the vocabulary into the softmax of each row, in place.

    See :func:`halfbyte.kernels.reference.fold_softmax`.
    """
    check_floating("logits", logits.dtype)
    if logits.ndim != 2 or logits.shape[1] == 0 or not logits.is_contiguous():
        raise ValueError(
            f"logits have shape {tuple(logits.shape)} and strides {logits.stride()}; they must be [n, width] with a "
            "width of at least 1, and contiguous"
        )
    n = len(logits)
    if labels.dtype != torch.int64 or labels.device != logits.device or not labels.is_contiguous():
        raise TypeError(
            f"labels are {labels.dtype} on {labels.device} with strides {labels.stride()}; they must be int64 on "
            f"{logits.device} and contiguous"
        )
    if labels.shape != (n,) or softmax.sum.shape != (n,):
        raise ValueError(f"{n} rows of logits, labels {tuple(labels.shape)} and a softmax of {len(softmax.sum)} rows")
    if cap is not None and not cap > 0:
        raise ValueError(f"cap is {cap}; it must be above 0, or None")
    provider_for(logits.device).fold_softmax(logits, labels, first, softmax, scale, cap, gradient)

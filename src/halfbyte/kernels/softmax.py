"""The softmax over a vocabulary that is seen in chunks: what is kept of each row between them, and what it gives.

With z the logits of one row and m the largest so far, the sums are taken of exp(z - m) and shrink by exp(m - m')
when a larger m' comes (the online softmax, arXiv 1805.02867).
"""

import dataclasses
from typing import Self

import torch
from torch import Tensor


@dataclasses.dataclass(frozen=True, eq=False)
class RunningSoftmax:
    """Of ``n`` rows, over the part of the vocabulary seen so far; changed in place by every chunk.

    Attributes:
        maximum: m, fp32 ``[n]``.
        sum: Σ exp(z - m), fp32 ``[n]``.
        weighted: Σ exp(z - m) (z - m), fp32 ``[n]``.
        squares: Σ exp(z - m)², fp32 ``[n]``.
        total: Σ z, fp32 ``[n]``.
        label: z of the row's label, fp32 ``[n]``; NaN until seen.
        slope: dz of the label by its logit, fp32 ``[n]``; NaN until seen.
        shrink: exp(m - m') of the last chunk, fp32 ``[n]``.
        top: the first index of the largest logit, int64 ``[n]``.
    """

    maximum: Tensor
    sum: Tensor
    weighted: Tensor
    squares: Tensor
    total: Tensor
    label: Tensor
    slope: Tensor
    shrink: Tensor
    top: Tensor

    def __post_init__(self) -> None:
        n = len(self.sum)
        for field in dataclasses.fields(self):
            x = getattr(self, field.name)
            dtype = torch.int64 if field.name == "top" else torch.float32
            if x.dtype != dtype or x.shape != (n,) or x.device != self.sum.device or not x.is_contiguous():
                raise ValueError(
                    f"{field.name} is {x.dtype} {tuple(x.shape)} on {x.device} with strides {x.stride()}; it must be "
                    f"{dtype} ({n},) on {self.sum.device} and contiguous"
                )

    @classmethod
    def empty(cls, n: int, device: torch.device) -> Self:
        """Return the state of ``n`` rows of which nothing was seen yet."""
        numbers = torch.zeros(8, n, dtype=torch.float32, device=device)
        numbers[0] = torch.finfo(torch.float32).min
        numbers[5:7] = torch.nan
        names = [field.name for field in dataclasses.fields(cls) if field.name != "top"]
        top = torch.zeros(n, dtype=torch.int64, device=device)
        return cls(**dict(zip(names, numbers.unbind(0), strict=True)), top=top)

    def log_sum(self) -> Tensor:
        """log Σ exp(z), fp32 ``[n]``."""
        return self.maximum + self.sum.log()

    def log_prob(self) -> Tensor:
        """The logarithm of the label's probability, fp32 ``[n]``."""
        return self.label - self.maximum - self.sum.log()

    def entropy(self) -> Tensor:
        """-Σ p log p, fp32 ``[n]``, in nats."""
        return self.sum.log() - self.weighted / self.sum

    def log_sum_squares(self) -> Tensor:
        """The logarithm of Σ p², fp32 ``[n]``."""
        return self.squares.log() - 2 * self.sum.log()

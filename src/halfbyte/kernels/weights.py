"""What a 4-bit and an int8 weight are to the kernels."""

import dataclasses
import math

import torch
from torch import Tensor


@dataclasses.dataclass(frozen=True, eq=False)
class Nested:
    """Second-level statistics: how the coded 8 bits of ``Statistics.absmax`` become fp32 again.

    Attributes:
        absmax: fp32 ``[ceil(blocks / blocksize)]``.
        code: fp32 ``[256]``, ascending: bitsandbytes' signed dynamic map.
        blocksize: first-level statistics per second-level block; 256 in the paper and in bitsandbytes.
        offset: the fp32 mean of the first-level statistics, subtracted before they were quantized.
    """

    absmax: Tensor
    code: Tensor
    blocksize: int
    offset: float


@dataclasses.dataclass(frozen=True, eq=False)
class Statistics:
    """What is needed beside the packed codes to know the values of a 4-bit weight.

    Attributes:
        absmax: fp32 ``[blocks]``; with double quantization uint8 ``[blocks]``, codes of ``nested``.
        code: fp32 ``[16]``, the value of each 4-bit code.
        blocksize: values per block of the flattened weight.
        nested: the second level, or None without double quantization.
    """

    absmax: Tensor
    code: Tensor
    blocksize: int
    nested: Nested | None = None

    def to(self, device: torch.device | str) -> "Statistics":
        """Return the statistics on ``device``; dtypes never change."""
        nested = self.nested and dataclasses.replace(
            self.nested, absmax=self.nested.absmax.to(device), code=self.nested.code.to(device)
        )
        return dataclasses.replace(self, absmax=self.absmax.to(device), code=self.code.to(device), nested=nested)


@dataclasses.dataclass(frozen=True, eq=False)
class Weight4bit:
    """A weight in 4 bits: each value is ``code[q] * absmax``, ``q`` being its code and ``absmax`` its block's.

    Attributes:
        packed: uint8, ``ceil(n / 2)`` bytes at any address, the codes of the flattened weight, the first of two in the
            high half.
        statistics: block constants and table.
        shape: of the ``n`` values; ``(N, K)`` in a product.
    """

    packed: Tensor
    statistics: Statistics
    shape: tuple[int, ...]

    def numel(self) -> int:
        """Return how many values there are."""
        return math.prod(self.shape)


@dataclasses.dataclass(frozen=True, eq=False)
class WeightInt8:
    """A weight in int8, evenly spaced: each value is ``code * (absmax / 127)``.

    Attributes:
        codes: int8 ``[N, K]``, any address.
        absmax: fp32, one per block of the flattened weight.
        blocksize: values per block. With K it is bitsandbytes' row-wise LLM.int8 weight.
    """

    codes: Tensor
    absmax: Tensor
    blocksize: int

    @property
    def shape(self) -> tuple[int, int]:
        """``(N, K)``."""
        rows, columns = self.codes.shape
        return rows, columns

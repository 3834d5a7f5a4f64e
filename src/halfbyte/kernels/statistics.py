"""What a kernel needs beside the packed codes to know the values of a 4-bit weight."""

import dataclasses

import torch
from torch import Tensor


@dataclasses.dataclass(frozen=True, eq=False)
class Nested:
    """Second-level statistics: how the 8-bit codes of ``Statistics.absmax`` become fp32 again.

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
    """The quantization statistics of a 4-bit weight.

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

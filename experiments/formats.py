"""The data types that are compared, and what a matrix becomes in each of them."""

from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from halfbyte import HalfbyteConfig, quantize_4bit
from halfbyte.quant import quantize_int8

BLOCKSIZE = 64


@dataclass(frozen=True)
class Format:
    """A data type with its blocks.

    Attributes:
        name: of the type, as tables have it.
        quant_type: as halfbyte calls it.
        double_quant: whether constants are quantized too.
        blocksize: values that share a constant.
    """

    name: str
    quant_type: str
    double_quant: bool = False
    blocksize: int = BLOCKSIZE

    def config(self, dtype: torch.dtype) -> HalfbyteConfig:
        """Return how halfbyte is told."""
        size = None if self.quant_type == "none" else self.blocksize
        return HalfbyteConfig(self.quant_type, size, self.double_quant, compute_dtype=dtype)

    def rounded(self, weight: Tensor) -> tuple[Tensor, float]:
        """Return the values that a matrix has in this type, in fp32, and its bits per parameter."""
        if self.quant_type == "none":
            return weight.float(), 8.0 * weight.element_size()
        if self.quant_type == "int8":
            held: Any = quantize_int8(weight, self.blocksize)
        else:
            held = quantize_4bit(weight, self.quant_type, self.blocksize, self.double_quant)
        return held.dequantize(torch.float32), held.bits_per_parameter

    def in_blocks(self, size: int) -> "Format":
        """Return the same type in blocks of another size."""
        return replace(self, blocksize=size)

    def errors(self, weights: dict[str, Tensor]) -> dict[str, float]:
        """Return what rounding does to weights: squared error over squares, absolute error over magnitudes, bits."""
        squares = moved = magnitudes = strayed = bits = 0.0
        for weight in weights.values():
            values, size = self.rounded(weight)
            off = (values - weight).double()
            squares, moved = squares + float(weight.double().square().sum()), moved + float(off.square().sum())
            magnitudes, strayed = magnitudes + float(weight.double().abs().sum()), strayed + float(off.abs().sum())
            bits += size * weight.numel()
        count = sum(weight.numel() for weight in weights.values())
        return {"squared_error": moved / squares, "absolute_error": strayed / magnitudes, "bits": bits / count}


UNQUANTIZED = Format("unquantized", "none")
INT8 = Format("int8", "int8")
NF4, NF4_DQ = Format("NF4", "nf4"), Format("NF4 + DQ", "nf4", double_quant=True)
FP4 = Format("FP4, bitsandbytes", "fp4")
E2M1, E3M0 = Format("FP4 E2M1", "e2m1"), Format("FP4 E3M0", "e3m0")
INT4 = Format("Int4", "int4")
FORMATS = (INT4, E2M1, E3M0, FP4, NF4, NF4_DQ, INT8, UNQUANTIZED)
"""In the order of the paper's Table 2, then what it has not."""
COLORS = {"Int4": "C7", "FP4 E2M1": "C1", "FP4 E3M0": "C3", "FP4, bitsandbytes": "C4", "NF4": "C0", "NF4 + DQ": "C9",
          "int8": "C2", "unquantized": "black"}  # fmt: skip

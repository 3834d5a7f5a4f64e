"""The paper's number formats: codebooks, block-wise quantization, double quantization, and the 4-bit weight."""

from halfbyte.quant.blockwise import (
    Affine,
    Coded,
    dequantize_affine,
    dequantize_coded,
    quantize_affine,
    quantize_coded,
)
from halfbyte.quant.codebooks import codebook, normal_float
from halfbyte.quant.double_quant import quantize_statistics
from halfbyte.quant.int8 import QuantizedInt8, quantize_int8
from halfbyte.quant.weight import QuantizedWeight, quantize_4bit

__all__ = [
    "Affine",
    "Coded",
    "QuantizedInt8",
    "QuantizedWeight",
    "codebook",
    "dequantize_affine",
    "dequantize_coded",
    "normal_float",
    "quantize_4bit",
    "quantize_affine",
    "quantize_coded",
    "quantize_int8",
    "quantize_statistics",
]

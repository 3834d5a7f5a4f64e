"""Layers over frozen weights in 4, 8 or 16 bits, element-wise pieces of a decoder layer, the head with its loss."""

from halfbyte.nn.cross_entropy import Scores, linear_cross_entropy
from halfbyte.nn.frozen import DenseLinear, FrozenLinear, QuantizedLinear
from halfbyte.nn.gated import gated, gated_halves
from halfbyte.nn.linear4bit import Linear4bit
from halfbyte.nn.linear8bit import Linear8bit
from halfbyte.nn.lora import LowRank, Projection, lora_linear
from halfbyte.nn.norm import rms_norm
from halfbyte.nn.rotary import rotary

__all__ = [
    "DenseLinear",
    "FrozenLinear",
    "Linear4bit",
    "Linear8bit",
    "LowRank",
    "Projection",
    "QuantizedLinear",
    "Scores",
    "gated",
    "gated_halves",
    "linear_cross_entropy",
    "lora_linear",
    "rms_norm",
    "rotary",
]

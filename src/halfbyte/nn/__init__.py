"""Layers over 4-bit weights, the element-wise pieces of a decoder layer, and the output head with its loss."""

from halfbyte.nn.cross_entropy import Scores, linear_cross_entropy
from halfbyte.nn.gated import gated, gated_halves
from halfbyte.nn.linear4bit import Linear4bit
from halfbyte.nn.lora import LowRank, Projection, lora_linear
from halfbyte.nn.norm import rms_norm
from halfbyte.nn.rotary import rotary

__all__ = [
    "Linear4bit",
    "LowRank",
    "Projection",
    "Scores",
    "gated",
    "gated_halves",
    "linear_cross_entropy",
    "lora_linear",
    "rms_norm",
    "rotary",
]

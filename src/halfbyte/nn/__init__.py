"""Layers over 4-bit weights, and the element-wise pieces of a decoder layer in one pass each."""

from halfbyte.nn.gated import gated, gated_halves
from halfbyte.nn.linear4bit import Linear4bit
from halfbyte.nn.lora import LowRank, Projection, lora_linear
from halfbyte.nn.norm import rms_norm
from halfbyte.nn.rotary import rotary

__all__ = ["Linear4bit", "LowRank", "Projection", "gated", "gated_halves", "lora_linear", "rms_norm", "rotary"]

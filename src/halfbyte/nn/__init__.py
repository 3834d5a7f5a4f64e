"""Layers over 4-bit weights, and the element-wise pieces of a decoder layer in one pass each."""

from halfbyte.nn.gated import gated, gated_halves
from halfbyte.nn.linear4bit import Linear4bit
from halfbyte.nn.lora import lora_delta
from halfbyte.nn.norm import rms_norm
from halfbyte.nn.rotary import rotary

__all__ = ["Linear4bit", "gated", "gated_halves", "lora_delta", "rms_norm", "rotary"]

"""Layers over 4-bit weights, and the output head with its loss."""

from halfbyte.nn.cross_entropy import Scores, linear_cross_entropy
from halfbyte.nn.linear4bit import Linear4bit
from halfbyte.nn.lora import lora_delta

__all__ = ["Linear4bit", "Scores", "linear_cross_entropy", "lora_delta"]

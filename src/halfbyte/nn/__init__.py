"""Layers over 4-bit weights."""

from halfbyte.nn.linear4bit import Linear4bit
from halfbyte.nn.lora import LowRank, Projection, lora_linear

__all__ = ["Linear4bit", "LowRank", "Projection", "lora_linear"]

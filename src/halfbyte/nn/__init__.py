"""Layers over 4-bit weights."""

from halfbyte.nn.linear4bit import Linear4bit
from halfbyte.nn.lora import lora_delta

__all__ = ["Linear4bit", "lora_delta"]

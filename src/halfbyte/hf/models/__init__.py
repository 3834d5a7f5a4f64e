"""Models in 4 bits: how transformers builds them, how they are opened, and how a 4-bit copy is written."""

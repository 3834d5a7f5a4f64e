"""How wide a head is to llama.cpp (0.5), and by what it scales queries where the file does not say it."""

from typing import Any

OF_27B = {"gemma2": 46, "gemma3_text": 62}
"""Layers of the models whose queries are scaled by the width of the model over the heads."""


def head_size(text: Any) -> int:
    """Return the width of a head."""
    return int(getattr(text, "head_dim", None) or text.hidden_size // text.num_attention_heads)


def scaled_by(text: Any) -> int:
    """Return whose root the queries of a Gemma are divided by (``query_pre_attn_scalar``)."""
    if text.num_hidden_layers == OF_27B.get(text.model_type):
        return int(text.hidden_size // text.num_attention_heads)
    return head_size(text)

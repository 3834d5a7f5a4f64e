"""A model's stop tokens: whether it can learn to write them, and where other programs find them.

LoRA leaves the embedding and the head as they are. A stop token whose row in the head was never trained (a chat
template borrowed for a base model) can hardly be told from other such tokens, so the model would not learn to stop at
it. Such rows are found by what initialisation leaves behind: zeros, copies of one row, or almost the mean of all rows
(what transformers gives to new tokens).
"""

import contextlib
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import GenerationConfig, PreTrainedTokenizerBase

SMALL = 0.1
"""A row is untrained if its norm, or its distance from the mean row, is below this share of what is usual."""
ROWS = 1024
"""Rows that are widened to fp32 at a time."""


def check_stop_token(model: Any, tokenizer: PreTrainedTokenizerBase, stop_ids: Iterable[int]) -> list[str]:
    """Return a sentence for each stop token that the model has never learned.

    Args:
        model: with an input embedding ``[V, H]`` and perhaps a head of its own; weights that are held in 4 bits or on
            no device are not looked at.
        tokenizer: the model's.
        stop_ids: the tokens that training puts behind answers.
    """
    found: dict[int, str] = {}
    for what, layer in (("output", model.get_output_embeddings()), ("input", model.get_input_embeddings())):
        weight = getattr(layer, "weight", None)
        if isinstance(weight, Tensor) and weight.is_floating_point() and weight.ndim == 2 and not weight.is_meta:
            for token in sorted(set(stop_ids)):
                reason = untrained(weight, token) if token < len(weight) else None
                if reason:
                    found.setdefault(token, f"its {what} embedding {reason}")
    return [
        f"The model has never seen {tokenizer.convert_ids_to_tokens(token)!r}, the token that answers end with "
        f"({found[token]}), so it may not learn to stop; choose a chat template that the model knows, or train the "
        "embeddings too (modules_to_save: embed_tokens, lm_head)"
        for token in sorted(found)
    ]


def untrained(weight: Tensor, row: int) -> str | None:
    """Return in words how a row of ``weight``, ``[V, H]``, differs from trained ones, or None if it does not."""
    own = weight[row].detach().float()
    if not own.any():
        return "is all zeros"
    norms, total, same = [], torch.zeros_like(own), 0
    for part in torch.split(weight.detach(), ROWS):
        part = part.float()
        norms.append(part.norm(dim=1))
        total += part.sum(0)
        same += int((part == own).all(1).sum())
    mean = total / len(weight)
    if same > 1:
        return f"is the same as that of {same - 1} other token{'s' * (same > 2)}"
    if own.norm() < SMALL * torch.cat(norms).median():
        return "is far smaller than those of other tokens"
    distances = torch.cat([(part.float() - mean).norm(dim=1) for part in torch.split(weight.detach(), ROWS)])
    if (own - mean).norm() < SMALL * distances.median():
        return "is the mean of the others"
    return None


def save_stops(model: Any, tokenizer: PreTrainedTokenizerBase, stop_ids: Iterable[int], folder: Path) -> None:
    """Write ``generation_config.json`` beside an adapter: the model's settings, stopping at ``stop_ids`` too.

    Neither PEFT nor transformers reads it from an adapter's folder of its own accord (they take the base model's);
    ``GenerationConfig.from_pretrained(folder)`` does, and whoever merges the adapter finds it.
    """
    base = getattr(model, "generation_config", None)
    settings = GenerationConfig.from_dict(base.to_dict()) if base is not None else GenerationConfig()
    named = settings.eos_token_id
    own = [named] if isinstance(named, int) else [*(named or ())]
    settings.eos_token_id = list(dict.fromkeys([*own, *stop_ids]))
    if settings.pad_token_id is None:
        settings.pad_token_id = tokenizer.pad_token_id
    with contextlib.suppress(ValueError):  # settings of the base model's that contradict each other
        settings.save_pretrained(str(folder))

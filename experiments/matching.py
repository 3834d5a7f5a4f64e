"""What all-MiniLM-L6-v2 was trained for: which second half of a text belongs to its first half.

    loss of text i = −log softmax_j(20 cos(aᵢ, bⱼ))ᵢ

over the embeddings (means of the encoder's outputs) of all first halves a and second halves b: the loss of its training
(N. Reimers and I. Gurevych, multiple negatives with scale 20). Its perplexity is of how many texts one could take the
right one to be. Nothing is trained here.
"""

from collections.abc import Sequence
from typing import Any

import texts
import torch
from corpus import HELD_OUT, Losses
from torch import Tensor
from torch.nn import functional as F

SCALE = 20.0
TEXTS, SHORTEST, LONGEST = 400, 160, 280
"""Texts, and the characters of one."""


def halved_texts() -> list[str]:
    """Return descriptions of Debian's packages, of the sections that nothing here is trained on."""
    rows = (row.source.partition(": ")[2] for row in texts.synopses() if row.kind in HELD_OUT)
    return [text[:LONGEST] for text in rows if len(text) >= SHORTEST][:TEXTS]


def halves(text: str) -> tuple[str, str]:
    """Return the words of a text in two halves."""
    words = text.split()
    return " ".join(words[: len(words) // 2]), " ".join(words[len(words) // 2 :])


@torch.no_grad()
def matching_losses(model: Any, tokenizer: Any, read: Sequence[str]) -> Losses:
    """Return the loss of each text, a choice among all of them."""

    def embedded(parts: Sequence[str]) -> Tensor:
        outputs = (model(**tokenizer(part, return_tensors="pt")).last_hidden_state[0].mean(dim=0) for part in parts)
        return F.normalize(torch.stack(list(outputs)), dim=-1)

    first, second = (embedded(parts) for parts in zip(*map(halves, read), strict=True))
    nats = F.cross_entropy(SCALE * first @ second.T, torch.arange(len(read)), reduction="none")
    return nats.tolist(), [1] * len(read)

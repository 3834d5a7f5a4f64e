"""How surprised a model is by texts: the loss over rows of tokens, whatever the run's own method measures.

    loss = mean of −log P(t | t₁ … tᵢ₋₁) over the labelled tokens of all rows, in nats

The general text that comes with halfbyte (``general.txt``) tells whether a model forgets while it learns something
else. It is English of several kinds that is in the public domain: Austen, Melville, Dickens, Carroll, Lincoln, the
Declaration of Independence, Darwin, Doyle, Smith, Thoreau, Wells, Shakespeare, Twain, Baum, O. Henry, Mill, the
Constitution of the United States, Euclid (Heath's translation), Emerson, proverbs.
"""

from collections.abc import Iterable, Mapping, Sequence
from importlib import resources
from typing import Any

import torch

from halfbyte.choices import IGNORED
from halfbyte.data import Collator, Text

BETWEEN = "\n\n----\n\n"
"""Stands between the passages of the file."""


def general_texts() -> list[Text]:
    """Return the passages of the general text, each with its number."""
    file = resources.files("halfbyte.evaluate") / "general.txt"
    passages = file.read_text(encoding="utf-8").strip().split(BETWEEN)
    return [Text(f"passage {number} of the general text", text) for number, text in enumerate(passages, start=1)]


@torch.no_grad()
def summed_loss(model: Any, rows: Iterable[Mapping[str, Sequence[int]]]) -> tuple[float, int]:
    """Return the summed negative log-likelihood of the labelled tokens of ``rows``, in nats, and their number.

    One row a pass, so that the result does not depend on what stands beside it. The output head is asked for labelled
    positions alone, and its logits are never whole.

    Args:
        model: a causal language model from :func:`halfbyte.prepare`, in evaluation mode.
        rows: ``input_ids`` and ``labels`` each.
    """
    collate, loss, tokens = Collator(pad_token_id=None), 0.0, 0
    for row in rows:
        batch = {name: x.to(model.device) for name, x in collate([row]).items()}
        output = model(**batch, use_cache=False, fused_lm_head=True)
        loss -= float(output.log_probs.double().sum())  # 0 where nothing is labelled
        tokens += int((batch["labels"][:, 1:] != IGNORED).sum())
    return loss, tokens

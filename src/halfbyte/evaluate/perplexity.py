"""Perplexity of texts of any length, as lm-eval takes it (``loglikelihood_rolling``, 0.4.13).

    loss of a text = Σ −log P(tᵢ | what stands before it in its window), over all of its tokens, in nats
    perplexity     = e^(Σ loss / Σ tokens), over all texts
    bits a byte    = Σ loss / (ln 2 · Σ bytes of UTF-8), which models of other tokenizers can be compared by

A text's first token follows its tokenizer's bos, or eos where there is none. A window is as long as the model attends
to, or ``length``: each token is predicted once, the windows follow each other, and the last one reaches back, so that
it is a whole one. Each text is read for itself.
"""

import math
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

import numpy as np
import torch

from halfbyte.choices import IGNORED
from halfbyte.errors import InputError
from halfbyte.evaluate.estimates import Rows

LONGEST = 2048
"""Tokens of a window, where nobody says another number."""


class Loss(NamedTuple):
    """Nats of a text, and its tokens."""

    nats: float
    tokens: int


class Window(NamedTuple):
    """Tokens, of which the last ``new`` are predicted here."""

    ids: list[int]
    new: int


def windows(ids: Sequence[int], prefix: int, length: int) -> Iterator[Window]:
    """Yield a text in windows that read ``length`` tokens at most, each of its tokens predicted in one of them.

    Args:
        ids: of the text.
        prefix: the token that its first one follows.
        length: at least one.
    """
    whole = [prefix, *ids]
    done = 0
    while done < len(ids):
        end = min(done + length, len(ids))
        start = max(0, end - length) if done else 0
        yield Window(whole[start : end + 1], end - done)
        done = end


def losses(
    model: Any,
    texts: Sequence[Sequence[int]],
    prefix: int,
    length: int,
    progress: Callable[[int, int], None] = lambda *_: None,
) -> list[Loss]:
    """Return the loss of each text.

    Args:
        model: a causal language model whose head is bound (:mod:`halfbyte.hf.layers.head`), in evaluation mode.
        texts: token ids, without what the tokenizer puts around them.
        prefix: the token that a first one follows.
        length: tokens of a window.
        progress: called with the numbers of texts done and in all.
    """
    found = []
    for number, ids in enumerate(texts, start=1):
        found.append(Loss(sum(_nats(model, window) for window in windows(ids, prefix, length)), len(ids)))
        progress(number, len(texts))
    return found


@torch.no_grad()
def _nats(model: Any, window: Window) -> float:
    """Return the loss of a window. Its last token is predicted and not read, so that it fits where all positions go."""
    ids = torch.tensor([window.ids], device=model.device)
    targets = ids[:, 1:].clone()
    targets[:, : targets.shape[1] - window.new] = IGNORED
    read = ids[:, :-1]
    output = model(
        input_ids=read, attention_mask=torch.ones_like(read), shift_labels=targets, use_cache=False, fused_lm_head=True
    )
    return -float(output.log_probs.double().sum())  # 0 where nothing is labelled


def prefix_of(tokenizer: Any) -> int:
    """Return the token that the first one of a text follows.

    Raises:
        InputError: the tokenizer has neither bos nor eos.
    """
    for token in (tokenizer.bos_token_id, tokenizer.eos_token_id):
        if token is not None:
            return int(token)
    raise InputError("The tokenizer has neither a bos nor an eos token that a text could begin behind; give it one.")


def metrics_of(found: Sequence[Loss], texts: Sequence[str]) -> dict[str, Rows]:
    """Return ``perplexity`` and ``bits_per_byte`` of texts and their losses."""
    nats = np.array([loss.nats for loss in found])
    tokens = np.array([loss.tokens for loss in found], float)
    size = np.array([len(text.encode()) for text in texts], float)
    return {"perplexity": Rows(nats, tokens, is_exponent=True), "bits_per_byte": Rows(nats / math.log(2), size)}

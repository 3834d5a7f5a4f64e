"""How likely a model thinks it is that texts go on as they do, many at once.

    log P(b₁ … bₙ | a) = Σ log P(bᵢ | a, b₁ … bᵢ₋₁), in nats, and whether each bᵢ is the likeliest token there

Texts that differ in their last token alone (the letters of a multiple choice) share a pass over what they have in
common. Others are read together by length, padded behind their ends, which nothing before sees. The output head is
evaluated only at columns in which some text of the batch is asked for, and a batch holds no more logits than
``LOGITS``.

Left out: models whose ``forward`` has no ``logits_to_keep``, and to read the beginning that many texts share (solved
examples before each question) only once.
"""

from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from halfbyte.choices import IGNORED
from halfbyte.data import Collator

TOGETHER = 2048
"""Tokens of texts that are read together at most, what fills them up included."""
LOGITS = 1 << 26
"""Logits of a batch at most, if it has several texts."""


class Asked(NamedTuple):
    """A text that goes on, each token ids, both at least one."""

    context: tuple[int, ...]
    continuation: tuple[int, ...]


class Likelihood(NamedTuple):
    """What was found: the log-probability of the continuation, and whether a greedy answer would begin with it."""

    logprob: float
    is_greedy: bool


class _Shared(NamedTuple):
    """Texts that are the same but for their last tokens: what they share, from where it is asked for, and which."""

    ids: tuple[int, ...]
    start: int
    numbers: list[int]


@torch.no_grad()
def likelihoods(
    model: Any,
    asked: Sequence[Asked],
    *,
    together: int = TOGETHER,
    progress: Callable[[int, int], None] = lambda *_: None,
) -> list[Likelihood]:
    """Return how likely each text goes on as it does, in their order.

    Args:
        model: a causal language model in evaluation mode.
        asked: texts, with their ends no longer than the model attends to by one token at most.
        together: tokens that are read together at most; a longer text is read alone.
        progress: called with the numbers of texts done and in all.
    """
    shared: dict[tuple[int, tuple[int, ...]], _Shared] = {}
    for number, (context, continuation) in enumerate(asked):
        ids = (*context, *continuation[:-1])
        shared.setdefault((len(context), ids), _Shared(ids, len(context) - 1, [])).numbers.append(number)
    found: dict[int, Likelihood] = {}
    width = int(model.config.get_text_config().vocab_size)
    for group in _batches(sorted(shared.values(), key=lambda one: -len(one.ids)), together, LOGITS // width):
        for one, logprobs in zip(group, _read(model, group), strict=True):
            for number in one.numbers:
                found[number] = _told(logprobs, asked[number].continuation)
        progress(len(found), len(asked))
    return [found[number] for number in range(len(asked))]


def _batches(texts: Sequence[_Shared], together: int, places: int) -> Iterator[list[_Shared]]:
    """Yield texts, which come the longest first, as many as are read together."""
    group: list[_Shared] = []
    columns: set[int] = set()
    for text in texts:
        own = set(range(text.start, len(text.ids)))
        longest = len(group[0].ids) if group else 0
        if group and (longest * (len(group) + 1) > together or len(columns | own) * (len(group) + 1) > places):
            yield group
            group, columns = [], set()
        group.append(text)
        columns |= own
    if group:
        yield group


def _read(model: Any, texts: Sequence[_Shared]) -> Iterator[Tensor]:
    """Yield the log-probabilities [n, V] of what comes at each place that is asked for, a text after the other."""
    batch = Collator(pad_token_id=None)({"input_ids": text.ids, "labels": [IGNORED] * len(text.ids)} for text in texts)
    del batch["labels"]
    columns = torch.tensor(sorted({place for text in texts for place in range(text.start, len(text.ids))}))
    batch = {name: values.to(model.device) for name, values in batch.items()}
    logits = model(**batch, logits_to_keep=columns.to(model.device), use_cache=False).logits
    for row, text in zip(logits, texts, strict=True):
        own = (columns >= text.start) & (columns < len(text.ids))
        yield row[own.to(row.device)].float().log_softmax(-1)


def _told(logprobs: Tensor, continuation: Sequence[int]) -> Likelihood:
    tokens = torch.tensor(continuation, device=logprobs.device)
    total = logprobs.gather(1, tokens.unsqueeze(1)).double().sum()
    return Likelihood(float(total), bool((logprobs.argmax(-1) == tokens).all()))

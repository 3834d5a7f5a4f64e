"""The classes of texts, named by a classifier with their probabilities."""

import itertools
from collections.abc import Iterable, Iterator
from dataclasses import dataclass

import torch
from peft import PeftModel
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from halfbyte.data.classes import LabelledRows
from halfbyte.errors import InputError
from halfbyte.hf.layers.head import base_of
from halfbyte.hf.models.heads import is_classifier
from halfbyte.hf.models.limits import most_positions
from halfbyte.hf.trainers.tasks import TaskCollator

LONGEST = 8192
"""Tokens of a text where neither model nor tokenizer says how many they take."""


@dataclass(frozen=True)
class Named:
    """What a classifier says of a text.

    Attributes:
        text: the text, and its pair if there is one.
        label: the likeliest class.
        probabilities: of all classes, the likeliest first.
        cut: whether the text was longer than the model reads, so that its end had no part in it.
    """

    text: tuple[str, str | None]
    label: str
    probabilities: dict[str, float]
    cut: bool


@torch.inference_mode()
def classify_texts(
    model: PreTrainedModel | PeftModel,
    tokenizer: PreTrainedTokenizerBase,
    texts: Iterable[tuple[str, str | None]],
    *,
    batch_size: int = 32,
) -> Iterator[Named]:
    """Yield what a classifier says of each text, in order.

    Args:
        model: from :func:`halfbyte.load`, in evaluation mode.
        tokenizer: its tokenizer.
        texts: each with the text that it is a pair with, or None.
        batch_size: texts per forward pass.

    Raises:
        InputError: the model is no classifier, or a text is empty.
    """
    base = base_of(model)
    if not is_classifier(base):
        raise InputError(
            f"{type(base).__name__} does not classify; give a run that was trained with task classify, or a classifier."
        )
    config = model.config
    longest = min(most_positions(model) or LONGEST, tokenizer.model_max_length, LONGEST)
    rows, collate = LabelledRows(tokenizer, longest), TaskCollator(model, tokenizer.pad_token_id)
    stream = iter(texts)
    while part := list(itertools.islice(stream, batch_size)):
        if not all(text.strip() for text, _ in part):
            raise InputError("A text is empty, so there is nothing to classify; give at least one character.")
        tokens = [rows.tokens(*text) for text in part]
        batch = collate([dict(row) | {"labels": [0]} for row, _ in tokens])
        del batch["labels"]
        logits = model(**{name: x.to(model.device) for name, x in batch.items()}).logits
        for text, (_, length), shares in zip(part, tokens, logits.float().softmax(-1).tolist(), strict=True):
            named = sorted(((config.id2label[number], p) for number, p in enumerate(shares)), key=lambda one: -one[1])
            yield Named(text, named[0][0], dict(named), length > longest)

"""Tokens that a tokenizer gets, and rows of the embeddings for them, which are trained and saved with the adapter.

A new row begins as the mean of the rows of what the token was before, its pieces: near where the model knows the word.
PEFT (0.21) trains single rows (``trainable_token_indices``), of the input embedding and of an output head that is tied
to it; of a head of its own as well where it is named.
"""

from collections.abc import Sequence
from typing import NamedTuple

import torch
from tokenizers import AddedToken
from torch import Tensor, nn
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from halfbyte.errors import InputError
from halfbyte.nn import QuantizedLinear


class NewToken(NamedTuple):
    """A token that was added: its text, its id, and the ids that stood for it before."""

    text: str
    id: int
    pieces: list[int]


def add_tokens(tokenizer: PreTrainedTokenizerBase, texts: Sequence[str]) -> list[NewToken]:
    """Add ``texts`` to ``tokenizer`` as ordinary tokens, which are found as they are written.

    Raises:
        InputError: one of them is a token already.
    """
    known = tokenizer.get_vocab()
    for text in texts:
        if text in known:
            raise InputError(f"new_tokens {text!r} is a token already (id {known[text]}); leave it out.")
    pieces = [tokenizer(text, add_special_tokens=False)["input_ids"] for text in texts]
    tokenizer.add_tokens([AddedToken(text, normalized=False) for text in texts])
    return [NewToken(text, tokenizer.convert_tokens_to_ids(text), p) for text, p in zip(texts, pieces, strict=True)]


def give_rows(model: PreTrainedModel, tokens: Sequence[NewToken]) -> dict[str, list[int]]:
    """Give the embeddings of ``model`` rows for ``tokens``, and return them as PEFT's ``trainable_token_indices``.

    Raises:
        InputError: the model has no embeddings that rows of can be trained.
    """
    embedding, head = model.get_input_embeddings(), model.get_output_embeddings()
    for module, what in ((embedding, "input embedding"), (head, "output head")):
        if module is None and what == "output head":
            continue  # a classifier's
        if isinstance(module, QuantizedLinear) or not isinstance(module, nn.Embedding | nn.Linear):
            held = "quantized" if isinstance(module, QuantizedLinear) else type(module).__name__
            raise InputError(
                f"new_tokens need an {what} whose rows can be trained, and that of {model.config._name_or_path} is "
                f"{held}; name a model whose embeddings are dense."
            )
    ids = [token.id for token in tokens]
    if max(ids) >= embedding.weight.shape[0]:
        model.resize_token_embeddings(max(ids) + 1, mean_resizing=False)
        embedding, head = model.get_input_embeddings(), model.get_output_embeddings()
    alone = head is None or head.weight is embedding.weight
    trained = [embedding] if alone else [embedding, head]
    for module in trained:
        _begin_rows(module.weight, tokens)
    paths = {id(module): path for path, module in model.named_modules()}
    return {paths[id(module)]: ids for module in trained}


@torch.no_grad()
def _begin_rows(weight: Tensor, tokens: Sequence[NewToken]) -> None:
    first = min(token.id for token in tokens)
    for token in tokens:
        before = [piece for piece in token.pieces if piece < first]
        rows = weight[before] if before else weight[:first]
        weight[token.id] = rows.float().mean(0).to(weight.dtype)

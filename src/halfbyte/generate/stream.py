"""One answer as it is generated: an engine for one request, its text as an iterator.

The joined pieces are the decoded answer exactly (:mod:`halfbyte.generate.text`). Who has more than one question keeps
an :class:`halfbyte.generate.engine.Engine`, which keeps the keys and values of what it has read.
"""

from collections.abc import Iterator
from typing import Any

import torch
from peft import PeftModel
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from halfbyte.errors import InputError
from halfbyte.generate.answers import Request
from halfbyte.generate.conversation import encode, encode_source, stop_tokens
from halfbyte.generate.decoders import decoder_for
from halfbyte.generate.engine import Engine
from halfbyte.generate.sampling import Sampling
from halfbyte.hf.models.limits import check_tokens, most_positions


def check_generates(model: PreTrainedModel | PeftModel) -> None:
    """Refuse a model that writes nothing.

    Raises:
        InputError: it is one, such as a classifier.
    """
    if not model.can_generate():
        raise InputError(
            f"{type(model).__name__} does not generate text; give a causal language model, or a sequence-to-sequence "
            "model, or use classify for a classifier."
        )


def stream_reply(
    model: PreTrainedModel | PeftModel,
    tokenizer: PreTrainedTokenizerBase,
    prompt: list[dict[str, Any]] | str,
    *,
    max_new_tokens: int = 512,
    temperature: float = 0.0,
    top_p: float = 1.0,
) -> Iterator[str]:
    """Generate the answer to a conversation and yield its text piece by piece.

    Closing the iterator, or an interrupt, stops the generation after the token in work. An error in the
    generation is raised here.

    Args:
        model: a model that generates text, in evaluation mode.
        tokenizer: its tokenizer.
        prompt: the conversation so far (dictionaries with ``role`` and ``content``), or a plain text to go on
            with as it stands.
        max_new_tokens: the answer's greatest length in tokens.
        temperature: 0 takes the likeliest token each time; above, tokens are drawn, with a seed from torch's global
            generator.
        top_p: tokens are drawn from the likeliest ones that together have this probability.

    Raises:
        InputError: the model does not generate text, or the prompt is empty, no text, longer than the model can attend
            to, or holds a token that the model has no embedding for.
    """
    check_generates(model)
    reads_apart = model.config.is_encoder_decoder  # what is written then takes none of its positions
    ids = encode_source(prompt, tokenizer) if reads_apart else encode(prompt, tokenizer)
    check_tokens(model, tokenizer, max(ids), "The prompt")
    limit = most_positions(model)
    if limit is not None and len(ids) >= limit:
        raise InputError(f"The prompt is {len(ids)} tokens long, but the model attends to {limit}: shorten it.")
    sampling = Sampling(
        temperature=temperature,
        top_p=top_p,
        max_new_tokens=max_new_tokens,
        seed=int(torch.randint(2**63 - 1, ())),
        **own_options(model),
    )
    decoder = decoder_for(model)
    with Engine(decoder, tokenizer, stops=stop_tokens(model, tokenizer)) as engine:
        for piece in engine.submit(Request(tuple(ids), sampling, adapter=decoder.active)):
            if piece.text:
                yield piece.text


def own_options(model: PreTrainedModel | PeftModel) -> dict[str, Any]:
    """Return the options of sampling that a model's generation settings name, beside temperature and top-p.

    Others that transformers' ``generate`` obeys (``no_repeat_ngram_size``, suppressed tokens) are not sampling's.
    """
    own = model.generation_config
    named = {"top_k": own.top_k or None, "min_p": own.min_p, "repetition_penalty": own.repetition_penalty}
    return {name: value for name, value in named.items() if value is not None}

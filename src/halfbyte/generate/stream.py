"""Answers as they are generated: transformers' ``generate`` in a thread, its text as an iterator.

Each new token decodes the whole answer again and yields what it added, but for an unfinished character at the
end. That costs little beside generating the token, and the joined pieces are the decoded answer exactly;
transformers' own ``TextIteratorStreamer`` decodes line by line, which loses a space of indentation at the
start of a line with SentencePiece tokenizers. The cache of keys and values is not kept between two turns.
"""

import contextvars
import functools
import queue
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import torch
from peft import PeftModel
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase, StoppingCriteriaList

from halfbyte.errors import InputError
from halfbyte.generate.conversation import encode, encode_source, stop_tokens
from halfbyte.hf.models.limits import check_tokens, most_positions

COLDEST = 1e-5
"""The temperature below which the likeliest token is taken: divided by less, logits become infinite."""
UNFINISHED = "\N{REPLACEMENT CHARACTER}"


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
        temperature: 0 takes the likeliest token each time; above, tokens are drawn by torch's global generator.
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
    taken = 0 if reads_apart else len(ids)
    if limit is not None and len(ids) >= limit:
        raise InputError(f"The prompt is {len(ids)} tokens long, but the model attends to {limit}: shorten it.")
    listener = _Listener()
    generate = functools.partial(
        model.generate,
        input_ids=torch.tensor([ids], device=model.device),
        attention_mask=torch.ones(1, len(ids), dtype=torch.long, device=model.device),
        streamer=listener,
        stopping_criteria=StoppingCriteriaList([listener]),
        max_new_tokens=max_new_tokens if limit is None else min(max_new_tokens, limit - taken),
        num_beams=1,
        eos_token_id=stop_tokens(model, tokenizer),
        pad_token_id=tokenizer.pad_token_id,
        **(
            {"do_sample": True, "temperature": temperature, "top_p": top_p}
            if temperature >= COLDEST
            else {"do_sample": False}
        ),
    )
    with ThreadPoolExecutor(1) as thread:
        generation = thread.submit(contextvars.copy_context().run, generate)
        generation.add_done_callback(lambda _: listener.tokens.put(None))
        try:
            yield from _decode(listener, tokenizer)
        finally:
            listener.stopped = True
        generation.result()


class _Listener:
    """Gets each token from ``generate``, as its streamer, and tells it when to stop, as a stopping criterion."""

    def __init__(self) -> None:
        self.tokens: queue.SimpleQueue[int | None] = queue.SimpleQueue()
        self.stopped = False
        self._prompt_seen = False

    def put(self, value: Tensor) -> None:
        if self._prompt_seen:
            self.tokens.put(int(value))
        self._prompt_seen = True

    def end(self) -> None:
        pass

    def __call__(self, input_ids: Tensor, scores: Any, **kwargs: Any) -> Tensor:
        return torch.full((len(input_ids),), self.stopped, device=input_ids.device)


def _decode(listener: _Listener, tokenizer: PreTrainedTokenizerBase) -> Iterator[str]:
    ids: list[int] = []
    shown = text = ""
    while (token := listener.tokens.get()) is not None:
        ids.append(token)
        text = str(tokenizer.decode(ids, skip_special_tokens=True, clean_up_tokenization_spaces=False))
        if len(text) > len(shown) and not text.endswith(UNFINISHED):
            yield text[len(shown) :]
            shown = text
    if len(text) > len(shown):
        yield text[len(shown) :]

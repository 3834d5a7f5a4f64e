"""Answers to several prompts at once, the likeliest token each time: for samples and figures of a run, not for a chat.

Prompts are token ids. A model that decodes natively answers them through the engine; of others transformers'
``generate`` answers some together, padded on the left (of an encoder-decoder on the right). Nothing is drawn, so no
random state changes.
"""

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from peft import PeftModel
from torch import Tensor
from transformers import LogitsProcessorList, PreTrainedModel, PreTrainedTokenizerBase

from halfbyte.errors import DecodingError, InputError
from halfbyte.generate.answers import Request, Stream
from halfbyte.generate.conversation import stop_tokens
from halfbyte.generate.engine import Engine
from halfbyte.generate.native_decoder import NativeDecoder
from halfbyte.generate.sampling import Sampling
from halfbyte.hf.layers.adapters import active_adapter
from halfbyte.hf.layers.decoding import NotNative
from halfbyte.hf.models.limits import most_positions

TOGETHER = 16
"""Prompts that are answered together: a product with so many rows takes little longer than with one."""


@dataclass(frozen=True)
class Answer:
    """What a model wrote.

    Attributes:
        ids: its tokens, the one that ended it included.
        text: they as text, without special tokens.
        is_number: whether the logits of all of them were numbers.
    """

    ids: tuple[int, ...]
    text: str
    is_number: bool


@torch.no_grad()  # not inference mode: what a layer remembers of a pass must do for training too
def answer_all(
    model: PreTrainedModel | PeftModel,
    tokenizer: PreTrainedTokenizerBase,
    prompts: Sequence[Sequence[int]],
    *,
    max_new_tokens: int,
    batch_size: int = TOGETHER,
    most_tokens: int | None = None,
) -> list[Answer]:
    """Return the answer to each prompt.

    Args:
        model: a model that generates text, in evaluation mode.
        tokenizer: its tokenizer.
        prompts: token ids, each at least one, and fewer than the model attends to.
        max_new_tokens: the greatest length of an answer in tokens; less where the model attends to no more.
        batch_size: prompts that are answered together, at most.
        most_tokens: that they and their answers have together, if there are several; keys and values of all are held.
    """
    if (decoder := _native(model)) is not None:
        return _through_engine(decoder, tokenizer, prompts, max_new_tokens, batch_size, most_tokens)
    waiting = sorted(range(len(prompts)), key=lambda number: len(prompts[number]))
    answers: dict[int, Answer] = {}
    while waiting:
        whole = [len(prompts[number]) + max_new_tokens for number in waiting[:batch_size]]
        fitting = [place * tokens <= (most_tokens or math.inf) for place, tokens in enumerate(whole, start=1)]
        numbers = waiting[: max(1, sum(fitting))]  # they grow, so those that fit come first
        waiting = waiting[len(numbers) :]
        batch = [list(prompts[number]) for number in numbers]
        answers |= zip(numbers, _answers(model, tokenizer, batch, max_new_tokens), strict=True)
    return [answers[number] for number in range(len(prompts))]


def _native(model: PreTrainedModel | PeftModel) -> NativeDecoder | None:
    """Return a decoder for what ``model`` is computed with now, if it is known natively."""
    try:
        active = active_adapter(model) if isinstance(model, PeftModel) else None
        return NativeDecoder(model, adapters=[active])
    except (NotNative, InputError):
        return None


def _through_engine(
    decoder: NativeDecoder,
    tokenizer: PreTrainedTokenizerBase,
    prompts: Sequence[Sequence[int]],
    most: int,
    batch_size: int,
    most_tokens: int | None,
) -> list[Answer]:
    decoder.rows = min(decoder.rows, batch_size)
    if most_tokens is not None:
        decoder.budget = max(decoder.bytes_of(most_tokens), *(decoder.bytes_of(len(one) + most) for one in prompts))
    active, sampling = decoder.active, Sampling(max_new_tokens=most)
    with Engine(
        decoder, tokenizer, stops=stop_tokens(decoder.model, tokenizer), most_waiting=max(1, len(prompts))
    ) as engine:
        streams = [engine.submit(Request(tuple(prompt), sampling, active)) for prompt in prompts]
        return [_read(stream, tokenizer) for stream in streams]


def _read(stream: Stream, tokenizer: PreTrainedTokenizerBase) -> Answer:
    ids: list[int] = []
    is_number = True
    try:
        for piece in stream:
            ids += [one.token for one in piece.chosen]
    except DecodingError:
        is_number = False
    text = tokenizer.decode(ids, skip_special_tokens=True, clean_up_tokenization_spaces=False)
    return Answer(tuple(ids), str(text), is_number)


def _answers(
    model: PreTrainedModel | PeftModel, tokenizer: PreTrainedTokenizerBase, prompts: list[list[int]], most: int
) -> Iterator[Answer]:
    reads_apart, pad = model.config.is_encoder_decoder, tokenizer.pad_token_id or 0
    longest = max(map(len, prompts))
    ids = torch.full((len(prompts), longest), pad)
    mask = torch.zeros_like(ids)
    for row, prompt in enumerate(prompts):
        place = slice(0, len(prompt)) if reads_apart else slice(longest - len(prompt), longest)
        ids[row, place], mask[row, place] = torch.tensor(prompt), 1
    limit = None if reads_apart else most_positions(model)
    stops = stop_tokens(model, tokenizer)
    numbers = _Numbers(len(prompts))
    found: Any = model.generate(
        input_ids=ids.to(model.device),
        attention_mask=mask.to(model.device),
        max_new_tokens=most if limit is None else max(1, min(most, limit - longest)),
        do_sample=False,
        num_beams=1,
        eos_token_id=stops,
        pad_token_id=pad,
        logits_processor=LogitsProcessorList([numbers]),
    )
    for row, written in enumerate(found[:, 1 if reads_apart else longest :].tolist()):
        end = next((place + 1 for place, token in enumerate(written) if token in stops), len(written))
        text = tokenizer.decode(written[:end], skip_special_tokens=True, clean_up_tokenization_spaces=False)
        yield Answer(tuple(written[:end]), str(text), numbers.are[row])


class _Numbers:
    """A logits processor that changes nothing, and sees whether logits are numbers."""

    def __init__(self, rows: int) -> None:
        self.are = [True] * rows

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        bad = scores.isnan().any(-1).tolist()
        self.are = [good and not nan for good, nan in zip(self.are, bad, strict=True)]
        return scores

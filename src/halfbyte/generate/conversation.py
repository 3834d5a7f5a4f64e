"""A conversation as a model reads it, and where its answers end."""

from collections.abc import Callable
from typing import Any

from peft import PeftModel
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from halfbyte.data.control import tools_for
from halfbyte.data.rendering import Thinking
from halfbyte.data.stops import stop_ids
from halfbyte.data.template import Writer
from halfbyte.errors import InputError

Message = dict[str, Any]


def encode(
    prompt: list[Message] | str, tokenizer: PreTrainedTokenizerBase, *, thinking: Thinking | None = None
) -> list[int]:
    """Return the token ids of a conversation, the generation prompt included, or of a plain text to go on with.

    A conversation is written as in training (:meth:`halfbyte.data.template.Writer.prompt`): what the template refuses
    is put another way.

    Control tokens that are written out in a conversation are plain text, as in training; in a plain text they are what
    they are.

    Args:
        prompt: the turns so far, or a text.
        tokenizer: of the model.
        thinking: have the template ask for thoughts or not, as it was in training; None: as it does by default.

    Raises:
        InputError: the chat template refuses the conversation, or a text is empty or holds what is no character.
    """
    for text in [prompt] if isinstance(prompt, str) else [str(message.get("content")) for message in prompt]:
        try:
            text.encode()
        except UnicodeEncodeError as error:
            raise InputError(
                f"The prompt is not UTF-8 text: {text[error.start : error.end]!r} at character {error.start} is no "
                "character."
            ) from None
    if isinstance(prompt, str):
        ids: list[int] = tokenizer(prompt)["input_ids"]
        if not ids:
            raise InputError("The prompt is empty, so there is nothing to go on from; give at least one character.")
        return ids
    return encoder_of(tokenizer, thinking=thinking)(prompt)


def encoder_of(tokenizer: PreTrainedTokenizerBase, *, thinking: Thinking | None = None) -> Callable[..., list[int]]:
    """Return what :func:`encode` does to a conversation, for many: the template is learnt once.

    It takes the turns, and JSON schemas of functions that may be called, for the template.
    """
    writer = Writer(tokenizer, thinking=thinking)
    control, to_tokens = tools_for(tokenizer, writer.template)

    def encoded(messages: list[Message], tools: list[dict[str, Any]] | None = None) -> list[int]:
        [tokens] = to_tokens([control.render(messages, lambda turns: writer.prompt(turns, tools))])
        return [int(token) for token in tokens.ids]

    return encoded


def encode_source(prompt: list[Message] | str, tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """Return the token ids of what a sequence-to-sequence model reads, as in training: one text, without a template.

    Args:
        prompt: a text, or a conversation of one question, whose system prompt comes before it.
        tokenizer: of the model.

    Raises:
        InputError: there was an answer already, or the text is empty.
    """
    turns = [{"role": "user", "content": prompt}] if isinstance(prompt, str) else prompt
    if any(turn["role"] not in ("system", "user") for turn in turns):
        raise InputError("A sequence-to-sequence model answers one text and has no conversation; use generate.")
    text = "\n\n".join(turn["content"] for turn in turns if turn["content"].strip())
    if not text:
        raise InputError("The prompt is empty, so there is nothing to read; give at least one character.")
    ids: list[int] = tokenizer(text, split_special_tokens=True)["input_ids"]
    return ids


def stop_tokens(model: PreTrainedModel | PeftModel, tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """Return the stop tokens of the model, of its tokenizer, and the one that an answer in training ends with."""
    own = model.generation_config.eos_token_id
    if model.config.is_encoder_decoder:
        named = [tokenizer.eos_token_id, *([own] if isinstance(own, int) else own or ())]
        return sorted({token for token in named if token is not None})
    return stop_ids(tokenizer, own)

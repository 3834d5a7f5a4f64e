"""A conversation as a model reads it, and where its answers end."""

import contextlib
import sys
from typing import Any

import jinja2
from peft import PeftModel
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from halfbyte.data import Chat, chat_template, encode_examples
from halfbyte.errors import InputError

Message = dict[str, Any]


def encode(prompt: list[Message] | str, tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """Return the token ids of a conversation, the generation prompt included, or of a plain text to go on with.

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
    try:
        text = tokenizer.apply_chat_template(
            prompt, chat_template=chat_template(tokenizer), tokenize=False, add_generation_prompt=True
        )
    except jinja2.TemplateError as error:
        raise InputError(f"The model's chat template refuses this conversation: {error}") from error
    ids = tokenizer(text, add_special_tokens=False)["input_ids"]
    return ids


def stop_tokens(model: PreTrainedModel | PeftModel, tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """Return the stop tokens of the model, of its tokenizer, and the one that an answer in training ends with."""
    own = model.generation_config.eos_token_id
    stops = {tokenizer.eos_token_id, *(own if isinstance(own, list) else [own])} - {None}
    question, answer = {"role": "user", "content": "Is it?"}, {"role": "assistant", "content": "yes"}
    with contextlib.suppress(InputError):  # then nothing was trained with this tokenizer
        [encoded] = encode_examples([Chat("", [question, answer])], tokenizer, max_length=sys.maxsize)
        stops.add(int(encoded.rows[-1]["labels"][-1]))
    return sorted(stops)

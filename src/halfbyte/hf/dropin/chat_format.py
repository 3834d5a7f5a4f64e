"""``trl.setup_chat_format`` (TRL 0.7 to 0.24), ChatML for a base model, and ``trl.commands``: scripts of 2024."""

import types
from typing import Any

import trl

from halfbyte.errors import InputError
from halfbyte.hf.replacement import Replacement

START, END = "<|im_start|>", "<|im_end|>"
TEMPLATE = (
    "{% for message in messages %}{{'<|im_start|>' + message['role'] + '\n' + message['content'] "
    "+ '<|im_end|>' + '\n'}}{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)


def setup_chat_format(
    model: Any, tokenizer: Any, format: str = "chatml", resize_to_multiple_of: int | None = None
) -> tuple[Any, Any]:
    """Give a base model's tokenizer ChatML's tokens and template, and the model as many rows of embeddings.

    Returns:
        The same model and tokenizer.

    Raises:
        InputError: the tokenizer has a template, or ``format`` is another one.
    """
    if tokenizer.chat_template is not None:
        raise InputError(
            "Chat template is already added to the tokenizer. If you want to overwrite it, please set it to None"
        )
    if format != "chatml":
        raise InputError(f"Format {format} not available. Please use one of ['chatml']")
    tokenizer.bos_token, tokenizer.eos_token, tokenizer.pad_token = START, END, END
    tokenizer.add_special_tokens({"additional_special_tokens": [START, END]})
    tokenizer.chat_template = TEMPLATE
    model.resize_token_embeddings(len(tokenizer), pad_to_multiple_of=resize_to_multiple_of)
    for config in (getattr(model, "config", None), getattr(model, "generation_config", None)):
        if config is not None:
            config.bos_token_id, config.eos_token_id = tokenizer.bos_token_id, tokenizer.eos_token_id
            config.pad_token_id = tokenizer.pad_token_id
    return model, tokenizer


def _module(name: str) -> Any:
    def make(old: Any) -> Any:
        module: Any = types.ModuleType(name, "What of trl.commands is left, for scripts of 2024.")
        module.TrlParser = trl.TrlParser
        module.__path__ = []
        return module

    return make


def rows() -> list[Replacement]:
    """What is gone from TRL."""
    library = ("trl", ">=1.16,<1.17")
    return [
        Replacement(
            "trl:setup_chat_format", lambda old: setup_chat_format, "gone since TRL 0.25: ChatML's tokens", *library
        ),
        *(
            Replacement(f"sys.modules[{name}]", _module(name), "TrlParser was there until TRL 0.11", *library)
            for name in ("trl.commands", "trl.commands.cli_utils")
        ),
    ]

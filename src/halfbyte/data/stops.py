"""Where answers end: the stop token that is trained, and what of a tokenizer stands in its way.

Generation has to stop at the token that training wrote behind the answers. That is the last one that the chat template
writes there, which need not be the tokenizer's end-of-sequence token (Llama 3: ``<|eot_id|>`` and
``<|end_of_text|>``), nor among those that the model's generation settings name.
"""

import contextlib
import re
import sys
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from halfbyte.data.examples import Chat
from halfbyte.data.tokens import encode_examples
from halfbyte.errors import InputError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

_PAD = re.compile(r"\W*(finetune_right_)?pad(ding)?(_id)?\W*", re.IGNORECASE)
ANSWER: dict[str, Any] = {"content": "yes"}
CALL: dict[str, Any] = {
    "content": "",
    "tool_calls": [{"type": "function", "function": {"name": "search", "arguments": {"word": "yes"}}}],
}
_SPARE = re.compile(r"\W*(reserved|unused|extra_id|place.?holder)", re.IGNORECASE)


def trained_stop(tokenizer: "PreTrainedTokenizerBase", **writing: Any) -> int | None:
    """Return the token that an answer in training ends with, or None where the tokenizer cannot be trained with.

    Args:
        tokenizer: with its chat template, or without one.
        writing: further arguments of :class:`halfbyte.data.template.Writer`.
    """
    return next(reversed(_trial(tokenizer, writing)), None)


def stop_ids(tokenizer: "PreTrainedTokenizerBase", own: int | Sequence[int] | None = None, **writing: Any) -> list[int]:
    """Return all tokens that generation stops at: the model's, the tokenizer's, and those that are trained.

    Args:
        tokenizer: the model's.
        own: what the model's generation settings name (``model.generation_config.eos_token_id``).
        writing: further arguments of :class:`halfbyte.data.template.Writer`.
    """
    named = [own] if isinstance(own, int) else [*(own or ())]
    trained = {trial[-1] for answer in (ANSWER, CALL) if (trial := _trial(tokenizer, writing, answer))}
    found = {tokenizer.eos_token_id, *trained, *named}
    return sorted(token for token in found if token is not None)


def check_tokenizer(
    tokenizer: "PreTrainedTokenizerBase", own: int | Sequence[int] | None = None, **writing: Any
) -> list[str]:
    """Return what a user should know about a tokenizer's control tokens before training, a sentence each.

    Args:
        tokenizer: the model's.
        own: what the model's generation settings name (``model.generation_config.eos_token_id``).
        writing: further arguments of :class:`halfbyte.data.template.Writer`.
    """
    said: list[str] = []
    trial = _trial(tokenizer, writing)
    if not trial:
        return said
    named = [own] if isinstance(own, int) else [*(own or ())]
    if trial[-1] not in (tokenizer.eos_token_id, *named):
        others = [tokenizer.eos_token, *(tokenizer.convert_ids_to_tokens(token) for token in named)]
        listed = ", ".join(dict.fromkeys(repr(token) for token in others if token)) or "no token"
        said.append(
            f"Answers are trained to end with {tokenizer.convert_ids_to_tokens(trial[-1])!r}, where the model as it "
            f"came stops at {listed}; halfbyte stops at each, and generation_config.json beside the adapter says so"
        )
    bos = tokenizer.bos_token_id
    if bos is not None and tokenizer.chat_template and tokenizer("a")["input_ids"][0] == bos != trial[0]:
        said.append(
            f"The chat template does not begin with {tokenizer.bos_token!r}, though the tokenizer begins other texts "
            "with it; conversations are trained and generated as the template writes them"
        )
    return said


def choose_pad(tokenizer: "PreTrainedTokenizerBase", rows: int | None = None) -> str | None:
    """Give a tokenizer without a pad token one, and return a sentence that says so (None: it had one).

    A token that is made for padding comes first, then a spare one, then the end-of-sequence token. Labels do not depend
    on ids, so even the last does no harm here; other programs may leave the end-of-sequence token untrained.

    Args:
        tokenizer: the model's.
        rows: of the model's embedding: the pad token is one of them.
    """
    if tokenizer.pad_token is not None:
        return None
    taken = {tokenizer.bos_token, tokenizer.eos_token}
    added = [
        token.content
        for index, token in sorted(tokenizer.added_tokens_decoder.items())
        if token.special and token.content not in taken and (rows is None or index < rows)
    ]
    stop = trained_stop(tokenizer)
    added = [token for token in added if tokenizer.convert_tokens_to_ids(token) != stop]
    made = [token for token in added if _PAD.fullmatch(token)]
    spare = [token for token in added if _SPARE.match(token)]
    pad = next(iter([*made, *spare[-1:], *filter(None, [tokenizer.unk_token, tokenizer.eos_token])]), None)
    if pad is None:
        return None  # the collator pads with 0, which nothing looks at
    tokenizer.pad_token = pad
    return f"The tokenizer names no pad token; {pad!r} is taken"


def _trial(
    tokenizer: "PreTrainedTokenizerBase", writing: dict[str, Any], answer: dict[str, Any] | None = None
) -> list[int]:
    """Return the tokens of a conversation up to the end of its answer, or none where the tokenizer cannot be used."""
    turns = [{"role": "user", "content": "Is it?"}, {"role": "assistant", **(answer or ANSWER)}]
    with contextlib.suppress(InputError):
        [encoded] = encode_examples([Chat("", turns)], tokenizer, max_length=sys.maxsize, **writing)
        return [int(token) for row in encoded.rows[-1:] for token in row["input_ids"]]
    return []

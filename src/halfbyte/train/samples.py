"""Which prompts a run answers while it goes, and what is wrong with an answer of the model as it was loaded.

A prompt of a row is what stands before its last answer; of a text without a prompt it is the beginning. It is shown as
what the user says in it, where the chat template is seen to stand around that.
"""

import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from transformers import PreTrainedTokenizerBase

from halfbyte import data
from halfbyte.choices import IGNORED
from halfbyte.errors import InputError
from halfbyte.generate.batched import Answer
from halfbyte.generate.conversation import encode, encode_source
from halfbyte.hf.models.limits import most_positions
from halfbyte.runs.config import TrainConfig

ROWS = 3
"""Rows whose prompts are answered where none were given."""
BEGINNING = 16
"""Tokens of a text without a prompt that are gone on from."""
MARK = "sample prompt"
MOJIBAKE = re.compile("[ÂÃ][\u0080-\u00bf]|â€|ï»¿")
"""UTF-8 that was read as Latin-1 or Windows-1252, as é, ” or a byte-order mark look then."""
LEAST = 8
"""An answer of one token again and again is told from so many on."""


@dataclass(frozen=True)
class Asked:
    """A prompt: as it is shown, and as the model reads it."""

    shown: str
    ids: list[int]


def asked_of(config: TrainConfig, tokenizer: PreTrainedTokenizerBase, rows: data.Prepared, model: Any) -> list[Asked]:
    """Return the prompts that the run answers: those that it was given, or those of its first rows.

    Raises:
        InputError: one was given that the model cannot read.
    """
    if config.task == "classify":
        if config.sample_prompts:
            raise InputError("sample_prompts say nothing to task classify, which writes no answers; leave them out.")
        return []
    limit = None if model.config.is_encoder_decoder else most_positions(model)
    if config.sample_prompts is not None:
        given = [Asked(prompt, _encoded(config, tokenizer, prompt)) for prompt in config.sample_prompts]
        for asked in given:
            if limit is not None and len(asked.ids) >= limit:
                raise InputError(
                    f"The sample prompt {asked.shown[:40]!r} is {len(asked.ids)} tokens long, but the model attends to "
                    f"{limit}; shorten it."
                )
        return given
    table = (rows.evaluation or rows.train).rows
    around = _around(tokenizer) if config.task == "lm" and config.method != "text" else None
    found = [prompt_of(row, config.task) for row in table.select(range(min(ROWS, len(table))))]
    return [Asked(_shown(tokenizer, ids, around), ids) for ids in found if limit is None or len(ids) < limit]


def _encoded(config: TrainConfig, tokenizer: PreTrainedTokenizerBase, prompt: str) -> list[int]:
    if config.task == "seq2seq":
        return encode_source(prompt, tokenizer)
    return encode(prompt if config.method == "text" else [{"role": "user", "content": prompt}], tokenizer)


def prompt_of(row: Mapping[str, Any], task: str = "lm") -> list[int]:
    """Return what of a row's tokens stands before its last answer; at least one token."""
    ids = [int(token) for token in row["input_ids"]]
    if task != "lm":
        return ids
    start, _ = last_answer(row["labels"])
    return ids[:start] if start > 1 else ids[: max(1, min(BEGINNING, len(ids) // 2))]


def last_answer(labels: Sequence[int]) -> tuple[int, int]:
    """Return where the last stretch of labels begins and where it ends; it has at least one."""
    places = np.flatnonzero(np.asarray(labels) != IGNORED)
    gaps = np.flatnonzero(np.diff(places) > 1)
    return int(places[gaps[-1] + 1] if len(gaps) else places[0]), int(places[-1]) + 1


def _around(tokenizer: PreTrainedTokenizerBase) -> tuple[str, str] | None:
    """Return what the chat template writes before and after a question."""
    try:
        written = tokenizer.decode(encode([{"role": "user", "content": MARK}], tokenizer))
    except InputError:
        return None
    before, mark, after = written.partition(MARK)
    return (before, after) if mark else None


def _shown(tokenizer: PreTrainedTokenizerBase, ids: list[int], around: tuple[str, str] | None) -> str:
    written = str(tokenizer.decode(ids))
    if around and written.startswith(around[0]) and written.endswith(around[1]):
        said = written[len(around[0]) : len(written) - len(around[1])]
        if said.strip():
            return said
    return str(tokenizer.decode(ids, skip_special_tokens=True)).strip() or written


def trouble_of(answer: Answer, tokenizer: PreTrainedTokenizerBase) -> str | None:
    """Return what is wrong with an answer of a model that was not trained yet, in words that go on from "answers"."""
    if not answer.is_number:
        return (
            "with logits that are not numbers: look at compute_dtype (bfloat16, or float32) and at the base's weights"
        )
    special = set(tokenizer.all_special_ids)
    if not [token for token in answer.ids if token not in special]:
        return "with nothing but special tokens: look at the chat template (chat_template) and at where answers end"
    if not answer.text.strip():
        return "with nothing but blanks: look at the chat template (chat_template) and the tokenizer"
    words = [token for token in answer.ids if token not in special]
    if len(words) >= LEAST and len(set(words)) == 1:
        return (
            f"with {tokenizer.decode(words[:1])!r} again and again: look at the base (its weights may be broken, or "
            "not fit this format) and at the chat template (chat_template)"
        )
    # an answer that is cut off may end within a character
    if "\N{REPLACEMENT CHARACTER}" in answer.text.rstrip("\N{REPLACEMENT CHARACTER}"):
        return "with bytes that are no text (U+FFFD): look at the tokenizer, which may not be the base's own"
    if MOJIBAKE.search(answer.text):
        return "with letters of a wrong encoding (such as Ã©): look at the tokenizer, which may not be the base's own"
    return None


def told_trouble(asked: Iterable[Asked], answers: Iterable[Answer], tokenizer: PreTrainedTokenizerBase) -> str | None:
    """Return one sentence about the first answer of the model as it was loaded that shows trouble, or None."""
    for question, answer in zip(asked, answers, strict=True):
        if trouble := trouble_of(answer, tokenizer):
            return (
                f"Before training the model answers {question.shown[:60]!r} {trouble}. A base model that never saw "
                "this template may do so; a chat model should not."
            )
    return None

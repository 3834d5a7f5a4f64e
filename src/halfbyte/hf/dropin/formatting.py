"""``formatting_func`` of SFTTrainer: once it got a batch and returned a list of texts, now it gets a row (TRL 0.13)."""

import functools
from collections.abc import Callable
from typing import Any

from halfbyte.hf.dropin.said import say


def by_example(function: Callable[[Any], Any], rows: Any) -> Callable[[Any], Any]:
    """Return ``function`` as one of a row; it is tried on a batch of two, where only an old one returns a list."""
    first = next(iter(rows), None) if rows is not None else None
    if first is None:
        return function
    try:
        texts = function({name: [value, value] for name, value in first.items()})
    except Exception:  # a function of a row, over a batch: whatever it raises
        texts = None
    if isinstance(texts, list):
        if len(texts) != 2 or not all(isinstance(text, str) for text in texts):
            return function
        say("formatting_func gets a row now, and returns its text; this one gets a batch, and is called with each row.")
        return _of_batch(function)
    try:
        alone = function(first)
    except Exception:  # the trainer's own error, in its place
        return function
    if isinstance(alone, list) and len(alone) == 1:
        return _first_of(function)
    return function


def _of_batch(function: Callable[[Any], Any]) -> Callable[[Any], Any]:
    @functools.wraps(function)
    def formatted(row: Any) -> Any:
        return function({name: [value] for name, value in row.items()})[0]

    return formatted


def _first_of(function: Callable[[Any], Any]) -> Callable[[Any], Any]:
    @functools.wraps(function)
    def formatted(row: Any) -> Any:
        return function(row)[0]

    return formatted


def texts_alone(rows: Any, field: str) -> Any:
    """Return ``rows`` without a ``prompt`` beside the texts in ``field``, where there is no ``completion`` to it.

    TRL (1.16) takes such rows for prompts and answers, and ends in a KeyError; the TRL of then trained the texts.
    """
    if isinstance(rows, dict):
        return {name: texts_alone(part, field) for name, part in rows.items()}
    columns = getattr(rows, "column_names", None) or ()
    if not {field, "prompt"} <= {*columns} or {"completion", "chosen"} & {*columns}:
        return rows
    say(f"SFTTrainer: rows have {field!r} and a 'prompt' without a completion; the texts are trained.")
    return rows.remove_columns("prompt")

"""A script's wish for gradient checkpointing, as the memory plan's: recomputed is what there is no memory for.

Scripts that were written for a GPU ask for it as a matter of course, and it costs up to half as much again of matrix
work. A trainer of ours measures what a step would hold (:mod:`halfbyte.hf.layers.activations`) and recomputes as few
layers as the free memory allows; a loop of the script's own recomputes all of them, as it asked.
"""

import logging
import math
from collections.abc import Mapping
from typing import Any

import torch

from halfbyte import tables
from halfbyte.errors import InputError
from halfbyte.hf.dropin.said import say
from halfbyte.hf.layers import activations
from halfbyte.hf.trainers import distributed
from halfbyte.memory import free_memory

logger = logging.getLogger(__name__)

FREE_SHARE = 0.9
"""Of the memory that is free, what a step may take."""
LOOKED_AT, COLLATED = 2000, 8
"""Rows without ``input_ids`` that are compared, at most some, and the largest of them, which are collated."""
MARGIN = 1.25
"""By which the longest row may be longer than those that were looked at."""


def take_wish(args: Any, model: Any) -> bool:
    """Return whether recomputing was asked for, in the arguments or of the model, and take it out of the arguments."""
    wished = bool(args.activation_checkpointing)
    args.activation_checkpointing = args.gradient_checkpointing = False
    args.activation_checkpointing_kwargs = args.gradient_checkpointing_kwargs = None
    return wished or bool(getattr(model, "is_activation_checkpointing", False))


def plan(model: Any, rows: Any, args: Any, sequences: int = 1, collate: Any = None) -> None:
    """Treat the activations of ``model`` as the free memory allows.

    Args:
        model: ready to train; in place.
        rows: the training data, with ``input_ids`` or without.
        args: of the trainer.
        sequences: how many a row brings to a batch.
        collate: makes a batch of rows that have no ``input_ids`` of their own.
    """
    longest = _longest(rows, args)
    if longest is None and collate is not None:
        longest = _collated(rows, args, collate)
    model.activation_checkpointing_disable()
    if longest is None:
        model.activation_checkpointing_enable({"use_reentrant": False})
        say("gradient checkpointing: all layers are recomputed, since the rows do not tell their lengths.")
        return
    free = int(FREE_SHARE * free_memory()) // distributed.on_this_machine()
    [lacking] = distributed.largest([-free])
    batch = args.per_device_train_batch_size * sequences
    try:
        policy = activations.plan(model, length=longest, batch_size=batch, free=-lacking)
    except InputError as error:
        model.activation_checkpointing_enable({"use_reentrant": False})
        say(f"gradient checkpointing: all layers are recomputed, and even so memory may be short. {error}")
        return
    activations.apply(model, policy)
    say(f"gradient checkpointing is as memory needs it. {policy}.")


def _longest(rows: Any, args: Any) -> int | None:
    if "input_ids" in (getattr(rows, "column_names", None) or ()) and hasattr(rows, "__len__"):
        return int(tables.lengths(rows).max())
    limit: int | None = getattr(args, "max_length", None)
    return limit


def _collated(rows: Any, args: Any, collate: Any) -> int | None:
    """Return the length that the collator gives the largest rows, with :data:`MARGIN` if not all were looked at.

    Rows are compared by the characters and numbers in them. None where that tells nothing: streams, images, a collator
    that fails, columns that the trainer takes away before.
    """
    if not hasattr(rows, "__len__") or (args.remove_unused_columns and hasattr(rows, "column_names")):
        return None
    count = len(rows)
    try:
        some = range(0, count, max(1, count // LOOKED_AT))
        largest = sorted(some, key=lambda index: _size(rows[index]))[-COLLATED:]
        with torch.random.fork_rng():
            batch = collate([rows[index] for index in largest])
    except Exception:  # the script's own code, which the first step runs again and lets fail
        return None
    if any(name.startswith("pixel_values") for name in batch):
        return None
    found = [batch[name].shape[1] for name in ("input_ids", "inputs_embeds") if hasattr(batch.get(name), "shape")]
    return math.ceil(max(found) * (1 if len(some) == count else MARGIN)) if found else None


def _size(row: Any) -> int:
    values = row.values() if isinstance(row, Mapping) else [row]
    return sum(len(value) if hasattr(value, "__len__") else 1 for value in values)

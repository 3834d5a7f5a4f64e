"""``batch_size: auto``: as many rows a pass as memory allows, the rows of an optimizer step staying as they are.

The rows of a step are ``batch_size * gradient_accumulation_steps`` as they are without ``auto``; the largest divisor of
them is taken whose activations the plan of memory (:mod:`halfbyte.hf.layers.activations`) keeps. If not even one row's
fit, it is one row (of KTO, two) with as much recomputed as needed; recomputing to have more rows costs more than fuller
passes gain. A resumed run keeps the numbers it began with.
"""

from collections.abc import Callable
from typing import Any

from halfbyte import data
from halfbyte.errors import InputError
from halfbyte.runs.config import TrainConfig
from halfbyte.train.build import plan_activations
from halfbyte.train.methods import METHODS


def fit_batch(config: TrainConfig, model: Any, rows: data.Prepared, note: Callable[[str], None]) -> TrainConfig:
    """Return ``config`` with numbers in the place of ``auto``.

    Args:
        config: of the run.
        model: ready to train.
        rows: what it trains on.
        note: is told what was chosen.

    Raises:
        InputError: not even the smallest batch fits.
    """
    if config.batch_size != "auto":
        return config
    step = config.rows_a_step
    least = 2 if config.method == "kto" and config.loss_type != "apo_zero_unpaired" else 1
    sizes = [size for size in range(step, 0, -1) if step % size == 0 and size >= least]
    if not sizes:
        raise InputError(f"A step of {step} rows cannot be divided for method {config.method}; set batch_size.")
    chosen = next((size for size in sizes if _is_kept(with_batch(config, size), model, rows)), sizes[-1])
    note(f"batch_size {chosen} with gradient_accumulation_steps {step // chosen}: {step} rows a step")
    return with_batch(config, chosen)


def with_batch(config: TrainConfig, size: int) -> TrainConfig:
    """Return ``config`` with ``size`` rows a pass and as many rows a step as it has."""
    accumulated = config.rows_a_step // size
    return config.model_copy(update={"batch_size": size, "gradient_accumulation_steps": accumulated})


def _is_kept(config: TrainConfig, model: Any, rows: data.Prepared) -> bool:
    """Return whether the activations of a pass fit; where all are to be recomputed, whether what is left does."""
    try:
        policy = plan_activations(config, model, rows.longest, sequences=METHODS[config.method].sequences)
    except InputError:
        return False
    if config.gradient_checkpointing is None and policy.offloaded + policy.recomputed:
        return False
    return policy.bytes <= policy.free

"""Whether the samples of a step are packed, and what the activations of a packed pass take."""

from collections.abc import Callable
from typing import Any

from halfbyte import data, hf, tables
from halfbyte.errors import InputError
from halfbyte.hf.layers.activations import Policy
from halfbyte.runs.config import TrainConfig
from halfbyte.train.build import plan_activations
from halfbyte.train.methods import METHODS


def plan_step(
    config: TrainConfig, model: Any, rows: data.Prepared, note: Callable[[str], None]
) -> tuple[Policy, int | None]:
    """Choose whether a step is packed, and which layers' activations are kept.

    A packed pass may hold more tokens than the longest padded batch would, where rows are shorter than ``max_length``.
    If it is for that alone that activations would be recomputed, it gets no more tokens than that batch.

    Args:
        config: of the run.
        model: ready to train.
        rows: what it trains on.
        note: is told what was chosen.

    Returns:
        The choice of activations, and the most tokens that a packed pass may hold, or None for padded batches.

    Raises:
        InputError: packing was asked for and cannot be done, or nothing fits into memory.
    """
    longest, method = rows.longest, METHODS[config.method]
    if not method.packs:
        if config.packing:
            raise InputError(f"packing is not for method {config.method}, whose rows are compared; leave it out.")
        return plan_activations(config, model, longest, sequences=method.sequences), None
    plan = _packed(config, model, rows, config.max_length, note)
    policy = None
    if plan:
        try:
            policy = plan_activations(config, model, longest, plan.tokens)
        except InputError:
            policy = None
        if policy is None or (policy.offloaded + policy.recomputed and config.gradient_checkpointing is None):
            plan, policy = _packed(config, model, rows, rows.train.counts.longest, None), None
    policy = policy or plan_activations(config, model, longest)
    if plan:
        note(str(plan))
    return policy, plan.tokens if plan else None


def _packed(
    config: TrainConfig,
    model: Any,
    rows: data.Prepared,
    max_length: int,
    note: Callable[[str], None] | None,
) -> data.PackingPlan | None:
    noisy = config.neftune_noise_alpha  # noise that depends on the length of a row
    if config.packing is False or config.task != "lm" or noisy:
        return None
    lengths = tables.lengths(rows.train.rows)
    plan = data.plan_packing(
        lengths, config.rows_a_pass, config.gradient_accumulation_steps, max_length, config.group_by_length
    )
    if config.packing is None and not plan.pays:
        return None
    if note and (obstacle := hf.packing_obstacle(model, rows.train.counts.longest)):
        if config.packing:
            raise InputError(f"The samples of a step cannot be packed: {obstacle}; leave packing out.")
        note(f"Rows are padded, not packed: {obstacle}")
        return None
    return plan

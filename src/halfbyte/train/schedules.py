"""The course of the learning rate: which of transformers' (5.23) schedules, and what it is told, looked at beforehand.

A schedule's own arguments (``lr_scheduler_kwargs``) are those of the function that makes it; they are read from there,
and tried on a parameter, so that a wrong one ends the run before anything is loaded.
"""

import inspect
from typing import Any

import torch
from transformers.optimization import TYPE_TO_SCHEDULER_FUNCTION, GreedyLR, SchedulerType, get_scheduler

from halfbyte.choices import WATCHING
from halfbyte.errors import InputError, nearest
from halfbyte.runs.config import TrainConfig

GIVEN = ("optimizer", "num_warmup_steps", "num_training_steps", "last_epoch")
"""Arguments that the trainer fills in."""


def name_of(config: TrainConfig) -> str:
    """Return the schedule that ``config`` means: transformers' constant one has no warm-up, and another one has."""
    warm = config.lr_scheduler_type == "constant" and config.warmup_ratio > 0
    return "constant_with_warmup" if warm else config.lr_scheduler_type


def check(config: TrainConfig) -> None:
    """Refuse a schedule that cannot be followed.

    Raises:
        InputError: it watches evaluations and there are none, an argument is unknown, missing or wrong, or it has no
            warm-up and one is asked for.
    """
    name, given = config.lr_scheduler_type, config.lr_scheduler_kwargs or {}
    if name in WATCHING:
        if not (config.eval_data or config.eval_share):
            raise InputError(
                f"lr_scheduler_type {name} goes by the loss of evaluations, and there are none; set eval_data or "
                "eval_share."
            )
        if config.warmup_ratio:
            raise InputError(f"lr_scheduler_type {name} has no warm-up, but warmup_ratio is given; leave it out.")
    arguments = _arguments(name)
    for key in given:
        if key not in arguments:
            own = f"it has {', '.join(arguments)}" if arguments else "it has none"
            raise InputError(
                f"lr_scheduler_type {name} takes no argument {key!r} (lr_scheduler_kwargs){nearest(key, arguments)}; "
                f"{own}."
            )
    missing = [key for key, needed in arguments.items() if needed and key not in given]
    if missing:
        raise InputError(f"lr_scheduler_type {name} needs {', '.join(missing)} in lr_scheduler_kwargs.")
    _try(name, config, given)


def _arguments(name: str) -> dict[str, bool]:
    """Return the names of a schedule's own arguments, and whether each has to be given."""
    maker: Any = TYPE_TO_SCHEDULER_FUNCTION[SchedulerType(name)]
    if name in WATCHING:
        maker = GreedyLR if name == "greedy" else torch.optim.lr_scheduler.ReduceLROnPlateau
    parameters = inspect.signature(maker).parameters.values()
    return {p.name: p.default is p.empty for p in parameters if p.name not in GIVEN}


def _try(name: str, config: TrainConfig, given: dict[str, Any]) -> None:
    optimizer = torch.optim.SGD([torch.zeros(1, requires_grad=True)], lr=config.learning_rate)
    try:
        schedule = get_scheduler(name, optimizer, 1, 10, given)
        for _ in range(10):
            optimizer.step()
            schedule.step(*([1.0] if name in WATCHING else []))
    except (TypeError, ValueError, ZeroDivisionError, OverflowError) as error:
        told = " ".join(str(error).split()).rstrip(".")
        raise InputError(f"lr_scheduler_type {name} with lr_scheduler_kwargs {given!r} cannot be: {told}.") from error

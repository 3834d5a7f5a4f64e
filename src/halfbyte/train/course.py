"""A run that is given more steps: how many, and what becomes of its learning rate.

A schedule is laid out over all steps of a run, so that more of them change what is left: with twice the steps a rate
that falls to zero falls half as fast. The steps that were made stay as they are.
"""

import math
from pathlib import Path
from typing import Any

import torch
from torch.optim.lr_scheduler import LambdaLR
from transformers.optimization import get_scheduler

from halfbyte.checksums import step_of
from halfbyte.errors import InputError
from halfbyte.hf.trainers.state import steps_planned


def total_steps(trainer: Any) -> int:
    """Return how many steps ``trainer`` is to make in all, as Trainer counts them."""
    args = trainer.args
    if args.max_steps > 0:
        return int(args.max_steps)
    passes = -(-len(trainer.train_dataset) // (args.train_batch_size * args.world_size))
    steps: int = -(-passes // args.gradient_accumulation_steps)
    return math.ceil(float(args.num_train_epochs) * steps)


def course(trainer: Any, checkpoint: Path) -> tuple[dict[str, int], str] | None:
    """Return where and how the run gets another number of steps, and a sentence that says so; None if it does not.

    Raises:
        InputError: there would be fewer.
    """
    done, before, now = step_of(checkpoint), steps_planned(checkpoint), total_steps(trainer)
    if now == before:
        return None
    if now < before:
        raise InputError(
            f"The run was to have {before:,} steps and cannot have {now:,}: it can be given more, not fewer; raise "
            "max_steps or epochs."
        )
    told = f"The run was to have {before:,} steps and has {now:,} now; {done:,} are made"
    old, new = rate(trainer, before, done), rate(trainer, now, done)
    if old is not None and new is not None:
        name = str(getattr(trainer.args.lr_scheduler_type, "value", trainer.args.lr_scheduler_type))
        would = f"would have been {old:.3g} and is {new:.3g}" if done < before else f"is {new:.3g}"
        told += f". Its schedule ({name}) is laid out over all of them: the learning rate of step {done + 1:,} {would}"
    return {"step": done, "from": before, "to": now}, told


def rate(trainer: Any, total: int, done: int) -> float | None:
    """Return the learning rate of the step after ``done`` ones of a run of ``total`` steps, where it goes by steps."""
    args = trainer.args
    optimizer = torch.optim.SGD([torch.zeros(1)], lr=args.learning_rate)
    warmup = args.get_warmup_steps(total)
    schedule = get_scheduler(args.lr_scheduler_type, optimizer, warmup, total, args.lr_scheduler_kwargs)
    if not isinstance(schedule, LambdaLR):
        return None
    return float(args.learning_rate * schedule.lr_lambdas[0](done))

"""Transformers' early stopping, and a resumed run stops at the step at which the uninterrupted one does.

Trainer (transformers 5.23) restores the states of callbacks only together with its control flags, which are those of
the moment of the interrupt; so this one takes its own.
"""

import json
from pathlib import Path
from typing import Any

from transformers import EarlyStoppingCallback
from transformers.trainer import TRAINER_STATE_NAME
from transformers.trainer_callback import TrainerState

COUNTER = "early_stopping_patience_counter"


class EarlyStopping(EarlyStoppingCallback):
    """Stops after ``patience`` evaluations that were not better than the best one by more than ``threshold``.

    The evaluation before the first step is none of them: training begins with it.
    """

    def __init__(self, early_stopping_patience: int = 1, early_stopping_threshold: float | None = 0.0) -> None:
        super().__init__(early_stopping_patience, early_stopping_threshold)

    @property
    def is_reached(self) -> bool:
        """Whether it has stopped the run."""
        return bool(self.early_stopping_patience_counter >= self.early_stopping_patience)

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Take the count of the checkpoint that the run goes on from."""
        self.early_stopping_patience_counter = _counter(state.stateful_callbacks)

    def on_evaluate(self, args: Any, state: Any, control: Any, metrics: Any, **kwargs: Any) -> None:
        """Count the evaluation."""
        if state.global_step:
            super().on_evaluate(args, state, control, metrics, **kwargs)


def had_stopped(checkpoint: Path, patience: int) -> bool:
    """Return whether the run of ``checkpoint`` was stopped early at the very step that it holds."""
    file = checkpoint / TRAINER_STATE_NAME
    states = json.loads(file.read_text(encoding="utf-8")).get("stateful_callbacks") if file.is_file() else None
    return _counter(states or {}) >= patience


def _counter(states: Any) -> int:
    return int(states.get(EarlyStopping.__name__, {}).get("attributes", {}).get(COUNTER, 0))


def take_over(trainer: Any, checkpoint: Path) -> None:
    """Put a trainer into the state of ``checkpoint`` without a step: its weights, and what it knows of the run."""
    trainer.state = TrainerState.load_from_json(str(checkpoint / TRAINER_STATE_NAME))
    trainer._load_from_checkpoint(str(checkpoint))

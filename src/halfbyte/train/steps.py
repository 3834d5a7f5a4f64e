"""What transformers' trainer calls back, told as events, and the stop that was asked for, handed to it."""

import json
import math
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from transformers import IntervalStrategy, TrainerCallback
from transformers.trainer import TRAINER_STATE_NAME

from halfbyte.devices import memory_on
from halfbyte.hf.layers.experts import load_of
from halfbyte.hf.trainers.state import state_folder
from halfbyte.memory import resident_memory
from halfbyte.runs.events import Begin, Checkpoint, Evaluation, Event, StepMetrics
from halfbyte.train.stop import Stop


class Steps(TrainerCallback):  # type: ignore[misc]
    """Tells each step, evaluation and checkpoint, and stops the run when it was asked to.

    Args:
        trainer: whose ``trained_tokens`` count.
        before: the steps that were made before the run was resumed.
        stop: is looked at after each step.
        tell: hears of everything.
        figures: what else is taken from the trainer's log, by name.

    Attributes:
        made: all steps of the run so far.
    """

    def __init__(
        self,
        trainer: Any,
        before: list[StepMetrics],
        stop: Stop,
        tell: Callable[[Event], None],
        figures: Sequence[str] = (),
    ) -> None:
        self.trainer = trainer
        self.made = before
        self.stop = stop
        self.tell = tell
        self.figures = figures
        self.tokens_before = before[-1].trained_tokens if before else 0
        self.seconds_before = before[-1].elapsed if before else 0.0
        self.begun = self.step_begun = 0.0  # time.monotonic()

    def on_train_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        self.tell(Begin(step=state.global_step, total_steps=state.max_steps))
        self.begun = time.monotonic()

    def on_step_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        self.step_begun = time.monotonic()

    def on_log(self, args: Any, state: Any, control: Any, logs: dict[str, float], **_: Any) -> None:
        if "loss" not in logs:
            return  # the closing summary
        now = time.monotonic()
        tokens = self.tokens_before + self.trainer.trained_tokens
        new_tokens = tokens - (self.made[-1].trained_tokens if self.made else 0)
        step = StepMetrics(
            step=state.global_step,
            epoch=logs["epoch"],
            loss=logs["loss"],
            learning_rate=logs["learning_rate"],
            grad_norm=logs["grad_norm"],
            trained_tokens=tokens,
            tokens_per_second=new_tokens / (now - self.step_begun),
            elapsed=self.seconds_before + now - self.begun,
            memory_bytes=resident_memory(),
            gpu_memory_bytes=memory_on(self.trainer.args.device),
            figures={name: logs[name] for name in self.figures if name in logs} | self._load(),
        )
        self.made.append(step)
        self.tell(step)

    def _load(self) -> dict[str, float]:
        load = load_of(self.trainer.model)
        return {} if load is None else {"expert_load": load}

    def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        if state.global_step >= state.max_steps and str(args.eval_strategy) != str(IntervalStrategy.NO):
            control.should_evaluate = True  # what it came to
        if self.stop.asked:
            control.should_save = control.should_training_stop = True

    def on_save(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        folder = state_folder(self.trainer.args.output_dir, state.global_step)
        self.tell(Checkpoint(step=state.global_step, folder=f"{folder.parent.name}/{folder.name}"))

    def on_evaluate(self, args: Any, state: Any, control: Any, metrics: dict[str, Any], **_: Any) -> None:
        known = ((name, f"eval_{name}") for name in ("loss", *self.figures))
        found = {name: metrics[key] for name, key in known if key in metrics}
        self.tell(evaluation_of(state.global_step, found))


def steps_of(checkpoint: Path) -> list[StepMetrics]:
    """Return the steps that a checkpoint remembers; what it does not, tokens, time and memory, is 0."""
    state = json.loads((checkpoint / TRAINER_STATE_NAME).read_text(encoding="utf-8"))
    own = ("step", "epoch", "loss", "learning_rate", "grad_norm")
    return [
        StepMetrics(trained_tokens=0, tokens_per_second=0, elapsed=0, **{name: logs[name] for name in own})
        for logs in state["log_history"]
        if all(name in logs for name in own)
    ]


def evaluation_of(step: int, found: Mapping[str, float]) -> Evaluation:
    """Return the evaluation after ``step`` steps that ``found`` these figures; what is not finite stands apart."""
    figures = {name: value for name, value in found.items() if math.isfinite(value)}
    return Evaluation(step=step, figures=figures, not_finite=[name for name in found if name not in figures])

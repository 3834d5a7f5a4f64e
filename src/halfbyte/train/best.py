"""The best evaluation of a run: by what it is told, when a run without a better one stops, whose adapter is left."""

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from halfbyte.hf.trainers.early_stopping import EarlyStopping, had_stopped, take_over
from halfbyte.hf.trainers.state import state_folder
from halfbyte.runs.config import TrainConfig
from halfbyte.runs.events import Evaluation, Event, Listener, Note

LOWER = ("loss", "perplexity")
"""Ends of the names of figures that are the better the lower they are."""


def metric_arguments(config: TrainConfig) -> dict[str, Any]:
    """Return what a trainer is told of the best evaluation; nothing where nobody asks for it."""
    if not (config.keep_best or config.early_stopping_patience):
        return {}
    best = config.metric_for_best
    return {"metric_for_best_model": best, "greater_is_better": not best.endswith(LOWER)}


def best_of(evaluations: Sequence[Evaluation], metric: str) -> Evaluation | None:
    """Return the first evaluation after step 0 that none is better than by ``metric``; None: there is none."""
    known = [evaluation for evaluation in evaluations if evaluation.step and metric in evaluation.figures]
    sign = 1 if metric.endswith(LOWER) else -1
    return min(known, key=lambda evaluation: sign * evaluation.figures[metric], default=None)


class Heard:
    """A listener that passes events on, keeps the evaluations among them, and tells what they give rise to.

    Args:
        tell: hears of the events, and of the notices.
        notices: makes sentences of events.

    Attributes:
        evaluations: all of the run so far.
    """

    def __init__(self, tell: Listener, notices: Callable[[Event], list[str]]) -> None:
        self.tell = tell
        self.notices = notices
        self.evaluations: list[Evaluation] = []

    def __call__(self, event: Event) -> None:
        """Take an event."""
        self.tell(event)
        for sentence in self._kept(event):
            self.tell(Note(text=sentence, step=getattr(event, "step", None), trouble=True))

    def recall(self, events: Sequence[Event]) -> None:
        """Take what was told before the run was resumed."""
        for event in events:
            self._kept(event)

    def _kept(self, event: Event) -> list[str]:
        if isinstance(event, Evaluation):
            self.evaluations.append(event)
        return self.notices(event)


class Best:
    """Stops a trainer early, and puts the adapter of the best evaluation into its model at the end.

    Args:
        trainer: of the run.
        config: its options.
        note: is told what happens, in a sentence.
    """

    def __init__(self, trainer: Any, config: TrainConfig, note: Callable[[str], None]) -> None:
        self.trainer = trainer
        self.config = config
        self.note = note
        self.stopping: EarlyStopping | None = None
        trainer.keep_best = config.keep_best
        if config.early_stopping_patience:
            self.stopping = EarlyStopping(config.early_stopping_patience, config.early_stopping_threshold)
            trainer.add_callback(self.stopping)

    def train(self, checkpoint: Path | None) -> None:
        """Train, or where the run was over with ``checkpoint`` already, be where it was then."""
        if checkpoint and self.stopping and had_stopped(checkpoint, self.stopping.early_stopping_patience):
            take_over(self.trainer, checkpoint)
            self.stopping.on_train_begin(None, self.trainer.state, None)
        else:
            self.trainer.train(resume_from_checkpoint=str(checkpoint) if checkpoint else None)

    @property
    def is_over(self) -> bool:
        """Whether the run has come to its end: after its last step, or early."""
        state = self.trainer.state
        return state.global_step >= state.max_steps or bool(self.stopping and self.stopping.is_reached)

    def deliver(self, evaluations: Sequence[Evaluation]) -> int:
        """Put the adapter that the run leaves into the model, say which it is, and return its step."""
        state, metric = self.trainer.state, self.config.metric_for_best
        best = state.best_global_step
        if state.global_step < state.max_steps:
            self.note(
                f"Stopped early after step {state.global_step} of {state.max_steps}: "
                f"{self.config.early_stopping_patience} evaluations in a row "
                + (
                    f"were no better than that of step {best} ({metric} {state.best_metric:.4g})"
                    if best
                    else f"had no {metric} that is a number"
                )
            )
        if not self.config.keep_best or not best:
            return int(state.global_step)
        before = next((event.figures.get(metric) for event in evaluations if event.step == 0), None)
        sign = 1 if metric.endswith(LOWER) else -1
        if before is not None and sign * state.best_metric >= sign * before:
            self.note(
                f"No evaluation was better than that before training ({metric} {before:.4g}, at best "
                f"{state.best_metric:.4g}): look at the learning_rate and the data"
            )
        folder = state_folder(self.config.output, best)
        if best != state.global_step:
            if not folder.is_dir():
                self.note(
                    f"The checkpoint of the best evaluation, {folder}, is gone: the adapter is that of the last step"
                )
                return int(state.global_step)
            self.trainer._load_from_checkpoint(str(folder))
        self.note(
            f"The adapter is that of step {best}, whose evaluation was the best ({metric} {state.best_metric:.4g})"
        )
        return int(best)

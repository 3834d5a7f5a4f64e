"""Checkpoints by the clock."""

import time
from typing import Any

from transformers import TrainerCallback


class SaveByTime(TrainerCallback):  # type: ignore[misc]
    """Has a checkpoint saved after the first step that ends ``minutes`` or more after the last one was.

    By a clock that only goes forward: setting the machine's time makes no difference.
    """

    def __init__(self, minutes: float) -> None:
        self.seconds = 60 * minutes
        self.saved = 0.0  # time.monotonic()

    def on_train_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        self.saved = time.monotonic()

    def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        if time.monotonic() - self.saved >= self.seconds:
            control.should_save = True

    def on_save(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        self.saved = time.monotonic()

"""Whom a run reports to beside its folder: loggers that transformers (5.23) has, each with a package of its own."""

import importlib.util
import os
from typing import Any

from transformers.integrations import TensorBoardCallback

from halfbyte.errors import InputError
from halfbyte.runs.config import TrainConfig
from halfbyte.runs.folder import RunFolder

PACKAGES = {name: (name,) for name in ("tensorboard", "trackio", "wandb", "mlflow")} | {
    "tensorboard": ("tensorboard", "tensorboardX")
}
"""Packages of which one has to be there."""


def check(config: TrainConfig) -> None:
    """Refuse a logger whose package is not installed.

    Raises:
        InputError: it says how to install it.
    """
    for name in config.loggers:
        if not any(map(importlib.util.find_spec, PACKAGES[name])):
            raise InputError(f"report_to {name} needs a package that is not installed: pip install {name}.")


def arguments(config: TrainConfig) -> dict[str, Any]:
    """Return what a trainer is told of loggers."""
    return {"report_to": config.loggers, "run_name": config.output.name} if config.loggers else {"report_to": "none"}


def place(trainer: Any, config: TrainConfig) -> None:
    """Have TensorBoard's files lie in the run folder, where the environment does not say where."""
    for callback in trainer.callback_handler.callbacks:
        if isinstance(callback, TensorBoardCallback) and not os.environ.get("TENSORBOARD_LOGGING_DIR"):
            callback.logging_dir = str(RunFolder(config.output).tensorboard)

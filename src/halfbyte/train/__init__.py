"""Training: the configuration of a run, the run itself, and what it shows.

``TrainConfig`` imports no torch, so that the command line can answer at once; the rest is loaded when it is used.
"""

from typing import TYPE_CHECKING, Any

from halfbyte.runs.config import TrainConfig

if TYPE_CHECKING:
    from halfbyte.train.run import Interrupted, RunResult, fine_tune

__all__ = ["Interrupted", "RunResult", "TrainConfig", "fine_tune"]


def __getattr__(name: str) -> Any:
    if name in __all__:
        from halfbyte.train import run

        return getattr(run, name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")

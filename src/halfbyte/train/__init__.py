"""Training: methods, what a run is built from, and the run itself.

``TrainConfig`` imports no torch, so that the command line can answer at once; the rest is loaded when it is used.
"""

from typing import TYPE_CHECKING, Any

from halfbyte.runs.config import TrainConfig

if TYPE_CHECKING:
    from halfbyte.train.run import RunResult, fine_tune
    from halfbyte.train.stop import Interrupted

__all__ = ["Interrupted", "RunResult", "TrainConfig", "fine_tune"]


def __getattr__(name: str) -> Any:
    if name in ("RunResult", "fine_tune"):
        from halfbyte.train import run

        return getattr(run, name)
    if name == "Interrupted":
        from halfbyte.train.stop import Interrupted

        return Interrupted
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")

"""Free pages of the heap, given back between the passes of a run whose memory is short."""

from typing import Any

from transformers import TrainerCallback

from halfbyte.memory import give_back_freed


class GiveBack(TrainerCallback):  # type: ignore[misc]
    """Gives them back behind each micro-batch, in milliseconds: what one leaves free in the heap does not all fit the
    next, and the pool does not take from there."""

    def on_substep_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        give_back_freed()

    def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        give_back_freed()

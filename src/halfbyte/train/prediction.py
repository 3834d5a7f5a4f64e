"""What a run is going to take, before its model is loaded, and beside it what it took.

A run that cannot fit is refused here, with options that would, after its rows are known and before minutes of loading.
It is refused only where the plan is clear of its own error (:data:`MARGIN`); what is near goes on, and the run itself
decides when the model is there. Of models that there is no formula for, of GPUs and of several processes nothing is
foretold.
"""

import statistics
from collections.abc import Callable, Sequence
from typing import Any

from halfbyte import devices
from halfbyte.choices import REFERENCED
from halfbyte.data import Prepared
from halfbyte.errors import InputError
from halfbyte.hf.trainers import distributed
from halfbyte.memory import anonymous_memory, mapped_memory, peak_anonymous_memory
from halfbyte.plan import advice, words
from halfbyte.plan.estimate import DoesNotFitError, Plan, free_for, look_at, plan_run
from halfbyte.plan.rows import facts_of
from halfbyte.runs.config import TrainConfig
from halfbyte.runs.events import StepMetrics
from halfbyte.train.methods import Method

MARGIN = 1.1
"""A plan is not held against a run that would fit into so many times the memory that is free."""
FIRST = 2
"""Steps that are not counted: they take memory from the system for the first time."""


class Prediction:
    """A plan from before loading, and what the run came to.

    Args:
        config: of the run.
        method: of training.
        rows: that are trained on.

    Attributes:
        plan: None where nothing is foretold.

    Raises:
        InputError: the run cannot fit, whatever is done; told with options that would.
    """

    def __init__(self, config: TrainConfig, method: Method, rows: Prepared) -> None:
        self.begun = anonymous_memory()
        self.plan: Plan | None = None
        if config.task != "lm" or config.fsdp or distributed.world_size() > 1:
            return
        if devices.choose(config.device).type != "cpu":
            return
        try:
            model = look_at(config)
        except InputError:
            return  # no formula; what is wrong with the model is told when it is loaded
        options: dict[str, Any] = {"model": model, "facts": facts_of(rows), **of_method(config, method)}
        try:
            self.plan = plan_run(config, **options)
        except DoesNotFitError as error:
            if _is_clear(config, options):
                raise advice.refusal(config, error, **options) from None
        except InputError:
            return  # layers by names that the planner does not know; the run looks at the model itself

    def facts(self, steps: Sequence[StepMetrics]) -> dict[str, float]:
        """Return what was foretold and what the run took: bytes at the peak, seconds of a step (the median)."""
        seconds = step_seconds(steps)
        if self.plan is None or not seconds:
            return {}
        # of a base in 16 bits the pages that were read to quantize it are in memory too, until somebody wants the room
        resident = min(mapped_memory(".safetensors"), self.plan.memory.base_mapped)
        peak = peak_anonymous_memory() - self.begun + resident
        return {
            "foretold_peak_bytes": self.plan.memory.peak,
            "peak_bytes": peak,
            "foretold_step_seconds": self.plan.step.seconds,
            "step_seconds": statistics.median(seconds[FIRST:] or seconds),
        }

    def tell(self, steps: Sequence[StepMetrics], note: Callable[[str], None]) -> dict[str, float]:
        """Tell prediction and fact beside each other, and return them."""
        facts = self.facts(steps)
        if facts and self.plan is not None:
            note(words.compared(self.plan, int(facts["peak_bytes"]), facts["step_seconds"]))
        return facts


def of_method(config: TrainConfig, method: Method) -> dict[str, Any]:
    """Return what a plan is to be told of a method."""
    return {"sequences": method.sequences, "packs": method.packs, "reference": config.method in REFERENCED}


def step_seconds(steps: Sequence[StepMetrics]) -> list[float]:
    """Return the seconds of each step by itself, without evaluations and saving."""
    tokens = [0, *(step.trained_tokens for step in steps)]
    made = zip(tokens, steps, strict=False)
    return [(s.trained_tokens - before) / s.tokens_per_second for before, s in made if s.tokens_per_second > 0]


def _is_clear(config: TrainConfig, options: dict[str, Any]) -> bool:
    """Return whether a run would not fit with some more memory either."""
    try:
        plan_run(config, **options, free=int(MARGIN * max(free_for(config), 0)))
    except DoesNotFitError:
        return True
    return False

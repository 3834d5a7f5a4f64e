"""The options that say what is kept of a run while it goes on, and the marks of options for when it does. No torch."""

from typing import Any

from pydantic import Field

from halfbyte.options import Options

# Marks of fields: what may change when a run goes on, since its result does not depend on it; what says how to begin,
# not what to do, and is not written down; and what may become more.
CHANGEABLE: Any = {"on_resume": "may change"}
OF_THE_CALL: Any = {"on_resume": "of the call"}
GROWING: Any = {"on_resume": "may grow"}


class KeepOptions(Options):
    """When there are checkpoints beside those of every ``save_steps``, and how many stay. Part of a run's options."""

    save_minutes: float | None = Field(
        default=None,
        gt=0,
        json_schema_extra=CHANGEABLE,
        description="Minutes after which there is a checkpoint too, whatever save_steps is.",
    )
    keep: int | None = Field(
        default=None,
        ge=1,
        json_schema_extra=CHANGEABLE,
        description="Checkpoints that are kept, the newest ones, after the end too, so that the run can be given more "
        "steps; without it two, and none after the end.",
    )
    keep_best: bool = Field(
        default=False,
        description="Have a checkpoint of the best evaluation, keep it beside the newest ones, and leave its adapter "
        "in the run folder at the end; early stopping does.",
    )

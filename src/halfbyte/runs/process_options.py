"""The options that say how many processes train one model. Imports no torch."""

from typing import Self

from pydantic import Field, model_validator

from halfbyte.choices import Sharding
from halfbyte.options import Options
from halfbyte.runs.keep_options import CHANGEABLE, OF_THE_CALL


class ProcessOptions(Options):
    """Where the work of a step is divided. Part of a run's options."""

    processes: int = Field(
        default=1,
        ge=1,
        json_schema_extra=CHANGEABLE,
        description="Processes that train together on this machine, each with batch_size rows a pass; they share the "
        "cores and one base model. Across machines: torchrun (docs/scaling.md).",
    )
    max_restarts: int = Field(
        default=0,
        ge=0,
        json_schema_extra=CHANGEABLE,
        description="How often processes that died begin again from the last checkpoint.",
    )
    fsdp: Sharding | None = Field(
        default=None,
        json_schema_extra=CHANGEABLE,
        description="Divide the base over the processes, for GPUs that cannot hold it: full_shard, or shard_grad_op, "
        "which gathers each layer once a pass and holds all of them meanwhile (docs/scaling.md).",
    )
    ray: str | None = Field(
        default=None,
        json_schema_extra=OF_THE_CALL,
        description="Address of a Ray cluster whose workers the processes are, as auto, local or 10.0.0.1:6379; needs "
        "the extra ray.",
    )

    @model_validator(mode="after")
    def _restarts_of_processes(self) -> Self:
        if self.max_restarts and self.processes == 1 and self.ray is None:
            raise ValueError("max_restarts is for several processes; set processes, or leave it away")
        if self.max_restarts and self.ray is not None:
            raise ValueError("max_restarts is not for ray; leave one of them away")
        return self

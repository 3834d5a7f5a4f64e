"""Several processes have to be of one mind before they train: versions, options, data, the run folder.

Each tells the others, by digest where it is long. One that differs would train another model, and the mean of their
gradients would be nobody's. What differs is named, and of which process. And: a run that several processes began goes
on with another number of them, its steps having the same rows.
"""

import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from halfbyte.errors import InputError
from halfbyte.hf.trainers import distributed
from halfbyte.runs import launched
from halfbyte.runs.circumstances import fingerprint, kernels_in_force, versions
from halfbyte.runs.config import TrainConfig
from halfbyte.runs.folder import INPUTS, RunFolder

OWN = ("output", "data", "eval_data", "model", "adapter", "memory", "processes", "max_restarts")
"""Options that may differ between machines: places, whose content is compared, and what each has for itself."""


def settle(config: TrainConfig, folder: RunFolder) -> TrainConfig:
    """Return ``config`` as it is where a launcher started the processes again: to go on with what this job began.

    Raises:
        InputError: the base is to be divided, but not over several processes, or not of a language model.
    """
    if config.fsdp and distributed.world_size() == 1:
        raise InputError(
            "fsdp divides the base over several processes, and there is one; set processes, or leave it out."
        )
    if config.fsdp and config.task != "lm":
        raise InputError(f"fsdp is for language models, and the task is {config.task}; leave it out.")
    if not launched.restarts():
        return config
    [ours] = distributed.gather(folder.begun and folder.job() == launched.job())[:1]
    return config.model_copy(update={"resume": True, "overwrite": False}) if ours else config


def check_start(config: TrainConfig, folder: RunFolder, checkpoint: Path | None) -> None:
    """Look whether all processes have the same versions and options, and see one run folder.

    Raises:
        InputError: they do not.
    """
    if distributed.world_size() == 1:
        return
    distributed.check_alike(versions(), "install the same everywhere")
    options = {
        f"option {name}": json.dumps(value, default=str)
        for name, value in config.model_dump(mode="json", exclude=set(OWN)).items()
    }
    distributed.check_alike(options, "give all of them the same")
    distributed.check_alike({"kernels": kernels_in_force()}, "set HALFBYTE_ISA to what all of them have")
    with distributed.agreed_errors():
        if not folder.lock.exists():
            raise InputError(
                f"{folder.path} is another folder for process {distributed.rank()} than for the first one; name one "
                "that all machines share."
            )
    distributed.check_alike({"last checkpoint": checkpoint.name if checkpoint else "none"}, "share the run folder")


def check_inputs(config: TrainConfig, inputs: Mapping[str, str]) -> None:
    """Look whether all processes have the same base model, data, tokenizer and adapter.

    Args:
        config: of the run.
        inputs: digests (:func:`halfbyte.train.inputs.digests`).

    Raises:
        InputError: they have not.
    """
    if distributed.world_size() == 1:
        return
    told = {INPUTS[name].partition(" ")[2]: digest for name, digest in inputs.items()}
    told["base model"] = fingerprint(config.model)
    distributed.check_alike({name: digest[:12] for name, digest in told.items()}, "give all of them the same files")


def as_begun(config: TrainConfig, folder: RunFolder, note: Callable[[str], None]) -> TrainConfig:
    """Return ``config`` for as many processes as there are, with steps of as many rows as those that began the run had.

    Raises:
        InputError: the rows of a step cannot be divided so.
    """
    before, now = folder.processes(), distributed.world_size()
    if before == now:
        return config
    rows = config.rows_a_step * before
    size = config.rows_a_step if config.batch_size == "auto" else config.rows_a_pass
    size = folder.rows_a_pass() or size
    if rows % (size * now):
        raise InputError(
            f"A step of this run has {rows} rows, which {now} processes cannot divide into passes of {size}; start "
            f"{before}, or another number that can."
        )
    changed: dict[str, Any] = {"gradient_accumulation_steps": rows // (size * now), "batch_size": size}
    note(
        f"{before} process{'es' * (before > 1)} began this run and {now} go{'es' * (now == 1)} on, with "
        f"gradient_accumulation_steps {changed['gradient_accumulation_steps']}: steps have the same {rows} rows"
    )
    return config.model_copy(update=changed)

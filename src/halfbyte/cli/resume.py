"""``resume``: go on with a run, with what its folder holds; its flags are the options that may change then."""

from pathlib import Path
from typing import Annotated, Any

import typer

from halfbyte.cli.options import flags_of
from halfbyte.cli.train import run
from halfbyte.errors import InputError
from halfbyte.files import absolute
from halfbyte.runs.config import TrainConfig
from halfbyte.runs.folder import RunFolder

Run = Annotated[Path, typer.Argument(help="Run folder.", metavar="RUN")]


def resume(**options: Any) -> None:
    """Go on with a run that was interrupted, or give it more steps.

    The run folder holds all that is needed. From its last checkpoint that is whole it goes on bit for bit, as if
    nothing had happened. With more --max-steps or --epochs its schedule is laid out over all of them.
    """
    given = {name: value for name, value in options.items() if value is not None}
    folder = RunFolder(absolute(given.pop("folder")))
    if not folder.config.is_file():
        raise InputError(f"{folder.path} holds no run to go on with (config.yaml); name the folder of one.")
    run(TrainConfig.from_yaml(folder.config, given | {"output": folder.path, "resume": True}))


resume.__signature__ = flags_of(TrainConfig, TrainConfig.free_options(), folder=Run)  # type: ignore[attr-defined]

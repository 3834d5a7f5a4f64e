"""``convert-config``: a configuration of another tool as ours."""

from pathlib import Path
from typing import Annotated

import typer

from halfbyte.cli.console import shown
from halfbyte.errors import InputError
from halfbyte.files import absolute, write_text
from halfbyte.runs.convert import convert


def convert_config(
    file: Annotated[Path, typer.Argument(help="YAML of axolotl or LLaMA-Factory.")],
    output: Annotated[Path | None, typer.Option(help="File to write to.  [default: standard output]")] = None,
) -> None:
    """Turn a configuration of axolotl or LLaMA-Factory into one of halfbyte train.

    What has no counterpart here stands in it as comments, and is told on standard error.
    """
    made = convert(file)
    text = made.to_yaml()
    for line in made.lines():
        typer.echo(f"No counterpart: {line}", err=True)
    for key, reason in made.dropped.items():
        typer.echo(f"Says nothing here: {key} ({reason})", err=True)
    if output is None:
        typer.echo(text, nl=False)
        return
    if absolute(output).exists():
        raise InputError(f"{output} is there already; name another file, or remove it.")
    write_text(absolute(output), text)
    typer.echo(f"Wrote {shown(absolute(output))}.", err=True)

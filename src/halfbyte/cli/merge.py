"""``merge``: base and adapter as one model."""

from pathlib import Path
from typing import Annotated

import typer

from halfbyte import choices
from halfbyte.cli.console import bar, command, shown
from halfbyte.cli.options import RemoteCode
from halfbyte.errors import size_text
from halfbyte.quiet import quiet


def merge(
    run: Annotated[str, typer.Argument(help="Run folder, or a PEFT adapter's folder or hub id.")],
    output: Annotated[Path, typer.Argument(help="Folder for the merged model.")],
    onto: Annotated[
        choices.Onto,
        typer.Option(help="Weights to add to: those that were trained over, or those before they were quantized."),
    ] = "quantized",
    to: Annotated[choices.MergeType, typer.Option(help="What the sums are rounded to.")] = "bf16",
    base: Annotated[
        str | None, typer.Option(help="Another place for the base model than the adapter names: folder or hub id.")
    ] = None,
    rounding: Annotated[
        choices.Rounding | None,
        typer.Option(
            help="How codes are chosen in nf4: so that layers' outputs stay, at random, or from the original weights.",
            show_default="outputs where the training data are at hand, or else random",
        ),
    ] = None,
    data: Annotated[
        list[str] | None,
        typer.Option(help="Texts for outputs; may be repeated.", show_default="the run's training data"),
    ] = None,
    tokens: Annotated[int | None, typer.Option(min=1, help="Tokens of these texts.", show_default="8192")] = None,
    seed: Annotated[
        int | None, typer.Option(help="Of which texts are taken, and of what is drawn.", show_default="0")
    ] = None,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace what the output folder holds.")] = False,
    trust_remote_code: RemoteCode = False,
) -> None:
    """Merge an adapter into its base: a plain model, which opens without halfbyte.

    Tensor by tensor, so that any size fits in memory; who was interrupted goes on with the same command.
    """
    with quiet(), bar("Merging") as progress:
        from halfbyte.deploy.merge import merge as merged

        task = progress.add_task("")
        copy = merged(
            run,
            output,
            onto=onto,
            to=to,
            base=base,
            rounding=rounding,
            data=data or None,
            tokens=tokens,
            seed=seed,
            progress=lambda done, total: progress.update(task, completed=done, total=total),
            overwrite=overwrite,
            trust_remote_code=trust_remote_code,
        )
    weights = "quantized weights that it was trained over" if copy.is_quantized else "dense weights of its base"
    codes = ", codes chosen by " + copy.rounding if copy.rounding else ""
    typer.echo(
        f"Merged onto the {weights}: {copy.values:,} parameters in {to}{codes}, {size_text(copy.nbytes)}, in "
        f"{shown(copy.folder)}. Next:"
    )
    typer.echo(f"  {command('chat', shown(copy.folder))}")

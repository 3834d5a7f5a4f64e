"""``export``: a run or a model in the form that another program opens."""

from pathlib import Path
from typing import Annotated

import typer

from halfbyte import choices
from halfbyte.cli.console import bar, command, shown
from halfbyte.cli.options import RemoteCode
from halfbyte.deploy.export.formats import FORMATS, settle
from halfbyte.errors import size_text
from halfbyte.quiet import quiet

TO = "; ".join(f"{name}: {', '.join(form.to)}" for name, form in FORMATS.items())


def export(
    run: Annotated[str, typer.Argument(help="Run folder, adapter folder, model folder, GGUF file or hub id.")],
    output: Annotated[Path, typer.Argument(help="Folder for the exported model.")],
    format: Annotated[
        choices.ExportFormat,
        typer.Option(
            help="hf: transformers, vLLM and most others; bnb-4bit: the same in bitsandbytes' NF4; gguf: llama.cpp and "
            "Ollama; lora-gguf: the adapter alone for llama.cpp; mlx: mlx-lm, on Macs; gptq, awq: 4 bits for GPU "
            "servers (need halfbyte[autoround])."
        ),
    ],
    to: Annotated[
        str | None, typer.Option(help=f"What the weights are in. {TO}.  [default: the first]", metavar="<type>")
    ] = None,
    onto: Annotated[
        choices.Onto,
        typer.Option(
            help="Weights that an adapter is added to: those that were trained over, or those before they were "
            "quantized."
        ),
    ] = "quantized",
    base: Annotated[
        str | None, typer.Option(help="Another place for the base model than the adapter names: folder or hub id.")
    ] = None,
    data: Annotated[
        list[str] | None,
        typer.Option(
            help="Of bnb-4bit, gptq and awq: rows to calibrate on, named as for training; may be repeated.  [default: "
            "what the run was trained on]"
        ),
    ] = None,
    rounding: Annotated[
        choices.Rounding | None,
        typer.Option(
            help="Of bnb-4bit: how codes are chosen, as in halfbyte merge.  [default: outputs where there is data, or "
            "else random]"
        ),
    ] = None,
    rounds: Annotated[
        int | None,
        typer.Option(min=0, help="Of gptq and awq: how often each layer's rounding is tuned.  [default: 20]"),
    ] = None,
    pre: Annotated[
        str | None,
        typer.Option(
            help="Of gguf: llama.cpp's name for how the tokenizer cuts texts, such as llama-bpe.  [default: found out]"
        ),
    ] = None,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace what the output folder holds.")] = False,
    trust_remote_code: RemoteCode = False,
) -> None:
    """Write a run or a model in the form that another program opens, with a model card.

    An adapter is merged into its base on the way. docs/exporting.md has a table of the formats.
    """
    settle(format, to, {"data": data or None, "rounds": rounds, "rounding": rounding, "pre": pre})
    with quiet(), bar("{task.description}") as progress:
        from halfbyte.deploy.export.exporting import export as exported

        task = progress.add_task("Opening", total=None)
        copy = exported(
            run,
            output,
            format=format,
            to=to,
            onto=onto,
            base=base,
            data=data or None,
            rounds=rounds,
            rounding=rounding,
            pre=pre,
            report=lambda what, done, total: progress.update(task, description=what, completed=done, total=total),
            overwrite=overwrite,
            trust_remote_code=trust_remote_code,
        )
    typer.echo(
        f"Exported {copy.values:,} parameters for {format} in {copy.to}, {size_text(copy.nbytes)}, to "
        f"{shown(copy.folder)}."
    )
    for note in copy.notes:
        typer.echo(note)
    if format == "hf":
        typer.echo(f"Next:\n  {command('chat', shown(copy.folder))}")
    else:
        typer.echo(f"How to run it is in {shown(copy.folder / 'README.md')}.")

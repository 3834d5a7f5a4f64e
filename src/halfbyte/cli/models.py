"""``quantize``: models as files."""

from pathlib import Path
from typing import Annotated

import typer

from halfbyte.choices import DOUBLE_QUANT, QUANT_TYPE, SaveableType
from halfbyte.cli.console import bar, command, shown
from halfbyte.cli.options import RemoteCode
from halfbyte.errors import size_text
from halfbyte.files import absolute
from halfbyte.quiet import quiet


def quantize(
    model: Annotated[str, typer.Argument(help="Folder or hub id of a model in 16 or 32 bits.")],
    output: Annotated[Path, typer.Argument(help="Folder for the 4-bit model.")],
    quant_type: Annotated[SaveableType, typer.Option(help="4-bit number format.")] = QUANT_TYPE,
    double_quant: Annotated[bool, typer.Option(help="Quantize the absmax values too.")] = DOUBLE_QUANT,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace what the output folder holds.")] = False,
    trust_remote_code: RemoteCode = False,
) -> None:
    """Write a 4-bit copy of a model.

    In the format that transformers and bitsandbytes read; tensor by tensor, so that any size fits in memory.
    """
    output = absolute(output)
    with quiet(), bar("Quantizing") as progress:
        from halfbyte.hf import HalfbyteConfig, quantize_checkpoint

        task = progress.add_task("")
        copy = quantize_checkpoint(
            model,
            output,
            HalfbyteConfig(quant_type=quant_type, double_quant=double_quant),
            progress=lambda done, total: progress.update(task, completed=done, total=total),
            overwrite=overwrite,
            trust_remote_code=trust_remote_code,
        )
    typer.echo(
        f"{size_text(copy.bytes_before)} became {size_text(copy.bytes_after)}: "
        f"{8 * copy.bytes_after / copy.values:.2f} bits for each of {copy.values:,} parameters, {copy.share:.0%} of "
        "them in 4 bits."
    )
    typer.echo(f"The 4-bit model is in {shown(output)}. Next:")
    typer.echo(f"  {command('chat', shown(output))}")

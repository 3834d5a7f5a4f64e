"""``quantize`` and ``verify``: models as files."""

import dataclasses
import json
from pathlib import Path
from typing import Annotated

import typer

from halfbyte.choices import BLOCKSIZE, QUANT_TYPE, SaveableType
from halfbyte.cli.console import bar, command, shown
from halfbyte.cli.options import RemoteCode
from halfbyte.errors import counted, size_text
from halfbyte.files import absolute
from halfbyte.quiet import quiet


def quantize(
    model: Annotated[
        str,
        typer.Argument(help="Model in 16 or 32 bits, in GPTQ, AWQ or MXFP4: folder or hub id; or a GGUF file."),
    ],
    output: Annotated[Path, typer.Argument(help="Folder for the quantized model.")],
    quant_type: Annotated[SaveableType, typer.Option(help="Number format.")] = QUANT_TYPE,
    blocksize: Annotated[
        str, typer.Option(help="Weights that share one absmax; row, for int8, is bitsandbytes' format.")
    ] = str(BLOCKSIZE),
    double_quant: Annotated[
        bool | None,
        typer.Option("--double-quant/--no-double-quant", help="Quantize the absmax values too.  [default: in 4 bits]"),
    ] = None,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace what the output folder holds.")] = False,
    trust_remote_code: RemoteCode = False,
) -> None:
    """Write a copy of a model in 4 or 8 bits.

    In the format that transformers and bitsandbytes read, where it has one (nf4, fp4, and int8 with --blocksize row);
    tensor by tensor, so that any size fits in memory.
    """
    output = absolute(output)
    with quiet(), bar("Quantizing") as progress:
        from halfbyte.hf import HalfbyteConfig, quantize_checkpoint

        config = HalfbyteConfig(
            quant_type=quant_type,
            blocksize=int(blocksize) if blocksize.isdecimal() else blocksize,
            double_quant=double_quant,
        )
        task = progress.add_task("")
        copy = quantize_checkpoint(
            model,
            output,
            config,
            progress=lambda done, total: progress.update(task, completed=done, total=total),
            overwrite=overwrite,
            trust_remote_code=trust_remote_code,
        )
    typer.echo(
        f"{size_text(copy.bytes_before)} became {size_text(copy.bytes_after)}: "
        f"{8 * copy.bytes_after / copy.values:.2f} bits for each of {copy.values:,} parameters, {copy.share:.0%} of "
        f"them in {config.bits} bits."
    )
    if copy.error is not None:
        typer.echo(f"The weights were rounded a second time, {copy.error:.1%} off those of the source.")
    if not config.is_bitsandbytes:
        typer.echo(f"bitsandbytes has no {quant_type} in blocks of {blocksize}: halfbyte alone opens the folder.")
    typer.echo(f"The {config.bits}-bit model is in {shown(output)}. Next:")
    typer.echo(f"  {command('chat', shown(output))}")


def verify(
    checkpoint: Annotated[
        str, typer.Argument(help="Folder of a model or of an adapter, in any number of bits; a GGUF file; or a hub id.")
    ],
    as_json: Annotated[bool, typer.Option("--json", help="Print what was found as JSON.")] = False,
    trust_remote_code: RemoteCode = False,
) -> None:
    """Read every tensor of a checkpoint, and name each that is damaged.

    Files against their headers and index, names and shapes against config.json, values that are no numbers, block
    constants and tables of 4 and 8 bits, and the digests that halfbyte stored when it quantized. Nothing is written.
    The exit code is 1 if something is damaged.
    """
    with quiet(), bar("Reading") as progress:
        from halfbyte.hf.models.verify import verify as verified

        task = progress.add_task("")
        found = verified(
            checkpoint,
            progress=lambda done, total: progress.update(task, completed=done, total=total),
            trust_remote_code=trust_remote_code,
        )
    if as_json:
        typer.echo(json.dumps(dataclasses.asdict(found) | {"faults": found.faults}, indent=2))
        raise typer.Exit(1 if found.faults else 0)
    for finding in found.findings:
        typer.echo(f"{'' if finding.is_fault else 'Note: '}{finding.place} {finding.what}")
    stored = f", {found.compared:,} of them held against the digests in the folder" if found.compared else ""
    typer.echo(
        f"{counted(found.tensors, 'tensor')} in {counted(found.files, 'file')} of {size_text(found.nbytes)} read"
        f"{stored}: {counted(found.faults, 'fault') if found.faults else 'no fault'}."
    )
    if found.faults:
        typer.echo("Copy the damaged files from their source again, or make them anew.")
        raise typer.Exit(1)

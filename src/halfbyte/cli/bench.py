"""``bench kernels``, ``bench train`` and ``bench packing``."""

import contextlib
from pathlib import Path
from typing import Annotated, Any

import typer

from halfbyte.cli.console import bar, notes, print_table
from halfbyte.cli.options import Results, Threads
from halfbyte.errors import InputError
from halfbyte.files import absolute
from halfbyte.quiet import quiet

SMOLLM2 = "HuggingFaceTB/SmolLM2-135M-Instruct"


def kernels(
    isa: Annotated[
        str | None, typer.Option(help="Instruction-set tier; doctor lists them.  [default: the best]")
    ] = None,
    quick: Annotated[bool, typer.Option("--quick", help="Fewer works, in about half a minute.")] = False,
    output: Results = None,
    threads: Threads = None,
) -> None:
    """Measure the kernels: times, ratios, roofline.

    Beside them bitsandbytes, dense torch and this machine's ceilings: all take turns in one run, so that the ratios
    hold even where the machine's speed varies. Prints a table; writes kernels.json and roofline.png.
    """
    with quiet(), bar("{task.description}") as progress:
        from halfbyte import bench

        works = bench.kernel_works(quick)
        task = progress.add_task("Measuring", total=len(works))
        report = bench.bench_kernels(
            works,
            isa=isa,
            threads=threads,
            progress=lambda done, name: progress.update(task, completed=done, description=name),
        )
    _show(report, output)


def train(
    models: Annotated[
        list[str] | None,
        typer.Argument(
            metavar="[MODEL]...",
            help="16-bit model folders or hub ids, or 135m, 0.5b, 1b, 3b: random weights of such a shape.  "
            f"[default: {SMOLLM2}]",
        ),
    ] = None,
    vs: Annotated[
        list[str] | None,
        typer.Option("--vs", help="bitsandbytes or lora16 (a bf16 base); may be repeated.  [default: both]"),
    ] = None,
    alone: Annotated[bool, typer.Option("--alone", help="halfbyte beside nothing but the machine's peak.")] = False,
    batch: Annotated[int, typer.Option(min=1, help="Rows of a step.")] = 4,
    length: Annotated[int, typer.Option(min=2, help="Tokens of a row.")] = 512,
    lengths: Annotated[
        str | None, typer.Option(help="Several lengths, such as 256,512,1024; takes the place of --length.")
    ] = None,
    rank: Annotated[int, typer.Option(min=1, help="Rank of the LoRA matrices.")] = 16,
    steps: Annotated[int, typer.Option(min=2, help="Steps of each side that are counted.")] = 5,
    output: Results = None,
    threads: Threads = None,
) -> None:
    """Measure training on the CPU: tokens/s, memory, where the time goes.

    The sides do the same work in turns, each in a process of its own and in its fastest setting: halfbyte, and beside
    it transformers and peft over bitsandbytes or over a bf16 base. Prints a table; writes training.json and
    training.png.
    """
    try:
        measured = [int(part) for part in lengths.split(",")] if lengths else [length]
    except ValueError:
        raise InputError(f"--lengths is {lengths!r}; give numbers with commas between, such as 256,512.") from None
    if alone and vs:
        raise InputError("--alone and --vs contradict each other: give one of them.")
    if min(measured) < 2:
        raise InputError(f"--lengths is {lengths!r}; a row needs 2 tokens or more.")
    with quiet():
        from halfbyte.bench.stacks import PEERS
        from halfbyte.bench.train import bench_train

        with notes.status("Measuring") if notes.is_terminal else contextlib.nullcontext() as shown:
            report = bench_train(
                models or [SMOLLM2],
                versus=vs or ([] if alone else list(PEERS)),
                batch=batch,
                lengths=measured,
                rank=rank,
                steps=steps,
                threads=threads,
                progress=shown.update if shown else notes.print,
            )
    _show(report, output)


def packing(
    model: Annotated[
        str,
        typer.Argument(help="16-bit model folder or hub id, or 135m, 0.5b, 1b, 3b: random weights of such a shape."),
    ] = "135m",
    batch: Annotated[int, typer.Option(min=1, help="Rows of a forward pass without packing.")] = 4,
    accumulation: Annotated[int, typer.Option(min=1, help="Such passes of a step.")] = 4,
    length: Annotated[int, typer.Option(min=2, help="Tokens of a full row.")] = 512,
    rank: Annotated[int, typer.Option(min=1, help="Rank of the LoRA matrices.")] = 16,
    steps: Annotated[int, typer.Option(min=2, help="Steps of each side that are counted.")] = 5,
    output: Results = None,
    threads: Threads = None,
) -> None:
    """Measure what packing brings: steps of short rows, packed and not, beside full rows.

    Rows as long as those of instruction data, and rows of 20 tokens, in the order of group_by_length; all take turns.
    Prints a table; writes packing.json.
    """
    with quiet():
        from halfbyte.bench.packing import bench_packing

        with notes.status("Measuring") if notes.is_terminal else contextlib.nullcontext() as shown:
            report = bench_packing(
                model,
                batch=batch,
                accumulation=accumulation,
                length=length,
                rank=rank,
                steps=steps,
                threads=threads,
                progress=shown.update if shown else notes.print,
            )
    _show(report, output)


def _show(report: Any, output: Path | None) -> None:
    """Print a report's table and write it, to ``output`` or where reports go."""
    from halfbyte import bench

    print_table(report.table())
    folder = absolute(output) if output else bench.default_folder(report)
    report.write(folder)
    picture = "" if type(report).__name__ == "PackingReport" else ", and the picture,"
    typer.echo(f"Every time that was taken{picture} {'are' if picture else 'is'} in {folder}.")

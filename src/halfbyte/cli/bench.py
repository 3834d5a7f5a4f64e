"""``bench kernels``, ``bench train``, ``bench packing`` and ``bench decode``."""

import contextlib
from pathlib import Path
from typing import Annotated, Any

import typer

from halfbyte import choices
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


def decode(
    model: Annotated[
        str,
        typer.Argument(help="16-bit model folder or hub id, or 135m, 0.5b, 1b, 3b: random weights of such a shape."),
    ] = SMOLLM2,
    rows: Annotated[
        str, typer.Option(help="Conversations that are decoded together, such as 1,4,16,64.")
    ] = "1,4,16,64",
    peers: Annotated[
        str,
        typer.Option(
            help="Of bitsandbytes, bf16 (transformers both) and llama.cpp, with commas between, or none; llama.cpp is "
            "installed through npm into the cache."
        ),
    ] = "bitsandbytes,bf16",
    head: Annotated[
        choices.HeadType | None, typer.Option(help="Quantize halfbyte's output head.  [default: as it is]")
    ] = None,
    kv: Annotated[
        choices.KvType | None, typer.Option(help="Keep halfbyte's keys and values in 8 bits.  [default: as they are]")
    ] = None,
    adapters: Annotated[
        int, typer.Option(min=0, max=64, help="Rows with an adapter each, beside as many on one; 0: none.")
    ] = 16,
    prompt: Annotated[int, typer.Option(min=1, help="Tokens of a prompt that is read.")] = 512,
    history: Annotated[int, typer.Option(min=0, help="Tokens that a second turn comes after; 0: none.")] = 1000,
    tokens: Annotated[int, typer.Option(min=1, help="Tokens that each row is decoded by in a round.")] = 32,
    rounds: Annotated[int, typer.Option(min=2, help="Rounds that are counted.")] = 5,
    agreement: Annotated[
        bool,
        typer.Option("--agreement", help="Measure instead what kinds of head and cache cost in quality."),
    ] = False,
    json_file: Annotated[
        Path | None, typer.Option("--json", help="Where every time goes.  [default: decode.json among the results]")
    ] = None,
    picture: Annotated[
        Path | None, typer.Option(help="Where the picture goes.  [default: decode.png among the results]")
    ] = None,
    threads: Threads = None,
) -> None:
    """Measure decoding on the CPU: tokens/s of one and of several conversations, each beside its floor.

    Also how fast prompts are read, the first token of a second turn, and rows on adapters of their own. The floor is
    what the bytes of a step take at the speed of reading memory, or its products at the peak, both measured in the run;
    all sides take turns. Prints tables; writes decode.json and decode.png.
    """
    try:
        counts = [int(part) for part in rows.split(",")]
    except ValueError:
        counts = [0]
    if min(counts) < 1:
        raise InputError(f"--rows is {rows!r}; give numbers from 1 on with commas between, such as 1,4,16.")
    with quiet():
        from halfbyte import bench
        from halfbyte.bench.agreement import bench_agreement
        from halfbyte.bench.decode import bench_decode

        with notes.status("Measuring") if notes.is_terminal else contextlib.nullcontext() as shown:
            progress = shown.update if shown else notes.print
            if agreement:
                found = bench_agreement(model, threads=threads, progress=progress)
            else:
                report = bench_decode(
                    model,
                    rows=counts,
                    peers=[] if peers == "none" else peers.split(","),
                    head=head,
                    cache=kv,
                    prompt=prompt,
                    history=history,
                    tokens=tokens,
                    adapters=adapters,
                    rounds=rounds,
                    threads=threads,
                    progress=progress,
                )
    if agreement:
        print_table(found.table())
        file = absolute(json_file) if json_file else bench.default_folder(found) / "agreement.json"
        found.write(file)
        typer.echo(f"All that was counted is in {file}.")
        return
    print_table(report.table())
    print_table(report.phases())
    folder = bench.default_folder(report)
    files = absolute(json_file or folder / "decode.json"), absolute(picture or folder / "decode.png")
    report.write(*files)
    typer.echo(f"Every time that was taken is in {files[0]}, the picture in {files[1]}.")


def _show(report: Any, output: Path | None) -> None:
    """Print a report's table and write it, to ``output`` or where reports go."""
    from halfbyte import bench

    print_table(report.table())
    folder = absolute(output) if output else bench.default_folder(report)
    report.write(folder)
    picture = "" if type(report).__name__ == "PackingReport" else ", and the picture,"
    typer.echo(f"Every time that was taken{picture} {'are' if picture else 'is'} in {folder}.")

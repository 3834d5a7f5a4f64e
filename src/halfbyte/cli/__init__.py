"""The command line: parse, call, print.

Standard output gets what was asked for, standard error everything else, so that ``halfbyte generate`` can be piped.
Exit codes: 0; 2 with one sentence for bad input or a full disk; 130 after an interrupt. Any other error is a bug
and keeps its traceback. ``train`` has a flag for each field of :class:`halfbyte.runs.config.TrainConfig`, made from
it. torch and the libraries over it take seconds to import, so each command imports what it needs.
"""

import contextlib
import inspect
import logging
import os
import shlex
import shutil
import sys
import types
import typing
import warnings
from pathlib import Path
from typing import Annotated, Any, Literal

import rich.filesize
import safetensors
import typer
from pydantic import ByteSize
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from halfbyte import __version__
from halfbyte.errors import InputError
from halfbyte.files import disk_full
from halfbyte.runs.config import TrainConfig

INTERRUPTED = 130
SMOLLM2 = "HuggingFaceTB/SmolLM2-135M-Instruct"
TABLE_WIDTH = 160
"""Characters, where standard output is not a terminal."""

app = typer.Typer(
    help="QLoRA on the machine you have: fine-tune language models in 4 bits, and talk to them.",
    context_settings={"help_option_names": ["-h", "--help"]},
    rich_markup_mode=None,
    pretty_exceptions_enable=False,
    add_completion=False,
)
benchmarks = typer.Typer(help="Measure speed on this machine.", no_args_is_help=True)
app.add_typer(benchmarks, name="bench")
notes = Console(stderr=True, highlight=False)


def main() -> None:
    """Run the command line and exit."""
    # Read by libgomp when torch loads it. Its threads otherwise spin for milliseconds after each parallel region, and
    # whenever another program wants a core, a training step takes several times as long (CONTRIBUTING.md).
    os.environ.setdefault("GOMP_SPINCOUNT", "1000")
    if not sys.warnoptions:
        warnings.simplefilter("ignore")
    try:
        code = app(standalone_mode=False)
    except (InputError, typer.TyperException) as error:
        code = _fail(error.format_message() if isinstance(error, typer.TyperException) else str(error))
    except (OSError, safetensors.SafetensorError) as error:
        if not disk_full(error):
            raise
        code = _fail(f"The disk is full ({error}); free some space and try again.")
    if code == INTERRUPTED:
        typer.echo("Interrupted.", err=True)
    sys.exit(code)


@app.callback(invoke_without_command=True)
def _root(
    context: typer.Context,
    version: Annotated[bool, typer.Option("--version", help="Show the version and exit.")] = False,
) -> None:
    if version:
        typer.echo(f"halfbyte {__version__}")
    elif context.invoked_subcommand is None:
        typer.echo(context.get_help())


def _train(**options: Any) -> None:
    """Fine-tune a model with QLoRA.

    Options come from flags, from a YAML file, or from both (flags win). Interrupted with Ctrl-C, it saves a
    checkpoint first; --resume goes on from there.
    """
    given = {name: value for name, value in options.items() if value is not None}
    config = TrainConfig.from_yaml(given.pop("config", None), given)
    _quiet()
    from halfbyte.train import fine_tune
    from halfbyte.train.display import TerminalDisplay

    try:
        summary = fine_tune(config, TerminalDisplay(notes)).summary
    except KeyboardInterrupt as interrupt:
        typer.echo(str(interrupt) or "Interrupted.", err=True)
        if any(config.output.glob("checkpoints/step-*")):
            resume = _command("train", "--config", str(config.output / "config.yaml"), "--resume")
            typer.echo(f"Go on with:\n  {resume}", err=True)
        sys.exit(INTERRUPTED)
    folder = str(config.output)
    typer.echo(
        f"Trained {summary.steps} steps in {summary.seconds:.0f} s: loss {summary.loss:.3f}, "
        f"{summary.trained_tokens_per_second:,.0f} trained tokens/s, {_size(summary.peak_memory_bytes)} peak memory."
    )
    typer.echo(f"The adapter is in {folder}. Next:")
    typer.echo(f"  {_command('chat', folder)}")
    typer.echo(f"  {_command('generate', folder, '--prompt', 'your question')}")


def _train_signature() -> inspect.Signature:
    """Return the parameters of ``train``: the configuration file, and a flag for each option, absent unless given."""
    config = Annotated[Path | None, typer.Option("--config", help="YAML file with any of the options below.")]
    annotations: dict[str, Any] = {"config": config}
    for name, field in TrainConfig.model_fields.items():
        default = "" if field.is_required() or field.default is None else f"  [default: {field.default}]"
        option = typer.Option(help=f"{field.description}{default}")
        annotations[name] = Annotated[_flag_type(field.annotation) | None, option]
    return inspect.Signature(
        [
            inspect.Parameter(name, inspect.Parameter.KEYWORD_ONLY, default=None, annotation=annotation)
            for name, annotation in annotations.items()
        ]
    )


def _flag_type(annotation: Any) -> Any:
    """Return what a flag for a field of this type takes: the first member of a union; a size is text to pydantic."""
    if typing.get_origin(annotation) in (types.UnionType, typing.Union):
        return _flag_type(typing.get_args(annotation)[0])
    return str if annotation is ByteSize else annotation


_train.__signature__ = _train_signature()  # type: ignore[attr-defined]
app.command("train")(_train)


Model = Annotated[str, typer.Argument(help="Run folder, adapter folder, model folder or hub id.")]
System = Annotated[str | None, typer.Option(help="System prompt, put before the conversation.")]
MaxNewTokens = Annotated[int, typer.Option(min=1, help="Greatest length of an answer in tokens.")]
Temperature = Annotated[float, typer.Option(min=0, help="0 takes the likeliest token; more varies the answers.")]
TopP = Annotated[float, typer.Option(min=0, max=1, help="Draw from the likeliest tokens with this probability.")]
Seed = Annotated[int | None, typer.Option(min=0, help="Seed, to draw the same answers again.")]
RemoteCode = Annotated[bool, typer.Option("--trust-remote-code", help="Run Python code that comes with the model.")]


@app.command()
def chat(
    model: Model,
    system: System = None,
    max_new_tokens: MaxNewTokens = 512,
    temperature: Temperature = 0.7,
    top_p: TopP = 0.9,
    seed: Seed = None,
    trust_remote_code: RemoteCode = False,
) -> None:
    """Talk to a model. /reset forgets the conversation, /quit or Ctrl-D ends, Ctrl-C stops an answer."""
    loaded, tokenizer = _load(model, seed, trust_remote_code)
    from halfbyte.generate.stream import stream_reply

    with contextlib.suppress(ImportError):
        import readline  # noqa: F401  (gives input() line editing and history)
    opening = _opening(tokenizer, system)
    messages = list(opening)
    notes.print("Ctrl-C stops an answer; /reset forgets the conversation; /quit or Ctrl-D ends.", style="dim")
    while True:
        try:
            line = input("> " if sys.stdin.isatty() else "").strip()
        except EOFError:
            break
        except KeyboardInterrupt:
            notes.print("\n/quit or Ctrl-D ends.", style="dim")
            continue
        if line == "/quit":
            break
        if line == "/reset":
            messages = list(opening)
            notes.print("The conversation is forgotten.", style="dim")
            continue
        if line.startswith("/"):
            notes.print(f"There is no {line}; there is /reset and /quit.", style="dim", markup=False)
            continue
        if not line:
            continue
        question = {"role": "user", "content": line}
        reply = stream_reply(
            loaded,
            tokenizer,
            [*messages, question],
            max_new_tokens=max_new_tokens,
            temperature=temperature,
            top_p=top_p,
        )
        try:
            answer = _print_stream(reply)
        except InputError as error:
            _fail(str(error))
            continue
        if answer:
            messages += [question, {"role": "assistant", "content": answer}]


@app.command()
def generate(
    model: Model,
    prompt: Annotated[str, typer.Option(help="The question; - reads it from standard input.")],
    system: System = None,
    raw: Annotated[bool, typer.Option("--raw", help="Go on with the prompt as it stands, without a template.")] = False,
    max_new_tokens: MaxNewTokens = 512,
    temperature: Temperature = 0.0,
    top_p: TopP = 1.0,
    seed: Seed = None,
    trust_remote_code: RemoteCode = False,
) -> None:
    """Answer one prompt on standard output."""
    if raw and system is not None:
        raise InputError("--raw takes the prompt as it stands, without --system; give one of the two.")
    text = sys.stdin.read() if prompt == "-" else prompt
    loaded, tokenizer = _load(model, seed, trust_remote_code)
    from halfbyte.generate.stream import stream_reply

    for piece in stream_reply(
        loaded,
        tokenizer,
        text if raw else [*_opening(tokenizer, system), {"role": "user", "content": text}],
        max_new_tokens=max_new_tokens,
        temperature=temperature,
        top_p=top_p,
    ):
        typer.echo(piece, nl=False)
    typer.echo()


@app.command()
def quantize(
    model: Annotated[str, typer.Argument(help="Folder or hub id of a model in 16 or 32 bits.")],
    output: Annotated[Path, typer.Argument(help="Folder for the 4-bit model.")],
    quant_type: Annotated[Literal["nf4", "fp4"], typer.Option(help="4-bit number format.")] = "nf4",
    double_quant: Annotated[bool, typer.Option(help="Quantize the absmax values too.")] = True,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace what the output folder holds.")] = False,
    trust_remote_code: RemoteCode = False,
) -> None:
    """Write a 4-bit copy of a model.

    In the format that transformers and bitsandbytes read; tensor by tensor, so that any size fits in memory.
    """
    _quiet()
    from halfbyte.hf import HalfbyteConfig, quantize_checkpoint
    from halfbyte.plan.size import checkpoint_size

    columns = TextColumn("Quantizing"), BarColumn(), MofNCompleteColumn(), TextColumn("tensors"), TimeRemainingColumn()
    with Progress(*columns, console=notes, transient=True, disable=not notes.is_terminal) as bar:
        task = bar.add_task("")
        quantize_checkpoint(
            model,
            output,
            HalfbyteConfig(quant_type=quant_type, double_quant=double_quant),
            progress=lambda done, total: bar.update(task, completed=done, total=total),
            overwrite=overwrite,
            trust_remote_code=trust_remote_code,
        )
    before, after = checkpoint_size(model), checkpoint_size(output)
    typer.echo(
        f"{_size(before.bytes)} became {_size(after.bytes)}: "
        f"{8 * after.bytes / before.elements:.2f} bits for each of {before.elements:,} parameters."
    )
    typer.echo(f"The 4-bit model is in {output}. Next:")
    typer.echo(f"  {_command('chat', str(output))}")


@app.command()
def doctor(
    line: Annotated[bool, typer.Option("--line", help="Only one line: version, kernels and threads.")] = False,
) -> None:
    """Show what is installed and what this machine offers.

    Says what to do about what is missing.
    """
    from halfbyte.plan import doctor as plan_doctor

    if line:
        typer.echo(plan_doctor.line())
        return
    for finding in plan_doctor.report():
        typer.echo(f"{finding.name:16} {finding.value}")
        if finding.hint:
            typer.echo(f"{'':16} → {finding.hint}")


@benchmarks.command("kernels")
def bench_kernels(
    isa: Annotated[
        str | None, typer.Option(help="Instruction-set tier; doctor lists them.  [default: the best]")
    ] = None,
    quick: Annotated[bool, typer.Option("--quick", help="Fewer works, in about half a minute.")] = False,
    output: Annotated[
        Path | None,
        typer.Option(
            file_okay=False, help="Folder for the results.  [default: benchmarks/results/<date>-<commit>-<tier>]"
        ),
    ] = None,
    threads: Annotated[int | None, typer.Option(min=1, help="Threads of each side.  [default: torch's]")] = None,
) -> None:
    """Measure the kernels: times, ratios, roofline.

    Beside them bitsandbytes, dense torch and this machine's ceilings: all take turns in one run, so that the ratios
    hold even where the machine's speed varies. Prints a table; writes kernels.json and roofline.png.
    """
    logging.getLogger("bitsandbytes").setLevel(logging.ERROR)
    from halfbyte import bench

    works = bench.kernel_works(quick)
    columns = TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn()
    with Progress(*columns, console=notes, transient=True, disable=not notes.is_terminal) as bar:
        task = bar.add_task("Measuring", total=len(works))
        report = bench.bench_kernels(
            works,
            isa=isa,
            threads=threads,
            progress=lambda done, name: bar.update(task, completed=done, description=name),
        )
    Console(width=None if sys.stdout.isatty() else TABLE_WIDTH).print(report.table())
    folder = output or bench.default_folder(report)
    report.write(folder)
    typer.echo(f"Every time that was taken, and the roofline, are in {folder}.")


@benchmarks.command("train")
def bench_train(
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
    output: Annotated[
        Path | None,
        typer.Option(
            file_okay=False, help="Folder for the results.  [default: benchmarks/results/<date>-<commit>-<tier>]"
        ),
    ] = None,
    threads: Annotated[int | None, typer.Option(min=1, help="Threads of each side.  [default: torch's]")] = None,
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
    _quiet()
    from halfbyte import bench
    from halfbyte.bench.stacks import PEERS, Halfbyte
    from halfbyte.bench.train import bench_train as measure
    from halfbyte.train import fine_tune

    with notes.status("Measuring") if notes.is_terminal else contextlib.nullcontext() as status:
        report = measure(
            models or [SMOLLM2],
            Halfbyte(TrainConfig, fine_tune),
            versus=vs or ([] if alone else list(PEERS)),
            batch=batch,
            lengths=measured,
            rank=rank,
            steps=steps,
            threads=threads,
            progress=status.update if status else notes.print,
        )
    Console(width=None if sys.stdout.isatty() else TABLE_WIDTH).print(report.table())
    folder = output or bench.default_folder(report)
    report.write(folder)
    typer.echo(f"Every time that was taken, and the picture, are in {folder}.")


def _load(path: str, seed: int | None, trust_remote_code: bool) -> tuple[Any, Any]:
    with notes.status(f"Loading {path}") if notes.is_terminal else contextlib.nullcontext():
        _quiet()
        import transformers

        from halfbyte.hf import load, load_tokenizer

        if seed is not None:
            transformers.set_seed(seed)
        tokenizer = load_tokenizer(path, trust_remote_code=trust_remote_code)
        return load(path, trust_remote_code=trust_remote_code), tokenizer


def _opening(tokenizer: Any, system: str | None) -> list[dict[str, str]]:
    """Return what a conversation begins with."""
    if not tokenizer.chat_template:
        notes.print("The model has no chat template; a plain one is used.", style="dim")
    return [] if system is None else [{"role": "system", "content": system}]


def _print_stream(pieces: typing.Iterator[str]) -> str:
    """Print the pieces as they come, until the end or Ctrl-C; return what was printed."""
    printed = ""
    try:
        for piece in pieces:
            printed += piece
            typer.echo(piece, nl=False)
    except KeyboardInterrupt:
        notes.print(" (stopped)", style="dim", end="")
    typer.echo()
    return printed


def _quiet() -> None:
    """Silence the libraries' log lines and bars, but for downloads."""
    for library in ("bitsandbytes", "huggingface_hub"):
        logging.getLogger(library).setLevel(logging.ERROR)
    import transformers
    from huggingface_hub.utils.tqdm import enable_progress_bars

    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    enable_progress_bars()


def _size(count: int) -> str:
    return rich.filesize.decimal(count)


def _command(*arguments: str) -> str:
    """Return a command line for the user to type, as this program was started."""
    started = sys.argv[0]
    program = started if Path(started).name == "halfbyte" and shutil.which("halfbyte") != started else "halfbyte"
    return shlex.join([program, *arguments])


def _fail(sentence: str) -> int:
    typer.echo(f"Error: {sentence}", err=True)
    return 2

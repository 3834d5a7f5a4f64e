"""The command line: parse, call, print; a module for each group of commands.

Standard output gets what was asked for, standard error everything else, so that ``halfbyte generate`` can be piped.
Exit codes:

    0     done
    2     bad input, a full disk: one sentence says what is wrong and what to do
    130   interrupted, by Ctrl-C or SIGTERM
    141   whoever read the output has closed it (the shell's number for SIGPIPE)

Any other error is a bug and keeps its traceback. torch and the libraries over it take seconds to import, so modules of
this package do not import them; each command does, when it runs.
"""

import io
import os
import re
import signal
import sys
import warnings
from pathlib import Path
from typing import Annotated

import typer

from halfbyte import __version__
from halfbyte.cli import (
    adapter,
    audit,
    bench,
    chat,
    classify,
    convert,
    data,
    evaluate,
    evaluate_judge,
    example,
    export,
    generate,
    machine,
    merge,
    models,
    plan,
    push,
    qlora,
    resume,
    run,
    runs,
    serve,
    train,
    ui,
)
from halfbyte.cli.console import INTERRUPTED, fail
from halfbyte.cli.options import DataCommand, complete
from halfbyte.errors import InputError, nearest
from halfbyte.files import disk_full

CLOSED_PIPE = 141

app = typer.Typer(
    help="QLoRA on the machine you have: fine-tune language models in 4 bits, and talk to them.",
    context_settings={"help_option_names": ["-h", "--help"]},
    rich_markup_mode=None,
    pretty_exceptions_enable=False,
    add_completion=False,
)
benchmarks = typer.Typer(help="Measure speed on this machine.")
adapters = typer.Typer(help="Look at adapters, and make adapters of adapters.")
evaluations = typer.Typer(
    cls=evaluate.EvaluateGroup,
    help="Measure a model or a run (evaluate MODEL --tasks ...), or have answers judged in pairs.",
)
shown_runs = typer.Typer(cls=runs.RunsGroup, help="List runs (runs FOLDER), or put some beside each other.")

app.command(cls=DataCommand)(train.train)
app.command()(plan.plan)
app.command()(example.example)
app.command()(resume.resume)
app.command(context_settings=qlora.SETTINGS)(qlora.qlora)
app.command()(convert.convert_config)
app.command(cls=DataCommand)(data.data)
app.add_typer(shown_runs, name="runs")
shown_runs.command("list")(runs.list_runs)
shown_runs.command()(runs.compare)
app.command()(runs.report)
app.command()(chat.chat)
app.command()(generate.generate)
app.command()(classify.classify)
app.add_typer(evaluations, name="evaluate")
evaluations.command()(evaluate.model)
evaluations.command()(evaluate_judge.judge)
evaluations.command()(evaluate_judge.elo)
app.command()(serve.serve)
app.command()(ui.ui)
app.command()(models.quantize)
app.command()(models.verify)
app.command()(merge.merge)
app.command()(push.push)
app.command()(audit.audit)
app.command()(export.export)
app.add_typer(adapters, name="adapter")
for made in (adapter.info, adapter.truncate, adapter.combine, adapter.convert, adapter.diff):
    adapters.command()(made)
app.command()(machine.doctor)
app.command(context_settings=run.CONTEXT)(run.run)
app.add_typer(benchmarks, name="bench")
benchmarks.command()(bench.kernels)
benchmarks.command()(bench.train)
benchmarks.command()(bench.packing)
benchmarks.command()(bench.decode)


def main() -> None:
    """Run the command line and exit; who calls it within Python finds SIGTERM as it was."""
    before = signal.getsignal(signal.SIGTERM)
    try:
        code = _outcome()
    finally:
        if signal.getsignal(signal.SIGTERM) is not before:
            signal.signal(signal.SIGTERM, before)
    while run.waiting:
        run.waiting.pop()()
    sys.exit(code)


def _outcome() -> int:
    """Run the command line and return its exit code; a script that is to be run waits."""
    # Read by libgomp when torch loads it. Its threads otherwise spin for milliseconds after each parallel region, and
    # whenever another program wants a core, a training step takes several times as long (LOG.md).
    os.environ.setdefault("GOMP_SPINCOUNT", "1000")
    if sys.argv[1:2] != ["run"]:  # a script finds the process as Python leaves it
        if not sys.warnoptions:
            warnings.simplefilter("ignore")
        signal.signal(signal.SIGTERM, signal.default_int_handler)
    try:
        if sys.argv[1:2] != ["run"]:
            _check_surroundings()
        code = _run()
        if sys.stdout is not None:
            sys.stdout.flush()
    except (InputError, typer.TyperException) as error:
        code = fail(_told(error) if isinstance(error, typer.TyperException) else str(error))
    except BrokenPipeError:
        # Nobody reads any more; what the interpreter would still write at its end goes nowhere.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        code = CLOSED_PIPE
    except Exception as error:  # safetensors and tokenizers raise their own
        if not disk_full(error):
            raise
        code = fail(f"The disk is full ({error}); free some space and try again.")
    except KeyboardInterrupt:
        typer.echo("Interrupted.", err=True)
        code = INTERRUPTED
    return code


def _run() -> int:
    """Run the command that the arguments name; typer's own way of doing this would hide a closed pipe."""
    command = typer.main.get_command(app)
    try:
        with command.make_context("halfbyte", complete(sys.argv[1:])) as context:
            command.invoke(context)
    except typer.Exit as end:
        return end.exit_code
    return 0


def _told(error: typer.TyperException) -> str:
    """Return what typer (0.29) says, with what it does not: that an option is an argument, the nearest of its words."""
    text: str = error.format_message()
    if context := getattr(error, "ctx", None):
        arguments = [one.name for one in context.command.params if one.param_type_name == "argument"]
        name = getattr(error, "option_name", "").lstrip("-").replace("-", "_")
        if name in arguments:
            usage = " ".join([context.command_path, *(argument.upper() for argument in arguments)])
            return f"{name.upper()} is no option but an argument: {usage}."
    found = re.fullmatch(r"Invalid value for '(--\S+)': Value error, '(.*)' is not one of (.*)\.", text, re.DOTALL)
    if not found:
        return text
    words = re.findall(r"'([^']*)'", found[3])
    return f"{found[1]} {found[2]!r} is not one of {', '.join(words)}{nearest(found[2], words)}."


def _check_surroundings() -> None:
    """Look at what a program gets from its shell: folder, arguments, streams.

    What is read may be bytes of another encoding, which are told where they are used; what is printed may be text that
    the terminal's encoding cannot hold, which is printed with question marks.
    """
    try:
        Path.cwd()
    except FileNotFoundError:
        raise InputError("The working directory is gone; change to one that is there.") from None
    for argument in sys.argv[1:]:
        try:
            argument.encode()
        except UnicodeEncodeError:
            raise InputError(f"The argument {argument!a} is not UTF-8 text; names and prompts must be.") from None
    if isinstance(sys.stdin, io.TextIOWrapper):
        sys.stdin.reconfigure(errors="surrogateescape")
    if isinstance(sys.stdout, io.TextIOWrapper) and sys.stdout.encoding.lower() != "utf-8":
        sys.stdout.reconfigure(errors="replace")


@app.callback(invoke_without_command=True)
def _root(
    context: typer.Context,
    version: Annotated[bool, typer.Option("--version", help="Show the version and exit.")] = False,
) -> None:
    if version:
        typer.echo(f"halfbyte {__version__}")
    else:
        _help_alone(context)


@benchmarks.callback(invoke_without_command=True)
def _help_alone(context: typer.Context) -> None:
    if context.invoked_subcommand is None:
        typer.echo(context.get_help())

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

import os
import signal
import sys
import warnings
from typing import Annotated

import safetensors
import typer

from halfbyte import __version__
from halfbyte.cli import bench, machine, models, talk, train
from halfbyte.cli.console import INTERRUPTED, fail
from halfbyte.errors import InputError
from halfbyte.files import disk_full

CLOSED_PIPE = 141

app = typer.Typer(
    help="QLoRA on the machine you have: fine-tune language models in 4 bits, and talk to them.",
    context_settings={"help_option_names": ["-h", "--help"]},
    rich_markup_mode=None,
    pretty_exceptions_enable=False,
    add_completion=False,
)
benchmarks = typer.Typer(help="Measure speed on this machine.", no_args_is_help=True)

app.command()(train.train)
app.command()(talk.chat)
app.command()(talk.generate)
app.command()(models.quantize)
app.command()(machine.doctor)
app.add_typer(benchmarks, name="bench")
benchmarks.command()(bench.kernels)
benchmarks.command()(bench.train)


def main() -> None:
    """Run the command line and exit."""
    # Read by libgomp when torch loads it. Its threads otherwise spin for milliseconds after each parallel region, and
    # whenever another program wants a core, a training step takes several times as long (LOG.md).
    os.environ.setdefault("GOMP_SPINCOUNT", "1000")
    if not sys.warnoptions:
        warnings.simplefilter("ignore")
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    try:
        code = app(standalone_mode=False)
        sys.stdout.flush()
    except (InputError, typer.TyperException) as error:
        code = fail(error.format_message() if isinstance(error, typer.TyperException) else str(error))
    except BrokenPipeError:
        # Nobody reads any more; what the interpreter would still write at its end goes nowhere.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        code = CLOSED_PIPE
    except (OSError, safetensors.SafetensorError) as error:
        if not disk_full(error):
            raise
        code = fail(f"The disk is full ({error}); free some space and try again.")
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

"""``qlora``: the command line of the paper's own script, word for word."""

import sys

import typer

from halfbyte.cli import processes
from halfbyte.cli.console import INTERRUPTED, TerminalDisplay, notes, shown
from halfbyte.quiet import quiet
from halfbyte.train.qlora.flags import parse
from halfbyte.train.qlora.table import FLAGS
from halfbyte.train.qlora.translate import translate

TO_YAML = ("--to-yaml", "--to_yaml")
SETTINGS = {"allow_extra_args": True, "ignore_unknown_options": True, "help_option_names": ["-h", "--help"]}


def qlora(context: typer.Context) -> None:
    words = context.args
    to_yaml = [word for word in words if word in TO_YAML]
    words = [word for word in words if word not in TO_YAML]
    flags = parse(FLAGS, words)
    if to_yaml:
        translated = translate(flags)
        typer.echo(translated.to_yaml(words), nl=False)
        for name, why in translated.lacking.items():
            typer.echo(f"No counterpart: --{name} ({why})", err=True)
        return
    if processes.started(translate(flags).config()):
        return
    with quiet():
        from halfbyte.hf.trainers.distributed import ElsewhereError, is_first
        from halfbyte.train.qlora.run import qlora as run
    plain = flags["disable_tqdm"]
    display = TerminalDisplay(type(notes)(stderr=True, highlight=False, force_terminal=False) if plain else notes)
    try:
        figures = run(flags, display)
    except ElsewhereError:
        sys.exit(2)  # the process where it happened tells it
    except (MemoryError, RuntimeError) as error:
        processes.out_of_memory(error)
        raise
    except KeyboardInterrupt as interrupt:
        processes.let_end()
        if is_first():
            typer.echo(str(interrupt) or "Interrupted.", err=True)
            typer.echo("The same command goes on from its newest checkpoint.", err=True)
        sys.exit(INTERRUPTED)
    finally:
        display.close()
    if is_first():
        for name, figure in figures.items():
            typer.echo(f"{name:<28} {figure:.6g}" if isinstance(figure, float) else f"{name:<28} {figure}")
        typer.echo(f"The results are in {shown(translate(flags).config().output)}.")


def _help() -> str:
    rows = "\n".join(f"  --{flag.name:<35} {flag.told}" for flag in FLAGS)
    return (
        "Fine-tune with the command line of the paper's own script (artidoro/qlora, qlora.py).\n\n"
        "Flags, defaults and output folder are the script's. With --to-yaml it prints the configuration of halfbyte "
        "train for the same run, and does nothing else. Each flag does what it says, or is refused; those the script "
        f"dropped in silence are errors.\n\n\b\nWhat becomes of each flag:\n{rows}"
    )


qlora.__doc__ = _help()

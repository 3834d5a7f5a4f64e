"""``train``, with a flag for each field of :class:`halfbyte.runs.config.TrainConfig`, made from it."""

import sys
from typing import Any

import typer

from halfbyte.cli import processes
from halfbyte.cli.console import INTERRUPTED, TerminalDisplay, command, notes, shown
from halfbyte.cli.options import flags_of
from halfbyte.errors import size_text
from halfbyte.quiet import quiet
from halfbyte.runs.config import TrainConfig


def train(**options: Any) -> None:
    """Fine-tune a model with QLoRA.

    Options come from flags, from a YAML file, or from both (flags win). Interrupted with Ctrl-C or SIGTERM, it saves a
    checkpoint first; halfbyte resume goes on from there.
    """
    given = {name: value for name, value in options.items() if value is not None}
    run(TrainConfig.from_yaml(given.pop("config", None), given))


def run(config: TrainConfig) -> None:
    """Train as ``config`` says, and print what comes of it."""
    if processes.started(config):
        return
    with quiet():
        from halfbyte.hf.trainers.distributed import ElsewhereError, is_first
        from halfbyte.train import fine_tune
    unit = "rows" if config.task == "classify" else "trained tokens"
    display = TerminalDisplay(notes, unit)
    try:
        summary = fine_tune(config, display).summary
    except ElsewhereError:
        sys.exit(2)  # the process where it happened tells it
    except (MemoryError, RuntimeError) as error:
        processes.out_of_memory(error)
        raise
    except KeyboardInterrupt as interrupt:
        processes.let_end()
        if not is_first():
            sys.exit(INTERRUPTED)
        typer.echo(str(interrupt) or "Interrupted.", err=True)
        if any(config.output.glob("checkpoints/step-*")):
            typer.echo(f"Go on with:\n  {command('resume', str(config.output))}", err=True)
        sys.exit(INTERRUPTED)
    finally:
        display.close()
    if not is_first():
        return
    folder = shown(config.output)
    typer.echo(
        f"Trained {summary.steps} steps in {summary.seconds:.0f} s: loss {summary.loss:.3f}, "
        f"{summary.trained_tokens_per_second:,.0f} {unit}/s in them, "
        f"{size_text(summary.peak_memory_bytes)} peak memory."
    )
    typer.echo(f"The adapter is in {folder}, a page about the run in {folder}/report.html. Next:")
    if config.task == "classify":
        typer.echo(f"  {command('classify', folder, '--text', 'your text')}")
        return
    if config.task == "lm":
        typer.echo(f"  {command('chat', folder)}")
    typer.echo(f"  {command('generate', folder, '--prompt', 'your question')}")


train.__signature__ = flags_of(TrainConfig)  # type: ignore[attr-defined]

"""``train`` in several processes: started here, or this is one of them."""

import signal
import sys

import typer

from halfbyte.cli.console import TerminalDisplay, notes, shown
from halfbyte.errors import InputError
from halfbyte.quiet import quiet
from halfbyte.runs import launched
from halfbyte.runs.config import TrainConfig
from halfbyte.runs.folder import RunFolder

NO_MEMORY = ("can't allocate memory", "out of memory")
"""How torch (2.13) says that there is none, on a CPU and on a GPU."""


def started(config: TrainConfig) -> bool:
    """Start the processes that ``config`` asks for and wait for them; return False where this process is to train.

    Raises:
        InputError: a launcher started others than ``config`` asks for, or one of ours was killed.
    """
    if launched.is_launched():
        launched.end_with_launcher()
        there = launched.local_world_size()
        if config.processes not in (1, there):
            raise InputError(
                f"torchrun started {there} process{'es' * (there > 1)} here, but processes is {config.processes}; "
                "leave one of them away."
            )
        return False
    if config.ray is not None:
        with quiet():
            from halfbyte.train.on_ray import fine_tune_on_ray
        fine_tune_on_ray(config, TerminalDisplay(notes))
        typer.echo(f"The adapter is in {shown(config.output)}.")
        return True
    if config.processes == 1:
        return False
    with quiet():
        from halfbyte.train.launch import launch
    result = RunFolder(config.output).summary
    code = launch(config.processes, sys.argv[1:], TerminalDisplay(notes), config.max_restarts, result)
    if code:
        sys.exit(code)
    return True


def let_end() -> None:
    """Be deaf to the signal by which the launcher ends who is still there, while this process tells how it ended."""
    if launched.is_launched():
        signal.signal(signal.SIGTERM, signal.SIG_IGN)


def out_of_memory(error: Exception) -> None:
    """Tell in a sentence that memory ran out, if that is what ``error`` says.

    Raises:
        InputError: it is.
    """
    if isinstance(error, MemoryError) or any(words in str(error) for words in NO_MEMORY):
        raise InputError(
            "There is no memory left for this process; set memory, take a smaller batch_size or max_length, or fewer "
            "processes."
        ) from error

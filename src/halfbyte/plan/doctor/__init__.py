"""What is the matter, and what to do about it: this machine and installation, a model, a run, a script.

Every finding says what was looked at, what was found, why it matters, and what to paste (:mod:`.finding`). Nothing is
written, and nothing is downloaded. It works where libraries are missing or damaged: nothing here imports another's
package before that was tried in another process.

    finding          what is said
    distributions    versions that go together, files of libraries, by pip's metadata
    imports          what can be imported, tried apart
    kernels          which are in force; self_test: whether they are right
    machine, limits  processors and memory; what a container allows of them
    storage          disks, and the hub
    model            with tokenizer, weights, adapter, and hub_model, one that is not here
    run              what became of it and whether it learnt; speed, why it was slow
    script           read by reading; script_arguments, script_inputs: what it gives to libraries, and loads
"""

from collections.abc import Iterator
from pathlib import Path
from typing import Literal

from halfbyte import __version__
from halfbyte.errors import InputError
from halfbyte.plan.doctor.finding import LEVELS, Finding, Level, looked, worst
from halfbyte.plan.doctor.imports import Trial
from halfbyte.plan.doctor.imports import check as imported

__all__ = ["LEVELS", "Finding", "Level", "installation", "kind_of", "line", "report", "worst"]

SCRIPTS = (".py", ".ipynb")


def line() -> str:
    """Return one line that names the version, the provider and the instruction-set tier in force."""
    import torch

    from halfbyte.runs.circumstances import kernels_in_force

    name, *tier = kernels_in_force().split(" ", 1)
    return f"halfbyte {__version__}: {' '.join([name, 'kernels', *tier])}, {torch.get_num_threads()} threads"


def kind_of(what: str) -> Literal["script", "run", "model"]:
    """Return what ``what`` names; a model also where there is nothing, which may be an id of the hub.

    Raises:
        InputError: it is a file or folder of no such kind.
    """
    from halfbyte.runs.history import is_run, read_run

    path = Path(what).expanduser()
    if path.suffix in SCRIPTS:
        if path.is_file():
            return "script"
        raise InputError(f"There is no script {what}.")
    if path.is_file() and path.suffix != ".gguf":
        raise InputError(f"{what} is neither a script (.py, .ipynb) nor a GGUF file; name one, a model or a run.")
    if not path.is_dir():
        return "model"
    if is_run(path):
        return "run"
    if any((path / name).is_file() for name in ("config.json", "adapter_config.json")) or any(path.glob("*.gguf")):
        return "model"
    if any(path.glob("*.safetensors")):
        raise InputError(
            f"{what} holds weights, but neither config.json nor adapter_config.json says of what; copy it too."
        )
    read_run(path)  # says what is missing, or which runs are below
    return "run"


def report() -> list[Finding]:
    """Look at this installation and this machine."""
    trial = Trial()
    findings = [Finding("halfbyte", __version__), *looked("machine", _machine)]
    findings += installation()
    findings += looked("disks", _storage)
    result = trial.result()
    return [*findings, *result.findings, *looked("import", lambda: imported(result))]


def installation() -> list[Finding]:
    """Look at what is installed, by pip's metadata: this takes nothing but Python, and packaging."""
    return looked("distributions", _distributions)


# Imported where they are looked at: each stands on packages of others, which may be gone.


def _machine() -> Iterator[Finding]:
    from halfbyte.plan.doctor import machine

    yield from machine.check()


def _distributions() -> Iterator[Finding]:
    from halfbyte.plan.doctor import distributions

    yield from distributions.check()


def _storage() -> Iterator[Finding]:
    from halfbyte.plan.doctor import storage

    yield from storage.check()
    yield from storage.hub()

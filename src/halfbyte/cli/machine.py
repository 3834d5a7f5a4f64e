"""``doctor``: what is the matter with this machine, a model, a run or a script, and what to do about it."""

import contextlib
import dataclasses
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Annotated, Any

import typer

from halfbyte.cli import notebook
from halfbyte.cli.console import bar, status
from halfbyte.cli.options import RemoteCode
from halfbyte.errors import InputError, counted
from halfbyte.quiet import quiet

WIDTH = 16
"""Characters of what was looked at."""


def doctor(
    what: Annotated[
        str | None,
        typer.Argument(
            metavar="[MODEL|RUN|SCRIPT]",
            help="A model or an adapter (folder, GGUF file or hub id), the folder of a run, or a script or notebook; "
            "without it, this machine and installation.",
        ),
    ] = None,
    line: Annotated[bool, typer.Option("--line", help="Only one line: version, kernels and threads.")] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print the findings as a list in JSON.")] = False,
    trust_remote_code: RemoteCode = False,
) -> None:
    """Say what is wrong, why it matters, and what to paste to mend it.

    Of this machine and installation, with a self-test of the kernels; of a model, every tensor of which is read; of a
    run, why it was slow, diverged or learnt nothing; of a script, which is read and not run. Nothing is written or
    downloaded. The exit code is 1 if a fault was found, which a warning is not.
    """
    from halfbyte.plan import doctor as plan

    if line:
        if what is not None:
            raise InputError("--line is of this machine; leave it out, or the name behind it.")
        typer.echo(plan.line())
        return
    with status("Looking"):
        findings = plan.report() if what is None else _examined(what, trust_remote_code)
    if as_json:
        typer.echo(json.dumps([dataclasses.asdict(finding) for finding in findings], indent=2))
    else:
        _show(findings)
    if plan.worst(findings) == "fault":
        raise typer.Exit(1)


def _examined(what: str, trust_remote_code: bool) -> list[Any]:
    """Look at a model, a run or a script."""
    from halfbyte.plan import doctor as plan

    path = Path(what).expanduser()
    kind = plan.kind_of(what)
    with _broken_libraries_told(), quiet():
        if kind == "script":
            from halfbyte.plan.doctor import script

            return script.examine(path, _cells(path))
        with bar("Reading") as progress:
            task = progress.add_task("")

            def told(done: int, total: int) -> None:
                progress.update(task, completed=done, total=total)

            if kind == "run":
                from halfbyte.plan.doctor import run

                return run.examine(path, told)
            from halfbyte.plan.doctor import model

            return model.examine(what, progress=told, trust_remote_code=trust_remote_code)


def _cells(file: Path) -> list[tuple[str, str]]:
    """Return the source of a script, or of a notebook's cells with what they are called.

    Raises:
        InputError: it cannot be read.
    """
    if file.suffix == ".ipynb":
        return [(f"cell {number}", source) for number, source, _ in notebook.cells_of(file)]
    try:
        return [("", file.read_text(encoding="utf-8"))]
    except (OSError, UnicodeDecodeError) as error:
        reason = error.strerror if isinstance(error, OSError) else "it is not UTF-8"
        raise InputError(f"{file} cannot be read as a script: {reason}.") from None


@contextlib.contextmanager
def _broken_libraries_told() -> Iterator[None]:
    try:
        yield
    except ImportError as error:
        first = str(error).strip().split("\n")[0]
        raise InputError(
            f"A library cannot be imported ({first}); halfbyte doctor, without a name, says what to do."
        ) from error


def _show(findings: list[Any]) -> None:
    """Print findings, and how many of each kind there are."""
    for finding in findings:
        mark = "" if finding.level == "ok" else f"{finding.level}: "
        typer.echo(f"{finding.what:{WIDTH}} {mark}{finding.value}")
        if finding.level != "ok" and finding.why:
            typer.echo(f"{'':{WIDTH}} {finding.why}")
        if finding.fix:
            typer.echo(f"{'':{WIDTH}} → {finding.fix}")
    kinds = [(name, sum(finding.level == name for finding in findings)) for name in ("fault", "warning", "note")]
    told = [counted(count, name) for name, count in kinds if count]
    typer.echo(f"\n{', '.join(told)}." if told else "\nNothing is wrong.")

"""``doctor``: what this machine and this installation offer."""

from typing import Annotated

import typer


def doctor(
    line: Annotated[bool, typer.Option("--line", help="Only one line: version, kernels and threads.")] = False,
) -> None:
    """Show what is installed and what this machine offers.

    Says what to do about what is missing.
    """
    from halfbyte.plan import doctor as findings

    if line:
        typer.echo(findings.line())
        return
    for finding in findings.report():
        typer.echo(f"{finding.name:16} {finding.value}")
        if finding.hint:
            typer.echo(f"{'':16} → {finding.hint}")

"""``audit``: what each way of merging keeps."""

from pathlib import Path
from typing import Annotated

import typer

from halfbyte.cli.console import bar, command, print_table, shown
from halfbyte.cli.options import RemoteCode
from halfbyte.quiet import quiet


def audit(
    run: Annotated[str, typer.Argument(help="Run folder, or a PEFT adapter's folder or hub id.")],
    data: Annotated[
        list[str] | None,
        typer.Option(
            help="Rows to measure on; may be repeated.", show_default="what the run held out, or was trained on"
        ),
    ] = None,
    calibration: Annotated[
        list[str] | None,
        typer.Option(help="Texts for the ways that want some.", show_default="what the run was trained on"),
    ] = None,
    original: Annotated[
        str | None, typer.Option(help="The 16-bit model that a base in 4 bits was made of: folder or hub id.")
    ] = None,
    way: Annotated[
        list[str] | None, typer.Option(help="A way to measure; may be repeated.", show_default="all")
    ] = None,
    tokens: Annotated[int, typer.Option(min=1, help="Labelled tokens that are compared at most.")] = 2048,
    seed: Annotated[int, typer.Option(help="Of which texts are taken, and of what is drawn.")] = 0,
    output: Annotated[
        Path | None, typer.Option(help="Folder for audit.json and audit.png.", show_default="RUN/audit, or ./audit")
    ] = None,
    trust_remote_code: RemoteCode = False,
) -> None:
    """Measure what each way of merging keeps of what was learnt, and recommend one.

    Base and adapter are merged in each way, one after the other, opened, and compared with base and adapter apart.
    """
    with quiet(), bar("Measuring") as progress:
        from halfbyte.deploy.audit import audit as audited

        task = progress.add_task("")
        folder = output or (Path(run) / "audit" if Path(run).is_dir() else Path("audit"))
        report = audited(
            run,
            data=data or None,
            calibration=calibration or None,
            original=original,
            ways=way or None,
            positions=tokens,
            seed=seed,
            work=folder,
            trust_remote_code=trust_remote_code,
            progress=lambda words, done, total: progress.update(
                task, completed=done, total=total, description=f"Measuring: {words}"
            ),
        )
        folder.mkdir(parents=True, exist_ok=True)
        report.write(folder / "audit.json")
        report.draw(folder / "audit.png")
    print_table(report.table())
    for name, why in report.left_out.items():
        typer.echo(f"Left out: {name}. {why}")
    for line in report.recommendation:
        typer.echo(line)
    typer.echo(f"Figures of the layers: {shown(folder / 'audit.png')}. Next:")
    typer.echo(f"  {command('merge', run, 'OUT')}")

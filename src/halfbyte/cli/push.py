"""``push``: adapters and models on the Hugging Face hub."""

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.table import Table

from halfbyte.cli.console import notes, print_table, shown
from halfbyte.errors import counted, named, size_text
from halfbyte.files import absolute
from halfbyte.quiet import quiet

if TYPE_CHECKING:
    from halfbyte.deploy.uploads import Parcel


def push(
    run: Annotated[Path, typer.Argument(help="Folder of a run, an adapter, a model, or GGUF files.")],
    repo: Annotated[str, typer.Argument(metavar="USER/NAME", help="Repository on the hub, made if it is not there.")],
    public: Annotated[bool, typer.Option("--public", help="For everybody to see.  [default: private]")] = False,
    revision: Annotated[
        str | None, typer.Option(help="Branch to upload to, made if it is not there.  [default: main]")
    ] = None,
    message: Annotated[
        str | None, typer.Option(help="Of the commit.  [default: Upload an adapter, or a model]")
    ] = None,
    base: Annotated[
        str | None, typer.Option(help="Hub id of the base model.  [default: as the adapter names it, without a path]")
    ] = None,
    card: Annotated[
        Path | None, typer.Option(help="README.md to upload.  [default: written for an adapter, else the folder's]")
    ] = None,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Show the files and the card; upload nothing.")] = False,
) -> None:
    """Upload an adapter, a merged or quantized model, or GGUF files to the Hugging Face hub.

    Optimizer state, checkpoints, data, metrics and paths of this machine stay here. Log in with hf auth login.
    """
    with quiet():
        from halfbyte.deploy.push import check_id
        from halfbyte.deploy.push import push as pushed
        from halfbyte.deploy.uploads import parcel

        check_id(repo)
        if base is not None:
            check_id(base, owned=False)
        going = parcel(absolute(run), repo, base=base, card=absolute(card) if card else None)
        _show(going)
        if dry_run:
            readme = next((upload.source for upload in going.uploads if upload.name == "README.md"), b"")
            typer.echo((readme if isinstance(readme, bytes) else readme.read_bytes()).decode(errors="replace"))
            notes.print("Nothing was uploaded (--dry-run).")
            return
        made = pushed(going, repo, public=public, revision=revision, message=message)
    seen = "private" if made.is_private else "public"
    where = f"{made.url}{f'/tree/{revision}' if revision else ''}"
    if made.is_new:
        files = f"{counted(len(going.uploads), 'file')}, {size_text(going.nbytes)}"
        typer.echo(f"Pushed {files}, to {where} ({seen}), commit {made.commit[:7]}.")
    else:
        typer.echo(f"{where} ({seen}) has all of it already, by commit {made.commit[:7]}.")


def _show(going: "Parcel") -> None:
    """Say what goes and what stays."""
    table = Table("file", "size", "other than here", box=None)
    table.columns[1].justify = "right"
    for upload in going.uploads:
        table.add_row(upload.name, size_text(upload.nbytes), upload.note)
    print_table(table)
    typer.echo(f"{counted(len(going.uploads), 'file')} of {shown(going.folder)}, {size_text(going.nbytes)}.")
    if going.stays:
        typer.echo(f"Stays here: {named(going.stays)}.")
    if going.kind == "adapter" and not going.base_is_id:
        typer.echo(
            f"The base model lies in a folder of this machine, so that the adapter calls it {going.base} alone; give "
            "its hub id with --base."
        )

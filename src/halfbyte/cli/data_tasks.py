"""``data`` for classification and sequence-to-sequence: classes, lengths, hints and rows in the terminal."""

import dataclasses
import json
import sys
from pathlib import Path
from typing import Any

import typer
from rich.console import Console
from rich.table import Table
from rich.text import Text

from halfbyte.cli.console import TABLE_WIDTH
from halfbyte.errors import counted
from halfbyte.files import absolute, write_text

MOST_CLASSES = 30


def show_task(opened: Any, numbers: list[int] | None, count: int, json_file: Path | None) -> None:
    """Print what is trained, or write it as JSON.

    Args:
        opened: the rows and their tokenizer.
        numbers: of rows to show, from 1.
        count: so many rows are shown else: the first ones.
        json_file: where the numbers go; ``-`` prints them alone.
    """
    from halfbyte.data.samples import one_line
    from halfbyte.data.task_survey import shown_row, survey_task

    found = survey_task(opened.data, opened.notes)
    text = json.dumps(dataclasses.asdict(found), indent=1, ensure_ascii=False) + "\n"
    if str(json_file) == "-":
        typer.echo(text, nl=False)
        return
    if json_file:
        write_text(absolute(json_file), text)
    console = Console(width=None if sys.stdout.isatty() else TABLE_WIDTH, highlight=False)
    table = Table(show_header=False, box=None, padding=(0, 2, 0, 0))
    lines = [("rows", f"{found.rows:,}"), ("rows for evaluation", f"{found.evaluation_rows:,}")]
    lines += [("tokens a row", _spread(found.tokens))]
    lines += [("tokens of its target", _spread(found.target_tokens))] if found.target_tokens else []
    lines += [("cut", counted(found.truncated, "row")), ("repeat an earlier input", counted(found.repeated, "row"))]
    for name, value in lines:
        table.add_row(Text(name, style="dim"), Text(value))
    console.print(table)
    if found.classes:
        console.print(_classes(found.classes))
    for hint in found.hints():
        console.print(Text(f"! {one_line(hint)}"), soft_wrap=True)
    for number in numbers or range(1, min(count, found.rows) + 1):
        where, read, answer = shown_row(opened.data, number - 1, opened.tokenizer)
        console.print(Text(f"\nrow {number:,} of {found.rows:,} ({one_line(where)})", style="bold"), soft_wrap=True)
        console.print(Text(one_line(read)) + Text(f" → {one_line(answer)}", style="bold green"), soft_wrap=True)


def _classes(classes: dict[str, int]) -> Table:
    from halfbyte.data.samples import one_line

    total = sum(classes.values())
    table = Table("class", "examples", "share", box=None, padding=(0, 2, 0, 0))
    for name, count in list(classes.items())[:MOST_CLASSES]:
        table.add_row(Text(one_line(name)), f"{count:,}", f"{count / total:.1%}")
    if len(classes) > MOST_CLASSES:
        table.add_row(f"and {len(classes) - MOST_CLASSES} more", "", "")
    return table


def _spread(quantiles: dict[str, int]) -> str:
    return ", ".join(f"{q} % up to {tokens:,}" for q, tokens in quantiles.items())

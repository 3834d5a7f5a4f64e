"""``runs`` lists runs, ``runs compare`` puts some beside each other, ``report`` makes the page of a run anew."""

import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any

import typer
import typer.core
from rich.console import Console
from rich.measure import Measurement
from rich.table import Table
from rich.text import Text

from halfbyte.cli.console import TABLE_WIDTH, notes, print_table, shown
from halfbyte.cli.live import flow
from halfbyte.errors import InputError, check_writable, counted, nearest
from halfbyte.files import absolute, write_text
from halfbyte.runs.folder import RunFolder
from halfbyte.runs.history import Run, find_runs, read_run
from halfbyte.runs.report import words
from halfbyte.runs.report.axes import number

HOME = Path("runs")
"""The folder that is looked at without a name, if it is there; else the working directory."""
BLOCKS = "▁▂▃▄▅▆▇█"
WIDEST = 1000
"""Characters within which a table is measured."""
CURVE = 24
"""Characters of a curve in the terminal."""
PAGES = (".html", ".htm")
RIGHT = ("step", "loss", "evaluation", "time")
NAMED = ("step", "loss", "evaluation", "begun")
"""Figures that need their name where they stand in no column."""
COLOURS = {"running": "blue", "finished": "green", "interrupted": "yellow", "failed": "red", "killed": "red"}


class RunsGroup(typer.core.TyperGroup):
    """A group of which everything but the name of a command is an argument of its ``list``."""

    def parse_args(self, ctx: Any, args: list[str]) -> list[str]:
        """Read the arguments; what is no command is a folder to list.

        Raises:
            InputError: it is neither.
        """
        if not args or (args[0] not in self.commands and args[0] not in ctx.help_option_names):
            if len(args) > 1 and not args[0].startswith("-") and not Path(args[0]).exists():
                raise InputError(f"There is no folder and no command {args[0]!r}{nearest(args[0], self.commands)}.")
            args = ["list", *args]
        return super().parse_args(ctx, args)


def list_runs(
    folder: Annotated[
        Path | None,
        typer.Argument(help="Where to look, three folders deep.  [default: runs, or the working directory]"),
    ] = None,
) -> None:
    """List runs: what they train, how far they have come, their loss."""
    home = absolute(folder) if folder else absolute(HOME if HOME.is_dir() else ".")
    if not home.is_dir():
        raise InputError(f"{home} is {'a file' if home.exists() else 'not there'}; name a folder that holds runs.")
    found: list[Run] = []
    said: list[str] = []
    for path in find_runs(home):
        try:
            run = read_run(path, short=True)
        except InputError as error:
            said.append(str(error))
            continue
        found.append(run)
        said += [f"{shown(path)}: {problem}" for problem in run.problems]
    if not found and not said:
        raise InputError(f"There is no run in {home}; halfbyte train makes one, or name another folder.")
    if found:
        _print_listing(home, sorted(found, key=_when))
    for line in said:
        notes.print(_text(line), soft_wrap=True)


def _when(run: Run) -> float:
    return run.begun.timestamp() if run.begun else 0.0


def _print_listing(home: Path, runs: Sequence[Run]) -> None:
    """Print a line a run, or where the terminal is too narrow for that, each run's name and its figures below."""
    rows = [_row(home, run) for run in runs]
    table = Table(box=None, padding=(0, 2, 0, 0), header_style="dim")
    for name in rows[0]:
        table.add_column(name, justify="right" if name in RIGHT else "left", no_wrap=True)
    for run, row in zip(runs, rows, strict=True):
        table.add_row(*(Text(text, COLOURS[run.state] if name == "state" else "") for name, text in row.items()))
    console = Console(width=None if sys.stdout.isatty() else TABLE_WIDTH, highlight=False)
    if (
        Measurement.get(console, console.options.update(max_width=WIDEST), table).maximum <= console.width
        or not sys.stdout.isatty()
    ):
        print_table(table)
        return
    for row in rows:
        pieces = [f"{name} {text}" if name in NAMED else text for name, text in row.items() if text]
        console.print(Text(pieces[0], style="bold"))
        for line in flow(pieces[1:], console.width - 2):
            console.print(Text(f"  {line}"))


def _row(home: Path, run: Run) -> dict[str, str]:
    last = run.kept.figures if run.kept else {}
    return {
        "name": _visible(run.path.name if run.path == home else str(run.path.relative_to(home))),
        "state": words.STATES[run.state],
        "step": f"{run.step:,}/{run.total_steps:,}" if run.total_steps else f"{run.step:,}",
        "loss": "" if run.loss is None else number(run.loss),
        "evaluation": number(last["loss"]) if "loss" in last else "",
        "method": _visible(str(run.options.get("method", ""))),
        "model": _visible(words.model_name(run)),
        "begun": words.moment(run.begun),
        "time": "" if run.seconds is None else words.duration(run.seconds),
    }


def compare(
    runs: Annotated[list[Path], typer.Argument(help="Folders of two runs or more.")],
    html: Annotated[Path | None, typer.Option(help="Write a page with their curves in one.")] = None,
) -> None:
    """Put runs beside each other: what they came to, their curves, and the options in which they differ."""
    if len(runs) < 2:
        raise InputError(f"To compare takes two runs or more; name others beside {runs[0]}.")
    folders = [absolute(path) for path in runs]
    if len(set(folders)) < len(folders):
        raise InputError("A run is named twice; name different ones.")
    target = _page_target(html) if html else None
    named = list(zip(_names(folders), [read_run(folder) for folder in folders], strict=True))
    from halfbyte.runs.report import page

    if target:
        write_text(target, page.compare_page(named))
    names = [name for name, _ in named]
    figures = page.compared_figures(named)
    figures.append(("loss, moving mean", _curves([run for _, run in named])))
    print_table(_beside(names, figures))
    for title, rows in (
        ("Options that differ", page.compared_options(named)),
        ("Circumstances that differ", page.compared_circumstances(named)),
    ):
        typer.echo(f"\n{title}{'' if rows else ': none'}")
        if rows:
            print_table(_beside(names, rows))
    for name, run in named:
        for line in run.problems:
            notes.print(_text(f"{name}: {line}"), soft_wrap=True)
    if target:
        notes.print(_text(f"The page is {shown(target)}"), soft_wrap=True)


def _names(folders: Sequence[Path]) -> list[str]:
    """Return names that tell folders apart: their last parts, as many as that takes."""
    for parts in range(1, max(len(folder.parts) for folder in folders)):
        names = ["/".join(folder.parts[-parts:]) for folder in folders]
        if len(set(names)) == len(names):
            return names
    return [str(folder) for folder in folders]


def _beside(names: Sequence[str], rows: Sequence[tuple[str, Sequence[str]]]) -> Table:
    table = Table(box=None, padding=(0, 2, 0, 0), header_style="bold")
    table.add_column("", style="dim", overflow="fold")
    for name in names:
        table.add_column(_text(name), overflow="fold")
    for name, values in rows:
        table.add_row(_text(name), *map(_text, values))
    return table


def _curves(runs: Sequence[Run]) -> list[str]:
    """Return the loss of each run as a line of blocks; steps and losses of all lie on the same scale."""
    from halfbyte.runs.report.axes import is_drawn
    from halfbyte.runs.report.charts import mean_of

    means = [[(x, y) for x, y in mean_of([(s.step, s.loss) for s in run.steps])[1] if is_drawn(y)] for run in runs]
    every = [point for points in means for point in points]
    if not every:
        return [""] * len(runs)
    first, last_step = min(x for x, _ in every), max(x for x, _ in every)
    low, high = min(y for _, y in every), max(y for _, y in every)
    lines = []
    for points in means:
        columns: dict[int, list[float]] = {}
        for x, y in points:
            columns.setdefault(int((x - first) / ((last_step - first) or 1) * (CURVE - 1)), []).append(y)
        heights = {at: sum(values) / len(values) for at, values in columns.items()}
        last, line = " ", ""
        for at in range(max(heights, default=-1) + 1):
            if at in heights:
                last = BLOCKS[round((heights[at] - low) / ((high - low) or 1.0) * (len(BLOCKS) - 1))]
            line += last
        lines.append(line)
    return lines


def report(
    run: Annotated[Path, typer.Argument(help="Run folder.")],
    html: Annotated[
        Path | None, typer.Option(help="Where the page goes.  [default: report.html in the folder]")
    ] = None,
) -> None:
    """Make the page of a run anew: its curves, data, options and circumstances, to read or to send."""
    folder = RunFolder(absolute(run))
    told = read_run(folder.path)
    target = _page_target(html) if html else folder.report
    check_writable(target.parent)
    from halfbyte.runs.report.page import report_page

    write_text(target, report_page(told))
    for line in told.problems:
        notes.print(_text(line), soft_wrap=True)
    if told.state == "running":
        notes.print(f"The run is going on: the page shows its first {counted(told.step, 'step')}.", soft_wrap=True)
    typer.echo(shown(target))


def _page_target(html: Path) -> Path:
    """Return where a page goes.

    Raises:
        InputError: it cannot go there, or would take the place of something that is no page.
    """
    target = absolute(html)
    if target.is_dir():
        raise InputError(f"--html {html} is a folder; name a file.")
    if target.suffix.lower() not in PAGES:
        raise InputError(f"--html {html}: a page is a file in {' or '.join(PAGES)}; name it so.")
    check_writable(target.parent)
    return target


def _visible(text: str) -> str:
    """Return ``text`` without anything that a terminal would obey."""
    return "".join(one if one.isprintable() else ascii(one)[1:-1] for one in text)


def _text(text: str) -> Text:
    return Text(_visible(text))

"""A survey in the terminal: a table, the lengths as lines of blocks over their scale, hints, and rows.

All text of the data comes here as :mod:`halfbyte.data.samples` makes it visible, and goes out as rich's ``Text``, which
takes nothing in it for markup.
"""

import sys
from collections.abc import Sequence
from typing import TYPE_CHECKING

from rich.console import Console
from rich.table import Table
from rich.text import Text

from halfbyte.cli.console import TABLE_WIDTH

if TYPE_CHECKING:
    from halfbyte.data.samples import Piece, Sample
    from halfbyte.data.survey import Bin, Survey

TRAINED, SPECIAL, REST = "bold green", "dim", ""
BORDER = "│"
"""Between tokens, where borders are asked for."""
WIDEST_BIN = 6
"""Characters."""


def show(survey: "Survey", samples: Sequence["Sample"], *, borders: bool = False) -> None:
    """Print a survey and rows on standard output.

    Args:
        survey: what is shown.
        samples: rows.
        borders: whether the borders of tokens are shown.
    """
    from halfbyte.data.figures import figures, hints

    console = Console(width=None if sys.stdout.isatty() else TABLE_WIDTH, highlight=False)
    table = Table(show_header=False, box=None, padding=(0, 2, 0, 0))
    for name, value in figures(survey):
        table.add_row(Text(name, style="dim"), Text(value))
    console.print(table)
    console.print()
    for line in scale(survey.histogram, console.width):
        console.print(Text(line), no_wrap=True, crop=True)
    if lines := hints(survey):
        console.print()
    for line in lines:
        console.print(Text(f"! {line}"), soft_wrap=True)
    for one in samples:
        _print_sample(console, one, survey.rows, borders)


def scale(bins: Sequence["Bin"], width: int) -> list[str]:
    """Return lines of blocks for whole rows and for their trained parts, and the lengths at which bins begin.

    Bins without rows at both ends are left away, and what does not fit into ``width`` characters at the upper end.
    """
    from halfbyte.data.samples import blocks

    used = [place for place, one in enumerate(bins) if one.rows or one.trained]
    shown = bins[used[0] : used[-1] + 1]
    names = ("tokens a row ", "trained      ", "from         ")
    wide = min(WIDEST_BIN, max(1, (width - len(names[0])) // len(shown)))
    rows = "".join(block * wide for block in blocks(one.rows for one in shown))
    trained = "".join(block * wide for block in blocks(one.trained for one in shown))
    labels = ""
    for place, one in enumerate(shown):
        label = f"{one.least:,}"
        if (not labels or len(labels) < place * wide) and place * wide + len(label) <= width - len(names[0]):
            labels = labels.ljust(place * wide) + label
    return [name + line for name, line in zip(names, (rows, trained, labels), strict=True)]


def _print_sample(console: Console, sample: "Sample", rows: int, borders: bool) -> None:
    from halfbyte.data.samples import joined, one_line, plain

    console.print()
    where = f" ({one_line(sample.where)})" if sample.where else ""
    about = f"row {sample.row:,} of {rows:,}{where}: {sample.tokens:,} tokens, {sample.trained:,} of them trained"
    console.print(Text(about, style="bold"), soft_wrap=True)
    border = BORDER if borders else ""
    for name, all_pieces in sample.parts():
        pieces = all_pieces if borders else list(joined(all_pieces))
        if name:
            console.print(Text(f"{name}:", style="bold"))
        if console.color_system is None or console.no_color:
            console.print(Text(plain(pieces, border)), soft_wrap=True)
        else:
            console.print(_coloured(pieces, border), soft_wrap=True)


def _coloured(pieces: Sequence["Piece"], border: str) -> Text:
    from halfbyte.data.samples import gap, visible

    text = Text()
    for number, piece in enumerate(pieces):
        if number and border:
            text.append(border, "dim")
        if piece.is_gap:
            text.append(gap(piece), "dim italic")
        else:
            text.append(visible(piece.text), f"{TRAINED if piece.trained else REST} {'dim' * piece.special}".strip())
    return text

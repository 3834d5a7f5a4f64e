"""The picture of a survey: how long the rows are, and how much of each is trained."""

from typing import IO

from matplotlib import rc_context
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from halfbyte.data.survey import Bin, Survey

ROWS, TRAINED = ("#9aa3ad", "#5d6773"), ("#1f8a4c", "#3fbf77")
"""Colours on a light and on a dark ground."""


def draw_lengths(survey: Survey, file: str | IO[bytes], *, form: str = "png", dark: bool = False) -> None:
    """Draw the histogram of ``survey``.

    Args:
        survey: what is drawn.
        file: path or stream.
        form: ``png`` or ``svg``; an SVG has no ground of its own.
        dark: for a dark ground.
    """
    used = [place for place, one in enumerate(survey.histogram) if one.rows or one.trained]
    shown = survey.histogram[used[0] : used[-1] + 1]
    ink = "#d7dbe0" if dark else "#24292f"
    # Fixed names within an SVG: the same survey gives the same file.
    with rc_context({"svg.hashsalt": "halfbyte", "text.color": ink, "axes.labelcolor": ink, "axes.edgecolor": ink,
                     "xtick.color": ink, "ytick.color": ink}):  # fmt: skip
        figure = Figure(figsize=(8, 3.6), layout="constrained")
        axes = figure.subplots()
        places = range(len(shown))
        width = 0.42
        axes.bar(
            [place - width / 2 for place in places], [one.rows for one in shown], width,
            color=ROWS[dark], label="whole rows",
        )  # fmt: skip
        axes.bar(
            [place + width / 2 for place in places], [one.trained for one in shown], width,
            color=TRAINED[dark], label="what is trained of them",
        )  # fmt: skip
        axes.set_xticks(list(places), [_range(one) for one in shown], rotation=45, ha="right", rotation_mode="anchor")
        axes.yaxis.set_major_locator(MaxNLocator(integer=True))
        axes.yaxis.set_major_formatter(lambda value, _: f"{value:,.0f}")
        axes.set(xlabel="tokens", ylabel="rows")
        axes.spines[["top", "right"]].set_visible(False)
        axes.grid(axis="y", alpha=0.25)
        axes.set_axisbelow(True)
        axes.legend(frameon=False)
        metadata = {"Date": None} if form == "svg" else None
        figure.savefig(file, format=form, dpi=150, transparent=form == "svg", metadata=metadata)


def _range(one: Bin) -> str:
    return f"{one.least:,}" if one.least == one.most else f"{one.least:,}–{one.most:,}"

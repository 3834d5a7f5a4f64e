"""What the training benchmark found: every step's time, its circumstances, and what follows from both."""

from pathlib import Path

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from pydantic import BaseModel, computed_field
from rich.table import Table

from halfbyte.bench.parts import MATRIX_WORK, PARTS
from halfbyte.bench.report import Circumstances, Spread, digits, spread
from halfbyte.errors import size_text
from halfbyte.files import whole_file, write_text

DPI = 120
FLOOR = "matrix work at the peak"


class SideResult(BaseModel):
    """What one side did.

    Attributes:
        setting: which of its ways was the fastest; empty if it has one.
        trials: seconds of the shortest of its first steps in each of its ways, None where it did not come through.
        seconds: of a step, in each round.
        processor_seconds: that all threads together took in it, which others on the machine disturb less.
        losses: of each step, before its update, those that are not counted included.
        load_seconds: from the files to a model with an adapter.
        peak_bytes: highest anonymous memory above that after the imports; None where the system does not tell.
    """

    setting: str
    trials: dict[str, float | None]
    seconds: list[float]
    processor_seconds: list[float]
    losses: list[float]
    load_seconds: float
    peak_bytes: int | None


class TrainingRow(BaseModel):
    """One work: a model at one length.

    Attributes:
        model: its name.
        batch, length, rank: rows of a step, tokens of a row, LoRA's rank.
        flop: of the products in a step that cannot be left out.
        peak_flops: the machine's peak in each round, in flop/s.
        sides: by name, ``halfbyte`` first.
        parts: the fraction of the time of halfbyte's step that each part took (:data:`halfbyte.bench.parts.PARTS`).
    """

    model: str
    batch: int
    length: int
    rank: int
    flop: int
    peak_flops: list[float]
    sides: dict[str, SideResult]
    parts: dict[str, float]

    @computed_field  # type: ignore[prop-decorator]
    @property
    def tokens_per_second(self) -> dict[str, Spread]:
        """Of each side."""
        tokens = self.batch * self.length
        return {name: spread(tokens / second for second in side.seconds) for name, side in self.sides.items()}

    @computed_field  # type: ignore[prop-decorator]
    @property
    def ratios(self) -> dict[str, Spread]:
        """How many times as long each of the others takes, round by round."""
        ours = self.sides["halfbyte"].seconds
        return {
            name: spread(theirs / own for theirs, own in zip(side.seconds, ours, strict=True))
            for name, side in self.sides.items()
            if name != "halfbyte"
        }

    @computed_field  # type: ignore[prop-decorator]
    @property
    def floor_tokens_per_second(self) -> float:
        """The speed at which the matrix work would run at the highest peak that was seen."""
        return self.batch * self.length * max(self.peak_flops) / self.flop

    @computed_field  # type: ignore[prop-decorator]
    @property
    def fraction_of_peak(self) -> Spread:
        """The step's necessary matrix work at the highest peak that was seen, over the step's time."""
        return spread(self.flop / max(self.peak_flops) / own for own in self.sides["halfbyte"].seconds)

    @computed_field  # type: ignore[prop-decorator]
    @property
    def matrix_share(self) -> float:
        """The share of the profiled step that is matrix work (:data:`halfbyte.bench.parts.MATRIX_WORK`)."""
        return sum(self.parts[part] for part in MATRIX_WORK)

    @property
    def name(self) -> str:
        """Model, batch and length."""
        return f"{self.model}, {self.batch}×{self.length}"


class TrainingReport(BaseModel):
    """A benchmark's result."""

    circumstances: Circumstances
    rows: list[TrainingRow]

    def write(self, folder: Path) -> None:
        """Write ``training.json`` and ``training.png`` to ``folder``."""
        write_text(folder / "training.json", self.model_dump_json(indent=1) + "\n")
        with whole_file(folder / "training.png") as part:
            self._draw(part)

    def table(self) -> Table:
        """Return the rows for the terminal."""
        peak = max(p for row in self.rows for p in row.peak_flops)
        table = Table(
            title=self.circumstances.title,
            caption=(
                "×: how many times as long the side takes, median (and quartiles) over the rounds. memory: peak "
                "anonymous, above that after the imports. loss: after the same steps. matrix work: share of halfbyte's "
                "step in kernels that multiply matrices. of the peak: its necessary matrix work at the machine's peak, "
                f"the highest seen beside it (up to {peak / 1e9:,.0f} GFLOP/s), over its time."
            ),
        )
        for column in ("model, batch×length", "side"):
            table.add_column(column)
        for column in ("tokens/s", "× halfbyte", "memory", "load", "loss", "matrix\nwork", "of the\npeak"):
            table.add_column(column, justify="right")
        for row in self.rows:
            for name, side in row.sides.items():
                ours = name == "halfbyte"
                lower, median, upper = map(digits, row.ratios[name]) if not ours else ("", "", "")
                table.add_row(
                    row.name if ours else "",
                    f"{name} {side.setting}".strip(),
                    f"{row.tokens_per_second[name].median:,.0f}",
                    "" if ours else f"{median} ({lower}–{upper})",
                    "" if side.peak_bytes is None else size_text(side.peak_bytes),
                    f"{side.load_seconds:.1f} s",
                    f"{side.losses[-1]:.4f}",
                    f"{row.matrix_share:.0%}" if ours else "",
                    f"{row.fraction_of_peak.median:.0%}" if ours else "",
                )
            table.add_section()
        return table

    def _draw(self, file: Path) -> None:
        """Draw tokens/s of every side beside the floor, and where the time of halfbyte's step goes, as PNG.

        Several lengths of one model become a curve, anything else bars.
        """
        figure = Figure(figsize=(11, 4 + 0.9 * len(self.rows)), layout="constrained")
        speed, parts = figure.subplots(2)
        names = [row.name for row in self.rows]
        if len({row.model for row in self.rows}) == 1 and len(self.rows) > 2:
            self._draw_curves(speed)
        else:
            self._draw_bars(speed)
        figure.suptitle(self.circumstances.title, fontsize=9)
        lefts = [0.0] * len(names)
        for part in PARTS:
            widths = [row.parts[part] for row in self.rows]
            bars = parts.barh(names, widths, left=lefts, height=0.6, label=part)
            parts.bar_label(bars, [f"{w:.0%}" if w >= 0.04 else "" for w in widths], label_type="center", fontsize=8)
            lefts = [left + width for left, width in zip(lefts, widths, strict=True)]
        parts.set(xlabel="fraction of halfbyte's step", xlim=(0, 1))
        parts.invert_yaxis()
        for axes in (speed, parts):
            axes.legend(loc="center left", bbox_to_anchor=(1, 0.5), fontsize=8, markerscale=0.3)
        figure.savefig(file, format="png", dpi=DPI)

    def _draw_curves(self, axes: Axes) -> None:
        lengths = [row.length for row in self.rows]
        for side in self._sides():
            medians = [row.tokens_per_second[side].median for row in self.rows]
            axes.plot(lengths, medians, "o-", label=side)
        axes.plot(lengths, [row.floor_tokens_per_second for row in self.rows], "k--", label=FLOOR)
        axes.set(xlabel="tokens of a row", ylabel="tokens/s", xscale="log", ylim=(0, None))
        axes.set_xticks(lengths, [str(length) for length in lengths])
        axes.minorticks_off()

    def _draw_bars(self, axes: Axes) -> None:
        sides = self._sides()
        height = 0.8 / len(sides)
        for i, side in enumerate(sides):
            medians = [row.tokens_per_second[side].median for row in self.rows]
            places = [y + (i - (len(sides) - 1) / 2) * height for y in range(len(self.rows))]
            axes.bar_label(axes.barh(places, medians, height, label=side), fmt="{:,.0f}", padding=3, fontsize=8)
        floors = [row.floor_tokens_per_second for row in self.rows]
        axes.plot(floors, range(len(self.rows)), "k|", markersize=30, label=FLOOR)
        axes.set(xlabel="tokens/s")
        axes.set_yticks(range(len(self.rows)), [row.name for row in self.rows])
        axes.invert_yaxis()

    def _sides(self) -> list[str]:
        return list(dict.fromkeys(name for row in self.rows for name in row.sides))

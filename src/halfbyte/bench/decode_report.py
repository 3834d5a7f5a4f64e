"""What the decoding benchmark found: every time that was taken, its circumstances, and what follows from both."""

from pathlib import Path

from matplotlib.figure import Figure
from pydantic import BaseModel, Field, computed_field
from rich.table import Table

from halfbyte.bench.report import Circumstances, Spread, digits, spread
from halfbyte.files import whole_file, write_text

DPI = 120
OURS = "halfbyte"


class SideTimes(BaseModel):
    """What one side did of a work.

    Attributes:
        seconds: of the work, in each round.
        processor_seconds: that all threads together took, their waiting for each other included.
        step_bytes: that a step, or the reading, has to read.
        floor_seconds: of the work, at the highest bandwidth and peak of the run.
    """

    seconds: list[float] = Field(default_factory=list)
    processor_seconds: list[float] = Field(default_factory=list)
    step_bytes: int = 0
    floor_seconds: float = 0.0


class DecodeRow(BaseModel):
    """One work.

    Attributes:
        name: in words.
        kind, texts, adapters: as in :class:`halfbyte.bench.decode_works.Work`; ``texts`` are its rows.
        tokens: that the time is for.
        read_bandwidth: of memory in bytes/s, in each round.
        peak_flops: of arithmetic in flop/s, in each round.
        sides: by name, ``halfbyte`` first.
        phases: of halfbyte's step the processor seconds of all threads in each phase, in a profiled work: in its work,
            and in waiting for other threads. Of decoding alone.
    """

    name: str
    kind: str
    texts: int
    adapters: int
    tokens: int
    read_bandwidth: list[float]
    peak_flops: list[float]
    sides: dict[str, SideTimes]
    phases: dict[str, tuple[float, float]] = Field(default_factory=dict)

    @computed_field  # type: ignore[prop-decorator]
    @property
    def tokens_per_second(self) -> dict[str, Spread]:
        """Of each side."""
        return {name: spread(self.tokens / second for second in side.seconds) for name, side in self.sides.items()}

    @computed_field  # type: ignore[prop-decorator]
    @property
    def ratios(self) -> dict[str, Spread]:
        """How many times as long each of the others takes, round by round."""
        ours = self.sides[OURS].seconds
        return {
            name: spread(theirs / own for theirs, own in zip(side.seconds, ours, strict=True))
            for name, side in self.sides.items()
            if name != OURS
        }

    @computed_field  # type: ignore[prop-decorator]
    @property
    def of_floor(self) -> dict[str, float]:
        """Each side's floor over the shortest of its times."""
        return {name: side.floor_seconds / min(side.seconds) for name, side in self.sides.items()}


class DecodeReport(BaseModel):
    """A benchmark's result.

    Attributes:
        model: its name.
        head, cache: what halfbyte held them in.
        rows: the works.
    """

    circumstances: Circumstances
    model: str
    head: str
    cache: str
    rows: list[DecodeRow]

    @computed_field  # type: ignore[prop-decorator]
    @property
    def gains(self) -> dict[str, dict[str, Spread]]:
        """Of each work and side its tokens/s as a multiple of those of :meth:`beside`, round by round."""
        found = {}
        for row in self.rows:
            other = self.beside(row)
            if other is not None:
                found[row.name] = {
                    name: spread(
                        (row.tokens / own) / (other.tokens / base)
                        for own, base in zip(side.seconds, other.sides[name].seconds, strict=True)
                    )
                    if row.kind == "decode"
                    else spread(base / own for own, base in zip(side.seconds, other.sides[name].seconds, strict=True))
                    for name, side in row.sides.items()
                    if name in other.sides
                }
        return found

    def beside(self, row: DecodeRow) -> DecodeRow | None:
        """Return the work that ``row`` is to be seen beside.

        Many rows: one; each row on an adapter of its own: all on one; a turn: what is held, read again.
        """
        kind = "again" if row.kind == "turn" else row.kind
        if row.kind not in ("decode", "turn") or (row.kind == "decode" and (row.texts, row.adapters) == (1, 0)):
            return None
        wanted = (kind, row.texts, 1) if row.adapters > 1 else (kind, 1, 0)
        return next((other for other in self.rows if (other.kind, other.texts, other.adapters) == wanted), None)

    def write(self, table: Path, picture: Path) -> None:
        """Write all that was taken as JSON, and the picture as PNG."""
        write_text(table, self.model_dump_json(indent=1) + "\n")
        with whole_file(picture) as part:
            self._draw(part)

    def table(self) -> Table:
        """Return the rows for the terminal."""
        bandwidth = max(value for row in self.rows for value in row.read_bandwidth)
        peak = max(value for row in self.rows for value in row.peak_flops)
        table = Table(
            title=f"{self.model}, head {self.head}, keys and values {self.cache}\n{self.circumstances.title}",
            caption=(
                "shortest: a step's or a reading's time; processor: the least that all threads together took, which "
                "others on the machine disturb less. ×: how many times as long the side takes, median (and quartiles) "
                "over the rounds. of the floor: the side's own bytes at the speed of reading memory (up to "
                f"{bandwidth / 1e9:.1f} GB/s) or its flop at the peak (up to {peak / 1e9:,.0f} GFLOP/s), over its "
                "shortest time. beside: tokens/s as multiple of one row's, or of all rows' on one adapter; for a turn "
                "how many times as long reading all again takes."
            ),
        )
        for column in ("work", "side"):
            table.add_column(column)
        for column in ("tokens/s", "shortest", "processor", "× halfbyte", "MB a\nstep", "of the\nfloor", "beside"):
            table.add_column(column, justify="right")
        for row in self.rows:
            gains = self.gains.get(row.name, {})
            for name, side in row.sides.items():
                table.add_row(
                    row.name if name == OURS else "",
                    name,
                    f"{row.tokens_per_second[name].median:,.1f}",
                    _time(min(side.seconds), row),
                    _time(min(side.processor_seconds), row),
                    "" if name == OURS else _shown(row.ratios[name]),
                    f"{side.step_bytes / 1e6:,.0f}",
                    f"{row.of_floor[name]:.0%}",
                    _shown(gains[name]) if name in gains else "",
                )
            table.add_section()
        return table

    def phases(self) -> Table:
        """Return where the processor time of halfbyte's steps goes, for the terminal."""
        doing = [row for row in self.rows if row.phases]
        table = Table(
            title="Where the processor time of a step goes",
            caption="Share of all threads' time in the phase's work; waiting for other threads is a row of its own.",
        )
        table.add_column("phase")
        for row in doing:
            table.add_column(row.name, justify="right")
        totals = [sum(work + wait for work, wait in row.phases.values()) for row in doing]
        for phase in doing[0].phases if doing else ():
            shares = [row.phases[phase][0] / total for row, total in zip(doing, totals, strict=True)]
            table.add_row(phase, *(f"{share:.1%}" for share in shares))
        waits = [sum(wait for _, wait in row.phases.values()) / total for row, total in zip(doing, totals, strict=True)]
        table.add_row("waiting", *(f"{share:.1%}" for share in waits))
        return table

    def _draw(self, file: Path) -> None:
        """Draw every side's share of its own floor and its tokens/s beside halfbyte's floor, as PNG."""
        figure = Figure(figsize=(11, 2.5 + 0.9 * len(self.rows)), layout="constrained")
        axes = figure.subplots()
        names = list(dict.fromkeys(name for row in self.rows for name in row.sides))
        height = 0.8 / len(names)
        for i, name in enumerate(names):
            doing = [(y, row) for y, row in enumerate(self.rows) if name in row.sides]
            places = [y + (i - (len(names) - 1) / 2) * height for y, _ in doing]
            medians = [row.tokens_per_second[name].median for _, row in doing]
            axes.bar_label(axes.barh(places, medians, height, label=name), fmt="{:,.0f}", padding=3, fontsize=7)
        floors = [row.tokens / row.sides[OURS].floor_seconds for row in self.rows]
        axes.plot(floors, range(len(self.rows)), "k|", markersize=30, label="halfbyte's floor")
        axes.set(xlabel="tokens/s", xscale="log")
        axes.set_yticks(range(len(self.rows)), [row.name for row in self.rows])
        axes.invert_yaxis()
        axes.legend(loc="center left", bbox_to_anchor=(1, 0.5), fontsize=8, markerscale=0.3)
        figure.suptitle(f"{self.model}, {self.circumstances.title}", fontsize=9)
        figure.savefig(file, format="png", dpi=DPI)


def _time(seconds: float, row: DecodeRow) -> str:
    """Return a step's time, or the whole reading's."""
    each = seconds / (row.tokens / row.texts) if row.kind == "decode" else seconds
    return f"{each * 1e3:,.1f} ms"


def _shown(values: Spread) -> str:
    lower, median, upper = map(digits, values)
    return f"{median} ({lower}–{upper})"

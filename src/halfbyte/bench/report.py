"""What a benchmark found: every time that was taken, its circumstances, and what follows from both.

The floor of a work is the time that the machine's ceilings leave it: its flop at the peak of the tier's arithmetic, its
bytes at the bandwidth of a copy, or the 4-bit values of a product of few rows at the rate of the tier's lookups (where
that is probed), whichever takes longest. The fraction of the ceiling is the floor over the time
taken, round by round, since all were timed in the same round.
"""

import math
import statistics
from collections.abc import Iterable
from pathlib import Path
from typing import NamedTuple

from pydantic import BaseModel, computed_field
from rich.table import Table

from halfbyte.bench import roofline
from halfbyte.files import whole_file, write_text

IMPLEMENTATIONS = ("halfbyte", "bitsandbytes", "bf16", "fp32")


class Spread(NamedTuple):
    """The quartiles of a quantity over the rounds."""

    lower: float
    median: float
    upper: float


class Circumstances(BaseModel):
    """Where, with what and when a benchmark ran.

    Attributes:
        machine: the processor's name.
        cores: physical cores.
        memory_gib: memory of the machine.
        load: tasks that ran or wanted to, on average over the minute before.
        tier: the instruction-set tier that was measured, or ``reference`` without native kernels.
        arithmetic: what its ceiling was measured with.
        threads: of every implementation.
        spincount: the environment's ``GOMP_SPINCOUNT``, how long OpenMP threads wait awake; None if it is not set.
        versions: of Python and of the libraries.
        date: UTC, ISO 8601.
        commit: of the checkout that the package runs from, if it does.
        changed: whether that checkout had changes that are not in the commit.
    """

    machine: str
    cores: int
    memory_gib: float
    load: float
    tier: str
    arithmetic: str
    threads: int
    spincount: str | None = None
    versions: dict[str, str]
    date: str
    commit: str | None
    changed: bool

    @property
    def title(self) -> str:
        """All of it that a reader needs, in two lines."""
        commit = f", commit {self.commit}{' with changes' if self.changed else ''}" if self.commit else ""
        versions = ", ".join(f"{name} {version}" for name, version in self.versions.items())
        return (
            f"{self.machine}, {self.threads} threads, {self.tier} ({self.arithmetic})\n"
            f"{versions}{commit}, {self.date[:10]}"
        )


class Row(BaseModel):
    """One work.

    Attributes:
        operation, size, flop, bytes: as in :class:`halfbyte.bench.works.Work`.
        settings: which of its ways an implementation was measured in, if it has several.
        seconds: of one call of each implementation, in each round.
        peak_flops: the ceiling of arithmetic in each round, in flop/s.
        copy_bandwidth: bytes read and written per second by a copy, in each round.
        lookups: 4-bit values that have to be looked up, 0 where that is no ceiling.
        lookup_rate: values looked up per second, in each round, or nothing where that is no ceiling.
    """

    operation: str
    size: str
    flop: int
    bytes: int
    settings: dict[str, str]
    seconds: dict[str, list[float]]
    peak_flops: list[float]
    copy_bandwidth: list[float]
    lookups: int = 0
    lookup_rate: list[float] = []

    @computed_field  # type: ignore[prop-decorator]
    @property
    def milliseconds(self) -> dict[str, Spread]:
        """Of one call of each implementation."""
        return {name: spread(1e3 * second for second in times) for name, times in self.seconds.items()}

    @computed_field  # type: ignore[prop-decorator]
    @property
    def ratios(self) -> dict[str, Spread]:
        """How many times as long each of the others takes."""
        ours = self.seconds["halfbyte"]
        return {
            name: spread(theirs / own for theirs, own in zip(times, ours, strict=True))
            for name, times in self.seconds.items()
            if name != "halfbyte"
        }

    @computed_field  # type: ignore[prop-decorator]
    @property
    def bound(self) -> str:
        """Which ceiling is the lowest: ``arithmetic``, ``memory`` or ``lookups``."""
        floors = {name: statistics.median(times) for name, times in self._floors().items()}
        return max(floors, key=lambda name: floors[name])

    @computed_field  # type: ignore[prop-decorator]
    @property
    def fraction(self) -> Spread:
        """What part of the ceiling was reached."""
        floors = map(max, zip(*self._floors().values(), strict=True))
        return spread(floor / own for own, floor in zip(self.seconds["halfbyte"], floors, strict=True))

    @property
    def roof(self) -> float:
        """The median ceiling of lookups, in flop/s of this work; infinite where there is none."""
        return self.flop * statistics.median(self.lookup_rate) / self.lookups if self.lookup_rate else math.inf

    def _floors(self) -> dict[str, list[float]]:
        """Return the seconds that each ceiling leaves this work, in each round."""
        floors = {
            "memory": [self.bytes / copy for copy in self.copy_bandwidth],
            "arithmetic": [self.flop / peak for peak in self.peak_flops],
        }
        return floors | ({"lookups": [self.lookups / rate for rate in self.lookup_rate]} if self.lookup_rate else {})


class Report(BaseModel):
    """A benchmark's result."""

    circumstances: Circumstances
    rows: list[Row]

    @property
    def peak_flops(self) -> float:
        """The median ceiling of arithmetic, in flop/s."""
        return statistics.median(peak for row in self.rows for peak in row.peak_flops)

    @property
    def copy_bandwidth(self) -> float:
        """The median bandwidth of a copy, in bytes read and written per second."""
        return statistics.median(copy for row in self.rows for copy in row.copy_bandwidth)

    @property
    def title(self) -> str:
        """Where, with what and when it was measured, in two lines."""
        return self.circumstances.title

    def write(self, folder: Path) -> None:
        """Write ``kernels.json`` and ``roofline.png`` to ``folder``."""
        write_text(folder / "kernels.json", self.model_dump_json(indent=1) + "\n")
        points = [
            roofline.Point(row.operation, row.size, row.flop / row.bytes, row.fraction.median, row.roof)
            for row in self.rows
        ]
        with whole_file(folder / "roofline.png") as part:
            roofline.draw(points, self.peak_flops, self.copy_bandwidth, self.circumstances.title, part)

    def _lookups(self) -> str:
        rates = [rate for row in self.rows for rate in row.lookup_rate]
        return f", lookups {statistics.median(rates) / 1e9:.1f} G values/s" if rates else ""

    def table(self) -> Table:
        """Return the rows for the terminal."""
        table = Table(
            title=self.circumstances.title,
            caption=(
                f"Ceilings: {self.peak_flops / 1e9:,.0f} GFLOP/s, copy {self.copy_bandwidth / 1e9:.1f} GB/s"
                f"{self._lookups()}. "
                "×: how many times as long the other takes, median (and quartiles) over the rounds. "
                "bitsandbytes: t training path, e evaluation path."
            ),
        )
        table.add_column("work")
        table.add_column("M×N×K")
        for name in IMPLEMENTATIONS:
            table.add_column(f"{name}\nms", justify="right")
        for name in IMPLEMENTATIONS[1:]:
            table.add_column(f"× {name}", justify="right")
        table.add_column("of the\nceiling", justify="right")
        for before, row in zip([None, *self.rows], self.rows, strict=False):
            if before is not None and before.operation != row.operation:
                table.add_section()
            table.add_row(
                row.operation,
                row.size,
                *(_milliseconds(row, name) for name in IMPLEMENTATIONS),
                *(_ratio(row, name) for name in IMPLEMENTATIONS[1:]),
                f"{row.fraction.median:.0%} {row.bound}",
            )
        return table


def spread(values: Iterable[float]) -> Spread:
    """Return the quartiles of ``values``, two or more."""
    return Spread(*statistics.quantiles(values, method="inclusive"))


def _milliseconds(row: Row, name: str) -> str:
    if name not in row.seconds:
        return ""
    letter = row.settings.get(name, "")[:1] if name == "bitsandbytes" else ""
    return f"{digits(row.milliseconds[name].median)} {letter}".rstrip()


def _ratio(row: Row, name: str) -> str:
    if name not in row.ratios:
        return ""
    lower, median, upper = map(digits, row.ratios[name])
    return f"{median} ({lower}–{upper})"


def digits(value: float) -> str:
    """Return ``value`` with three digits or so."""
    return f"{value:.2f}" if value < 10 else f"{value:.1f}" if value < 100 else f"{value:.0f}"

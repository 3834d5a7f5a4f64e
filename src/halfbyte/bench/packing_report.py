"""What the benchmark of packing found: every step's time, its circumstances, and what follows from both."""

from pathlib import Path

import numpy as np
from pydantic import BaseModel, computed_field
from rich.table import Table

from halfbyte.bench.report import Circumstances, Spread, digits, spread
from halfbyte.files import write_text

FULL = "full rows"


class PackedSide(BaseModel):
    """One side.

    Attributes:
        seconds: of each step.
        processor_seconds: that all its threads together took in each step, which others on the machine disturb less.
        losses: of each step, the first ones that are not counted included.
        passes: forward passes of each step.
        peak_bytes: highest anonymous memory above that after the imports; None where the system does not tell.
    """

    seconds: list[float]
    processor_seconds: list[float]
    losses: list[float]
    passes: list[int]
    peak_bytes: int | None


class PackingRow(BaseModel):
    """Rows of one kind.

    Attributes:
        name: of the kind.
        tokens: of each step, without padding.
        padded_tokens: with the padding of the unpacked side.
        sides: ``packed`` and ``padded``; full rows have the latter alone.
    """

    name: str
    tokens: list[int]
    padded_tokens: list[int]
    sides: dict[str, PackedSide]

    def rate(self, side: str, of: str = "seconds") -> list[float]:
        """Return the tokens of each step by its seconds, or by ``processor_seconds``."""
        return [tokens / second for tokens, second in zip(self.tokens, getattr(self.sides[side], of), strict=True)]

    @computed_field  # type: ignore[prop-decorator]
    @property
    def gain(self) -> Spread | None:
        """How many times as long the padded steps take, step by step."""
        if "packed" not in self.sides:
            return None
        pairs = zip(self.sides["padded"].seconds, self.sides["packed"].seconds, strict=True)
        return spread(padded / packed for padded, packed in pairs)


class PackingReport(BaseModel):
    """A benchmark's result.

    Attributes:
        model, batch, accumulation, length, rank: of all sides.
        rows: the kinds; full rows first.
    """

    circumstances: Circumstances
    model: str
    batch: int
    accumulation: int
    length: int
    rank: int
    rows: list[PackingRow]

    @computed_field  # type: ignore[prop-decorator]
    @property
    def of_full(self) -> dict[str, dict[str, Spread]]:
        """Of each kind and side, the tokens/s beside those of full rows in the same round."""
        return self._of_full("seconds")

    @computed_field  # type: ignore[prop-decorator]
    @property
    def of_full_by_processor(self) -> dict[str, dict[str, Spread]]:
        """The same by processor time."""
        return self._of_full("processor_seconds")

    def _of_full(self, seconds: str) -> dict[str, dict[str, Spread]]:
        full = self.rows[0].rate("padded", seconds)
        return {
            row.name: {
                side: spread(own / whole for own, whole in zip(row.rate(side, seconds), full, strict=True))
                for side in row.sides
            }
            for row in self.rows[1:]
        }

    def write(self, folder: Path) -> None:
        """Write ``packing.json`` to ``folder``."""
        write_text(folder / "packing.json", self.model_dump_json(indent=1) + "\n")

    def table(self) -> Table:
        """Return the rows for the terminal."""
        table = Table(
            title=f"{self.model}, steps of {self.batch * self.accumulation} rows, {self.circumstances.title}",
            caption=(
                "tokens/s: without padding, all counted steps together. × packed: how many times as long the step "
                f"takes. of full rows: these tokens/s beside those of rows of {self.length} tokens in the same round; "
                "again by the processor time of all threads together. Median (and quartiles)."
            ),
        )
        for column in ("rows", "side"):
            table.add_column(column)
        for column in (
            "tokens\na step",
            "passes\na step",
            "tokens/s",
            "× packed",
            "of full\nrows",
            "by proc-\nessor",
            "memory",
            "loss",
        ):
            table.add_column(column, justify="right")
        ratios = (self.of_full, self.of_full_by_processor)
        for row in self.rows:
            for name, side in row.sides.items():
                memory = "" if side.peak_bytes is None else f"{side.peak_bytes / 2**30:.2f} GiB"
                gain = row.gain if name == "padded" else None
                full, processor = (found.get(row.name, {}).get(name) for found in ratios)
                table.add_row(
                    row.name if name == next(iter(row.sides)) else "",
                    name,
                    f"{np.mean(row.tokens):,.0f}",
                    f"{np.mean(side.passes):.1f}",
                    f"{sum(row.tokens) / sum(side.seconds):,.0f}",
                    _shown(gain),
                    _shown(full),
                    _shown(processor),
                    memory,
                    f"{side.losses[-1]:.4f}",
                )
            table.add_section()
        return table


def _shown(values: Spread | None) -> str:
    if values is None:
        return ""
    lower, median, upper = map(digits, values)
    return f"{median} ({lower}–{upper})"

"""What an audit found: figures of every way to merge, a recommendation, a picture of what is lost in which layer."""

from pathlib import Path

from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator
from pydantic import BaseModel, Field
from rich.table import Table

from halfbyte.errors import size_text
from halfbyte.files import whole_file, write_text

DPI = 120
GOOD = 0.95
"""Share of what was learnt below which a way is not recommended without a word."""


class Measured(BaseModel):
    """A way to have base and adapter as one model.

    Attributes:
        name: as ``--way`` takes it; ``base`` is the model without the adapter, ``adapter`` the two together.
        about: in words.
        bits: of a weight, without constants; of those apart 16.
        nbytes: of its weights in files; None where nothing is written.
        divergence, agreement, loss, accuracy: as in :mod:`halfbyte.evaluate.fidelity`, from base and adapter.
        kept: the share of the loss that was learnt, ``(base - way) / (base - adapter)``; None where nothing was.
        elsewhere: the divergence on general text.
        layers: of each layer, how far its outputs are from those of base and adapter, by how far the base's are: 0 as
            with the adapter, 1 as without.
    """

    name: str
    about: str
    bits: int = 16
    nbytes: int | None = None
    divergence: float
    agreement: float
    loss: float
    accuracy: float
    kept: float | None = None
    elsewhere: float | None = None
    layers: list[float] = Field(default_factory=list)


class AuditReport(BaseModel):
    """Everything that was found.

    Attributes:
        run: the name of the run or adapter.
        rows: in words, on which it was measured.
        positions: labelled tokens of them; ``elsewhere`` the same of the general text.
        ways: what was measured, ``base`` and ``adapter`` first.
        left_out: ways that were not possible, and why.
    """

    run: str
    rows: str
    positions: int
    elsewhere: int = 0
    ways: list[Measured]
    left_out: dict[str, str] = Field(default_factory=dict)

    def write(self, file: Path) -> None:
        """Write all of it as JSON."""
        write_text(file, self.model_dump_json(indent=1) + "\n")

    @property
    def recommendation(self) -> list[str]:
        """What follows, a sentence each."""
        ways = [way for way in self.ways if way.nbytes is not None]
        lines = []
        for words, bits in (("16 bits", (16,)), ("8 bits", (6, 8)), ("4 bits", (4, 5))):
            best = min((way for way in ways if way.bits in bits), key=lambda way: way.divergence, default=None)
            if best is None:
                continue
            kept = "" if best.kept is None else f", {best.kept:.1%} of what was learnt"
            line = f"In {words}: {best.name} ({best.about}): divergence {best.divergence:.4f}{kept}."
            if best.kept is not None and best.kept < GOOD:
                line += " That is much: serve the adapter beside its base, which loses nothing."
            lines.append(line)
        if self.ways[1].loss >= self.ways[0].loss:
            lines.append("The adapter's loss on these rows is no lower than the base's, so nothing was learnt of them.")
        return lines

    def table(self) -> Table:
        """Return the ways for the terminal."""
        table = Table(
            title=f"{self.run}: what each way of merging keeps",
            caption=(
                f"{self.rows}, {self.positions:,} labelled tokens. divergence: KL(base + adapter ‖ way) in nats; "
                f"elsewhere: the same on {self.elsewhere:,} tokens of general text. kept: of what the adapter took off "
                "the loss. agreement: the same first choice. All computed in fp32, so that weights alone differ."
            ),
        )
        table.add_column("way")
        for column in ("size", "divergence", "elsewhere", "loss", "kept", "agreement", "accuracy"):
            table.add_column(column, justify="right")
        for way in self.ways:
            table.add_row(
                way.name,
                "" if way.nbytes is None else size_text(way.nbytes),
                f"{way.divergence:.4f}",
                "" if way.elsewhere is None else f"{way.elsewhere:.4f}",
                f"{way.loss:.4f}",
                "" if way.kept is None else f"{way.kept:.1%}",
                f"{way.agreement:.1%}",
                f"{way.accuracy:.1%}",
            )
        return table

    def draw(self, file: Path) -> None:
        """Draw what is lost in which layer."""
        ways = [way for way in self.ways if way.nbytes is not None and way.layers]
        figure = Figure(figsize=(9, 4.5), dpi=DPI, layout="constrained")
        axes = figure.add_subplot()
        for number, way in enumerate(ways):
            values = [max(value, 1e-6) for value in way.layers]
            style = "--" if way.bits >= 16 else "-" if way.bits < 6 else ":"
            axes.semilogy(range(1, 1 + len(values)), values, style, color=f"C{number % 10}", label=way.name)
        axes.axhline(1, color="gray", linewidth=1)
        axes.text(1, 1.1, "as far as without the adapter", color="gray", fontsize=8)
        axes.set_xlabel("layer")
        axes.xaxis.set_major_locator(MaxNLocator(integer=True))
        axes.set_ylabel("distance of its outputs from base + adapter,\nby that of the base")
        axes.set_title(f"{self.run}: what is lost where")
        axes.legend(fontsize=8, loc="upper left", bbox_to_anchor=(1, 1))
        axes.grid(alpha=0.3)
        with whole_file(file) as part:
            figure.savefig(part, format="png")

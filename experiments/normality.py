"""The paper's appendix F: are the weights of a layer's units normally distributed?

The Shapiro-Wilk test of every output unit, a row of a linear layer's weight, at 5 %; of large models a sample of rows.
Beside it the same of normal values in the same shapes, of which it rejects 5 %; of the first 64 values of each row, a
block; and the excess kurtosis of a matrix as a whole, of its rows, and of its blocks of 64 over their largest value,
which is what a data type sees.
"""

import re
from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

import numpy as np
import torch
from bases import FREE, MATCHING, ON_A_GRID, Base, base, in_folder
from figure_3 import over_largest
from formats import BLOCKSIZE
from lab import Book, book, markdown
from matplotlib.figure import Figure
from scipy import stats
from small_llama import small_llama
from torch import Tensor

from halfbyte.quiet import quiet

LEVEL, MARGIN = 0.05, 0.10
"""Of the test; and what share of rows may be rejected for the paper's finding to hold."""
ROWS = 400
"""Of each kind of layer, at most; drawn with a seed."""
VALUES = 2**21
PLACES = torch.special.ndtr(torch.linspace(-4, 4, 81, dtype=torch.float64)).tolist()
"""Probabilities of the quantiles that are kept."""
DPI = 110


def kinds_of(weights: Mapping[str, Tensor]) -> dict[str, dict[str, Tensor]]:
    """Return the matrices by their place in a layer: their names behind its number."""
    found: dict[str, dict[str, Tensor]] = {}
    for name, weight in weights.items():
        kind = re.sub(r"^.*\.\d+\.", "", name)
        found.setdefault(kind, {})[name] = weight
    return found


def rejected(rows: np.ndarray[Any, Any]) -> tuple[float, float]:
    """Return the share of rows that the Shapiro-Wilk test rejects, and the median of its W."""
    results = [stats.shapiro(row) for row in rows]
    return float(np.mean([r.pvalue < LEVEL for r in results])), float(np.median([r.statistic for r in results]))


def kurtosis(values: Tensor) -> float:
    """Return the excess kurtosis, 0 of normal values."""
    return float(stats.kurtosis(values.double().flatten().numpy()))


def tested(weights: Mapping[str, Tensor]) -> dict[str, Any]:
    """Return what a trial keeps of the matrices of one kind."""
    generator = torch.Generator().manual_seed(0)
    rows = torch.cat(list(weights.values()))
    chosen = rows[torch.randperm(len(rows), generator=generator)[:ROWS]].double()
    share, statistic = rejected(chosen.numpy())
    normal = torch.randn(chosen.shape, generator=generator, dtype=torch.float64)
    return {
        "rows": len(chosen), "of": len(rows), "columns": rows.shape[1], "rejected": share, "statistic": statistic,
        "normal_rejected": rejected(normal.numpy())[0], "block_rejected": rejected(chosen[:, :BLOCKSIZE].numpy())[0],
        "matrix_kurtosis": float(np.median([kurtosis(weight) for weight in weights.values()])),
        "row_kurtosis": float(np.median([kurtosis(row) for row in chosen])),
        "scaled_kurtosis": kurtosis(over_largest(weights, BLOCKSIZE)),
    }  # fmt: skip


def quantiles_of(weights: Mapping[str, Tensor]) -> dict[str, Any]:
    """Return the quantiles of all weights, each over its row's deviation, and each over its block's largest."""
    rows = torch.cat([((w - w.mean(1, keepdim=True)) / w.std(1, keepdim=True)).flatten() for w in weights.values()])
    found = {"rows": rows, "blocks": over_largest(weights, BLOCKSIZE)}
    return {name: [round(float(q), 5) for q in np.quantile(x.double().numpy(), PLACES)] for name, x in found.items()}


def trial_of(model: Callable[[], Base]) -> dict[str, Any]:
    """Return what a trial keeps of a model."""
    weights = model().weights()
    layers = {kind: tested(found) for kind, found in kinds_of(weights).items()}
    return {"layers": layers, "quantiles": quantiles_of(weights)}


def normal_values() -> Base:
    """Return a base of normal values."""
    values = torch.randn(VALUES, generator=torch.Generator().manual_seed(1)).view(-1, 1024)
    return Base({"normal": values}.copy, lambda *_: ([], []))


NORMAL = "normal values"


def summary(layers: Mapping[str, Mapping[str, Any]], name: str) -> float:
    """Return the mean of a figure over the rows that were tested."""
    rows = sum(layer["rows"] for layer in layers.values())
    return float(sum(layer[name] * layer["rows"] for layer in layers.values()) / rows)


def table(lab: Book) -> str:
    """Return the models' figures."""
    rows = []
    for line in lab.lines():
        layers = line["layers"]
        share = summary(layers, "rejected")
        star = " *" if line["model"] in ON_A_GRID else ""
        columns = sorted({layer["columns"] for layer in layers.values()})
        tested_rows = sum(layer["rows"] for layer in layers.values())
        shares = [f"{summary(layers, name):.1%}" for name in ("rejected", "normal_rejected", "block_rejected")]
        more = [f"{summary(layers, name):.4f}" for name in ("statistic",)]
        more += [f"{summary(layers, f'{name}_kurtosis'):+.2f}" for name in ("matrix", "row", "scaled")]
        lengths = f"{columns[0]} to {columns[-1]}" if len(columns) > 1 else str(columns[0])
        held = "" if line["model"] == NORMAL else "yes" if share <= MARGIN else "no"
        rows.append([line["model"] + star, str(tested_rows), lengths, *shares, *more, held])
    head = ["model", "rows", "values of a row", "rejected", "of normal values", "of 64 values of each", "W",
            "kurtosis: matrix", "row", "over block's largest", f"at most {MARGIN:.0%}"]  # fmt: skip
    return markdown(head, rows) + (
        "\n\nShapiro-Wilk at 5 %; the paper has 7.5 % of LLaMA 7B's units. * its weights lay on a 4-bit grid before. "
        "W: the median of the statistic, 1 for what is exactly normal; kurtosis: excess, medians."
    )


def layers_table(lab: Book) -> str:
    """Return the figures of every kind of layer."""
    rows = []
    for line in lab.lines():
        for kind, layer in line["layers"].items():
            cells = [line["model"], kind, f"{layer['rows']} of {layer['of']}", str(layer["columns"])]
            cells += [f"{layer['rejected']:.1%}", f"{layer['block_rejected']:.1%}", f"{layer['statistic']:.4f}"]
            rows.append([*cells, f"{layer['matrix_kurtosis']:+.2f}", f"{layer['row_kurtosis']:+.2f}"])
    head = ["model", "layer", "rows", "values", "rejected", "64 values", "W", "kurtosis: matrix", "row"]
    return markdown(head, rows)


def picture(lab: Book) -> Figure:
    """Draw the quantiles of weights against those of normal values, by rows and by blocks."""
    lines = {line["model"]: line["quantiles"] for line in lab.lines()}
    normal = lines[NORMAL]
    figure = Figure(figsize=(10.5, 4.6), layout="constrained")
    left, right = figure.subplots(1, 2)
    for number, (name, found) in enumerate(lines.items()):
        if name != NORMAL:
            style = "--" if name in ON_A_GRID else "-"
            left.plot(normal["rows"], found["rows"], style, color=f"C{number}", label=name, linewidth=1.3)
            right.plot(normal["blocks"], found["blocks"], style, color=f"C{number}", label=name, linewidth=1.3)
    for panel, lowest, highest in ((left, -4, 4), (right, -1, 1)):
        panel.plot([lowest, highest], [lowest, highest], color="black", linewidth=0.7)
        panel.grid(alpha=0.3)
    left.set(title="each weight over its row's deviation", xlabel="quantile of normal values", ylabel="of weights",
             ylim=(-8, 8))  # fmt: skip
    right.set(title=f"each weight over the largest of its block of {BLOCKSIZE}", xlabel="quantile of normal values")
    left.legend(fontsize=8)
    return figure


def main() -> None:
    """Measure, and write."""
    lab, small = book("normality", __doc__)
    torch.set_num_threads(1)
    models: dict[str, Callable[[], Base]] = {
        name: partial(base, name) for name in (*FREE, *ON_A_GRID) if name != MATCHING
    }
    if small:
        lines = ["The cat of the house reads in the garden.", "The owner sings."] * 4
        folder = small_llama(lab.folder / "model", 1, lines, steps=1)
        models = {"tiny": partial(in_folder, lambda: folder, torch.float32)}
    for name, model in ({NORMAL: normal_values} | models).items():
        lab.trial({"model": name}, partial(trial_of, model))
    lab.write("table.md", table(lab) + "\n\n" + layers_table(lab))
    picture(lab).savefig(lab.folder / "quantiles.png", dpi=DPI)


if __name__ == "__main__":
    with quiet():
        main()

"""The paper's Figure 3: data types against bits; and their values over real weights (section 3).

The paper draws zero-shot accuracy against the bits of models of several sizes. Here the loss of one model is drawn
against bits a parameter, which the size of blocks changes, constants counted. A second picture lays the sixteen values
of each 4-bit type over a histogram of a model's weights, each over the largest of its block.
"""

import itertools
import math
from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

import torch
from bases import MASKED, Base, base, in_folder
from formats import BLOCKSIZE, COLORS, E2M1, E3M0, FP4, INT4, NF4, NF4_DQ, UNQUANTIZED
from lab import Book, book, markdown, mean_and_half
from matplotlib.figure import Figure
from small_llama import small_llama
from table_2 import losses_of
from torch import Tensor

from halfbyte.quant import codebook
from halfbyte.quiet import quiet

FOUR_BITS = (INT4, E2M1, E3M0, FP4, NF4, NF4_DQ)
ALONE = FOUR_BITS[:-1]
"""Those with values of their own."""
SIZES = (32, 64, 128, 256, 1024, 4096)
MODELS = ("textgenrnn", "SmolLM2-135M-Instruct")
LINES = (MASKED, "SmolLM2-135M-Instruct")
"""Those whose losses, and those whose weights are drawn."""
BINS = 160
DPI = 110


def over_largest(weights: Mapping[str, Tensor], blocksize: int) -> Tensor:
    """Return all weights, each over the largest magnitude of its block: flat; the last weights of a matrix left out."""
    parts = []
    for weight in weights.values():
        flat = weight.reshape(-1)
        blocks = flat[: len(flat) // blocksize * blocksize].view(-1, blocksize)
        parts.append((blocks / blocks.abs().amax(dim=1, keepdim=True).clamp_min(1e-30)).reshape(-1))
    return torch.cat(parts)


def taken(values: Tensor, table: Tensor) -> list[float]:
    """Return the share of ``values`` that is nearest to each value of an ascending table."""
    edges = (table[1:] + table[:-1]) / 2
    counts = torch.bincount(torch.bucketize(values, edges), minlength=len(table))
    return [round(share, 6) for share in (counts / len(values)).tolist()]


def lines_of(model: Callable[[], Base]) -> dict[str, Any]:
    """Return the histogram of a model's scaled weights, and of each type its values and how often each is taken."""
    values = over_largest(model().weights(), BLOCKSIZE)
    counts = torch.histc(values, BINS, -1, 1) / len(values)
    types = {}
    for kind in ALONE:
        table = codebook(kind.quant_type).sort().values
        table = table[torch.cat([torch.tensor([True]), table[1:] != table[:-1]])]  # floats have two zeros
        types[kind.name] = {"values": table.tolist(), "taken": taken(values, table)}
    return {"histogram": [round(share, 7) for share in counts.tolist()], "types": types}


def measure(lab: Book, models: Mapping[str, Callable[[], Base]], drawn: Mapping[str, Callable[[], Base]]) -> None:
    """Do the trials: the weights of the models that are ``drawn``, and the losses of ``models``."""
    for name, model in drawn.items():
        lab.trial({"lines of": name}, partial(lines_of, model))
    for name, model in models.items():
        lab.trial({"model": name, "format": UNQUANTIZED.name, "blocksize": 0}, partial(losses_of, model, UNQUANTIZED))
        for size, kind in itertools.product(SIZES, FOUR_BITS):
            key = {"model": name, "format": kind.name, "blocksize": size}
            lab.trial(key, partial(losses_of, model, kind.in_blocks(size)))


Lines = dict[tuple[str, str, int], dict[str, Any]]


def by_model(lab: Book) -> Lines:
    """Return the trials of losses, by model, data type and size of blocks."""
    return {(line["model"], line["format"], line["blocksize"]): line for line in lab.lines() if "model" in line}


def more(lines: Lines, one: tuple[str, str, int], other: tuple[str, str, int]) -> tuple[float, float]:
    """Return how many nats a token one trial has more than another, and half the interval."""
    pairs = zip(lines[one]["nats"], lines[other]["nats"], lines[one]["tokens"], strict=True)
    return mean_and_half((a - b) / count for a, b, count in pairs)


def names_of(lines: Lines) -> list[str]:
    """Return the models of which everything was measured."""
    wanted = list(itertools.product((kind.name for kind in FOUR_BITS), SIZES))
    return [name for name in dict.fromkeys(key[0] for key in lines) if all((name, *rest) in lines for rest in wanted)]


def table(lines: Lines) -> str:
    """Return the nats a token that each type has more than the unquantized model, and who is first at each size."""
    parts = []
    for name in names_of(lines):
        rows = []
        for size in SIZES:
            found = {kind: more(lines, (name, kind.name, size), (name, UNQUANTIZED.name, 0)) for kind in FOUR_BITS}
            beaten = [kind for kind in (INT4, E2M1, E3M0, FP4) if _above(lines, name, kind.name, size)]
            cells = [f"{mean:+.4f} ± {half:.4f}" for mean, half in found.values()]
            rows.append([f"{size} ({lines[name, NF4.name, size]['bits']:.3f} bits)", *cells, f"{len(beaten)} of 4"])
        head = [name, *(kind.name for kind in FOUR_BITS), "NF4 before"]
        mean, half = more(lines, (name, NF4_DQ.name, BLOCKSIZE), (name, NF4.name, BLOCKSIZE))
        parts.append(markdown(head, rows) + f"\n\nNF4 + DQ less NF4, blocks of {BLOCKSIZE}: {mean:+.4f} ± {half:.4f}.")
    return "\n\n".join(parts) + (
        "\n\nNats a token more than the unquantized model, mean over texts and its 95 % interval; bits without double "
        "quantization. NF4 before: of how many other types the interval of their loss less NF4's lies above 0."
    )


def _above(lines: Lines, name: str, kind: str, size: int) -> bool:
    mean, half = more(lines, (name, kind, size), (name, NF4.name, size))
    return mean - half > 0


def values_table(lab: Book) -> str:
    """Return how evenly each type's values are taken."""
    rows = []
    for line in lab.lines():
        for kind, found in line.get("types", {}).items():
            shares = [share for share in found["taken"] if share]
            entropy = -sum(share * math.log2(share) for share in shares)
            rows.append([line["lines of"], kind, str(len(found["values"])), f"{entropy:.3f}", f"{max(shares):.1%}"])
    return markdown(["weights of", "data type", "values", "entropy, bits", "most taken"], rows)


def bits_picture(lines: Lines) -> Figure:
    """Draw loss against bits a parameter."""
    names = names_of(lines)
    figure = Figure(figsize=(5.2 * len(names), 4), layout="constrained")
    for panel, name in zip(figure.subplots(1, len(names), squeeze=False).flat, names, strict=True):
        for kind in FOUR_BITS:
            trials = [lines[name, kind.name, size] for size in SIZES]
            pairs = [more(lines, (name, kind.name, size), (name, UNQUANTIZED.name, 0)) for size in SIZES]
            panel.errorbar([trial["bits"] for trial in trials], [mean for mean, _ in pairs],
                           yerr=[half for _, half in pairs], fmt="o-", color=COLORS[kind.name], label=kind.name,
                           markersize=4, capsize=2)  # fmt: skip
        panel.set(title=name, xlabel="bits a parameter (blocks of 4096 … 32)", yscale="log")
        panel.set_ylabel("nats a token more than unquantized")
        panel.grid(alpha=0.3, which="both")
        if name == names[0]:
            panel.legend(fontsize=7)
    return figure


def lines_picture(line: Mapping[str, Any]) -> Figure:
    """Draw the types' values as number lines under a histogram of the weights; a dot's area: how often it is taken."""
    kinds = ALONE
    figure = Figure(figsize=(10, 6), layout="constrained")
    top, low = figure.subplots(2, 1, sharex=True, height_ratios=(3, 4))
    centres = [-1 + (i + 0.5) * 2 / BINS for i in range(BINS)]
    top.fill_between(centres, line["histogram"], step="mid", color="lightgrey")
    top.vlines(line["types"][NF4.name]["values"], 0, max(line["histogram"][1:-1]), color=COLORS["NF4"], linewidth=0.8)
    top.set(ylim=(0, 1.08 * max(line["histogram"][1:-1])), yticks=[], ylabel="share of weights")
    top.set_title(f"{line['lines of']}: weights over the largest of their block of {BLOCKSIZE}; lines: NF4's values")
    for place, kind in enumerate(reversed(kinds)):
        found = line["types"][kind.name]
        low.axhline(place, color="lightgrey", linewidth=1, zorder=0)
        low.scatter(found["values"], [place] * len(found["values"]), s=[2 + 1600 * share for share in found["taken"]],
                    color=COLORS[kind.name], alpha=0.55, linewidths=0)  # fmt: skip
        low.plot(found["values"], [place] * len(found["values"]), "|", color="black", markersize=9)
    low.set(yticks=range(len(kinds)), xlabel="value", ylim=(-0.6, len(kinds) - 0.4), xlim=(-1.06, 1.06))
    low.set_yticklabels([kind.name for kind in reversed(kinds)])
    low.set_title("the values of each data type; area: how many weights take it", fontsize=9)
    return figure


def main() -> None:
    """Measure, and write."""
    lab, small = book("figure_3", __doc__)
    torch.set_num_threads(1)
    if small:
        lines = [f"The {word} of the house reads {word}s in the garden." for word in ("cat", "owner", "painter")] * 8
        folder = small_llama(lab.folder / "model", 1, lines, steps=1)
        tiny = in_folder(lambda: folder, torch.float32, lambda: lines[:4])
        measure(lab, {"tiny": lambda: tiny}, {"tiny": lambda: tiny})
    else:
        models, drawn = ({name: partial(base, name) for name in names} for names in (MODELS, LINES))
        measure(lab, models, drawn)
    found = by_model(lab)
    lab.write("values.md", values_table(lab))
    for line in lab.lines():
        if "lines of" in line:
            lines_picture(line).savefig(lab.folder / f"values_{line['lines of']}.png", dpi=DPI)
    if names_of(found):
        lab.write("table.md", table(found))
        bits_picture(found).savefig(lab.folder / "bits.png", dpi=DPI)


if __name__ == "__main__":
    with quiet():
        main()

"""The paper's Table 2: perplexity by data type, of six models; and rounding errors, which tell why.

    python experiments/table_2.py               see lab.py
    python experiments/table_2.py --only gemma

A trial is a model in a data type: the nats of each text, and the errors of its weights. Another kind of trial is a
distribution (normal, or Student's t of so many degrees of freedom) in blocks of a size: the errors alone.
"""

import itertools
import math
from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

import torch
from bases import FREE, MASKED, ON_A_GRID, Base, base, in_folder
from corpus import perplexity
from formats import COLORS, E2M1, E3M0, FORMATS, FP4, INT4, INT8, NF4, NF4_DQ, UNQUANTIZED, Format
from lab import Book, book, markdown, mean_and_half
from matplotlib.figure import Figure
from scipy import stats
from small_llama import small_llama

from halfbyte.quiet import quiet

PAPER = {INT4: 34.34, E2M1: 31.07, E3M0: 29.48, NF4_DQ: 27.41}
MARGIN = 0.01
"""Nats a token within which a data type costs nothing."""
FOUR_BITS = (INT4, E2M1, E3M0, FP4, NF4)
FREEDOMS = (2, 3, 4, 5, 7, 10, 30, 0)
"""Degrees of freedom of Student's t; 0: normal."""
SIZES = (64, 256, 1024, 4096)
VALUES = 2**21
DPI = 110


def losses_of(model: Callable[[], Base], kind: Format) -> dict[str, Any]:
    """Return what a trial keeps of a model in a data type."""
    chosen = model()
    nats, tokens = chosen.losses(kind, chosen.reads())
    found = {"perplexity": perplexity(nats, tokens), **kind.errors(chosen.weights())}
    return found | {"nats": [round(value, 4) for value in nats], "tokens": tokens}


def drawn(freedom: int, count: int = VALUES) -> torch.Tensor:
    """Return values of a distribution, ``[count / 1024, 1024]``, the same ones each time."""
    torch.manual_seed(freedom)
    values = torch.randn(count)
    if freedom:
        chi = torch.distributions.Chi2(torch.tensor(float(freedom))).sample((count,))
        values = values / (chi / freedom).sqrt()
    return values.view(-1, 1024)


def errors_of(freedom: int, size: int, count: int = VALUES) -> dict[str, Any]:
    """Return the errors of every 4-bit type on values of a distribution, in blocks of a size."""
    values = {"values": drawn(freedom, count)}
    found = {kind.name: kind.in_blocks(size).errors(values) for kind in FOUR_BITS}
    return {name: {kind: one[name] for kind, one in found.items()} for name in ("squared_error", "absolute_error")}


def measure(lab: Book, models: Mapping[str, Callable[[], Base]], count: int) -> None:
    """Do the trials: ``count`` values of each distribution, and ``models``."""
    for freedom, size in itertools.product(FREEDOMS, SIZES):
        key = {"values": f"t, {freedom}" if freedom else "normal", "blocksize": size}
        lab.trial(key, partial(errors_of, freedom, size, count))
    for (name, model), kind in itertools.product(models.items(), FORMATS):
        lab.trial({"model": name, "format": kind.name}, partial(losses_of, model, kind))


Lines = dict[tuple[str, str], dict[str, Any]]


def by_model(lab: Book) -> Lines:
    """Return the trials of models, by model and data type."""
    return {(line["model"], line["format"]): line for line in lab.lines() if "model" in line}


def less(lines: Lines, model: str, one: Format, other: Format) -> tuple[float, float]:
    """Return how many nats a token ``one`` has more than ``other``: the mean over texts, and half its interval."""
    first, second = lines[model, one.name], lines[model, other.name]
    pairs = zip(first["nats"], second["nats"], first["tokens"], strict=True)
    return mean_and_half((a - b) / count for a, b, count in pairs)


def whole(lines: Lines) -> list[str]:
    """Return the models of which every data type was measured."""
    names = dict.fromkeys(model for model, _ in lines)
    return [name for name in names if all((name, kind.name) in lines for kind in FORMATS)]


def table(lines: Lines) -> str:
    """Return the perplexities, and the ratio to the unquantized model over the models whose weights lay on no grid."""
    names = whole(lines)
    free = [name for name in names if name not in (*ON_A_GRID, MASKED)]
    head = ["data type", "bits", *(f"{name} *" if name in ON_A_GRID else name for name in names), "ratio", "the paper"]
    rows = []
    for kind in FORMATS:
        bits = "16, 32" if kind is UNQUANTIZED else f"{lines[names[0], kind.name]['bits']:.3f}"
        cells = [kind.name, bits, *(f"{lines[name, kind.name]['perplexity']:.3f}" for name in names)]
        ratio = math.exp(sum(less(lines, name, kind, UNQUANTIZED)[0] for name in free) / len(free)) if free else 1
        rows.append([*cells, f"{ratio:.4f}", f"{PAPER[kind]:.2f}" if kind in PAPER else ""])
    return markdown(head, rows) + (
        "\n\nPerplexity. * its weights lay on a 4-bit grid before. Ratio: to the unquantized model, the geometric mean "
        "over the models without *, of MiniLM by matching alone; a text counts once, whatever its length."
    )


def differences(lines: Lines) -> str:
    """Return the nats a token that each data type has more than NF4, with 95 % intervals."""
    names = whole(lines)
    rows = []
    for kind in FORMATS:
        if kind is not NF4:
            pairs = [less(lines, name, kind, NF4) for name in names]
            rows.append([kind.name, *(f"{mean:+.4f} ± {half:.4f}" for mean, half in pairs)])
    return markdown(["less NF4", *names], rows) + "\n\nNats a token, mean over texts and its 95 % interval."


def weights(lines: Lines) -> str:
    """Return the errors of the models' weights."""
    names = whole(lines)
    rows = [
        [kind.name, *(f"{lines[n, kind.name]['squared_error']:.5f} / {lines[n, kind.name]['absolute_error']:.4f}"
                      for n in names)]
        for kind in FORMATS if kind is not UNQUANTIZED
    ]  # fmt: skip
    return markdown(["data type", *names], rows) + (
        "\n\nSquared error over the sum of squares / absolute error over the sum of magnitudes, of all linear weights."
    )


def tails(lab: Book) -> str:
    """Return the squared error of each data type on heavier and heavier tails, the least in bold."""
    rows = []
    for line in lab.lines():
        if "values" in line:
            found = line["squared_error"]
            least = min(found.values())
            cells = [f"**{found[kind.name]:.5f}**" if found[kind.name] == least else f"{found[kind.name]:.5f}"
                     for kind in FOUR_BITS]  # fmt: skip
            first = "E3M0" if found[E3M0.name] < found[E2M1.name] else "E2M1"
            rows.append([line["values"], str(line["blocksize"]), *cells, first])
    return markdown(["values", "block", *(kind.name for kind in FOUR_BITS), "of the two"], rows) + (
        "\n\nSquared error over the sum of squares. t, n: Student's t of n degrees of freedom."
    )


def verdicts(lines: Lines) -> str:
    """Return what became of the claims in README.md."""
    out = []
    names = whole(lines)
    held = {kind: [less(lines, name, kind, NF4) for name in names] for kind in (INT4, E2M1, E3M0, FP4)}
    for kind, pairs in held.items():
        worse = sum(mean - half > 0 for mean, half in pairs)
        better = sum(mean + half < 0 for mean, half in pairs)
        out.append([f"1. NF4 before {kind.name}", f"{worse} of {len(names)}; the other way round {better}"])
    for number, one, other in ((2, NF4_DQ, NF4), (3, INT8, UNQUANTIZED)):
        pairs = [less(lines, name, one, other) for name in names]
        inside = sum(abs(mean) + half < MARGIN for mean, half in pairs)
        out.append([f"{number}. {one.name} costs nothing", f"{inside} of {len(names)}"])
    for name in names:
        order = sorted(PAPER, key=lambda kind: -lines[name, kind.name]["perplexity"])
        out.append([f"4. order, {name}", " > ".join(kind.name for kind in order)])
    for error in ("squared_error", "absolute_error"):
        for name in names:
            trials = [lines[name, kind.name] for kind in FOUR_BITS]
            found = stats.spearmanr([t[error] for t in trials], [t["perplexity"] for t in trials]).statistic
            out.append([f"rank correlation of {error.replace('_', ' ')} and perplexity, {name}", f"{found:+.2f}"])
    return markdown(["claim", "found"], out)


def picture(lines: Lines) -> Figure:
    """Draw the differences to NF4 with their intervals, a panel a model."""
    names = whole(lines)
    figure = Figure(figsize=(11, 6.4), layout="constrained")
    panels = figure.subplots(2, math.ceil(len(names) / 2), squeeze=False).flat
    shown = [kind for kind in FORMATS if kind is not NF4]
    for panel, name in zip(panels, names, strict=False):
        for place, kind in enumerate(reversed(shown)):
            mean, half = less(lines, name, kind, NF4)
            panel.errorbar(mean, place, xerr=half, fmt="o", color=COLORS[kind.name], capsize=3)
        panel.axvline(0, color=COLORS["NF4"], linewidth=1)
        panel.set_yticks(range(len(shown)), [kind.name for kind in reversed(shown)])
        panel.set_title(name + (" (on a 4-bit grid before)" if name in ON_A_GRID else ""), fontsize=9)
        panel.grid(axis="x", alpha=0.3)
        panel.locator_params(axis="x", nbins=5)
        panel.tick_params(labelsize=8)
    for panel in list(panels):
        panel.set_visible(False)
    figure.supxlabel("nats a token more than NF4, 95 % interval over texts", fontsize=9)
    return figure


def tails_picture(lab: Book) -> Figure:
    """Draw the errors of data types against the tails' weight, a panel a size of blocks."""
    lines = [line for line in lab.lines() if "values" in line]
    figure = Figure(figsize=(11, 3.6), layout="constrained")
    panels = figure.subplots(1, len(SIZES), sharey=True)
    for panel, size in zip(panels, SIZES, strict=True):
        found = [line for line in lines if line["blocksize"] == size]
        for kind in FOUR_BITS:
            values = [line["squared_error"][kind.name] for line in found]
            panel.plot(range(len(found)), values, "o-", color=COLORS[kind.name], label=kind.name, markersize=3)
        panel.set_xticks(range(len(found)), [line["values"].removeprefix("t, ") for line in found], fontsize=7)
        panel.set(title=f"blocks of {size}", yscale="log", xlabel="Student's t, degrees of freedom")
        panel.grid(alpha=0.3)
    panels[0].set_ylabel("squared error / squares")
    panels[0].legend(fontsize=7)
    return figure


def main() -> None:
    """Measure, and write."""
    lab, small = book("table_2", __doc__)
    torch.set_num_threads(1)
    if small:
        lines = [f"The {word} of the house reads {word}s in the garden." for word in ("cat", "owner", "painter")] * 8
        folder = small_llama(lab.folder / "model", 1, lines, steps=1)
        tiny = in_folder(lambda: folder, torch.float32, lambda: lines[:4])
        measure(lab, {"tiny": lambda: tiny}, 2**17)
    else:
        measure(lab, {name: partial(base, name) for name in (*FREE, *ON_A_GRID)}, VALUES)
    found = by_model(lab)
    lab.write("tails.md", tails(lab))
    tails_picture(lab).savefig(lab.folder / "tails.png", dpi=DPI)
    if whole(found):
        text = "\n\n".join((table(found), verdicts(found), differences(found), weights(found)))
        lab.write("table.md", text)
        picture(found).savefig(lab.folder / "differences.png", dpi=DPI)


if __name__ == "__main__":
    with quiet():
        main()

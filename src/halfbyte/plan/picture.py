"""A plan's memory as a picture: a bar of its parts, beside it what there is."""

from pathlib import Path

from matplotlib.figure import Figure

from halfbyte.errors import size_text
from halfbyte.files import whole_file
from halfbyte.plan.estimate import Plan
from halfbyte.plan.words import MEMORY

DPI = 120


def draw(plan: Plan, file: Path) -> None:
    """Draw the memory at the peak of a step by part, as PNG."""
    parts = [("imports", plan.imports)] + [(MEMORY[n], size) for n, size in plan.memory.parts().items() if size]
    figure = Figure(figsize=(9, 2.6), layout="constrained")
    axes = figure.subplots()
    left = 0.0
    for index, (name, size) in enumerate(parts):
        color = f"C{index - 1}" if index else "lightgrey"
        axes.barh([0], [size / 2**30], left=left, color=color, label=f"{name}, {size_text(size)}", height=0.6)
        left += size / 2**30
    budget = plan.config.memory
    if budget:
        axes.axvline(budget / 2**30, color="black", linestyle="--", label=f"memory, {size_text(budget)}")
    title = f"{plan.model.name}: {size_text(plan.memory.peak)} beyond the imports at the peak of a step"
    axes.set(xlabel="GiB", yticks=[], title=title, xlim=(0, 1.05 * max(left, (budget or 0) / 2**30)))
    figure.legend(loc="outside lower center", ncols=4, fontsize=8)
    with whole_file(file) as part:
        figure.savefig(part, format="png", dpi=DPI)

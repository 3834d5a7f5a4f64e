"""The check as one picture: the loss curve, speed and memory beside the peer's, the peaks with their predictions."""

from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("Agg")
from matplotlib import pyplot


def draw(report: dict[str, Any], path: Path) -> None:
    """Draw what there is of sections c, d and g."""
    rows = {name: {row["name"]: row for row in section["rows"]} for name, section in report["sections"].items()}
    figure, (curve, speed, memory) = pyplot.subplots(1, 3, figsize=(15, 4.5), layout="constrained")
    for name, row in rows.get("c", {}).items():
        if "losses" in row:
            steps = range(1, len(row["losses"]) + 1)
            curve.plot(steps, row["losses"], "o-", ms=3, label=name.removeprefix("losses on "))
    curve.set(title="c: loss at 135M", xlabel="step")
    ratios = {name.partition(":")[0]: row["ratio"] for name, row in rows.get("d", {}).items() if "ratio" in row}
    speed.barh(list(ratios), list(ratios.values()))
    speed.axvline(1, color="gray", lw=1)
    speed.set(title="d: times as fast as transformers + peft + bitsandbytes")
    peaks = report["sections"].get("g", {}).get("rows", [])
    names = [row["name"].removesuffix(": memory").removesuffix(": predicted") for row in peaks]
    places = range(len(names))
    memory.barh([p + 0.2 for p in places], [row["peak"] / 1e9 for row in peaks], 0.4, label="peak")
    memory.barh([p - 0.2 for p in places], [row["predicted"] / 1e9 for row in peaks], 0.4, label="predicted")
    memory.set(title="g: memory in GB", yticks=list(places), yticklabels=names)
    for axes in (curve, memory):
        if axes.get_legend_handles_labels()[0]:
            axes.legend()
    about = report["circumstances"]
    kind = f"{'tiny, ' * about['tiny']}{report['seconds']} s"
    figure.suptitle(f"{about.get('gpu', 'CPU')}, torch {about['torch']}, {kind}")
    figure.savefig(path, dpi=100)
    pyplot.close(figure)

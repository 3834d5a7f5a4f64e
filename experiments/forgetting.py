"""What a task is learnt for: its gain against the loss on general text, over rate, rank, replay and scale.

python experiments/forgetting.py
"""

import functools
import itertools
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import lab
import tables_3_4
import tasks
import texts
import torch
from lab import Book
from peft.tuners.lora import LoraLayer
from tasks import Recipe, Task

from halfbyte.evaluate.texts import general_texts
from halfbyte.quiet import quiet

WAY = "QLoRA NF4 + DQ"
SEEDS = range(1)
SCALES = (0.25, 0.5, 0.75, 1.0)
WORDS = 40
"""Of a row of replay."""
Rows = Sequence[texts.Row]


@dataclass(frozen=True)
class Setting:
    """How a run differs: its rate in parts of the usual one, its rank, and the part of its rows that are replay."""

    rate: float = 1.0
    rank: int = 16
    replay: float = 0.0


USUAL = Setting()
SETTINGS = (
    Setting(rate=0.25), USUAL, Setting(rate=4.0), Setting(rank=2), Setting(rank=64),
    Setting(replay=0.1), Setting(replay=0.3), Setting(rate=4.0, replay=0.3),
)  # fmt: skip


class Point(NamedTuple):
    """Gain and forgetting of a setting at a scale, in nats, in the mean over seeds."""

    setting: Setting
    scale: float
    gain: float
    forgetting: float


def do(
    book: Book,
    task: Task,
    rate: float,
    replayed: Rows,
    settings: Sequence[Setting],
    seeds: Sequence[int],
) -> None:
    """Do what is missing."""
    general = [texts.Row("", text.text, "general") for text in general_texts()]
    book.trial({"part": "before"}, lambda: _losses(tasks.untrained(task, Recipe(WAY, rate)), general))
    for seed, setting in itertools.product(seeds, settings):
        measure = functools.partial(_measure, task, rate, setting, seed, replayed, general)
        book.trial({"part": "run", **vars(setting), "seed": seed}, measure)


def _losses(trained: tasks.Trained, general: Rows) -> dict[str, float]:
    reading = replace(trained, task=replace(trained.task, longest=512))
    return {"task": trained.loss(trained.task.test)["loss"], "general": reading.loss(general)["loss"]}


def _measure(task: Task, rate: float, setting: Setting, seed: int, replayed: Rows, general: Rows) -> dict[str, Any]:
    recipe = Recipe(WAY, rate * setting.rate, setting.rank, 2 * setting.rank)
    more = round(len(task.train) * setting.replay / (1 - setting.replay))
    trained = tasks.fit(task, recipe, seed, [*task.train, *replayed[:more]])
    layers = [module for module in trained.model.modules() if isinstance(module, LoraLayer)]
    found: dict[str, Any] = {}
    for scale in SCALES:
        for layer in layers:
            layer.set_scale("default", scale)
        found |= {f"{name}_{scale:g}": value for name, value in _losses(trained, general).items()}
    return found


def points(book: Book) -> list[Point]:
    """Return gain and forgetting of each setting and scale."""
    [before] = tasks.lines(book, part="before")
    found = []
    for setting, scale in itertools.product(SETTINGS, SCALES):
        runs = tasks.lines(book, part="run", **vars(setting))
        if runs:
            task, general = (sum(run[f"{name}_{scale:g}"] for run in runs) / len(runs) for name in ("task", "general"))
            found.append(Point(setting, scale, before["task"] - task, general - before["general"]))
    return found


def front(found: Sequence[Point]) -> list[Point]:
    """Return the points that no other has both more gain and less forgetting than, by gain."""
    best = [one for one in found if not any(_beats(other, one) for other in found)]
    return sorted(best, key=lambda point: point.gain)


def _beats(one: Point, other: Point) -> bool:
    return one != other and one.gain >= other.gain and one.forgetting <= other.forgetting


def claims(found: Sequence[Point]) -> Iterator[str]:
    """Yield what became of the claims of training.md."""
    whole = {point.setting: point for point in found if point.scale == 1}
    by_rate = [
        whole[setting].forgetting for setting in (Setting(rate=0.25), USUAL, Setting(rate=4.0)) if setting in whole
    ]
    if len(by_rate) == 3:
        yield f"Claim 1 {tasks.holds(by_rate == sorted(by_rate))}: forgetting at the three rates {_told(by_rate)}."
    replay = whole.get(Setting(replay=0.3))
    if replay and USUAL in whole:
        usual = whole[USUAL]
        claim = replay.forgetting <= usual.forgetting / 2 and replay.gain > 0.9 * usual.gain
        yield (
            f"Claim 2 {_holds(claim, usual)}: with 30 % of replay forgetting is {replay.forgetting:+.3f} in place of "
            f"{usual.forgetting:+.3f}, the gain {replay.gain:.3f} in place of {usual.gain:.3f}."
        )
    for setting, one in whole.items():
        if not setting.replay:
            half = [
                point
                for point in found
                if point.setting == setting
                and point.scale < 1
                and point.forgetting <= one.forgetting / 2
                and point.gain >= 0.8 * one.gain
            ]
            scales = ", ".join(f"{point.scale:g}" for point in half) or "none"
            yield f"Claim 3 {_holds(bool(half), one)} for {_name(setting)}: scales that do it: {scales}."
    scaled = [point for point in front(found) if point.scale < 1]
    claim = tasks.holds(bool(scaled))
    yield f"Claim 4 {claim}: {len(scaled)} of the {len(front(found))} points of the front are scaled."


def _holds(claim: bool, point: Point) -> str:
    """Say whether a claim on halving what a run forgets holds, if it forgets anything."""
    return tasks.holds(claim) if point.forgetting > 0 else "is not tested (nothing is forgotten)"


def _told(values: Sequence[float]) -> str:
    return ", ".join(f"{value:+.3f}" for value in values)


def _name(setting: Setting) -> str:
    replay = f", {setting.replay:.0%} replay" if setting.replay else ""
    return f"rate × {setting.rate:g}, rank {setting.rank}{replay}"


def table(book: Book) -> str:
    """Return the table, and whether the claims hold."""
    found = points(book)
    on_front = front(found)
    rows = [
        [
            _name(point.setting),
            f"{point.scale:g}",
            f"{point.gain:.3f}",
            f"{point.forgetting:+.3f}",
            "yes" if point in on_front else "",
        ]
        for point in found
    ]
    head = ["run", "scale", "task gain", "forgetting", "on the front"]
    return "\n\n".join([lab.markdown(head, rows), *claims(found)])


def draw(book: Book) -> None:
    """Draw gain against forgetting: a line for each run over its scales, and the front."""
    from matplotlib.figure import Figure

    figure = Figure((7, 4.2), layout="constrained")
    axes = figure.subplots()
    found = points(book)
    for number, setting in enumerate(SETTINGS):
        own = [point for point in found if point.setting == setting]
        if own:
            forgetting, gain = [point.forgetting for point in own], [point.gain for point in own]
            axes.plot(forgetting, gain, "-", color=f"C{number}", linewidth=1, alpha=0.6)
            axes.scatter(
                forgetting, gain, [60 * point.scale for point in own], color=f"C{number}", label=_name(setting)
            )
    axes.plot(0, 0, "x", color="0.3", label="untrained")
    best = front(found)
    axes.plot([point.forgetting for point in best], [point.gain for point in best], ":", color="0.3", label="front")
    axes.set_xlabel("forgetting: rise of the loss on general text (nats)")
    axes.set_ylabel("task gain: fall of the loss (nats)")
    axes.set_title("Points from small to large: scale ¼, ½, ¾, 1", fontsize="medium")
    axes.grid(alpha=0.3)
    axes.legend(fontsize="small")
    figure.savefig(book.folder / "forgetting.png", dpi=110)


def replay_rows() -> list[texts.Row]:
    """Return the beginnings of descriptions of packages that are no languages' libraries."""
    rows = (row for row in texts.synopses() if row.kind not in texts.LIBRARIES)
    return [texts.Row("", " ".join(row.source.partition(": ")[2].split()[:WORDS]), "replay") for row in rows]


def main() -> None:
    torch.set_num_threads(1)
    book, small = lab.book("forgetting", __doc__)
    with quiet():
        if small:
            task = tasks.tiny_tasks(book.folder / "models")[-1]
            replayed = [texts.Row("", row.target, "replay") for row in task.choice]
            do(book, task, 1e-3, replayed, (USUAL, Setting(replay=0.3)), range(1))
        elif not book.tables_only:
            task = tasks.instructions_task()
            rate = tables_3_4.chosen_rate(Book(book.folder.parent / "tables_3_4"), task.name, WAY)
            do(book, task, rate, replay_rows(), SETTINGS, SEEDS)
    book.write("table.md", table(book))
    draw(book)


if __name__ == "__main__":
    main()

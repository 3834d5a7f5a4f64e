"""What the page asks of its worker: columns and previews of data, plans, what this machine is.

Functions of plain values, so that both go from process to process.
"""

import contextlib
import dataclasses
import itertools
import os
from pathlib import Path
from typing import Any

from halfbyte.deploy.ui.jobs import USE
from halfbyte.errors import InputError

SAMPLES = 6
SEEN = 50
"""Rows that are looked at for their columns."""
LONGEST = 200
"""Characters of a cell that is shown."""
LARGE = 2**24
"""Bytes of data beyond which its first rows alone are looked at, about so much of them."""
HOUR = 3600.0
HOUR_LENGTH = 256
"""Tokens of a row of which it is said how many can be trained in an hour."""


@dataclasses.dataclass(frozen=True)
class Columns:
    """The columns of data, with what its first rows have in them.

    Attributes:
        names: in their order.
        rows: of these columns' values as texts.
        where: each row stands.
    """

    names: list[str]
    rows: list[list[str]]
    where: list[str]


@dataclasses.dataclass(frozen=True)
class Preview:
    """Data as it would be trained on.

    Attributes:
        figures: names and values.
        hints: what should be looked at, a sentence each.
        bad: kinds of rows that cannot be trained on, how many, and the first of them.
        samples: of rows: a title, and parts of a name and pairs of a style and a text.
        rows: that are trained on.
        of: bytes of the data, if only its first rows were looked at; else nothing.
    """

    figures: list[tuple[str, str]]
    hints: list[str]
    bad: list[tuple[str, int, str]]
    samples: list[tuple[str, list[tuple[str, list[tuple[str, str]]]]]]
    rows: int
    of: int = 0


@dataclasses.dataclass(frozen=True)
class Foretold:
    """A plan, as the page shows it.

    Attributes:
        parts: bytes by part.
        peak, imports, free: bytes: of the step, of a process as such, and what may be taken.
        step: seconds of one.
        steps, seconds: of the whole run; None where nobody knows.
        evaluations: seconds of them.
        measured: whether the machine's own rates are behind it.
        policy: what becomes of activations and of the base.
        advice: options that make it faster, and how many times.
        of: bytes of the data, if the number of its rows is a guess by the first ones; else nothing.
        refusal: why it cannot be, with what could; then all else is nothing.
    """

    parts: dict[str, int] = dataclasses.field(default_factory=dict)
    peak: int = 0
    imports: int = 0
    free: int = 0
    step: float = 0.0
    steps: int | None = None
    seconds: float | None = None
    measured: bool = False
    policy: str = ""
    advice: list[tuple[str, float]] = dataclasses.field(default_factory=list)
    refusal: str = ""
    of: int = 0
    evaluations: float = 0.0


def columns(data: list[str]) -> Columns:
    """Return the columns of data, by its first rows.

    Raises:
        InputError: it cannot be read.
    """
    from halfbyte.data.sources import read_source, resolve

    found: list[tuple[str, Any]] = []
    for source in resolve(data):
        found += itertools.islice(read_source(source), SEEN - len(found))
        if len(found) == SEEN:
            break
    names = list(dict.fromkeys(name for _, row in found if isinstance(row, dict) for name in row))
    tables = [(where, row) for where, row in found if isinstance(row, dict)][:SAMPLES]
    texts = [[_short(row.get(name)) for name in names] for _, row in tables]
    return Columns([str(name) for name in names], texts, [where for where, _ in tables])


def preview(options: dict[str, Any]) -> Preview:
    """Return what a run with these options would train on; rows that it could not are left out and told.

    Raises:
        InputError: the options or the data will not do.
    """
    from halfbyte.quiet import quiet
    from halfbyte.runs.config import TrainConfig
    from halfbyte.train.methods import method_of
    from halfbyte.train.rows import opened_tokenizer, prepared

    config = TrainConfig.from_yaml(None, options | {"skip_bad_rows": "all"})
    config, share, size = _first_rows(config)
    said: list[str] = []
    with quiet():
        tokenizer, _ = opened_tokenizer(config, said.append)
        rows = prepared(config, method_of(config), tokenizer)
        said += rows.said
        bad = [(kind, count, rows.bad.first.get(kind, "")) for kind, count in rows.bad.counts.items()]
        if config.task != "lm":
            found = _of_task(rows, tokenizer, said, bad)
        else:
            found = _of_language(config, rows, tokenizer, said, bad)
    return dataclasses.replace(found, of=size if share < 1 else 0)


def _first_rows(config: Any) -> tuple[Any, float, int]:
    """Return options that name the first rows of data that is large, what share of its bytes they are, and its bytes.

    Nobody wants to wait for half a gigabyte of tokens before the first row is seen; training reads it all.
    """
    from halfbyte.data.sources import inputs_of

    size = sum(file.stat().st_size for file in inputs_of(config.data))
    if size <= LARGE:
        return config, 1.0, size
    heads = [_head(source, LARGE // len(config.data)) for source in config.data]
    first = [s.model_copy(update={"max_rows": rows}) for s, (rows, _) in zip(config.data, heads, strict=True)]
    return config.model_copy(update={"data": first}), min(sum(read for _, read in heads) / size, 1.0), size


def _head(source: Any, most: int) -> tuple[int, float]:
    """Return how many of a source's rows come before about ``most`` bytes of it, and how many bytes that are."""
    from halfbyte.data.sources import inputs_of, read_source

    held = rows = 0
    told = (0, 0)  # rows, and bytes of the file up to them

    def far(row: int, here: int, _: int) -> None:
        nonlocal told
        told = row, here

    once = source.model_copy(update={"weight": 1.0})
    for rows, (_, row) in enumerate(read_source(once, far), start=1):
        held += len(str(row))
        if max(told[1], held) > most:
            return rows, rows * told[1] / told[0] if told[1] else held
    return rows, sum(file.stat().st_size for file in inputs_of([source]))


def _of_language(config: Any, rows: Any, tokenizer: Any, said: list[str], bad: list[tuple[str, int, str]]) -> Preview:
    from halfbyte.data.figures import figures, hints
    from halfbyte.data.samples import choose, gap, joined, row_lengths, sample, visible
    from halfbyte.data.survey import survey

    found = survey(rows.train, tokenizer, against=rows.evaluation, max_length=config.max_length)
    found = dataclasses.replace(found, shapes=rows.shapes, said=said)

    def spans(pieces: Any) -> list[tuple[str, str]]:
        told = []
        for piece in joined(pieces):
            style = "gap" if piece.is_gap else "trained" if piece.trained else "special" if piece.special else ""
            told.append((style, gap(piece) if piece.is_gap else visible(piece.text)))
        return told

    samples = []
    for number in choose(row_lengths(rows.train.rows), SAMPLES):
        one = sample(rows.train.rows, number, tokenizer)
        samples.append((f"{number:,} · {one.where}", [(name, spans(pieces)) for name, pieces in one.parts()]))
    return Preview(figures(found), hints(found), bad, samples, found.rows)


def _of_task(rows: Any, tokenizer: Any, said: list[str], bad: list[tuple[str, int, str]]) -> Preview:
    from halfbyte.data.task_survey import shown_row, survey_task

    found = survey_task(rows, said)
    figures = [("rows", f"{found.rows:,}"), ("rows for evaluation", f"{found.evaluation_rows:,}")]
    figures += [(name, f"{count:,}") for name, count in found.classes.items()]
    samples = []
    for number in range(min(SAMPLES, found.rows)):
        where, read, answer = shown_row(rows, number, tokenizer)
        samples.append((f"{number + 1:,} · {where}", [("", [("", read), ("trained", answer)])]))
    return Preview(figures, found.hints(), bad, samples, found.rows)


def plan(options: dict[str, Any], with_data: bool) -> Foretold:
    """Return what a run with these options takes.

    Args:
        options: of the run.
        with_data: whether its rows are to be looked at.

    Raises:
        InputError: the options will not do, or there is no formula for the model.
    """
    from halfbyte.plan import advice, calibrate
    from halfbyte.plan.estimate import DoesNotFitError, free_for, look_at, plan_run
    from halfbyte.plan.rows import facts_of
    from halfbyte.quiet import quiet
    from halfbyte.runs.config import TrainConfig
    from halfbyte.train.methods import method_of
    from halfbyte.train.prediction import of_method
    from halfbyte.train.rows import opened_tokenizer, prepared

    config = TrainConfig.from_yaml(None, options)
    method, size, share = method_of(config), 0, 1.0
    with quiet():
        given: dict[str, Any] = {"model": look_at(config), "machine": calibrate.known(), **of_method(config, method)}
        if with_data:
            skipping, share, size = _first_rows(config.model_copy(update={"skip_bad_rows": "all"}))
            tokenizer, _ = opened_tokenizer(skipping, lambda _: None)
            given["facts"] = facts_of(prepared(skipping, method, tokenizer)).times(1 / share)
        try:
            found = plan_run(config, **given)
        except DoesNotFitError as error:
            return Foretold(refusal=str(advice.refusal(config, error, **given)))
        faster = advice.faster(found, **given)
    told = [(one.flags, one.gain(found)) for one in faster]
    return Foretold(
        {name: size for name, size in found.memory.parts().items() if size},
        found.memory.peak,
        found.imports,
        free_for(config),
        found.step.seconds,
        found.steps,
        found.seconds,
        found.machine.is_measured,
        str(found.policy),
        told,
        of=size if share < 1 else 0,
        evaluations=found.evaluations,
    )


def rows_an_hour(models: list[str]) -> dict[str, float]:
    """Return how many rows of :data:`HOUR_LENGTH` tokens each model trains on in an hour; those that can be planned."""
    from halfbyte.plan import calibrate
    from halfbyte.plan.estimate import look_at, plan_run
    from halfbyte.quiet import quiet
    from halfbyte.runs.config import TrainConfig

    found = {}
    with quiet():
        for model in models:
            config = TrainConfig(
                model=model, data="-", output=Path("runs/plan"), preset="quick", max_length=HOUR_LENGTH, batch_size=1,
                gradient_accumulation_steps=16,
            )  # fmt: skip
            with contextlib.suppress(InputError):
                told = plan_run(config, model=look_at(config), machine=calibrate.known())
                found[model] = HOUR / told.step.seconds * config.rows_a_step
    return found


def machine() -> dict[str, Any]:
    """Return what this machine is."""
    from halfbyte.memory import free_memory, memory_limit
    from halfbyte.plan import calibrate
    from halfbyte.runs.circumstances import kernels_in_force, processor

    installed = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    return {
        "processor": processor(),
        "cores": len(os.sched_getaffinity(0)),
        "kernels": kernels_in_force(),
        "memory": min(memory_limit() or installed, installed),
        "free": free_memory(),
        "measured": calibrate.known().is_measured,
    }


def card(run: str) -> str:
    """Return the card of what is made of a run, as far as it does not depend on what that is."""
    import tempfile

    from halfbyte.deploy.card import CARD, write_card
    from halfbyte.hf.models.configs import ADAPTER, json_of
    from halfbyte.hf.models.hub import locate

    base = locate(json_of(Path(run) / ADAPTER)["base_model_name_or_path"])
    with tempfile.TemporaryDirectory() as place:
        folder = Path(place) / f"{Path(run).name}-model"
        folder.mkdir()
        source = Path(base.path) if base.is_folder else folder
        write_card(folder, Path(run), base, source, "fine-tuned")
        return (folder / CARD).read_text(encoding="utf-8").partition(USE)[0].strip()


def measure() -> None:
    """Measure this machine, for half a minute."""
    from halfbyte.plan import calibrate

    calibrate.calibrate()


def _short(value: Any) -> str:
    text = "" if value is None else value if isinstance(value, str) else repr(value)
    return text if len(text) <= LONGEST else f"{text[: LONGEST - 1]}…"

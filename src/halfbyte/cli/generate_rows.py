"""A file of prompts answered into a file of answers; what is said of it."""

import contextlib
import dataclasses
import secrets
import sys
import time
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import typer
from pydantic import ValidationError
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from halfbyte.cli.console import notes
from halfbyte.errors import InputError, counted
from halfbyte.files import absolute

if TYPE_CHECKING:
    from halfbyte.data.bad_rows import Skip
    from halfbyte.data.examples import BadRow
    from halfbyte.data.prompts import Asked, Named
    from halfbyte.evaluate.asking import Asking
    from halfbyte.generate.constraint import Constraint
    from halfbyte.generate.engine import Engine
    from halfbyte.generate.sampling import Sampling

LINES = (".txt", ".text")
"""Endings of files with a prompt a line."""
TELL_EVERY = 30.0
"""Seconds between two lines on how far it is, where nobody watches a bar."""


@dataclasses.dataclass(frozen=True)
class Settings:
    """What decides what is generated.

    Attributes:
        model: as it was named.
        system: the system prompt.
        raw: whether prompts are gone on with as they stand.
        sampling: how answers are drawn.
        constraint: what they follow; ``rules``: its schema and its expression.
        samples: answers to each row.
        thinking: what the chat template is told of thoughts.
        formats: of the cache and the head.
        adapter: that answers, or None for the base.
        named: the columns that rows are read by, or None.
    """

    model: str
    system: str | None
    raw: bool
    sampling: "Sampling"
    constraint: "Constraint | None"
    rules: tuple[Any, str | None]
    samples: int
    thinking: Any
    formats: tuple[str | None, str | None]
    adapter: str | None
    named: "Named | None" = None

    @property
    def digest(self) -> str:
        """Twelve digits that are others for other settings."""
        from halfbyte.evaluate.answered import settings_of
        from halfbyte.files import model_path

        left_out = ("constraint", "named")
        about = {f.name: getattr(self, f.name) for f in dataclasses.fields(self) if f.name not in left_out}
        if self.named:
            about["named"] = self.named.ways
        sampling = {**vars(self.sampling), "logit_bias": dict(self.sampling.logit_bias)}
        return settings_of(about | {"model": model_path(self.model), "sampling": sampling})

    @property
    def asking(self) -> "Asking":
        """How rows are put to the model."""
        from halfbyte.evaluate.asking import Asking

        return Asking(self.sampling, self.adapter, self.constraint, self.system, self.raw, self.thinking)


def answer_file(engine: "Engine", model: Any, prompts: str, out: Path | None, settings: Settings, skip: str) -> None:
    """Answer the rows of a file into another one, or on standard output, and sum up.

    Raises:
        InputError: rows are bad, or the file of answers holds something else.
    """
    from halfbyte.evaluate.answered import AnswersFile, answered, jobs_of, scores_of, text_of, writable

    file = None
    if out is not None:
        out = absolute(out)
        if prompts != "-" and absolute(prompts) == out:
            raise InputError(f"{out} is the file of prompts itself; name another file with --out.")
        writable(out)
        file = AnswersFile(out, settings.digest)
    jobs, bad, count = jobs_of(
        _rows(prompts, settings.named), settings.asking.requests(engine.tokenizer, model), engine
    )
    skipped: Skip = "all" if skip == "all" else skip in ("yes", "true")
    bad.check(count, skipped, "answer", "answered")
    if bad.total:
        notes.print(f"{counted(bad.total, 'row')} left out:\n{bad.told()}", style="dim", markup=False, soft_wrap=True)
    if not count:
        raise InputError(f"{prompts} holds no prompt; give a file with a row for each.")
    lines: list[dict[str, Any]] = []
    if file:
        file.check(jobs)
        lines = list(file.lines.values())
        if lines:
            notes.print(f"{counted(len(lines), 'row')} of {len(jobs):,} are answered by now.", style="dim")
    rest = [job for job in jobs if file is None or job.row not in file.lines]
    seed = settings.sampling.seed if settings.sampling.seed is not None else secrets.randbits(32)
    began = time.perf_counter()
    made = answered(engine, rest, samples=settings.samples, seed=seed, settings=settings.digest)
    try:
        for line in _watched(made, len(rest), engine):
            if file:
                file.add(line)
            else:
                typer.echo(text_of(line))
                sys.stdout.flush()
            lines.append(line)
    except KeyboardInterrupt:
        if file:
            notes.print(
                f"Interrupted: {counted(len(file.lines), 'row')} of {len(jobs):,} are answered in {file.path}; the "
                "same command goes on.",
                markup=False, soft_wrap=True,
            )  # fmt: skip
        raise
    finally:
        made.close()
    seconds, figures = time.perf_counter() - began, engine.figures()
    rate = f", {figures.tokens_written:,} tokens, {figures.tokens_written / seconds:.0f} tokens/s" if rest else ""
    notes.print(f"{counted(len(rest), 'row')} answered in {seconds:.1f} s{rate}.", highlight=False)
    scores, scored = scores_of(lines)
    if scored:
        means = f"ROUGE-L {scores['rouge_l']:.3f}, exact match {scores['exact_match']:.1%}"
        several = f", {settings.samples} answers each" if settings.samples > 1 else ""
        notes.print(f"{means} over {counted(scored, 'row')} with a reference{several}.", highlight=False)


def named_columns(model: str, columns: str | None) -> "Named | None":
    """Return the columns that rows are read by: those that were given, or else a run's own, in rows that have them.

    Raises:
        InputError: they cannot be understood.
    """
    from halfbyte.data.columns import paired
    from halfbyte.data.prompts import Named
    from halfbyte.data.sources import Source
    from halfbyte.options import read_mapping
    from halfbyte.runs.folder import RunFolder

    if columns is not None:
        try:
            pairs = paired(columns)
        except ValueError as error:
            raise InputError(f"--columns {error}.") from None
        return Named([(pairs, None)])
    config = RunFolder(absolute(model)).config
    if not config.is_file():
        return None
    with contextlib.suppress(InputError, ValidationError):  # of a damaged file, which only says how it was trained
        options = read_mapping(config)
        data = options.get("data")
        whole = {name: options.get(name) for name in ("columns", "template")}
        ways = []
        for source in data if isinstance(data, list) else [data]:
            own = source if isinstance(source, dict) else {}
            read = Source.model_validate({"path": "-", **{name: own.get(name) or whole[name] for name in whole}})
            ways.append((read.columns, read.template))
        return Named(ways, always=False) if any(map(any, ways)) else None
    return None


def _rows(prompts: str, named: "Named | None") -> "Iterator[Asked | BadRow]":
    """Return what the rows of a file ask.

    Raises:
        InputError: it cannot be read.
    """
    from halfbyte.data.prompts import asked_of
    from halfbyte.data.sources import read_source, resolve

    if Path(prompts).suffix.lower() in LINES and absolute(prompts).is_file():
        return asked_of(_lines(Path(prompts)), named)
    return asked_of((row for source in resolve(prompts) for row in read_source(source)), named)


def _lines(path: Path) -> Iterator[tuple[str, Any]]:
    from halfbyte.cli.talk import read_text

    for number, line in enumerate(read_text(absolute(path)).splitlines(), start=1):
        if line.strip():
            yield f"{path}, line {number}", line


def _watched(lines: Iterable[dict[str, Any]], total: int, engine: "Engine") -> Iterator[dict[str, Any]]:
    """Yield the lines, with a bar in a terminal, else with a line now and then: how many, how fast, how long."""
    began = told = time.monotonic()
    with Progress(
        BarColumn(), MofNCompleteColumn(), TextColumn("{task.fields[rate]}"), TimeRemainingColumn(), console=notes,
        transient=True, disable=not notes.is_terminal,
    ) as progress:  # fmt: skip
        task = progress.add_task("", total=total, rate="")
        for done, line in enumerate(lines, start=1):
            now = time.monotonic()
            rate = f"{engine.figures().tokens_written / max(now - began, 1e-9):.0f} tokens/s"
            progress.update(task, completed=done, rate=rate)
            if not notes.is_terminal and now - told >= TELL_EVERY:
                told, left = now, (now - began) / done * (total - done)
                notes.print(f"{done:,} of {counted(total, 'row')}, {rate}, {left / 60:.0f} min left", highlight=False)
            yield line

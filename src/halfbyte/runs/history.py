"""A run as its folder tells of it, also of one that goes on, broke off, or is damaged; read by whoever shows runs.

Nothing here changes a folder, and nothing imports torch: a folder is read as data, so that one whose data or base model
are gone, or that another version wrote, can still be looked at.
"""

import datetime
import json
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from os.path import isdir, isfile
from pathlib import Path
from typing import Any, Literal, TypeVar

from halfbyte.errors import InputError, counted
from halfbyte.files import read_lines
from halfbyte.locks import is_locked
from halfbyte.options import read_mapping
from halfbyte.runs.events import (
    Begin,
    Checkpoint,
    DataSummary,
    End,
    Evaluation,
    Event,
    Note,
    Sample,
    StepMetrics,
    from_lines,
    whole_number,
)
from halfbyte.runs.folder import VERSION, RunFolder

State = Literal["running", "finished", "interrupted", "failed", "killed"]
"""``killed``: its process ended without a word."""
DEPTH = 3
"""Levels of folders in which runs are looked for."""
LOSS_STEPS = 10
"""The loss of a run is the mean over its last so many steps."""

E = TypeVar("E", bound=Event)


@dataclass(frozen=True)
class Run:
    """What a folder tells of a run.

    Attributes:
        path: of the folder.
        state: what has become of it.
        options: as ``config.yaml`` has them.
        circumstances: as ``run.json`` has them, by the names of :class:`halfbyte.runs.circumstances.Circumstances`.
        begun: when; None if nobody wrote it down.
        events: in order; of a short reading the last step alone.
        summary: of a finished run.
        problems: what could not be read, a sentence each.
    """

    path: Path
    state: State
    options: dict[str, Any] = field(default_factory=dict)
    circumstances: dict[str, Any] = field(default_factory=dict)
    begun: datetime.datetime | None = None
    events: list[Event] = field(default_factory=list)
    summary: dict[str, Any] = field(default_factory=dict)
    problems: list[str] = field(default_factory=list)

    def of(self, kind: type[E]) -> list[E]:
        """Return the events of one kind."""
        return [event for event in self.events if isinstance(event, kind)]

    @cached_property
    def steps(self) -> list[StepMetrics]:
        """The optimizer steps, by their numbers; of one that was made again after resuming, the later one."""
        return [step for _, step in sorted({step.step: step for step in self.of(StepMetrics)}.items())]

    @cached_property
    def evaluations(self) -> list[Evaluation]:
        """What was measured on held-out rows, by steps."""
        return [one for _, one in sorted({one.step: one for one in self.of(Evaluation)}.items())]

    @property
    def samples(self) -> dict[str, list[Sample]]:
        """Answers by their prompts, by steps."""
        by_prompt: dict[str, dict[int, Sample]] = {}
        for sample in self.of(Sample):
            by_prompt.setdefault(sample.prompt, {})[sample.step] = sample
        return {prompt: [answers[step] for step in sorted(answers)] for prompt, answers in by_prompt.items()}

    @property
    def notes(self) -> list[str]:
        """What the run said, once each."""
        return list(dict.fromkeys(note.told for note in self.of(Note)))

    @property
    def troubles(self) -> list[str]:
        """What of that something should be done about."""
        return list(dict.fromkeys(note.told for note in self.of(Note) if note.trouble))

    @property
    def data(self) -> DataSummary | None:
        """What it trains on, if that was told."""
        return next(iter(reversed(self.of(DataSummary))), None)

    @property
    def step(self) -> int:
        """The last optimizer step."""
        return self.steps[-1].step if self.steps else 0

    @property
    def adapter_step(self) -> int:
        """The step whose adapter it has left: of a finished run as it says itself."""
        told = self.summary.get("adapter_step")
        return told if isinstance(told, int) else self.step

    @property
    def kept(self) -> Evaluation | None:
        """The evaluation of the adapter that it has left, or else the last one."""
        of_it = (one for one in self.evaluations if one.step == self.adapter_step)
        return next(of_it, self.evaluations[-1] if self.evaluations else None)

    @property
    def total_steps(self) -> int | None:
        """How many steps it is to have."""
        return next((event.total_steps for event in reversed(self.of(Begin))), None)

    @property
    def loss(self) -> float | None:
        """Mean over the last ten steps, in nats; of a finished run what it says itself."""
        if isinstance(told := self.summary.get("loss"), (int, float)):
            return float(told)
        ending = [step.loss for step in self.steps[-LOSS_STEPS:]]
        return sum(ending) / len(ending) if ending else None

    @property
    def seconds(self) -> float | None:
        """Of training."""
        return self.steps[-1].elapsed if self.steps else None

    @property
    def peak_memory(self) -> int | None:
        """The largest resident memory, in bytes."""
        told = self.summary.get("peak_memory_bytes")
        return told if isinstance(told, int) else max((step.memory_bytes for step in self.steps), default=0) or None

    @property
    def peak_gpu_memory(self) -> int | None:
        """The most of a GPU's memory that it had after a step, in bytes; None where it used none."""
        return max((step.gpu_memory_bytes for step in self.steps), default=0) or None

    @property
    def error(self) -> str:
        """Why it failed, if it did."""
        return next((event.error for event in reversed(self.of(End))), "")

    @property
    def checkpoints(self) -> list[Checkpoint]:
        """Those that are on the disk, by steps."""
        there = {one.step: one for one in self.of(Checkpoint) if isdir(self.path / one.folder)}
        return [one for _, one in sorted(there.items())]


def read_run(path: Path, *, state: State | None = None, short: bool = False) -> Run:
    """Read the run in the folder ``path``.

    Args:
        path: the folder.
        state: what has become of the run, where the caller knows better than the folder.
        short: whether the last step is enough, with the mean of the last ten as its loss.

    Raises:
        InputError: it is no run folder, or one of a newer layout.
    """
    if not path.is_dir():
        raise InputError(f"{path} is {'a file' if path.exists() else 'not there'}; name the folder of a run.")
    if not is_run(path):
        below = [run.relative_to(path) for run in find_runs(path)]
        hint = f"it holds {counted(len(below), 'run')}: name one, such as {path / below[0]}" if below else (
            "it has no run.json and no metrics.jsonl; name a folder that halfbyte train wrote"
        )  # fmt: skip
        raise InputError(f"{path} is no run folder: {hint}.")
    folder = RunFolder(path)
    problems: list[str] = []
    about = _read_json(folder.about, problems, "of halfbyte 0.1.0 there is none")
    version = about.get("version", VERSION)
    if not isinstance(version, int) or version > VERSION:
        raise InputError(f"{path} holds a run of a newer halfbyte (layout {version}); look at it with that one.")
    summary = _read_json(folder.summary, problems) if folder.finished else {}
    options = _read_options(folder.config, problems)
    events = _read_metrics(folder.metrics, problems, short)
    circumstances = about.get("circumstances")
    return Run(
        path=path,
        state=state or _state(folder, events),
        options=options,
        circumstances=circumstances if isinstance(circumstances, dict) else {},
        begun=_begun(about, folder),
        events=events,
        summary=summary,
        problems=problems,
    )


def is_run(path: Path) -> bool:
    """Tell whether ``path`` looks like the folder of a run."""
    folder = RunFolder(path)  # what may not be looked at is none: os.path raises nothing
    return isfile(folder.about) or (isfile(folder.config) and isfile(folder.metrics))


def rate(steps: Sequence[StepMetrics]) -> float | None:
    """Return the trained tokens a second while steps were made: without evaluations, samples and saving; or None."""
    before = [0, *(step.trained_tokens for step in steps)]
    made = [(s.trained_tokens - b, s.tokens_per_second) for s, b in zip(steps, before, strict=False)]
    seconds = sum(tokens / speed for tokens, speed in made if speed > 0)
    return steps[-1].trained_tokens / seconds if seconds > 0 else None


def find_runs(path: Path, depth: int = DEPTH) -> Iterator[Path]:
    """Yield the run folders at or below ``path``, by name; hidden folders, links and what cannot be read are passed."""
    if is_run(path):
        yield path
    elif depth:
        try:
            below = sorted(one for one in path.iterdir() if one.is_dir() and not one.is_symlink())
        except OSError:
            return
        for one in below:
            if not one.name.startswith("."):
                yield from find_runs(one, depth - 1)


def _state(folder: RunFolder, events: Iterable[Event]) -> State:
    if folder.finished:
        return "finished"
    if is_locked(folder.lock):
        return "running"
    last = next((event for event in reversed(list(events)) if isinstance(event, (Begin, End))), None)
    if isinstance(last, End) and last.reason != "finished":
        return last.reason
    return "killed"


def _begun(about: dict[str, Any], folder: RunFolder) -> datetime.datetime | None:
    try:
        return datetime.datetime.fromisoformat(about["begun"]).astimezone()
    except (KeyError, TypeError, ValueError):
        try:
            return datetime.datetime.fromtimestamp(folder.config.stat().st_mtime).astimezone()
        except OSError:
            return None


def _read_json(path: Path, problems: list[str], missing: str = "") -> dict[str, Any]:
    try:
        values = json.loads(path.read_text(encoding="utf-8"), parse_int=whole_number)
    except FileNotFoundError:
        problems.append(f"{path.name} is missing{f' ({missing})' if missing else ''}.")
        return {}
    except (OSError, ValueError, RecursionError) as error:
        problems.append(f"{path.name} cannot be read ({_reason(error)}) and is left out.")
        return {}
    if not isinstance(values, dict):
        problems.append(f"{path.name} is damaged and is left out.")
        return {}
    return values


def _read_options(path: Path, problems: list[str]) -> dict[str, Any]:
    try:
        return {str(name): value for name, value in read_mapping(path).items()}
    except InputError as error:
        reason = str(error).removeprefix(f"{path}: ").partition(";")[0].rstrip(".")
        problems.append(f"{path.name} is left out: {reason}.")
        return {}


def _read_metrics(path: Path, problems: list[str], short: bool) -> list[Event]:
    try:
        lines = read_lines(path)
    except OSError as error:
        problems.append(f"{path.name} cannot be read ({_reason(error)}), so there are no curves.")
        return []
    damaged = sum(not _is_object(line) for line in lines) if not short else 0
    if damaged:
        problems.append(f"{path.name} is damaged: {counted(damaged, 'line')} of {len(lines):,} cannot be read.")
    if not short:
        return _noted(from_lines(lines, path.name), problems)
    steps = [line for line in lines if line.startswith('{"kind":"step"')]
    others = [line for line in lines if not line.startswith(('{"kind":"step"', '{"kind":"note"', '{"kind":"sample"'))]
    last = [event for event in from_lines(steps[-LOSS_STEPS:]) if isinstance(event, StepMetrics)]
    mean = [last[-1].model_copy(update={"loss": sum(one.loss for one in last) / len(last)})] if last else []
    return [*mean, *_noted(from_lines(others, path.name), problems)]


def _noted(events: Iterable[Event], problems: list[str]) -> list[Event]:
    """Return ``events``; what is said of a newer file is a problem."""
    kept: list[Event] = []
    for event in events:
        if isinstance(event, Note) and "was written by a newer halfbyte" in event.text and not kept:
            problems.append(event.text)
        else:
            kept.append(event)
    return kept


def _is_object(line: str) -> bool:
    try:
        return isinstance(json.loads(line), dict)
    except (ValueError, RecursionError):
        return False


def _reason(error: Exception) -> str:
    return (error.strerror or str(error)) if isinstance(error, OSError) else "it is damaged"

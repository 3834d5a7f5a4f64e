"""A model measured, or a run: its base and its adapter side by side, in one process over one base.

Inputs are read and tasks loaded before the model is opened; what is kept appears as a whole folder, or not at all.
"""

import datetime
import functools
import importlib.metadata
import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from pydantic import BaseModel, ConfigDict

from halfbyte import hf
from halfbyte.choices import Device
from halfbyte.data.bad_rows import Skip
from halfbyte.data.forms import sides as sequences_of
from halfbyte.data.sources import read_source, resolve
from halfbyte.errors import InputError, check_writable
from halfbyte.evaluate.contamination import N, Training, overlaps
from halfbyte.evaluate.estimates import difference
from halfbyte.evaluate.parts import (
    MmluPart,
    Opened,
    Part,
    Progress,
    ReferencesPart,
    TasksPart,
    TextsPart,
    Value,
    Values,
)
from halfbyte.evaluate.perplexity import LONGEST
from halfbyte.evaluate.report import EvaluationReport, Example, Figure, Measured, Overlap
from halfbyte.evaluate.sides import sides_of
from halfbyte.evaluate.tasks import check_installed
from halfbyte.files import absolute, whole_folder
from halfbyte.generate.stream import check_generates
from halfbyte.hf.layers.fusion import fuse
from halfbyte.hf.layers.head import base_of, bind_head
from halfbyte.hf.models.hub import locate
from halfbyte.hf.models.limits import most_positions
from halfbyte.nn import FrozenLinear
from halfbyte.runs.circumstances import versions
from halfbyte.runs.folder import RunFolder
from halfbyte.train.rows import has_rows, rows_again

RESULTS = "results.json"
EXAMPLES = 5
"""Rows that overlap, shown of each file."""
AT_ONCE = 1000
"""Rows of tokens that become text together."""


class Wanted(BaseModel):
    """What is measured, and how.

    Attributes:
        tasks: names of lm-eval's tasks, files of such.
        mmlu: where MMLU's questions are; ``mmlu_shots``: those that are answered before them, if not there.
        data: texts.
        references: rows with what should come.
        shots: solved examples for tasks that are files of rows.
        num_fewshot: solved examples before each question of a task.
        limit: rows of each file and task, the first ones.
        apply_chat_template: put the questions of tasks as conversations.
        system: a system prompt before the rows with references.
        max_new_tokens: of an answer to these.
        max_length: tokens that are read at once.
        batch_size: of MMLU.
        with_base: measure the base of an adapter too.
        contamination: look for the rows in the training data.
        train_data: that, where it is not a run's own.
        ngram: words in a row that overlap.
        log_samples: keep what each task asked and was answered.
        skip_bad_rows: leave out rows that cannot be answered.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    tasks: list[str] = []
    mmlu: str | None = None
    mmlu_shots: str | None = None
    data: list[str] = []
    references: list[str] = []
    shots: str | None = None
    num_fewshot: int | None = None
    limit: int | None = None
    apply_chat_template: bool = False
    system: str | None = None
    max_new_tokens: int = 256
    max_length: int | None = None
    batch_size: int = 8
    with_base: bool = True
    contamination: bool = False
    train_data: list[str] = []
    ngram: int = N
    log_samples: bool = False
    skip_bad_rows: Skip = False


def evaluate(
    path: str,
    wanted: Wanted,
    *,
    output: Path | None = None,
    device: Device = "auto",
    trust_remote_code: bool = False,
    progress: Progress = lambda *_: None,
) -> tuple[EvaluationReport, Path | None]:
    """Measure a model or a run; return what was found, and the folder that holds it, if one does.

    Args:
        path: a run, an adapter, or a model.
        wanted: what is measured.
        output: a folder for the results; None: ``evaluate/`` in a run's folder, or none.
        device: where the model runs.
        trust_remote_code: run code that comes with the model.
        progress: told what is being done, how many of it are done, and how many there are.

    Raises:
        InputError: there is nothing to measure or no such model, an input is not there or cannot be used.
    """
    began = datetime.datetime.now(datetime.UTC)
    folder = _folder(path, output, began)
    if folder:
        check_writable(folder)
    adapter = Path(locate(path).path)
    training = _training(adapter, wanted, trust_remote_code)
    parts = parts_of(wanted)
    progress("opening the model", 0, 0)
    opened = _opened(path, wanted, parts, device, trust_remote_code)
    sides = sides_of(opened.model, wanted.with_base)
    report = EvaluationReport(
        model=path,
        sides=[side.name for side in sides],
        weights=hf.describe_base(opened.model),
        date=began.isoformat(timespec="seconds"),
        versions=versions() | _version_of("lm_eval", bool(wanted.tasks)),
        options=wanted.model_dump(mode="json", exclude_defaults=True) | {"max_length": opened.length},
    )
    for part in parts:
        values = {side.name: part.measure(opened, side, progress) for side in sides}
        report.measured += _beside(values)
        report.notes += part.notes
        if training:
            progress("looking for overlaps", 0, 0)
            report.overlaps += list(
                _overlaps(part, values, functools.partial(training, opened.tokenizer), wanted.ngram)
            )
    if folder:
        _keep(folder, report, parts)
    return report, folder


def parts_of(wanted: Wanted) -> list[Part]:
    """Return what is measured, its inputs read.

    Raises:
        InputError: that is nothing, or an input cannot be used.
    """
    parts: list[Part] = [TextsPart(name, wanted.limit) for name in wanted.data]
    parts += [
        ReferencesPart(
            name,
            wanted.limit,
            wanted.skip_bad_rows,
            system=wanted.system,
            max_new_tokens=wanted.max_new_tokens,
        )
        for name in wanted.references
    ]
    for option, given, needs in (
        ("--mmlu-shots", wanted.mmlu_shots, wanted.mmlu), ("--shots", wanted.shots, wanted.tasks),
        ("--num-fewshot", wanted.num_fewshot, wanted.tasks), ("--log-samples", wanted.log_samples, wanted.tasks),
        ("--apply-chat-template", wanted.apply_chat_template, wanted.tasks),
        ("--system", wanted.system, wanted.references),
    ):  # fmt: skip
        if given and not needs:
            what = {"--mmlu-shots": "--mmlu", "--system": "--references"}.get(option, "--tasks")
            raise InputError(f"{option} belongs to {what}; name some, or leave it out.")
    if wanted.mmlu:
        parts.append(MmluPart(wanted.mmlu, wanted.mmlu_shots, wanted.limit, wanted.max_length, wanted.batch_size))
    if wanted.tasks:
        check_installed()
        from halfbyte.evaluate.tasks.named import load

        loaded = load(wanted.tasks, shots=wanted.shots, num_fewshot=wanted.num_fewshot)
        parts.append(TasksPart(loaded, wanted.limit, wanted.apply_chat_template, wanted.log_samples))
    if not parts:
        raise InputError(
            "evaluate was told to measure nothing; name --tasks, --mmlu, texts (--data), or rows with what should come "
            "(--references)."
        )
    return parts


def _opened(path: str, wanted: Wanted, parts: Sequence[Part], device: Device, trust_remote_code: bool) -> Opened:
    """Open a model, ready to be measured.

    Raises:
        InputError: it is none that writes on, or attends to fewer tokens than are to be read.
    """
    tokenizer = hf.load_tokenizer(path, trust_remote_code=trust_remote_code)
    model: Any = hf.load(path, device=device, trust_remote_code=trust_remote_code)
    check_generates(model)
    if model.config.is_encoder_decoder and not all(part.takes_sources for part in parts):
        raise InputError(f"{path} turns one text into another; what can be measured of it is answers (--references).")
    base: Any = base_of(model)
    if base is model and any(isinstance(module, FrozenLinear) for module in model.modules()):
        fuse(model)  # with an adapter it is by now
    bind_head(base)
    limit, asked = most_positions(model), wanted.max_length
    if limit and asked and asked > limit:
        raise InputError(f"--max-length {asked:,} is more than {path} attends to: {limit:,}.")
    return Opened(model, tokenizer, asked or min(limit or LONGEST, LONGEST), asked or limit or LONGEST)


def _version_of(library: str, wanted: bool) -> dict[str, str]:
    return {library: importlib.metadata.version(library)} if wanted else {}


def _folder(path: str, output: Path | None, began: datetime.datetime) -> Path | None:
    """Return where the results go, if they are kept."""
    if output is not None:
        return absolute(output)
    folder = RunFolder(absolute(path))
    return folder.evaluations / began.strftime("%Y-%m-%dT%H-%M-%SZ") if folder.config.is_file() else None


def _keep(folder: Path, report: EvaluationReport, parts: Sequence[Part]) -> None:
    with whole_folder(folder) as made:
        report.write(made / RESULTS)
        for part in parts:
            for name, lines in part.kept.items():
                text = "".join(f"{json.dumps(line, ensure_ascii=False, default=str)}\n" for line in lines)
                (made / name.replace("/", "_")).write_text(text, encoding="utf-8")


def _beside(values: Mapping[str, Values]) -> list[Measured]:
    """Return the metrics of the sides beside each other."""
    first = next(iter(values.values()))
    return [_measured(key, {side: found[key] for side, found in values.items()}) for key in first]


def _measured(key: tuple[str, str], found: Mapping[str, Value]) -> Measured:
    one = next(iter(found.values()))
    apart = None
    if len(found) == 2:
        before, after = found.values()
        apart = Figure(value=after.estimate.value - before.estimate.value)
        if before.rows is not None and after.rows is not None:
            apart = Figure.of(difference(before.rows, after.rows))
    return Measured(
        task=key[0],
        metric=key[1],
        count=one.count,
        higher_is_better=one.better,
        figures={side: Figure.of(value.estimate) for side, value in found.items()},
        difference=apart,
        is_inner=one.is_inner,
    )


def _training(
    adapter: Path, wanted: Wanted, trust_remote_code: bool
) -> Callable[[Any], Iterator[tuple[str, str]]] | None:
    """Return what yields the training data's texts, each with where it stands, given the tokenizer.

    Raises:
        InputError: there are none.
    """
    if wanted.train_data:
        if not wanted.contamination:
            raise InputError("--train-data is looked through with --contamination; set that, or leave it out.")
        return lambda _: (pair for name in wanted.train_data for pair in _strings(name))
    if not wanted.contamination:
        return None
    if not has_rows(adapter):
        raise InputError(
            f"{adapter} is no run of halfbyte, so its training data are not known; name them (--train-data FILE)."
        )
    rows = rows_again(adapter, trust_remote_code=trust_remote_code).train.rows
    return lambda tokenizer: _decoded(rows, tokenizer)


def _strings(name: str) -> Iterator[tuple[str, str]]:
    """Yield the rows of a file as texts: all that is text in them."""
    for source in resolve(name):
        for where, row in read_source(source):
            yield where, "\n".join(_within(row))


def _within(value: Any) -> Iterator[str]:
    if isinstance(value, str):
        yield value
    elif isinstance(value, Mapping):
        for one in value.values():
            yield from _within(one)
    elif isinstance(value, list | tuple):
        for one in value:
            yield from _within(one)


def _decoded(rows: Any, tokenizer: Any) -> Iterator[tuple[str, str]]:
    """Yield rows of tokens as texts: what was trained on, and nothing that was cut off or held out."""
    for start in range(0, len(rows), AT_ONCE):
        part = rows[start : start + AT_ONCE]
        for number, where in enumerate(part["where"]):
            row = {name: values[number] for name, values in part.items()}
            for ids, _ in sequences_of(row):
                yield where, str(tokenizer.decode(ids, skip_special_tokens=True))


def _overlaps(part: Part, values: Mapping[str, Values], training: Training, ngram: int) -> Iterator[Overlap]:
    """Yield what of a part's rows was trained on, and its metrics without them."""
    texts = part.texts()
    placed = [pair for own in texts.values() for pair in own]
    found = iter(overlaps([text for _, text in placed], training, ngram))
    for task, own in texts.items():
        hits = [next(found) for _ in own]
        clean = np.array([hit is None for hit in hits])
        pairs = [(where, hit) for (where, _), hit in zip(own, hits, strict=True) if hit]
        examples = [
            Example(where=where, words=hit.gram, trained=hit.where, covered=hit.covered)
            for where, hit in pairs[:EXAMPLES]
        ]
        yield Overlap(
            task=task,
            ngram=ngram,
            rows=len(own),
            overlapping=len(pairs),
            covered=sum(hit.covered for _, hit in pairs) / max(1, len(pairs)),
            examples=examples,
            clean=_on_clean(task, values, clean) if clean.any() and not clean.all() else [],
        )


def _on_clean(task: str, values: Mapping[str, Values], clean: Any) -> list[Measured]:
    """Return the metrics on rows that do not overlap, where each row's part in them is known."""
    sides: dict[str, Values] = {
        side: {
            key: Value.of(value.rows.only(clean), better=value.better)
            for key, value in found.items()
            if key[0] == task and value.rows is not None and len(value.rows) == len(clean)
        }
        for side, found in values.items()
    }
    return _beside(sides)

"""What a user calls data, and the files or hub data sets that it means.

    rows.jsonl   data/   "data/*.csv"   -             a file, the data files in a folder, a pattern, standard input
    data@train                                        one split of a folder
    user/name   user/name:config@split                a data set of the hub
    alpaca                                            one of the data sets of QLoRA's paper (``catalog``)
    rows.jsonl@0.3                                    each with a weight

A weight is how often a row is taken: of 0.3 that is three rows of ten, drawn with a seed; of 2.5 each row twice and
half of them a third time. That holds for every few rows; which of them is drawn. A source may have options of its
own, in YAML, ``max_rows`` among them: its first rows alone are read.
"""

import difflib
import itertools
import os
import random
import re
from collections.abc import Iterator, Mapping
from pathlib import Path, PurePath
from typing import Any

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from halfbyte.data import catalog, hub
from halfbyte.data.named_files import BLOCK, STANDARD_INPUT, Files, files_of
from halfbyte.data.readers import Progress, is_there, kind_of, near, read_rows, shown_path
from halfbyte.data.trees import gathered
from halfbyte.errors import InputError, counted, named, nearest
from halfbyte.files import absolute

HUB_ID = re.compile(r"(?P<id>[\w-][\w.-]*/[\w.-]+)(:(?P<config>[^@:]+))?(@(?P<split>[^@]+))?")
STRETCH = 20
"""Rows of which a weight takes its share."""
NUMBER = re.compile(r"\d+(\.\d*)?|\.\d+")


class Source(BaseModel):
    """One source of rows, with options of its own that win over the run's."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    path: str
    weight: float = Field(default=1.0, gt=0, le=1000)
    max_rows: int | None = Field(default=None, ge=1)
    config: str | None = None
    split: str | None = None
    format: str | None = None
    columns: dict[str, str] | None = None
    template: str | None = None
    encoding: str | None = None
    split_text: int | str | None = None

    @property
    def is_hub(self) -> bool:
        """Whether it is a data set of the hub."""
        return self.path != STANDARD_INPUT and not self.path.startswith("/")


def resolve(given: Any) -> list[Source]:
    """Return the sources that a user names: with a word, a path, a mapping of options, or several of these.

    Paths become absolute; whether they are there is looked at when they are read.

    Raises:
        InputError: a word is empty, or a source has an unknown option.
    """
    words = list(given) if isinstance(given, list | tuple) else [given]
    if not words:
        raise InputError("data names nothing; name a file, a folder or a hub id.")
    return [_source(word) for word in words]


def _source(given: Any) -> Source:
    if isinstance(given, Source):
        return given
    if isinstance(given, Mapping):
        unknown = next((key for key in given if key not in Source.model_fields), None)
        if unknown is not None:
            raise InputError(
                f"a source of data has an unknown option {unknown!r}{nearest(str(unknown), Source.model_fields)}."
            )
        if "path" not in given:
            raise InputError("a source of data has no path; write {path: ..., weight: ...}.")
        source = _source(given["path"])
        return _made(**source.model_dump(exclude_defaults=True) | dict(given) | {"path": source.path})
    if not isinstance(given, str | PurePath):
        raise InputError(f"{given!r} is no name of data; name a file, a folder or a hub id.")
    word = str(given).strip()
    if not word:
        raise InputError("data is empty; name a file, a folder or a hub id.")
    if word == STANDARD_INPUT:
        return Source(path=word)
    path = absolute(word)
    if is_there(path):
        return Source(path=str(path))
    name, _, behind = word.rpartition("@")
    if name and NUMBER.fullmatch(behind):
        source = _source(name)
        return _made(**source.model_dump(exclude_defaults=True) | {"weight": float(behind)})
    if name and os.path.isdir(before := absolute(name)):
        return Source(path=str(before), split=behind)
    if name and os.path.isfile(before):
        raise InputError(f"{word}: what stands behind @ is how often a row is taken, such as 0.3 or 2.")
    if known := catalog.find(word):
        return Source(**known.source)
    found = HUB_ID.fullmatch(word)
    if found and not word.startswith((".", "~")) and kind_of(Path(word)) is None and not _is_mistyped(path):
        return Source(path=found["id"], config=found["config"], split=found["split"])
    if not near(path) and (hint := nearest(word, catalog.DATASETS)):
        raise InputError(
            f"There is no file {shown_path(path)}, and no data set {word!r} of QLoRA's paper{hint}; name one of them, "
            "a file, a folder or a hub id."
        )
    return Source(path=str(path))


def _made(**options: Any) -> Source:
    try:
        source = Source(**options)
    except ValidationError as error:
        first = error.errors()[0]
        problem = first["msg"].removeprefix("Value error, ").removeprefix("Input ")
        raise InputError(
            f"{options['path']}: {first['loc'][0]} {first['input']!r} of this source is wrong, it {problem}."
        ) from None
    if source.config and not source.is_hub:
        raise InputError(f"{source.path} has no configuration {source.config!r}: only data sets of the hub have such.")
    return source


def _is_mistyped(path: Path) -> bool:
    """Tell whether what looks like a hub id is nearly the name of a file: in a folder that is there, or nearly so."""
    if path.parent.is_dir():
        return near(path) != ""
    try:
        folders = {entry.name: entry for entry in path.parent.parent.iterdir() if entry.is_dir()}
        close = difflib.get_close_matches(path.parent.name, folders, n=1, cutoff=0.6)
        inside = [entry.stem for entry in folders[close[0]].iterdir()] if close else []
    except OSError:
        return False
    return bool(difflib.get_close_matches(path.stem, inside, n=1, cutoff=0.8))


def named_sources(sources: list[Source]) -> str:
    """Return the sources' names for a message."""
    return named(source.path for source in sources)


def read_source(
    source: Source,
    progress: Progress | None = None,
    *,
    seed: int = 0,
    said: list[str] | None = None,
    encoding: str | None = None,
    split_text: int | str | None = None,
) -> Iterator[tuple[str, Any]]:
    """Yield the rows of a source, as often as its weight says, each with where it stands.

    Args:
        source: what is read.
        progress: called now and then with the rows read, the bytes read, and all bytes.
        seed: of the draw of a weight.
        said: is told, in sentences, what was found out about files.
        encoding: of text files that do not say their own.
        split_text: how plain text is divided.

    Raises:
        InputError: nothing is there, or something cannot be read.
    """
    said = said if said is not None else []
    if source.is_hub:
        rows = hub.read(source.path, source.config, source.split)
    elif _is_saved(source):
        rows = hub.read_saved(Path(source.path), source.split)
    else:
        rows = _files(source, progress, said, source.encoding or encoding, source.split_text or split_text)
    if source.max_rows is not None:
        rows = itertools.islice(rows, source.max_rows)
    if source.weight != 1:
        rows = gathered(rows)  # a tree of messages is taken as one
    read = taken = 0
    for row, times in zip(rows, _times(source.weight, seed), strict=False):
        read += 1
        taken += times
        yield from itertools.repeat(row, times)
    if source.weight % 1:
        of = "of" if source.weight < 1 else "from"
        said.append(f"{source.path}@{source.weight:g}: {taken:,} {of} {counted(read, 'row')}")


def _times(weight: float, seed: int) -> Iterator[int]:
    """Yield how often each row is taken: of every ``STRETCH`` rows the share that is due, but which ones is drawn."""
    whole, part = divmod(weight, 1)
    draw = random.Random(seed)
    due = draw.random()
    while True:
        due += part * STRETCH
        more = {*draw.sample(range(STRETCH), int(due))} if part else ()
        due -= len(more)
        yield from (int(whole) + (place in more) for place in range(STRETCH))


def fingerprint(source: Source, *, contents: bool = True) -> str:
    """Return a digest of a source's options and of every byte of its files.

    Args:
        source: whose.
        contents: read the bytes; without it their number and the time of change stand for them, which takes no time
            but takes a copy of a file for another one.

    Raises:
        InputError: nothing is there, or something cannot be read.
    """
    import xxhash

    digest = xxhash.xxh3_128(repr(source).encode())
    if source.is_hub:
        digest.update(hub.fingerprint(source.path, source.config, source.split))
        return str(digest.hexdigest())
    found = _found(source)
    for file in found.files:
        digest.update(str(found.name or file).encode(errors="surrogateescape"))
        try:
            if not contents:
                about = file.stat()
                digest.update(f"{about.st_size} {about.st_mtime_ns}".encode())
                continue
            with file.open("rb") as stream:
                while block := stream.read(BLOCK):
                    digest.update(block)
        except OSError as error:
            raise InputError(f"{file} cannot be read: {error.strerror}.") from error
    return str(digest.hexdigest())


def inputs_of(sources: list[Source]) -> list[Path]:
    """Return the files of sources that are on this machine, without what comes through standard input.

    Raises:
        InputError: nothing is there.
    """
    here = (source for source in sources if not source.is_hub and source.path != STANDARD_INPUT)
    return [file for source in here for file in _found(source).files]


def _found(source: Source) -> Files:
    """Return the files of a source of this machine."""
    if _is_saved(source):
        return Files(sorted(Path(source.path).rglob("*.arrow")))
    return files_of(source.path, source.split)


def _is_saved(source: Source) -> bool:
    try:
        return hub.is_saved(Path(source.path))
    except (OSError, ValueError):  # told when its files are looked for
        return False


def _files(
    source: Source, progress: Progress | None, said: list[str], encoding: str | None, split_text: int | str | None
) -> Iterator[tuple[str, Any]]:
    found = files_of(source.path, source.split)
    said += found.said
    total = sum(file.stat().st_size for file in found.files if file.is_file())
    rows = done = 0

    def passed_on(_: int, here: int, __: int) -> None:
        if progress:
            progress(rows, done + here, total)

    for file in found.files:
        options: dict[str, Any] = {"encoding": encoding, "split_text": split_text, "name": found.name}
        for row in read_rows(file, passed_on, said=said, **options):
            rows += 1
            yield row
        done += file.stat().st_size

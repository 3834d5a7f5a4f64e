"""Rows of token ids and labels in a memory-mapped table: what a million of them take is disk and cache, not memory.

Examples stream through :func:`halfbyte.data.tokens.encode_examples` into a file in Arrow's stream format, some thousand
rows at a time, and are counted in passing. The file is then mapped as a ``datasets.Dataset``:

    input_ids   int32 list
    labels      int32 list, as long; ``IGNORED`` where not trained
    where       text: the file and the row that it comes from

Labels are stored whole. As stretches they would make the file of a long answer half as large, but nothing else could
read it as it stands.
"""

import dataclasses
import mmap
import os
import shutil
import tempfile
import uuid
import weakref
from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pyarrow as pa

from halfbyte.choices import IGNORED
from halfbyte.data.formats import Example
from halfbyte.data.tokens import Row, encode_examples
from halfbyte.tables import WHERE, Digest

if TYPE_CHECKING:
    import datasets
    from transformers import PreTrainedTokenizerBase

BATCH = 1 << 18
"""Tokens that are written at once; a row more at the most."""
NAMES = 1000
"""Names of unused columns that are kept: keys of data that are numbers have no end."""


@dataclasses.dataclass(frozen=True)
class Tokenized:
    """Rows to train on, and what became of the examples.

    Attributes:
        rows: a dataset with the columns ``input_ids``, ``labels`` and ``where``, at most ``max_length`` tokens each,
            each with a trained token; in the order of the examples, of which a conversation may take several.
        examples: how many there were.
        truncated: examples that lost tokens to ``max_length``.
        tokens: in all rows.
        trained_tokens: those of them that have a label.
        longest: tokens of the longest row.
        largest_id: the greatest token id.
        digest: of ids, labels and their order (:class:`halfbyte.tables.Digest`).
        unused: columns of the data that had no part in the examples, with the number of examples that had them.
    """

    rows: "datasets.Dataset"
    examples: int
    truncated: int
    tokens: int
    trained_tokens: int
    longest: int
    largest_id: int
    digest: str
    unused: dict[str, int]


def tokenize(
    examples: Iterable[Example], tokenizer: "PreTrainedTokenizerBase", max_length: int, folder: Path | None = None
) -> Tokenized:
    """Turn examples into rows of token ids and labels, cut off at the right after ``max_length`` tokens.

    Args:
        examples: from :func:`halfbyte.data.read_examples`; they are read as they are needed.
        tokenizer: a fast one.
        max_length: tokens.
        folder: where the file of rows, ``rows.arrow``, is to lie and stay; by default in a temporary folder that is
            removed when nobody uses the rows any more.

    Raises:
        InputError: no answer of an example begins within ``max_length``, the chat template cannot write one, or no
            stop token is known.
    """
    if folder is not None:
        folder.mkdir(parents=True, exist_ok=True)
        file = folder / "rows.arrow"
        part = folder / f".rows-{uuid.uuid4().hex}.part"  # whoever has mapped an older file keeps it
        try:
            counts = _write(part, examples, tokenizer, max_length)
            os.replace(part, file)
        finally:
            part.unlink(missing_ok=True)
        return Tokenized(_open(file), **counts)
    temporary = Path(tempfile.mkdtemp(prefix="halfbyte-rows-"))
    try:
        counts = _write(temporary / "rows.arrow", examples, tokenizer, max_length)
        return Tokenized(_open(temporary / "rows.arrow", temporary=True), **counts)
    except BaseException:
        shutil.rmtree(temporary, ignore_errors=True)
        raise


def _open(file: Path, *, temporary: bool = False) -> "datasets.Dataset":
    """Map a file; a temporary one goes, with its folder, when the last Arrow buffer does that lies in the mapping.

    Selections and copies of the dataset share these buffers, but no object of Python's that could be watched instead.
    """
    import datasets  # takes a second, which a chat need not wait

    with file.open("rb") as stream:
        mapping = mmap.mmap(stream.fileno(), 0, access=mmap.ACCESS_READ)
    if temporary:
        weakref.finalize(mapping, _remove, file.parent, os.getpid())
    table = pa.ipc.open_stream(pa.py_buffer(mapping)).read_all()
    return datasets.Dataset(datasets.table.MemoryMappedTable(table, str(file)))


def _remove(folder: Path, owner: int) -> None:
    if os.getpid() == owner:  # not a worker of the data loader
        shutil.rmtree(folder, ignore_errors=True)


def _write(
    file: Path, examples: Iterable[Example], tokenizer: "PreTrainedTokenizerBase", max_length: int
) -> dict[str, Any]:
    """Write the rows of ``examples``; return what was counted, as in :class:`Tokenized`."""
    count = truncated = 0
    unused: dict[str, int] = {}
    with _Stream(file) as stream:
        for encoded in encode_examples(examples, tokenizer, max_length):
            count += 1
            truncated += encoded.truncated
            for name in encoded.example.unused:
                if name in unused or len(unused) < NAMES:
                    unused[name] = unused.get(name, 0) + 1
            for row in encoded.rows:
                stream.add(row, encoded.example.where)
    return {
        "examples": count,
        "truncated": truncated,
        "tokens": stream.tokens,
        "trained_tokens": stream.trained_tokens,
        "longest": stream.longest,
        "largest_id": stream.largest_id,
        "digest": stream.digest.hexdigest(),
        "unused": unused,
    }


class _Stream:
    """A file of rows that are written in batches and counted in passing."""

    def __init__(self, file: Path) -> None:
        ids = pa.list_(pa.int32())
        self.schema = pa.schema([("input_ids", ids), ("labels", ids), (WHERE, pa.string())])
        self.sink = pa.OSFile(str(file), "wb")
        self.stream = pa.ipc.new_stream(self.sink, self.schema)
        self.rows: list[Row] = []
        self.places: list[str] = []
        self.waiting = self.tokens = self.trained_tokens = self.longest = self.largest_id = 0
        self.digest = Digest()

    def add(self, row: Row, where: str) -> None:
        length = len(row["labels"])
        self.rows.append(row)
        self.places.append(where)
        self.tokens += length
        self.trained_tokens += int((row["labels"] != IGNORED).sum())
        self.longest = max(self.longest, length)
        self.largest_id = max(self.largest_id, int(row["input_ids"].max()))
        self.waiting += length
        if self.waiting >= BATCH:
            self.flush()

    def flush(self) -> None:
        offsets = np.cumsum([0, *(len(row["labels"]) for row in self.rows)], dtype=np.int32)
        columns = [
            pa.ListArray.from_arrays(
                offsets, np.concatenate([np.zeros(0, np.int32), *(row[name] for row in self.rows)])
            )
            for name in ("input_ids", "labels")
        ]
        batch = pa.RecordBatch.from_arrays([*columns, pa.array(self.places, pa.string())], schema=self.schema)
        self.digest.update(batch)
        self.stream.write_batch(batch)
        self.rows, self.places, self.waiting = [], [], 0

    def __enter__(self) -> "_Stream":
        return self

    def __exit__(self, kind: object, *_: object) -> None:
        if kind is None:
            self.flush()
            self.stream.close()
        self.sink.close()

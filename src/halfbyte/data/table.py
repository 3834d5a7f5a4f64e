"""Rows of token ids and labels in a memory-mapped table: what a million of them take is disk and cache, not memory.

Examples stream through :func:`halfbyte.data.tokens.encode_examples` into a file in Arrow's stream format, some thousand
rows at a time, and are counted in passing. The file is then mapped as a ``datasets.Dataset``:

    input_ids   int32 list
    labels      int32 list, as long; ``IGNORED`` where not trained
    where       text: the file and the row that it comes from
    reference   text, for evaluation only: what the last answer of the row should be

and what else the form of the rows has (:mod:`halfbyte.data.forms`).

Beside the file (``rows.arrow``) stands what was counted (``about.json``). Labels are stored whole. As stretches they
would make the file of a long answer half as large, but nothing else could read it as it stands.
"""

import dataclasses
import json
import mmap
import os
import shutil
import sys
import tempfile
import weakref
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pyarrow as pa

from halfbyte.choices import IGNORED
from halfbyte.data.bad_rows import BadRows, Skip
from halfbyte.data.examples import BadRow, Chat, Example
from halfbyte.data.forms import GOOD, LISTS, Form, Former, Placed, sides
from halfbyte.data.tokens import Encoded, Row, decode_trained, encode_examples
from halfbyte.tables import WHERE, Digest

if TYPE_CHECKING:
    import datasets
    from transformers import PreTrainedTokenizerBase

ROWS = "rows.arrow"
ABOUT = "about.json"
REFERENCE = "reference"
BATCH = 1 << 18
"""Tokens that are written at once; a row more at the most."""
NAMES = 1000
"""Names of unused columns that are kept: keys of data that are numbers have no end."""


@dataclasses.dataclass
class Counts:
    """What became of the examples.

    Attributes:
        examples: how many there were, bad ones apart.
        chats: those that are conversations.
        truncated: examples that lost tokens to ``max_length``.
        rows: of the table; a conversation may take several.
        tokens: in all rows.
        trained_tokens: those of them that have a label.
        longest: tokens of the longest row.
        largest_id: the greatest token id.
        digest: of ids, labels and their order (:class:`halfbyte.tables.Digest`).
        unused: columns of the data that had no part in the examples, with the number of examples that had them.
        notes: what was made of examples that their author might not expect, with the number of examples.
    """

    examples: int = 0
    chats: int = 0
    truncated: int = 0
    rows: int = 0
    tokens: int = 0
    trained_tokens: int = 0
    longest: int = 0
    largest_id: int = 0
    digest: str = ""
    unused: dict[str, int] = dataclasses.field(default_factory=dict)
    notes: dict[str, int] = dataclasses.field(default_factory=dict)

    def add(self, encoded: Encoded) -> None:
        """Count an example."""
        self.examples += 1
        self.chats += isinstance(encoded.example, Chat) or isinstance(getattr(encoded.example, "prompt", None), list)
        self.truncated += encoded.truncated
        for names, counts in ((encoded.example.unused, self.unused), (encoded.notes, self.notes)):
            for name in names:
                if name in counts or len(counts) < NAMES:
                    counts[name] = counts.get(name, 0) + 1


@dataclasses.dataclass(frozen=True)
class Tokenized:
    """Rows to train on, and what became of the examples.

    Attributes:
        rows: a dataset with the columns ``input_ids``, ``labels`` and ``where``, at most ``max_length`` tokens each,
            each with a trained token; in the order of the examples.
        counts: see :class:`Counts`.
    """

    rows: "datasets.Dataset"
    counts: Counts


def tokenize(
    examples: Iterable[Example | BadRow],
    tokenizer: "PreTrainedTokenizerBase",
    max_length: int,
    *,
    skip_bad_rows: Skip = False,
    form: Form = "answers",
    **settings: Any,
) -> Tokenized:
    """Turn examples into rows of token ids and labels, cut off at the right after ``max_length`` tokens.

    The table lies in a temporary folder that is removed when nobody uses the rows any more;
    :func:`halfbyte.data.prepare` keeps tables.

    Args:
        examples: from :func:`halfbyte.data.read_examples`; they are read as they are needed.
        tokenizer: of the model.
        max_length: tokens.
        skip_bad_rows: go on without rows that cannot be trained on.
        form: of the rows: see :mod:`halfbyte.data.forms`.
        settings: further ones of :func:`halfbyte.data.encode_examples`.

    Raises:
        InputError: rows cannot be trained on, or none can.
    """
    temporary = Path(tempfile.mkdtemp(prefix="halfbyte-rows-"))
    try:
        bad = BadRows()
        most = sys.maxsize if form == "blocks" else max_length
        with Table(temporary, form=form, length=max_length) as table:
            for encoded in encode_examples(examples, tokenizer, most, **settings):
                if encoded.bad:
                    bad.add(encoded.bad)
                else:
                    table.add(encoded)
        bad.check(bad.total + table.counts.examples, skip_bad_rows)
        return open_table(temporary, temporary=temporary)
    except BaseException:
        shutil.rmtree(temporary, ignore_errors=True)
        raise


class Table:
    """A folder that rows are written to in batches, and counted in passing; whole when the block has ended well.

    Args:
        folder: is there.
        reference: writes the column ``reference``; the text of a row's last answer.
        form: of the rows.
        length: tokens of a block, where the form is that.
        columns: in the place of the form's, the lists of integers of a row; the first two are ``input_ids`` and
            ``labels``.
    """

    def __init__(
        self,
        folder: Path,
        reference: Callable[[Row], str] | None = None,
        *,
        form: Form = "answers",
        length: int = 0,
        columns: Sequence[str] | None = None,
    ) -> None:
        self.folder = folder
        self.counts = Counts()
        self._reference = reference
        self._former = Former(form, length)
        self._lists = tuple(columns or LISTS[form])
        verdicts = [(GOOD, pa.bool_())] if form == "judged" else []
        texts = [(WHERE, pa.string()), *([(REFERENCE, pa.string())] if reference else [])]
        self._trained_on = [*self._lists, *(name for name, _ in verdicts)]
        self._schema = pa.schema([*((name, pa.list_(pa.int32())) for name in self._lists), *verdicts, *texts])
        self._sink = pa.OSFile(str(folder / ROWS), "wb")
        self._stream = pa.ipc.new_stream(self._sink, self._schema)
        self._rows: list[Row] = []
        self._places: list[str] = []
        self._waiting = 0
        self._digest = Digest()

    def add(self, encoded: Encoded) -> None:
        """Write the rows of an example."""
        self.counts.add(encoded)
        for placed in self._former.rows(encoded):
            self._add(placed)

    def _add(self, placed: Placed) -> None:
        row, counts = placed.row, self.counts
        self._rows.append(row)
        self._places.append(placed.where)
        counts.rows += 1
        for ids, labels in sides(row):
            counts.tokens += len(ids)
            counts.trained_tokens += int((labels != IGNORED).sum())
            counts.longest = max(counts.longest, len(ids), len(labels))
            counts.largest_id = max(counts.largest_id, int(ids.max()))
            self._waiting += len(ids)
        if self._waiting >= BATCH:
            self._flush()

    def _flush(self) -> None:
        columns = [self._list(name) for name in self._lists]
        columns += [pa.array([row[name] for row in self._rows]) for name in self._trained_on if name == GOOD]
        columns.append(pa.array(self._places, pa.string()))
        if self._reference:
            columns.append(pa.array([self._reference(row) for row in self._rows], pa.string()))
        batch = pa.RecordBatch.from_arrays(columns, schema=self._schema)
        self._digest.update(batch.select(self._trained_on))
        self._stream.write_batch(batch)
        self._rows, self._places, self._waiting = [], [], 0

    def _list(self, name: str) -> Any:
        offsets = np.cumsum([0, *(len(row[name]) for row in self._rows)], dtype=np.int32)
        values = np.concatenate([np.zeros(0, np.int32), *(row[name] for row in self._rows)])
        return pa.ListArray.from_arrays(offsets, values)

    def __enter__(self) -> "Table":
        return self

    def __exit__(self, kind: object, *_: object) -> None:
        if kind is None:
            for placed in self._former.rest():
                self._add(placed)
            self._flush()
            self._stream.close()
        self._sink.close()
        if kind is None:
            self.counts.digest = self._digest.hexdigest()
            (self.folder / ABOUT).write_text(json.dumps(dataclasses.asdict(self.counts)), encoding="utf-8")


def last_answer(tokenizer: "PreTrainedTokenizerBase") -> Callable[[Row], str]:
    """Return what tells the text of a row's last trained stretch, without special tokens."""

    def reference(row: Row) -> str:
        return decode_trained(tokenizer, row, skip_special_tokens=True)[-1]

    return reference


def open_table(folder: Path, *, temporary: Path | None = None) -> Tokenized:
    """Map a table; a ``temporary`` folder goes when the last Arrow buffer does that lies in the mapping.

    Selections and copies of the dataset share these buffers, but no object of Python's that could be watched instead.
    """
    import datasets  # takes a second, which a chat need not wait

    counts = Counts(**json.loads((folder / ABOUT).read_text(encoding="utf-8")))
    with (folder / ROWS).open("rb") as stream:
        mapping = mmap.mmap(stream.fileno(), 0, access=mmap.ACCESS_READ)
    if temporary:
        weakref.finalize(mapping, _remove, temporary, os.getpid())
    table = pa.ipc.open_stream(pa.py_buffer(mapping)).read_all()
    return Tokenized(datasets.Dataset(datasets.table.MemoryMappedTable(table, str(folder / ROWS))), counts)


def _remove(folder: Path, owner: int) -> None:
    if os.getpid() == owner:  # not a worker of the data loader
        shutil.rmtree(folder, ignore_errors=True)

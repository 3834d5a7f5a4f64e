"""Tables of rows (``datasets.Dataset``), looked at column by column in Arrow's own memory, never as Python objects.

What the data path and the trainers both need to know of a table: its digest, how long its rows are, and where the rows
of a batch stand in it. A table may be memory-mapped and larger than memory, so it is gone through in parts.
"""

import hashlib
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

WHERE = "where"
"""The column of a table that says where in the data a row comes from. It is no part of what is trained on."""
PART = 10_000
"""Rows of a table that are looked at together."""


class Digest:
    """SHA-256 of a table's content: of the names, types, values and order of its columns, without ``WHERE``.

    It does not depend on how the table is divided into parts, nor on the file that it lies in.
    """

    def __init__(self) -> None:
        self._hashes: dict[str, Any] = {}

    def update(self, part: pa.Table | pa.RecordBatch) -> None:
        """Take in the next rows."""
        for name in part.column_names:
            if name != WHERE:
                column = part[name]
                for chunk in column.chunks if isinstance(column, pa.ChunkedArray) else [column]:
                    self._array(name, chunk)

    def hexdigest(self) -> str:
        """Return the digest of all rows so far."""
        whole = hashlib.sha256()
        for name, column in sorted(self._hashes.items()):
            whole.update(f"{len(name)} {name} {column.hexdigest()}\n".encode())
        return whole.hexdigest()

    def _array(self, name: str, array: pa.Array) -> None:
        """Take in values by streams: of a list its lengths (null: -1), then its values in a stream of their own."""
        if _is_list(array.type):
            self._stream(f"{name} lengths", pc.list_value_length(array).fill_null(-1).cast(pa.int64()).to_numpy())
            self._array(f"{name} values", array.flatten())
        elif (pa.types.is_integer(array.type) or pa.types.is_floating(array.type)) and not array.null_count:
            self._stream(f"{name} {array.type}", array.to_numpy())
        else:
            self._stream(f"{name} {array.type}", "".join(f"{value!r}\n" for value in array.to_pylist()).encode())

    def _stream(self, name: str, values: Any) -> None:
        self._hashes.setdefault(name, hashlib.sha256()).update(values)


def digest(rows: Any) -> str:
    """Return the :class:`Digest` of a dataset."""
    found = Digest()
    for part in _parts(rows):
        found.update(part)
    return found.hexdigest()


def lengths(rows: Any, column: str = "input_ids") -> np.ndarray[Any, np.dtype[np.integer[Any]]]:
    """Return how many values each row of a dataset has in ``column``, a column of lists."""
    return np.concatenate([np.zeros(0, np.int32), *(_lists(part, column)[1] for part in _parts(rows))])


def places(rows: Any, samples: Sequence[Sequence[int]]) -> list[str | int | None]:
    """Say of each sample of token ids where it stands in a dataset with ``input_ids``.

    Returns:
        what the first such row has in its column ``WHERE``, or its number from 0; None for a sample that is not there.
    """
    found: dict[int, str | int] = {}
    first = 0
    for part in _parts(rows):
        values, sizes = _lists(part, "input_ids")
        starts = np.cumsum(sizes) - sizes
        for number, sample in enumerate(samples):
            if number in found:
                continue
            like = np.flatnonzero(sizes == len(sample))
            for offset, token in enumerate(sample):
                if not len(like):
                    break
                like = like[values[starts[like] + offset] == token]
            if len(like):
                row = int(like[0])
                found[number] = part[WHERE][row].as_py() if WHERE in part.column_names else first + row
        first += part.num_rows
    return [found.get(number) for number in range(len(samples))]


def _parts(rows: Any) -> Iterator[pa.Table]:
    """Yield the parts of a dataset in order; one that is transformed as it is read, or no dataset, is read by rows."""
    if hasattr(rows, "with_format") and (getattr(rows, "format", None) or {}).get("type") != "custom":
        yield from rows.with_format("arrow").iter(batch_size=PART)
        return
    part: list[dict[str, Any]] = []
    for row in rows:
        part.append({name: _plain(value) for name, value in row.items()})
        if len(part) == PART:
            yield _table(part)
            part = []
    if part:
        yield _table(part)


def _plain(value: Any) -> Any:
    return value.tolist() if hasattr(value, "tolist") else value


def _table(rows: Iterable[Mapping[str, Any]]) -> pa.Table:
    try:
        return pa.Table.from_pylist(list(rows))
    except (pa.ArrowInvalid, pa.ArrowTypeError):  # values that Arrow has no type for
        return pa.Table.from_pylist([{name: repr(value) for name, value in row.items()} for row in rows])


def _lists(part: pa.Table, column: str) -> tuple[Any, Any]:
    """Return the values of all lists of a column, one behind the other, and the lists' lengths."""
    array = part[column].combine_chunks()
    return array.flatten().to_numpy(zero_copy_only=False), pc.list_value_length(array).fill_null(0).to_numpy()


def _is_list(kind: pa.DataType) -> bool:
    return bool(pa.types.is_list(kind) or pa.types.is_large_list(kind) or pa.types.is_fixed_size_list(kind))

"""Parquet and Arrow: what is told of them while they are read, and values that Python cannot hold."""

from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from halfbyte.data.examples import BadRow
from halfbyte.data.readers import read_rows

KINDS = ("parquet", "file", "stream")


def write(path: Path, table: pa.Table, kind: str, rows: int = 1000) -> Path:
    if kind == "parquet":
        pq.write_table(table, path, row_group_size=rows)
        return path
    make = pa.ipc.new_file if kind == "file" else pa.ipc.new_stream
    with pa.OSFile(str(path), "wb") as sink, make(sink, table.schema) as writer:
        writer.write_table(table, max_chunksize=rows)
    return path


@pytest.mark.parametrize("kind", KINDS)
def test_progress_goes_through_the_whole_file(tmp_path: Path, kind: str) -> None:
    path = write(tmp_path / "d", pa.table({"text": [f"row {n}" for n in range(5000)]}), kind)
    told: list[tuple[int, int, int]] = []
    assert [row["text"] for _, row in read_rows(path, lambda *numbers: told.append(numbers))][4999] == "row 4999"
    size = path.stat().st_size
    assert [rows for rows, _, _ in told] == [1000, 2000, 3000, 4000, 5000, 5000]
    assert told == sorted(told) and told[-1] == (5000, size, size)
    assert 0.1 * size < told[0][1] < 0.4 * size and 0.5 * size < told[3][1] <= size


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("bad", ["text", "date"])
def test_a_value_that_python_cannot_hold_makes_one_bad_row(tmp_path: Path, kind: str, bad: str) -> None:
    offsets = pa.py_buffer(np.array([0, 1, 2, 3], np.int32))
    values = {
        "text": pa.StringArray.from_buffers(3, offsets, pa.py_buffer(b"a\xffc")),
        "date": pa.array([0, 2**61, 1], pa.timestamp("us")),
    }
    path = write(tmp_path / "d", pa.table({"x": values[bad], "n": [1, 2, 3]}), kind)
    rows = [row for _, row in read_rows(path)]
    assert [row if isinstance(row, BadRow) else row["n"] for row in rows][::2] == [1, 3]
    assert isinstance(rows[1], BadRow) and "row 2 holds a value that cannot be read" in str(rows[1])

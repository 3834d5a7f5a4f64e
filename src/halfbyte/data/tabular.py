"""Parquet and Arrow to rows, a batch at a time; how far reading has come is the position of the open file."""

from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any, BinaryIO

from halfbyte.data.examples import BadRow
from halfbyte.errors import InputError

if TYPE_CHECKING:
    import pyarrow as pa

BATCH = 1000


def read_parquet(place: Path, path: Path, file: BinaryIO) -> Iterator[tuple[str, Any]]:
    """Yield the rows of the Parquet file at ``place``, which messages call ``path``."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    try:
        # Buffered, as is the default, all that was read of the file would stay in memory to its end.
        whole = pq.ParquetFile(place, memory_map=True, pre_buffer=False)
        size, count = place.stat().st_size, max(whole.metadata.num_rows, 1)

        def batches() -> Iterator[pa.RecordBatch]:
            rows = 0
            for batch in whole.iter_batches(BATCH):
                rows += batch.num_rows
                file.seek(size * rows // count)
                yield batch

        yield from _rows(path, batches())
    except (pa.ArrowInvalid, pa.ArrowNotImplementedError) as error:
        raise _damaged(path, "Parquet", error) from error


def read_arrow(place: Path, path: Path, file: BinaryIO) -> Iterator[tuple[str, Any]]:
    """Yield the rows of the Arrow file at ``place``, of files' or of streams' format; messages call it ``path``."""
    import pyarrow as pa

    try:
        with pa.memory_map(str(place)) as source:
            size = source.size()
            is_file = source.read(6) == b"ARROW1"
            source.seek(0)

            def batches() -> Iterator[pa.RecordBatch]:
                if is_file:
                    reader = pa.ipc.open_file(source)
                    for number in range(reader.num_record_batches):
                        file.seek(size * (number + 1) // reader.num_record_batches)
                        yield reader.get_batch(number)
                else:
                    for batch in pa.ipc.open_stream(source):
                        file.seek(source.tell())
                        yield batch

            yield from _rows(path, batches())
    except pa.ArrowInvalid as error:
        raise _damaged(path, "Arrow", error) from error


def _rows(path: Path, batches: "Iterator[pa.RecordBatch]") -> Iterator[tuple[str, Any]]:
    row = 0
    for batch in batches:
        for part in range(0, batch.num_rows, BATCH):
            rows = batch.slice(part, BATCH)
            try:
                values = rows.to_pylist()
            except (ValueError, OverflowError):  # a date beyond Python's, text that is not UTF-8: one value of one row
                values = [
                    _value(f"{path}, row {row + number + 1}", rows.slice(number, 1)) for number in range(len(rows))
                ]
            for value in values:
                row += 1
                yield f"{path}, row {row}", value


def _value(where: str, row: "pa.RecordBatch") -> Any:
    try:
        return row.to_pylist()[0]
    except (ValueError, OverflowError) as error:
        return BadRow(where, "value that cannot be read", f"holds a value that cannot be read: {_first_line(error)}.")


def _first_line(error: Exception) -> str:
    return str(error).split("\n")[0].rstrip(".")


def _damaged(path: Path, kind: str, error: Exception) -> InputError:
    return InputError(f"{path} is no whole {kind} file ({_first_line(error)}); fetch it again.")

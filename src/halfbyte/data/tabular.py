"""Parquet and Arrow to rows, a batch at a time."""

from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

from halfbyte.errors import InputError

if TYPE_CHECKING:
    import pyarrow as pa

BATCH = 1000


def read_parquet(file: Path, path: Path) -> Iterator[tuple[str, Any]]:
    """Yield the rows of a Parquet file, which messages call ``path``."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    try:
        yield from _rows(path, pq.ParquetFile(file).iter_batches(BATCH))
    except (pa.ArrowInvalid, pa.ArrowNotImplementedError) as error:
        raise _damaged(path, "Parquet", error) from error


def read_arrow(file: Path, path: Path) -> Iterator[tuple[str, Any]]:
    """Yield the rows of an Arrow file, of files' or of streams' format, which messages call ``path``; it is mapped."""
    import pyarrow as pa

    try:
        with pa.memory_map(str(file)) as source:
            is_file = source.read(6) == b"ARROW1"
            source.seek(0)
            if is_file:
                reader = pa.ipc.open_file(source)
                batches = (reader.get_batch(number) for number in range(reader.num_record_batches))
            else:
                batches = iter(pa.ipc.open_stream(source))
            yield from _rows(path, batches)
    except pa.ArrowInvalid as error:
        raise _damaged(path, "Arrow", error) from error


def _rows(path: Path, batches: "Iterator[pa.RecordBatch]") -> Iterator[tuple[str, Any]]:
    row = 0
    for batch in batches:
        for part in range(0, batch.num_rows, BATCH):
            for value in batch.slice(part, BATCH).to_pylist():
                row += 1
                yield f"{path}, row {row}", value


def _damaged(path: Path, kind: str, error: Exception) -> InputError:
    first = str(error).split("\n")[0].rstrip(".")
    return InputError(f"{path} is no whole {kind} file ({first}); fetch it again.")

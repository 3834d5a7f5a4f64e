"""Tensors that are views of mapped files: which pages they lie on, which are read ahead of use and dropped behind it.

A weight of a 4-bit folder is a view of its safetensors file (design.md, section 3), so its bytes are the page cache's:
they come when somebody touches them, in small pieces and one after the other, and go when the system wants memory. Here
they come in large pieces and go when they are told to. What is computed with them cannot depend on either: a page that
is not there is read when it is touched.

``MADV_POPULATE_READ`` from one thread, front to back, is all it takes: the system reads ahead in large pages, for a
tenth of the processor time of reading or advising (LOG.md). But it reads some megabytes around what it is asked for, so
pieces that lie scattered (experts) are advised first, all of them, and then populated: the disk has them in its queue
together, and gives no more than them.
"""

import bisect
import ctypes
import errno
import mmap
import os
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

from torch import Tensor

from halfbyte.errors import InputError

CHUNK = 2**23
"""Bytes that are read at a time."""
ADVISED = 2**17
"""Bytes that the system is advised of at a time: of more it may read only what its read-ahead is, by default this."""
GAP = 2**16
"""Bytes between two tensors up to which they are read as one piece."""
_POPULATE_READ = 22
"""Linux's ``MADV_POPULATE_READ`` (5.14), which Python 3.11 lacks: maps pages, and fails where a touch would kill."""
_NORMAL = 0
_RANDOM = 1
_WILLNEED = 3
_DONTNEED = 4


class Piece(NamedTuple):
    """Whole pages of a mapped file.

    Attributes:
        address: of the first byte in memory.
        nbytes: of them.
        file: its name.
        offset: of the first byte in the file.
    """

    address: int
    nbytes: int
    file: str
    offset: int


def available() -> bool:
    """Return whether this system tells what is mapped and takes advice on it (Linux)."""
    return hasattr(os, "posix_fadvise") and Path("/proc/self/maps").is_file()


def pieces_of(tensors: Iterable[Tensor], maps: "Maps | None" = None) -> list[Piece]:
    """Return the pieces of files that CPU ``tensors`` are views of, in the order of their addresses.

    Tensors in memory of the process's own have none. What lies close together is one piece.

    Args:
        tensors: on the CPU.
        maps: of this process, for whoever asks often; looked up if not given.
    """
    maps = maps or Maps()
    spans = {(t.untyped_storage().data_ptr() + _first(t), _last(t) - _first(t)) for t in tensors if t.numel()}
    return joined(piece for span in spans if (piece := maps.piece(*span)) is not None)


def joined(pieces: Iterable[Piece], gap: int = GAP) -> list[Piece]:
    """Return ``pieces`` in the order of their addresses, as one where no more than ``gap`` bytes lie between two."""
    found: list[Piece] = []
    for piece in sorted(pieces):
        if found and _follows(found[-1], piece, gap):
            before = found.pop()
            end = max(before.address + before.nbytes, piece.address + piece.nbytes)
            piece = before._replace(nbytes=end - before.address)
        found.append(piece)
    return found


def inner(pieces: Iterable[Piece]) -> list[Piece]:
    """Return ``pieces`` without their first and last pages, which others may lie on too."""
    rim = 2 * mmap.PAGESIZE
    return [
        Piece(p.address + mmap.PAGESIZE, p.nbytes - rim, p.file, p.offset + mmap.PAGESIZE)
        for p in pieces
        if p.nbytes > rim
    ]


def _first(tensor: Tensor) -> int:
    return tensor.data_ptr() - tensor.untyped_storage().data_ptr()


def _last(tensor: Tensor) -> int:
    steps = sum((size - 1) * stride for size, stride in zip(tensor.shape, tensor.stride(), strict=True))
    return _first(tensor) + (steps + 1) * tensor.element_size()


def _follows(before: Piece, piece: Piece, gap: int) -> bool:
    close = piece.address <= before.address + before.nbytes + gap
    return close and before.file == piece.file and piece.address - before.address == piece.offset - before.offset


class Maps:
    """What files are mapped where in this process, when it is made."""

    def __init__(self) -> None:
        self._starts: list[int] = []
        self._maps: list[tuple[int, int, str]] = []  # end, offset, file
        for line in Path("/proc/self/maps").read_text().splitlines():
            span, rights, offset, _, inode, *name = line.split(maxsplit=5)
            if inode != "0" and name and rights.startswith("r"):
                start, end = (int(number, 16) for number in span.split("-"))
                self._starts.append(start)
                self._maps.append((end, int(offset, 16), name[0].removesuffix(" (deleted)")))

    def piece(self, address: int, nbytes: int) -> Piece | None:
        """Return the pages on which bytes from an address on lie, or None where they are of no file."""
        place = bisect.bisect_right(self._starts, address) - 1
        if place < 0:
            return None
        start, (end, offset, file) = self._starts[place], self._maps[place]
        if address + nbytes > end:
            return None
        first = address - address % mmap.PAGESIZE
        last = min(-(-(address + nbytes) // mmap.PAGESIZE) * mmap.PAGESIZE, end)
        return Piece(first, last - first, file, offset + first - start)


class Files:
    """Files of which pieces are read and dropped.

    Raises:
        InputError: one is not there any more, or is shorter than what is mapped of it.
    """

    def __init__(self, pieces: Iterable[Piece]) -> None:
        self._libc = ctypes.CDLL(None, use_errno=True)
        self._libc.madvise.argtypes = [ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int]
        self._open: dict[str, int] = {}
        for piece in pieces:
            if piece.file not in self._open:
                try:
                    self._open[piece.file] = os.open(piece.file, os.O_RDONLY)
                except OSError as error:
                    self.close()
                    raise _gone(piece, error.strerror or str(error)) from error

    def close(self) -> None:
        """Close the files; what is mapped stays."""
        while self._open:
            os.close(self._open.popitem()[1])

    def read(self, pieces: Sequence[Piece], scattered: bool = False) -> Iterator[int]:
        """Have pieces in memory; yield the bytes of each chunk that is.

        Args:
            pieces: in the order of their addresses.
            scattered: whether they lie among others that are not wanted: these are not read, at more processor time.

        Raises:
            InputError: the disk fails, or the file is shorter now.
        """
        if scattered:
            for chunk in (chunk for piece in pieces for chunk in _chunks(piece, ADVISED)):
                self._libc.madvise(chunk.address, chunk.nbytes, _WILLNEED)
        for piece in pieces:
            for chunk in _chunks(piece, CHUNK):
                if self._libc.madvise(chunk.address, chunk.nbytes, _POPULATE_READ):
                    self._otherwise(chunk, ctypes.get_errno())
                yield chunk.nbytes

    def drop(self, pieces: Iterable[Piece]) -> None:
        """Give the memory of pieces back; pages that another process has mapped stay in the cache."""
        for piece in pieces:
            self._libc.madvise(piece.address, piece.nbytes, _DONTNEED)
            os.posix_fadvise(self._open[piece.file], piece.offset, piece.nbytes, os.POSIX_FADV_DONTNEED)

    def read_around(self, pieces: Iterable[Piece], around: bool) -> None:
        """Let the system read around a page of pieces that is touched, as it does by itself, or that page alone."""
        for piece in pieces:
            self._libc.madvise(piece.address, piece.nbytes, _NORMAL if around else _RANDOM)

    def _otherwise(self, chunk: Piece, code: int) -> None:
        """Tell why a chunk did not come; a system that does not know how to be asked is asked in the older way."""
        file = self._open[chunk.file]
        size = os.fstat(file).st_size
        if size < chunk.offset + chunk.nbytes - mmap.PAGESIZE + 1:
            raise _gone(chunk, f"it has {size:,} bytes now")
        if code not in (errno.EINVAL, errno.ENOSYS):
            raise _gone(chunk, os.strerror(code))
        os.posix_fadvise(file, chunk.offset, chunk.nbytes, os.POSIX_FADV_WILLNEED)


def _gone(piece: Piece, why: str) -> InputError:
    return InputError(
        f"{piece.file} can no longer be read ({why}), and the weights of the model lie in it: it was changed or its "
        "disk fails. Restore the file and start again; a run goes on from its last checkpoint."
    )


def _chunks(piece: Piece, size: int) -> Iterator[Piece]:
    for first in range(0, piece.nbytes, size):
        nbytes = min(size, piece.nbytes - first)
        yield Piece(piece.address + first, nbytes, piece.file, piece.offset + first)

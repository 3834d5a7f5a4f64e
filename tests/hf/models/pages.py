"""What of mapped files is in memory."""

import ctypes
import mmap
from collections.abc import Sequence

from halfbyte import mapped


def resident(pieces: Sequence[mapped.Piece]) -> float:
    """Return the share of pages that are in memory, as the system says."""
    libc = ctypes.CDLL(None, use_errno=True)
    there = pages = 0
    for piece in pieces:
        count = -(-piece.nbytes // mmap.PAGESIZE)
        found = (ctypes.c_ubyte * count)()
        assert libc.mincore(ctypes.c_void_p(piece.address), ctypes.c_size_t(piece.nbytes), found) == 0
        there += sum(one & 1 for one in found)
        pages += count
    return there / pages

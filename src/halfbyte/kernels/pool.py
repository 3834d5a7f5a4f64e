"""A pool for the large tensors of a step: memory that is taken from the system once and used again.

A training step asks for the same sizes over and over. glibc serves them from one heap, where short-lived results and
kept activations lie mixed: it fragments, to 1.6 to 4 times what is in use, or, with a mapping for each tensor, spends
its time in page faults. Here each size has blocks of its own, mapped once and handed out again, last freed first:

- sizes are rounded up to eighths of a power of two, so that batches of nearly one length share blocks;
- a block lies on a boundary of 2 MiB and asks for huge pages (madvise, where the system grants them), which cost fewer
  faults and fewer misses of the address cache;
- what lies unused is given back, the sizes longest unused first, as soon as all blocks together would take more than
  the most that was ever in use at once, and a slack.

A tensor holds its block by a memoryview of its own; the block is free when the last tensor over it is gone.
"""

import contextlib
import math
import mmap
import weakref
from collections import OrderedDict, deque
from collections.abc import Sequence
from threading import Lock

import torch
from torch import Tensor

SMALLEST = 2**20
"""Bytes under which a tensor is torch's own."""
HUGE_PAGE = 2**21
SLACK = 2**26
"""Bytes that may lie unused beyond the most that was in use."""


def empty(shape: Sequence[int], dtype: torch.dtype, device: torch.device | str = "cpu") -> Tensor:
    """Return an uninitialized contiguous tensor, on a CPU from the pool if it is large."""
    count = math.prod(shape)
    nbytes = count * dtype.itemsize
    if nbytes < SMALLEST or torch.device(device).type != "cpu":
        return torch.empty(shape, dtype=dtype, device=device)
    return torch.frombuffer(_pool.take(nbytes), dtype=dtype, count=count).resize_(tuple(shape))


def release() -> None:
    """Give all blocks that are not in use back to the system."""
    _pool.release()


class Pool:
    """Blocks in use and free ones.

    Attributes:
        used: bytes in use.
        unused: bytes that lie free.
        most: the most bytes that were in use at once.
    """

    def __init__(self) -> None:
        self.used = self.unused = self.most = 0
        self._free: OrderedDict[int, list[memoryview]] = OrderedDict()  # by size, the longest unused size first
        self._returned: deque[tuple[int, memoryview]] = deque()  # a finalizer may run anywhere, so it only appends
        self._lock = Lock()

    def take(self, nbytes: int) -> memoryview:
        """Return memory of at least ``nbytes`` bytes, in use until nobody refers to it."""
        step = 1 << max((nbytes - 1).bit_length() - 4, 12)
        size = -(-nbytes // step) * step
        with self._lock:
            self._collect()
            blocks = self._free.get(size)
            if blocks:
                block = blocks.pop()
                self.unused -= size
            else:
                block = self._another(size)
            self.used += size
            self.most = max(self.most, self.used)
        view = block[:]
        weakref.finalize(view, self._returned.append, (size, block)).atexit = False
        return view

    def release(self) -> None:
        """Give the blocks that are not in use back to the system."""
        with self._lock:
            self._collect()
            self._shrink(0)
            self.most = self.used

    def _another(self, size: int) -> memoryview:
        self._shrink(max(self.most - self.used - size, 0) + SLACK)
        try:
            return _map(size)
        except OSError:  # the system has no more
            self._shrink(0)
            return _map(size)

    def _collect(self) -> None:
        while self._returned:
            size, block = self._returned.popleft()
            self._free.setdefault(size, []).append(block)
            self._free.move_to_end(size)
            self.used -= size
            self.unused += size

    def _shrink(self, unused: int) -> None:
        """Give blocks back until no more than ``unused`` bytes lie free."""
        while self.unused > unused:
            size, blocks = next(iter(self._free.items()))
            if blocks:
                blocks.pop(0)
                self.unused -= size
            if not blocks:
                del self._free[size]


def _map(size: int) -> memoryview:
    block = mmap.mmap(-1, size + HUGE_PAGE, mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    if hasattr(mmap, "MADV_HUGEPAGE"):
        with contextlib.suppress(OSError):  # a kernel without huge pages
            block.madvise(mmap.MADV_HUGEPAGE)
    first = -torch.frombuffer(block, dtype=torch.uint8, count=1).data_ptr() % HUGE_PAGE
    return memoryview(block)[first : first + size]


_pool = Pool()

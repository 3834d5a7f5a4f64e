"""Where paged optimizer state lives (QLoRA, section 3, "Paged Optimizers").

On a GPU the paper keeps the state in unified memory, from which the driver evicts it to the CPU. On a CPU the place
below memory is the disk, so here the state is a file, mapped and shared: under pressure the operating system writes
its pages back and drops them, and reads them again when a step touches them. Arithmetic sees ordinary tensors.

On a CUDA device it is the paper's way: managed memory, as bitsandbytes allocates it
(:func:`halfbyte.kernels.bitsandbytes.managed_memory`), which has not been run for want of a GPU. What follows is of the
CPU's way.

- The file has no name (it is gone when its last tensor is, or the process, however that ends).
- Its blocks are reserved beforehand with ``posix_fallocate``, or by writing zeros where there is none (macOS): a full
  disk is an error at once, not a bus fault later. (A copy-on-write file system, such as btrfs, may still need new
  blocks to rewrite old ones.)
- It never lies in a tmpfs, whose pages are memory.
- One file holds many tensors, each aligned to a cache line.

Left out: moving pages ahead of use. A step walks through the state once, front to back, as the kernel's read-ahead
expects.
"""

import collections
import errno
import mmap
import os
import shutil
import tempfile
from collections.abc import Sequence
from pathlib import Path

import psutil
import torch
from torch import Tensor

from halfbyte.errors import InputError
from halfbyte.kernels import bitsandbytes

IN_MEMORY = ("tmpfs", "ramfs", "devtmpfs")
ZEROS = bytes(2**20)
ALIGNMENT = 64


def choose_folder(page_dir: Path | None) -> Path:
    """Return the first that lies on a disk of ``page_dir`` (if given), the temporary folder and ``/var/tmp``.

    Raises:
        InputError: ``page_dir`` is not a folder, or all of them lie in memory.
    """
    if page_dir is not None and not page_dir.is_dir():
        raise InputError(f"The folder for paged optimizer state, {page_dir}, does not exist; create it first.")
    folders = [*([page_dir] if page_dir else []), Path(tempfile.gettempdir()), Path("/var/tmp")]
    for folder in folders:
        if folder.is_dir() and filesystem(folder) not in IN_MEMORY:
            return folder
    raise InputError(
        f"Paged optimizer state needs a folder on a disk, but {', '.join(map(str, folders))} lie in memory or do not "
        "exist; name another with page_dir, or use an optimizer that is not paged."
    )


def filesystem(folder: Path) -> str:
    """Return the type of the file system that holds ``folder``, such as ``ext4``."""
    folder = folder.resolve()
    mounts = [m for m in psutil.disk_partitions(all=True) if folder.is_relative_to(m.mountpoint)]
    # Of two on one mount point, the later hides the earlier.
    return max(reversed(mounts), key=lambda mount: len(mount.mountpoint)).fstype


def possible(device: torch.device) -> bool:
    """Return whether optimizer state of parameters on ``device`` can be paged."""
    return device.type == "cpu" or (device.type == "cuda" and bitsandbytes.available())


def zeros(layouts: Sequence[tuple[torch.dtype, torch.Size]], place: Path | torch.device) -> list[Tensor]:
    """Return zero tensors of the given dtypes and shapes, all in one piece that can be paged.

    Args:
        layouts: dtype and shape of each.
        place: the folder of an unnamed, mapped file, for tensors on the CPU; or the CUDA device that they are to be on.

    Raises:
        InputError: the disk is too full, or the folder cannot be written.
    """
    if isinstance(place, torch.device):
        return _managed(layouts, place)
    if not layouts:
        return []
    starts, size = [], 0
    for dtype, shape in layouts:
        starts.append(size)
        size += -(-shape.numel() * dtype.itemsize // ALIGNMENT) * ALIGNMENT
    memory = reserve(place, max(size, ALIGNMENT))
    # a storage for each, since torch.save refuses one that is seen as two dtypes
    return [
        torch.frombuffer(memory, dtype=dtype, count=shape.numel(), offset=start).view(shape)
        if shape.numel()
        else torch.empty(shape, dtype=dtype)
        for start, (dtype, shape) in zip(starts, layouts, strict=True)
    ]


def _managed(layouts: Sequence[tuple[torch.dtype, torch.Size]], device: torch.device) -> list[Tensor]:
    """The same in CUDA managed memory, one piece for each dtype."""
    sizes = collections.Counter[torch.dtype]()
    starts = []
    for dtype, shape in layouts:
        starts.append(sizes[dtype])
        sizes[dtype] += -(-shape.numel() * dtype.itemsize // ALIGNMENT) * ALIGNMENT
    memory = {dtype: bitsandbytes.managed_memory(max(size, ALIGNMENT), device) for dtype, size in sizes.items()}
    return [
        memory[dtype][start : start + shape.numel() * dtype.itemsize].view(dtype).view(shape)
        for start, (dtype, shape) in zip(starts, layouts, strict=True)
    ]


def reserve(folder: Path, size: int) -> mmap.mmap:
    """Reserve ``size`` bytes of zeros in an unnamed file in ``folder`` and map it.

    Raises:
        InputError: the disk is too full, or the folder cannot be written.
    """
    free = shutil.disk_usage(folder).free
    try:
        if size > free:  # asked first, since posix_fallocate fills the disk before it fails
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        with tempfile.TemporaryFile(dir=folder) as file:
            if hasattr(os, "posix_fallocate"):
                os.posix_fallocate(file.fileno(), 0, size)
            else:
                for start in range(0, size, len(ZEROS)):
                    file.write(ZEROS[: size - start])
                file.flush()
            return mmap.mmap(file.fileno(), size)
    except OSError as error:
        raise InputError(
            f"Paged optimizer state needs {size:,} bytes in {folder}, which has {free:,} free ({error.strerror}); make "
            "room, name another folder with page_dir, or use an optimizer that is not paged."
        ) from error

"""Disks and the hub: where models and runs lie, what room there is, how fast they are read, whether new ones come.

The speed is that of reading an existing file past the page cache (``O_DIRECT``), 64 MiB at most; nothing is written.
"""

import contextlib
import mmap
import os
import shutil
import stat
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

from halfbyte.errors import counted, size_text
from halfbyte.files import cache_folder
from halfbyte.hub import reason_without
from halfbyte.plan.doctor.finding import Finding

NONE_LEFT = 2**28
"""Bytes under which a run cannot save."""
LITTLE_LEFT = 4 * 2**30
"""Bytes under which a model of some billion parameters does not fit."""
READ = 2**26
"""Bytes that are read at most."""
PIECE = 2**23
SECONDS = 0.4
"""For which is read."""
SLOW = 100e6
"""Bytes a second under which a disk is slow."""
LARGE = 2**24
"""Bytes from which a file says something of the disk's speed."""
MEMORY_FILESYSTEMS = ("tmpfs", "ramfs")


def check() -> Iterator[Finding]:
    """Yield what is found of the disks."""
    hub = hub_cache()
    yield from cache(hub)
    for what, folder in (("halfbyte's cache", cache_folder()), ("working folder", working_directory())):
        if folder is not None:
            yield from room(what, folder)
    yield from speed(hub)
    yield from temporary(Path(tempfile.gettempdir()))


def hub_cache() -> Path:
    """Return the folder that downloaded models lie in."""
    import huggingface_hub.constants

    return Path(huggingface_hub.constants.HF_HUB_CACHE)


def working_directory() -> Path | None:
    """Return the folder that commands are given in, unless it is gone."""
    with contextlib.suppress(OSError):
        return Path.cwd()
    return None


def cache(folder: Path) -> Iterator[Finding]:
    """Yield what is found of the cache of downloaded models."""
    held, parts = _contents(folder)
    value = f"{folder}, {size_text(held)}" if held else str(folder)
    yield from room("model cache", folder, value, "; HF_HOME moves it")
    if parts:
        yield Finding(
            "broken downloads",
            f"{counted(len(parts), 'file')} of {size_text(sum(file.stat().st_size for file in parts))} in {folder}",
            "They go on when the model is asked for again; if it never is, they only take space.",
            f"find {folder} -name '*.incomplete' -delete",
            "note",
        )


def _contents(folder: Path) -> tuple[int, list[Path]]:
    """Return the bytes of all files in the cache, and the files that are incomplete."""
    held, parts = 0, []
    for home, _, names in os.walk(folder):
        for name in names:
            file = Path(home) / name
            with contextlib.suppress(OSError):
                about = file.lstat()
                if stat.S_ISREG(about.st_mode):
                    held += about.st_size
                    if name.endswith(".incomplete"):
                        parts.append(file)
    return held, parts


def room(what: str, folder: Path, value: str = "", hint: str = "") -> Iterator[Finding]:
    """Yield how much can be written to a folder, which need not be there yet."""
    there = next(parent for parent in (folder, *folder.parents) if parent.exists())
    free = shutil.disk_usage(there).free
    about = os.statvfs(there)
    said = f"{value or folder} ({size_text(free)} free{hint})"
    if not os.access(there, os.W_OK):
        yield Finding(
            what,
            f"{said}: {there} cannot be written to",
            "What is downloaded or made is kept there, and cannot be.",
            f"sudo chown -R $USER {there}" + ("  # or: export HF_HOME=/a/folder/of/yours" if hint else ""),
            "warning",
        )
    elif about.f_files and not about.f_favail:
        yield Finding(
            what,
            f"{said}: {there} can take no more files",
            "The disk has space, but all its inodes are in use: every new file is an error.",
            f"sudo du --inodes -d 3 -x {there} | sort -n | tail  # shows where the many files are",
            "fault",
        )
    elif free < LITTLE_LEFT:
        yield Finding(
            what,
            said,
            "What is written there ends with an error: a download, or the checkpoint of a run."
            if free < NONE_LEFT
            else "A model of some billion parameters in 16 bits takes more than that.",
            f"du -xh -d 2 {there} | sort -h | tail  # shows what takes the space"
            + ("; hf cache ls  # shows the models" if hint else ""),
            "fault" if free < NONE_LEFT else "warning",
        )
    else:
        yield Finding(what, said)


def speed(folder: Path) -> Iterator[Finding]:
    """Yield how fast the disk reads that the cache of models lies on."""
    file = largest_file(folder) or _library()
    rate = file and read_speed(file)
    if not file or not rate:
        return
    value = f"{rate / 1e6:,.0f} MB/s past the cache, from {file}"
    if rate < SLOW:
        yield Finding(
            "disk",
            value,
            "A model is read once from there; one that is larger than memory is read twice for every step.",
            "Put models on a local disk: export HF_HOME=/a/folder/on/it",
            "warning",
        )
    else:
        yield Finding("disk", value)


def largest_file(folder: Path) -> Path | None:
    """Return the largest file in a folder, if one is large enough to say something of the disk."""
    sizes: dict[Path, int] = {}
    for home, _, names in os.walk(folder):
        for name in names:
            with contextlib.suppress(OSError):
                sizes[Path(home) / name] = (Path(home) / name).stat().st_size
    best = max(sizes, key=lambda file: sizes[file], default=None)
    return best if best is not None and sizes[best] >= LARGE else None


def _library() -> Path | None:
    """Return torch's largest file."""
    import importlib.util

    spec = importlib.util.find_spec("torch")
    return largest_file(Path(spec.origin).parent / "lib") if spec and spec.origin else None


def read_speed(file: Path) -> float | None:
    """Return the bytes a second at which a file is read from its disk, or None where that cannot be known."""
    if not hasattr(os, "O_DIRECT"):
        return None
    buffer = mmap.mmap(-1, PIECE)  # O_DIRECT asks for a page's boundary
    try:
        handle = os.open(file, os.O_RDONLY | os.O_DIRECT)
    except OSError:  # a file system in memory, or one that has no such way
        return None
    try:
        begun, done = time.monotonic(), 0
        while done < READ and time.monotonic() - begun < SECONDS:
            count = os.preadv(handle, [buffer], done)
            if count <= 0:
                break
            done += count
        return done / max(time.monotonic() - begun, 1e-6) if done else None
    except OSError:
        return None
    finally:
        os.close(handle)


def temporary(folder: Path, mounts: Path = Path("/proc/mounts")) -> Iterator[Finding]:
    """Yield whether temporary files lie in memory."""
    with contextlib.suppress(OSError):
        kind = filesystem(folder, mounts.read_text())
        if kind in MEMORY_FILESYSTEMS:
            yield Finding(
                "temporary files",
                f"{folder} is in memory ({kind}, {size_text(shutil.disk_usage(folder).free)} free)",
                "What is put there, as data that are made ready, takes memory from the run.",
                "export TMPDIR=/var/tmp",
                "note",
            )


def filesystem(folder: Path, mounts: str) -> str:
    """Return the kind of file system that a folder is on, by the text of ``/proc/mounts``."""
    kinds = {}
    for line in mounts.splitlines():
        _, place, kind, *_ = line.split()
        kinds[Path(place)] = kind
    folder = folder.resolve()
    return next((kinds[parent] for parent in (folder, *folder.parents) if parent in kinds), "")


def hub() -> Iterator[Finding]:
    """Yield whether models can come from the hub."""
    from huggingface_hub import constants, get_token

    if constants.HF_HUB_OFFLINE:
        yield Finding(
            "hub",
            "not asked: HF_HUB_OFFLINE is set",
            "Only what was downloaded before can be opened.",
            "unset HF_HUB_OFFLINE",
            "note",
        )
        return
    where = constants.ENDPOINT
    reason = reason_without(lambda api: api.repo_exists("gpt2"), "model")
    if reason:
        yield Finding(
            "hub",
            f"{where}: {reason}",
            "Models and data that are not on this machine yet cannot be fetched; those in the cache and in folders "
            "can be used.",
            "export HF_ENDPOINT=https://...  # a mirror; or export HF_HUB_OFFLINE=1, so that nobody waits for it",
            "note",
        )
        return
    login = "logged in" if get_token() else "not logged in, as gated models ask for (hf auth login)"
    yield Finding("hub", f"{where} answers, {login}")

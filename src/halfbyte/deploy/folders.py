"""The folder that a model is written to: what is looked at before anything is written, in a sentence where it fails."""

import hashlib
import shutil
from collections.abc import Iterable
from pathlib import Path

from halfbyte.errors import InputError, check_writable, size_text
from halfbyte.files import absolute, repair


def free_folder(output: str | Path, overwrite: bool, holds: str = "config.json") -> Path:
    """Return the folder ``output`` as an absolute path, if a model may be written there.

    Args:
        output: as the user names it.
        overwrite: whether a model that is there may be replaced.
        holds: the file that tells a model's folder from others, which are never replaced; a pattern.

    Raises:
        InputError: it may not.
    """
    output = absolute(output)
    repair(output)
    if output.is_file():
        raise InputError(f"{output} is a file; name a folder.")
    if output.exists() and not overwrite:
        raise InputError(f"{output} is there already; choose another folder or overwrite it (--overwrite).")
    if output.exists() and not any(output.glob(holds)):
        raise InputError(f"{output} holds no model that could be overwritten; choose another folder.")
    check_writable(output)
    return output


def check_apart(output: Path, sources: Iterable[Path]) -> None:
    """Check that none of the folders that are read lies in the one that is written.

    Raises:
        InputError: one does.
    """
    if any(source.resolve().is_relative_to(output.resolve()) for source in sources):
        raise InputError(f"The output folder {output} holds the adapter or the base itself; choose another.")


def check_room(output: Path, needed: int, what: str) -> None:
    """Check that the disk has room.

    Args:
        output: the folder to be.
        needed: bytes.
        what: is written, as a sentence begins with it.

    Raises:
        InputError: it has not.
    """
    parent = next(folder for folder in output.parents if folder.is_dir())
    free = shutil.disk_usage(parent).free
    if needed > free:
        raise InputError(
            f"{what} takes {size_text(needed)}, and {size_text(free)} are free in {parent}; free some space, or name a "
            "folder on another disk."
        )


def stamp(folder: Path) -> str:
    """Return a digest of what files a folder has, and of which sizes and times."""
    digest = hashlib.sha256(str(folder).encode())
    for file in sorted(folder.iterdir()):
        about = file.stat()
        digest.update(f"{file.name} {about.st_size} {about.st_mtime_ns}\n".encode())
    return digest.hexdigest()

"""The kind of error that is the user's to mend: bad input; what ends an answer; how sentences say names and sizes.

Everything else that is raised is a bug of ours and keeps its traceback.
"""

import difflib
import errno
import pwd
import shutil
import stat
import tempfile
from collections.abc import Iterable
from pathlib import Path
from typing import Any


class InputError(ValueError):
    """Bad input, told in one sentence: what is wrong, where, and what to do.

    The command line prints the sentence and exits with code 2.
    """


class DecodingError(Exception):
    """An answer ended by an error that was found while it was decoded, told in one sentence."""


def nearest(name: str, known: Iterable[str]) -> str:
    """Return `` (did you mean 'x'?)`` for the known name closest to ``name``, or an empty string."""
    close = difflib.get_close_matches(name, list(known), n=1, cutoff=0.5)
    return f" (did you mean {close[0]!r}?)" if close else ""


NAMES_SHOWN = 12
LONGEST_NAME = 60


def named(names: Iterable[Any]) -> str:
    """Return names as a sentence lists them, each on one line and not too many of them."""
    listed = [name if isinstance(name, str) and name.strip() and name.isprintable() else repr(name) for name in names]
    shown = [name if len(name) <= LONGEST_NAME else f"{name[: LONGEST_NAME - 3]}..." for name in listed[:NAMES_SHOWN]]
    if len(listed) > NAMES_SHOWN:
        shown.append(f"{len(listed) - NAMES_SHOWN} more")
    return " and ".join([", ".join(shown[:-1]), shown[-1]] if len(shown) > 1 else shown)


def check_writable(path: Path) -> None:
    """Look whether ``path`` can be made, before the work that ends in it.

    Raises:
        InputError: it cannot; told with the folder that stands in the way, its owner and its permissions.
    """
    folder = next(folder for folder in (path, *path.parents) if folder.exists())
    if not folder.is_dir():
        raise InputError(f"{folder} is a file, so there can be no folder {path}; name another one.")
    try:
        with tempfile.TemporaryFile(dir=folder):
            pass
    except OSError as error:
        if error.errno in (errno.ENOSPC, errno.EDQUOT):
            raise
        about = folder.stat()
        raise InputError(
            f"{path} cannot be written ({error.strerror}): {folder} belongs to {_user(about.st_uid)} with permissions "
            f"{stat.filemode(about.st_mode)}; name another folder, or change that."
        ) from None


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


def _user(number: int) -> str:
    try:
        return pwd.getpwuid(number).pw_name
    except KeyError:
        return f"user {number}"


def counted(count: int, thing: str) -> str:
    """Return how many there are of something: ``1 row``, ``2 rows``."""
    return f"{count:,} {thing}{'' if count == 1 else 's'}"


def size_text(count: int) -> str:
    """Return a number of bytes as a person reads it, to three digits in binary units: ``1.08 GiB``."""
    size = float(max(count, 0))
    for unit in ("B", "KiB", "MiB", "GiB"):
        if size < 999.5 or unit == "GiB":
            break
        size /= 1024
    decimals = 0 if unit == "B" or size >= 99.95 else 1 if size >= 9.995 else 2
    return f"{size:,.{decimals}f} {unit}"

"""The one kind of error that is the user's to mend: bad input; and how its sentences say names and sizes.

Everything else that is raised is a bug of ours and keeps its traceback.
"""

import difflib
from collections.abc import Iterable


class InputError(ValueError):
    """Bad input, told in one sentence: what is wrong, where, and what to do.

    The command line prints the sentence and exits with code 2.
    """


def nearest(name: str, known: Iterable[str]) -> str:
    """Return `` (did you mean 'x'?)`` for the known name closest to ``name``, or an empty string."""
    close = difflib.get_close_matches(name, list(known), n=1, cutoff=0.5)
    return f" (did you mean {close[0]!r}?)" if close else ""


def size_text(count: int) -> str:
    """Return a number of bytes as a person reads it, to three digits in binary units: ``1.08 GiB``."""
    size = float(max(count, 0))
    for unit in ("B", "KiB", "MiB", "GiB"):
        if size < 999.5 or unit == "GiB":
            break
        size /= 1024
    decimals = 0 if unit == "B" or size >= 99.95 else 1 if size >= 9.995 else 2
    return f"{size:,.{decimals}f} {unit}"

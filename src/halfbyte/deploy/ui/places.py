"""The folders that the page may use: what a browser names is looked for in them, and nowhere else."""

import os
import re
from collections.abc import Sequence
from pathlib import Path

from halfbyte.errors import InputError

RUNS = "runs"
OWN = ".halfbyte-ui"
UPLOADS, JOBS, ARRIVING = f"{OWN}/uploads", f"{OWN}/jobs", f"{OWN}/arriving"
LONGEST = 100
"""Characters of a name that the page gives."""


class Outside(InputError):
    """A path lies in none of the folders."""


class Places:
    """The folders.

    Args:
        roots: that may be read and written; they are made if they are not there.

    Attributes:
        own: what the page keeps for itself.
        runs: where runs go.
        uploads: where files go that a browser sends.
        jobs: where the page's jobs are.
        arriving: where gradio keeps what is being sent, beside ``uploads`` so that nothing is copied.
    """

    def __init__(self, roots: Sequence[str | Path]) -> None:
        self.roots = [Path(root).expanduser().resolve() for root in roots]
        for root in self.roots:
            if root.exists() and not root.is_dir():
                raise InputError(f"{root} is a file; name a folder (--root).")
        first = self.roots[0]
        self.own = first / OWN
        self.runs, self.uploads, self.jobs, self.arriving = (first / name for name in (RUNS, UPLOADS, JOBS, ARRIVING))

    def inside(self, name: str | Path, *, sent: bool = False) -> Path:
        """Return the path that ``name`` leads to, links followed, if it lies in one of the folders.

        Args:
            name: absolute, or from one of the folders.
            sent: whether it may be a file that a browser sent; such are data, never a model or a run.

        Raises:
            Outside: it does not, or in that of the page itself.
        """
        text = str(name)
        if "\0" in text or not text.strip():
            raise Outside("This is no path.")
        given = Path(os.path.expanduser(text.strip()))  # of nobody's folder it stays as it is
        tried = [given] if given.is_absolute() else [root / given for root in self.roots]
        found = []
        for path in tried:
            try:
                whole = path.resolve()
            except (OSError, RuntimeError, ValueError):
                continue
            is_own = whole.is_relative_to(self.own) and not (sent and whole.is_relative_to(self.uploads))
            if any(whole.is_relative_to(root) for root in self.roots) and not is_own:
                found.append(whole)
        if not found:
            raise Outside(f"{text} lies outside of the folders that this page may use (--root).")
        return next((path for path in found if os.path.exists(path)), found[0])

    def shown(self, path: Path) -> str:
        """Return how a path is shown: from the folder that it lies in, if there is only one."""
        for root in self.roots:
            if path.is_relative_to(root) and len(self.roots) == 1:
                return str(path.relative_to(root)) or "."
        return str(path)

    def told(self, text: str) -> str:
        """Return a sentence as the page says it: files that were sent to it are called as they were called."""
        return re.sub(rf"{re.escape(str(self.uploads))}/([0-9a-f]{{16}}/)?", "", text)

    def new_run(self, name: str) -> Path:
        """Return the folder of a run that is to be called ``name``.

        Raises:
            InputError: it can be no name of a folder.
        """
        return self.runs / safe_name(name)


def safe_name(name: str) -> str:
    """Return ``name`` as a folder or a file may be called.

    Raises:
        InputError: it is none: empty, too long, hidden, or with characters that lead elsewhere.
    """
    text = name.strip()
    if not text or len(text.encode()) > LONGEST or text.startswith(".") or not text.isprintable():
        raise InputError(f"{name!r} cannot be a name: give letters and digits, {LONGEST} at most, no dot in front.")
    if set(text) & set('/\\:*?"<>|'):
        raise InputError(f'{name!r} cannot be a name: leave / \\ : * ? " < > | away.')
    return text


def uploaded_name(name: str) -> str:
    """Return what a file is called here that a browser calls ``name``: no folders, no control characters."""
    last = re.split(r"[/\\]", name)[-1]
    kept = "".join(one for one in last if one.isprintable() and one not in ':*?"<>|').strip().lstrip(".")
    stem, dot, ending = kept.rpartition(".")
    while len(kept.encode()) > LONGEST and stem:
        stem = stem[:-1]
        kept = f"{stem}{dot}{ending}"
    return kept or "data"

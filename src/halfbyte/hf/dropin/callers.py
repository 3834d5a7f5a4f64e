"""Who calls: the user's own script, or a library.

A function's code is the user's if its module is ``__main__`` or its file lies neither in a folder of installed packages
(``site-packages``, ``dist-packages``) nor in the standard library nor in this package; what has no file (a notebook's
cell, ``python -c``) is the user's. torch's and accelerate's launchers are libraries even as ``__main__``.
"""

import os
import sysconfig
from pathlib import Path
from types import CodeType, FrameType

import accelerate
import torch


def _within(folder: Path | str) -> str:
    """Return what the names of files in ``folder`` begin with; those of torchtune are not torch's."""
    return f"{folder}{os.sep}"


OWN = _within(Path(__file__).parents[2])
HERE = _within(Path(__file__).parent)
TORCH = _within(Path(torch.__file__).parent)
LAUNCHERS = (TORCH, OWN, _within(Path(accelerate.__file__).parent))
INSTALLED = frozenset({"site-packages", "dist-packages"})
STANDARD = tuple({_within(sysconfig.get_path("stdlib")), _within(sysconfig.get_path("platstdlib"))})
PASSING = frozenset({"to", "cuda", "wrapper", "<dictcomp>", "<listcomp>", "<genexpr>", "<lambda>"})
"""Functions of libraries that hand a wish on: ``BatchEncoding.to`` and what transformers wraps around ``to``."""

_known: dict[str, bool] = {}


def is_users(frame: FrameType | None) -> bool:
    """Return whether ``frame`` runs the user's own code."""
    if frame is None:
        return False
    name = frame.f_code.co_filename
    if name.startswith("<"):  # made from text: of the module in which it runs
        name = frame.f_globals.get("__file__") or ""
    if frame.f_globals.get("__name__") == "__main__":
        return not name.startswith(LAUNCHERS)
    known = _known.get(name)
    if known is None:
        known = _known[name] = not _is_library(name)
    return known


def _is_library(file: str) -> bool:
    return file.startswith((OWN, *STANDARD)) or not INSTALLED.isdisjoint(Path(file).parts)


def is_wish_of_user(frame: FrameType | None) -> bool:
    """Return whether what ``frame`` does was wished by the user's own code, be it through functions that hand it on.

    Those are all of torch's and of this folder, and the ones named :data:`PASSING`.
    """
    while frame is not None and not is_users(frame):
        if not _passes(frame.f_code):
            return False
        frame = frame.f_back
    return frame is not None


def _passes(code: CodeType) -> bool:
    return code.co_name in PASSING or code.co_filename.startswith((TORCH, HERE))

"""Scripts written for transformers, peft, trl and bitsandbytes, unchanged: one table of what is replaced, and its undo.

    halfbyte.install()                    in a script, before it loads a model
    halfbyte run script.py args...        or python -m halfbyte run; -m module too
    %load_ext halfbyte                    in a notebook

:func:`table` has a row for each name that is replaced: where it is, by what, for which versions of its library, and
why. Nothing is replaced by a mere import. Classes and functions are changed in place (a class's methods, a function's
code), so that names which a script imported before are served as well; models and trainers that are not over our 4-bit
weights go through the libraries' own code.
"""

import contextlib
import importlib.metadata
from typing import Any

from packaging.specifiers import SpecifierSet

from halfbyte.errors import InputError
from halfbyte.hf.dropin import (
    adapters,
    arguments,
    beginnings,
    bitsandbytes,
    chat_format,
    cuda,
    hub,
    loading,
    optimizers,
    said,
    services,
    trainers,
)
from halfbyte.hf.dropin.shell import guard
from halfbyte.hf.replacement import Replacement

_installed = contextlib.ExitStack()
"""What puts back everything, each name though another's was an error."""


def table() -> list[Replacement]:
    """Return all rows, in the order in which they are put in place."""
    parts = (
        loading,
        adapters,
        beginnings,
        optimizers,
        arguments,
        trainers,
        chat_format,
        bitsandbytes,
        cuda,
        hub,
        services,
    )
    return [row for part in parts for row in part.rows()]


def install(cuda: bool = True) -> None:
    """Let halfbyte answer for bitsandbytes, and for old names, in the libraries that scripts use. Twice is as once.

    Args:
        cuda: also answer a script's own questions about a GPU that is not there, so that what was written for one runs
            on the CPU.

    Raises:
        InputError: a library's version is not one that the table was read for.
    """
    undo()
    rows = [row for row in table() if cuda or not row.cuda]
    check_versions(rows)
    try:
        for row in rows:
            _installed.callback(row.put())
    except BaseException:
        undo()
        raise


def attend(shell: Any) -> None:
    """Let the IPython ``shell`` of a notebook install no other versions; see :mod:`halfbyte.hf.dropin.shell`."""
    _installed.callback(guard(shell))


def undo() -> None:
    """Put back everything that :func:`install` replaced."""
    _installed.close()
    said.forget()


def check_versions(rows: list[Replacement]) -> None:
    """Check that each library is of a version that its rows are for.

    Raises:
        InputError: one is not; it names the library and both versions.
    """
    for library, versions in dict.fromkeys((row.library, row.versions) for row in rows):
        try:
            installed = importlib.metadata.version(library)
        except importlib.metadata.PackageNotFoundError:
            continue  # a stand-in, or a library of which nothing is needed
        if not SpecifierSet(versions).contains(installed, prereleases=True):
            raise InputError(
                f"halfbyte.install() replaces names of {library} {versions}, and {installed} is installed; install "
                f"one of those: pip install '{library}{versions}'."
            )

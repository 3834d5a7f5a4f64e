"""Benchmarks through lm-eval (EleutherAI's lm-evaluation-harness, 0.4.13; extra ``eval``):

``named`` (what a user calls a task) → ``rows`` (a file of rows as one) → ``harness`` (a model as lm-eval asks it) →
``measured`` (figures, by row where that can be told).

Modules here import lm-eval when they are imported themselves; :func:`check_installed` says how to install it.
"""

from importlib.util import find_spec

from halfbyte.errors import InputError

INSTALL = "pip install 'halfbyte[eval]'"


def check_installed() -> None:
    """See that lm-eval is there.

    Raises:
        InputError: it is not.
    """
    if find_spec("lm_eval") is None:
        raise InputError(f"Tasks are lm-eval's, which is not installed: {INSTALL}.")

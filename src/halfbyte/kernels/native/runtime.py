"""The extension, its instruction-set tiers and its threads; nothing else imports ``halfbyte._native``.

The kernels run on the OpenMP threads that torch has already: the dynamic linker is asked which ``GOMP_parallel`` torch
is bound to.
"""

import ctypes
import functools
import importlib
import importlib.util
import os
from pathlib import Path
from typing import TYPE_CHECKING

import torch

from halfbyte.errors import InputError, nearest

AVAILABLE = importlib.util.find_spec("halfbyte._native") is not None
if TYPE_CHECKING:
    from halfbyte import _native

    extension = _native
else:
    extension = importlib.import_module("halfbyte._native") if AVAILABLE else None

TYPES = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2}  # enum Type in csrc/contract.h


def available() -> bool:
    """Return whether this installation has the extension.

    Raises:
        InputError: it has not, but ``HALFBYTE_ISA`` asks for one of its tiers.
    """
    if not AVAILABLE and os.environ.get("HALFBYTE_ISA"):
        raise InputError(
            "HALFBYTE_ISA is set, but this installation has no native kernels: install again with a C++ compiler, "
            "or unset it."
        )
    return AVAILABLE


def tiers() -> list[str]:
    """Return the instruction-set tiers that this build and this chip have, best first."""
    return extension.tiers() if AVAILABLE else []


def tier() -> str:
    """Return the tier in force.

    Raises:
        InputError: ``HALFBYTE_ISA`` names one that this build or this chip lacks.
    """
    return tiers()[tier_index()]


def tier_index() -> int:
    """Return the index of the tier in force among :func:`tiers`, as the extension takes it; errors as :func:`tier`."""
    return _tier_named(os.environ.get("HALFBYTE_ISA"))


@functools.cache
def _tier_named(name: str | None) -> int:
    """Return the index among :func:`tiers` of the one called ``name``, or of the best."""
    known = tiers()
    if not name:
        return 0
    if name not in known:
        raise InputError(
            f"HALFBYTE_ISA is {name!r}, a tier that this chip or this build lacks{nearest(name, known)}; "
            f"set it to {' or '.join(known)}, or unset it."
        )
    return known.index(name)


def threads() -> int:
    """Return the number of threads that the kernels run on: torch's."""
    return torch.get_num_threads()


def gomp_parallel() -> int:
    """Return the address of the ``GOMP_parallel`` that torch is bound to, or 0 if there is none.

    The dynamic linker's own order: first what every library shares, then what torch's depends on.
    """
    for library in (None, str(Path(torch.__file__).parent / "lib" / "libtorch_cpu.so")):
        try:
            function = ctypes.CDLL(library, mode=os.RTLD_NOLOAD | os.RTLD_LAZY).GOMP_parallel
        except (OSError, AttributeError):
            continue
        return ctypes.cast(function, ctypes.c_void_p).value or 0
    return 0


if AVAILABLE:
    extension.use_openmp(gomp_parallel())

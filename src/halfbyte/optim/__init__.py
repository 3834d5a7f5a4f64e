"""AdamW and Lion with 32-bit or block-wise 8-bit state, in memory or paged to disk.

:func:`create` makes one by the name that transformers gives it.
"""

from collections.abc import Iterable
from pathlib import Path
from typing import Any

from torch import Tensor

from halfbyte.choices import Optimizer
from halfbyte.errors import InputError, nearest
from halfbyte.optim.adamw import AdamW
from halfbyte.optim.lion import Lion

KINDS: dict[Optimizer, dict[str, Any]] = {
    "adamw_torch": {"state_bits": 32, "paged": False},
    "adamw_32bit": {"state_bits": 32, "paged": False, "exact": False},
    "adamw_8bit": {"state_bits": 8, "paged": False},
    "paged_adamw_32bit": {"state_bits": 32, "paged": True, "exact": False},
    "paged_adamw_8bit": {"state_bits": 8, "paged": True},
}
"""AdamW's; torch's own bits under torch's name alone."""
LIONS: dict[Optimizer, dict[str, Any]] = {
    "lion_32bit": {"state_bits": 32, "paged": False},
    "lion_8bit": {"state_bits": 8, "paged": False},
    "paged_lion_32bit": {"state_bits": 32, "paged": True},
    "paged_lion_8bit": {"state_bits": 8, "paged": True},
}


def create(
    name: str,
    params: Iterable[Tensor] | Iterable[dict[str, Any]],
    *,
    lr: float,
    betas: tuple[float, float],
    eps: float,
    weight_decay: float,
    page_dir: Path | None = None,
) -> AdamW:
    """Return the optimizer that transformers calls ``name``; the rest as in :class:`AdamW`. Lion has no ``eps``.

    Raises:
        InputError: there is no such optimizer.
    """
    if name in LIONS:
        return Lion(params, lr, betas, weight_decay, page_dir=page_dir, **LIONS[name])
    if name not in KINDS:
        names = [*KINDS, *LIONS]
        raise InputError(f"There is no optimizer {name!r}{nearest(name, names)}; there is {', '.join(names)}.")
    return AdamW(params, lr, betas, eps, weight_decay, page_dir=page_dir, **KINDS[name])


__all__ = ["AdamW", "Lion", "create"]

"""The Trainer's optimizers of bitsandbytes (transformers 5.23: ``trainer_optimizer._OPTIMIZER_HANDLERS``), as ours.

Those that halfbyte does not have are left to bitsandbytes where it is installed, and refused by name where not.
"""

from pathlib import Path
from typing import Any

from transformers.trainer_optimizer import _BITSANDBYTES_OPTIMIZERS, OptimizerContext
from transformers.utils import is_bitsandbytes_available

from halfbyte.errors import InputError, named
from halfbyte.hf.replacement import Replacement
from halfbyte.hf.trainers.base import BITSANDBYTES_NAMES
from halfbyte.optim import AdamW


def _ours(context: OptimizerContext) -> tuple[Any, dict[str, Any]]:
    """Return our AdamW and its arguments, as a handler of the Trainer's does."""
    args = context.args
    if context.optim_args:
        raise InputError(f"optim={args.optim.value!r} takes no optim_args, and there is {args.optim_args!r}.")
    folder = Path(args.output_dir)
    paged = {"page_dir": folder if folder.is_dir() else None}
    return AdamW, context.optimizer_kwargs | context.adam_kwargs | BITSANDBYTES_NAMES[args.optim.value] | paged


def _left(old: Any) -> Any:
    def handler(context: OptimizerContext) -> Any:
        if not is_bitsandbytes_available():
            raise InputError(
                f"optim={context.args.optim.value!r} is bitsandbytes' alone, and not installed; halfbyte has "
                f"{named(BITSANDBYTES_NAMES)}."
            )
        return old(context)

    return handler


def rows() -> list[Replacement]:
    """What the table of optimizers gets."""
    return [
        Replacement(
            f"transformers.trainer_optimizer:_OPTIMIZER_HANDLERS[{name.value}]",
            (lambda old: _ours) if name.value in BITSANDBYTES_NAMES else _left,
            f"optim={name.value!r} "
            + (
                "is our AdamW, with its state in 8 or 32 bits, paged or not"
                if name.value in BITSANDBYTES_NAMES
                else "is refused in a sentence where bitsandbytes is not installed"
            ),
            "transformers",
            ">=5.23,<5.24",
        )
        for name in _BITSANDBYTES_OPTIMIZERS
    ]

"""Whether the disk has room for what a run will write, looked at before its first step.

Of a step's state there are the adapter, the optimizer's moments and the tokenizer; ``keep`` of them stay, one more is
there while it takes the place of the oldest, and at the end there is the adapter once more. State that is paged lies in
a file there too.
"""

import shutil
from pathlib import Path
from typing import Any

from peft import get_peft_model_state_dict

from halfbyte.errors import InputError, counted, size_text
from halfbyte.files import scratch
from halfbyte.hf.layers.adapters import vocabulary_resized
from halfbyte.optim import AdamW

THEIR_STATE = {"adagrad": 4, "rmsprop": 4, "adamw_torch": 8}
"""Bytes a parameter of the state of transformers' optimizers; what is not here has less."""


def adapter_bytes(trainer: Any, folder: Path) -> int:
    """Return what the adapter takes on the disk, with tokenizer and so on beside it, which are written to see it."""
    tensors = get_peft_model_state_dict(trainer.model, save_embedding_layers=vocabulary_resized(trainer.model))
    with scratch(folder / "tokenizer") as part:
        trainer.processing_class.save_pretrained(part)
        for save in trainer.saved_beside:
            save(part)
        beside = sum(file.stat().st_size for file in part.iterdir())
    return beside + sum(int(tensor.nbytes) for tensor in tensors.values())


def state_bytes(trainer: Any) -> int:
    """Return what the optimizer's state takes on the disk."""
    if isinstance(trainer.optimizer, AdamW):
        bytes_of_ours: int = trainer.optimizer.state_bytes()
        return bytes_of_ours
    trained = sum(p.numel() for p in trainer.model.parameters() if p.requires_grad)
    return THEIR_STATE.get(str(trainer.args.optim.value), 0) * int(trained)


def check(trainer: Any, folder: Path, saves: int, there: int) -> None:
    """Hold what the run will write in ``folder`` to what is free there.

    Args:
        trainer: ready to train.
        folder: of the run.
        saves: how many checkpoints there will be at most at a time.
        there: bytes of those that are there already, whose place new ones take.

    Raises:
        InputError: it does not fit; told with the numbers.
    """
    adapter = adapter_bytes(trainer, folder)
    state = state_bytes(trainer)
    one, paged = adapter + state, state if getattr(trainer.optimizer, "page_dir", None) == folder else 0
    needed, free = max(0, saves * one - there) + adapter + paged, shutil.disk_usage(folder).free
    if needed > free:
        more = f" and the paged state ({size_text(paged)})" if paged else ""
        raise InputError(
            f"{folder}: {counted(saves, 'checkpoint')} of {size_text(one)}, the adapter ({size_text(adapter)}){more} "
            f"need {size_text(needed)} of disk, and {size_text(free)} are free; free some space, name another folder "
            "for the run, or keep fewer checkpoints (keep)."
        )

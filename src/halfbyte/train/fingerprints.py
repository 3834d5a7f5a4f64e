"""The fingerprint of a run's base model: saved with each of its adapters, and compared where the run goes on."""

from functools import partial
from pathlib import Path
from typing import Any

from halfbyte import hf
from halfbyte.errors import InputError
from halfbyte.hf.layers.head import base_of
from halfbyte.hf.models.base_files import fingerprint
from halfbyte.hf.models.base_format import save_base_format
from halfbyte.hf.models.fingerprint import FILE, Fingerprint
from halfbyte.hf.trainers import distributed
from halfbyte.runs.config import TrainConfig
from halfbyte.train.build import quantization


def fingerprint_of(model: Any, config: TrainConfig) -> Fingerprint | None:
    """Return the fingerprint of the base that a run has opened; of several processes the first one alone does.

    Of a dense base also what it is in the run's format and in the default one, in which others have it too.

    Raises:
        InputError: its files cannot be read any more; all processes end with it.
    """
    source = getattr(base_of(model), "opened_from", None)
    with distributed.first_writes() as writes:
        found = fingerprint(source, [hf.HalfbyteConfig(), quantization(config)]) if writes and source else None
    return None if found is None else found.called(config.model)


def keep_with(trainer: Any, config: TrainConfig, base: Fingerprint | None) -> None:
    """Have a trainer save with each adapter which base it is for, and how that was held."""
    trainer.saved_beside = (partial(save_base_format, quantization(config)), *([base.save] if base else []))


def check_resumed(run: Path, checkpoint: Path, base: Fingerprint | None) -> bool:
    """Compare the base of a run that goes on from ``checkpoint`` with that which it was begun with.

    Returns:
        Whether it is known that all bits are the same.

    Raises:
        InputError: it is another one.
    """
    with distributed.agreed_errors():
        before = Fingerprint.of_adapter(checkpoint)
        if before is None or base is None:
            return False
        if found := before.difference(base):
            raise InputError(
                f"{run} cannot be resumed as the same run: the base model's files are others ({found}). Put that back, "
                f"or begin another run; {FILE} in {checkpoint} says what they were."
            )
        return before.is_copy(base)

"""TRL's trainers over 4-bit models: resumed bit for bit, without pickle, and what they stand on.

ORPO's is imported when it is first used: it is one of TRL's experiments.
"""

from typing import TYPE_CHECKING, Any

from halfbyte.hf.trainers.methods import DPOConfig, DPOTrainer, KTOConfig, KTOTrainer, SFTConfig, SFTTrainer
from halfbyte.hf.trainers.sampler import EpochSampler
from halfbyte.hf.trainers.tasks import ClassifyConfig, ClassifyTrainer, Seq2SeqConfig, Seq2SeqTrainer

if TYPE_CHECKING:
    from halfbyte.hf.trainers.orpo import ORPOConfig, ORPOTrainer

__all__ = [
    "ClassifyConfig",
    "ClassifyTrainer",
    "DPOConfig",
    "DPOTrainer",
    "EpochSampler",
    "KTOConfig",
    "KTOTrainer",
    "ORPOConfig",
    "ORPOTrainer",
    "SFTConfig",
    "SFTTrainer",
    "Seq2SeqConfig",
    "Seq2SeqTrainer",
]


def __getattr__(name: str) -> Any:
    if name not in ("ORPOConfig", "ORPOTrainer"):
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from halfbyte.hf.trainers import orpo

    return getattr(orpo, name)

"""TRL's trainers over 4-bit models: resumed bit for bit, without pickle, and what they stand on."""

from halfbyte.hf.trainers.methods import DPOConfig, DPOTrainer, KTOConfig, KTOTrainer, SFTConfig, SFTTrainer
from halfbyte.hf.trainers.sampler import EpochSampler
from halfbyte.hf.trainers.tasks import ClassifyConfig, ClassifyTrainer, Seq2SeqConfig, Seq2SeqTrainer

__all__ = [
    "ClassifyConfig",
    "ClassifyTrainer",
    "DPOConfig",
    "DPOTrainer",
    "EpochSampler",
    "KTOConfig",
    "KTOTrainer",
    "SFTConfig",
    "SFTTrainer",
    "Seq2SeqConfig",
    "Seq2SeqTrainer",
]

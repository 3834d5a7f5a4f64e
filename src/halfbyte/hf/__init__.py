"""Everything that knows the internals of transformers, peft and trl."""

from halfbyte.hf.adapters import LoraLinear4bit, count_parameters, prepare_for_training, project, unprepare
from halfbyte.hf.checkpoint import quantize_checkpoint
from halfbyte.hf.config import HalfbyteConfig
from halfbyte.hf.loader import load, load_tokenizer
from halfbyte.hf.quantizer import HalfbyteQuantizer

__all__ = [
    "HalfbyteConfig",
    "HalfbyteQuantizer",
    "LoraLinear4bit",
    "count_parameters",
    "load",
    "load_tokenizer",
    "prepare_for_training",
    "project",
    "quantize_checkpoint",
    "unprepare",
]

"""Everything that knows the internals of transformers, peft and trl."""

from halfbyte.hf.adapters import LoraLinear4bit, count_parameters, project
from halfbyte.hf.checkpoint import quantize_checkpoint
from halfbyte.hf.config import HalfbyteConfig
from halfbyte.hf.fusion import decoder_path, fuse, unfuse
from halfbyte.hf.loader import load, load_tokenizer
from halfbyte.hf.prepare import prepare_for_training, unprepare
from halfbyte.hf.quantizer import HalfbyteQuantizer

__all__ = [
    "HalfbyteConfig",
    "HalfbyteQuantizer",
    "LoraLinear4bit",
    "count_parameters",
    "decoder_path",
    "fuse",
    "load",
    "load_tokenizer",
    "prepare_for_training",
    "project",
    "quantize_checkpoint",
    "unfuse",
    "unprepare",
]

"""Everything that knows the internals of transformers, peft and trl."""

from halfbyte.hf.layers.adapters import LoraLinear4bit, count_parameters, project
from halfbyte.hf.layers.attention_choice import describe_attention
from halfbyte.hf.layers.fusion import describe_layers, fuse, unfuse
from halfbyte.hf.layers.prepare import prepare, prepare_for_training, unprepare
from halfbyte.hf.layers.separation import packing_obstacle
from halfbyte.hf.layers.starts import initialize
from halfbyte.hf.models.config import HalfbyteConfig
from halfbyte.hf.models.linears import describe_base, not_linear, share_in_4bit, share_quantized
from halfbyte.hf.models.loader import load, load_tokenizer
from halfbyte.hf.models.loftq import LoftQ
from halfbyte.hf.models.more_adapters import add_adapter
from halfbyte.hf.models.quantize_files import quantize_checkpoint
from halfbyte.hf.models.quantizer import HalfbyteQuantizer

__all__ = [
    "HalfbyteConfig",
    "HalfbyteQuantizer",
    "LoftQ",
    "LoraLinear4bit",
    "add_adapter",
    "count_parameters",
    "describe_attention",
    "describe_base",
    "describe_layers",
    "fuse",
    "initialize",
    "load",
    "load_tokenizer",
    "not_linear",
    "packing_obstacle",
    "prepare",
    "prepare_for_training",
    "project",
    "quantize_checkpoint",
    "share_in_4bit",
    "share_quantized",
    "unfuse",
    "unprepare",
]

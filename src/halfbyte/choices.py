"""The words and bounds that options may take, once; importing this imports no torch.

Everything that takes such an option reads its words, bounds and defaults here: configurations, the command line, the
quantizer, the file format.
"""

from typing import Literal, get_args

Type4bit = Literal["nf4", "fp4", "e2m1", "e3m0", "int4"]
"""A 4-bit number format of weights; see :mod:`halfbyte.quant.codebooks`."""
SaveableType = Literal[Type4bit, "int8"]
"""Those that a folder can hold; 8 bits are those of :mod:`halfbyte.quant.int8`."""
QuantType = Literal[SaveableType, "none"]
"""What the base weights of a model are held in; ``none`` leaves them in the compute dtype."""
FloatType = Literal["float32", "bfloat16", "float16"]
"""A dtype of torch in which can be computed."""
Optimizer = Literal["paged_adamw_8bit", "paged_adamw_32bit", "adamw_8bit", "adamw_torch"]
"""AdamW by the bits of its state and whether that can be paged to disk."""
Schedule = Literal["constant", "linear", "cosine"]
"""The course of the learning rate after the warm-up; linear and cosine fall to zero."""
Preset = Literal["paper", "quick"]
"""Which defaults of a run apply: the paper's, or quick ones for small models and data."""

Method = Literal["sft"]
"""A method of training; see :mod:`halfbyte.train.methods`."""

TYPES_4BIT: tuple[str, ...] = get_args(Type4bit)
SAVEABLE_TYPES: tuple[str, ...] = get_args(SaveableType)
QUANT_TYPES: tuple[str, ...] = get_args(QuantType)
BITSANDBYTES_TYPES = ("nf4", "fp4")
"""4-bit formats that bitsandbytes' files have a name for."""
FLOAT_TYPES: tuple[str, ...] = get_args(FloatType)
OPTIMIZERS: tuple[str, ...] = get_args(Optimizer)

BLOCKSIZES = range(32, 4097)
"""Values that may share one absmax."""
ROW = "row"
"""In place of a block size, for int8 alone: each row is a block, as bitsandbytes' LLM.int8() has it."""

QUANT_TYPE: SaveableType = "nf4"
BLOCKSIZE = 64
DOUBLE_QUANT = True
COMPUTE_DTYPE: FloatType = "bfloat16"
"""Defaults: the paper's (QLoRA, arXiv 2305.14314, section 3)."""

IGNORED = -100
"""The label of a token that is not trained, as in torch's cross entropy."""

"""The kernels: operations on 4-bit and 8-bit numbers as torch functions with gradients.

``reference`` states each formula once, ``native`` carries them out in C++, ``bitsandbytes`` by that library's kernels,
``provider`` chooses. What everybody else calls is in a file for each family of operations, which checks the arguments
and hands them on: ``quantize``, ``matmul``, ``attention``, ``norm``, ``gated``, ``rotary``, ``fold_softmax``,
``adamw``; the files of ``native`` have the same names. ``weights``, ``terms``, ``softmax`` and ``adamw_step`` are what
operations take; ``pool`` is where large results lie. Codebooks come in as arguments; this package knows none.
"""

from halfbyte.kernels.adamw import Adamw8bit, Adamw32bit, adamw_8bit, adamw_32bit
from halfbyte.kernels.adamw_step import AdamwStep
from halfbyte.kernels.attention import attention, attention_backward
from halfbyte.kernels.decode import (
    DecodeLayer,
    DecodeNorm,
    Decoder,
    DecoderParts,
    LowRankPart,
    Products,
    can_decode,
)
from halfbyte.kernels.dense import product_dtype
from halfbyte.kernels.fold_softmax import fold_softmax
from halfbyte.kernels.gated import gated, gated_gradient, gated_halves_gradient
from halfbyte.kernels.matmul import matmul_4bit, matmul_int8, matmul_sums
from halfbyte.kernels.norm import rms_norm, rms_norm_gradient, rms_norm_weight_gradient
from halfbyte.kernels.provider import provider_for, providers, use_provider
from halfbyte.kernels.quantize import (
    dequantize_4bit,
    dequantize_coded,
    dequantize_int8,
    quantize_4bit,
    quantize_coded,
    quantize_int8,
)
from halfbyte.kernels.rotary import rotary
from halfbyte.kernels.softmax import RunningSoftmax
from halfbyte.kernels.terms import Sum, Term
from halfbyte.kernels.weights import Nested, Statistics, Weight4bit, WeightInt8

__all__ = [
    "Adamw8bit",
    "Adamw32bit",
    "AdamwStep",
    "DecodeLayer",
    "DecodeNorm",
    "Decoder",
    "DecoderParts",
    "LowRankPart",
    "Nested",
    "Products",
    "RunningSoftmax",
    "Statistics",
    "Sum",
    "Term",
    "Weight4bit",
    "WeightInt8",
    "adamw_8bit",
    "adamw_32bit",
    "attention",
    "attention_backward",
    "can_decode",
    "dequantize_4bit",
    "dequantize_coded",
    "dequantize_int8",
    "fold_softmax",
    "gated",
    "gated_gradient",
    "gated_halves_gradient",
    "matmul_4bit",
    "matmul_int8",
    "matmul_sums",
    "product_dtype",
    "provider_for",
    "providers",
    "quantize_4bit",
    "quantize_coded",
    "quantize_int8",
    "rms_norm",
    "rms_norm_gradient",
    "rms_norm_weight_gradient",
    "rotary",
    "use_provider",
]

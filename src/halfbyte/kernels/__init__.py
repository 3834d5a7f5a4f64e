"""The kernels: 4-bit and 8-bit operations as torch functions with gradients.

``reference`` states each formula once, ``native`` carries them out in C++, ``bitsandbytes`` by that library's kernels,
``provider`` chooses, and ``operations`` and ``adamw`` are what everybody else calls. Codebooks come in as arguments;
this package knows none.
"""

from halfbyte.kernels.adamw import Adamw8bit, Adamw32bit, adamw_8bit, adamw_32bit
from halfbyte.kernels.operations import (
    attention,
    attention_backward,
    dequantize_4bit,
    dequantize_8bit,
    dequantize_int8,
    fold_softmax,
    gated,
    gated_gradient,
    gated_halves_gradient,
    matmul_4bit,
    matmul_int8,
    matmul_sums,
    quantize_4bit,
    quantize_8bit,
    quantize_int8,
    rms_norm,
    rms_norm_gradient,
    rms_norm_weight_gradient,
    rotary,
)
from halfbyte.kernels.provider import provider_for, providers, use_provider
from halfbyte.kernels.softmax import RunningSoftmax
from halfbyte.kernels.statistics import Nested, Statistics
from halfbyte.kernels.terms import Sum, Term, Weight4bit, Weight8bit

__all__ = [
    "Adamw8bit",
    "Adamw32bit",
    "Nested",
    "RunningSoftmax",
    "Statistics",
    "Sum",
    "Term",
    "Weight4bit",
    "Weight8bit",
    "adamw_8bit",
    "adamw_32bit",
    "attention",
    "attention_backward",
    "dequantize_4bit",
    "dequantize_8bit",
    "dequantize_int8",
    "fold_softmax",
    "gated",
    "gated_gradient",
    "gated_halves_gradient",
    "matmul_4bit",
    "matmul_int8",
    "matmul_sums",
    "provider_for",
    "providers",
    "quantize_4bit",
    "quantize_8bit",
    "quantize_int8",
    "rms_norm",
    "rms_norm_gradient",
    "rms_norm_weight_gradient",
    "rotary",
    "use_provider",
]

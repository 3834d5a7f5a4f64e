"""The kernels: 4-bit and 8-bit operations as torch functions with gradients.

``reference`` states each formula once, ``native`` carries them out in C++, ``bitsandbytes`` by that library's kernels,
``provider`` chooses, and ``operations`` is what everybody else calls. Codebooks come in as arguments; this package
knows none.
"""

from halfbyte.kernels.operations import (
    adamw_8bit,
    adamw_32bit,
    dequantize_4bit,
    dequantize_8bit,
    matmul_4bit,
    quantize_4bit,
    quantize_8bit,
)
from halfbyte.kernels.provider import provider_for, providers, use_provider
from halfbyte.kernels.statistics import Nested, Statistics

__all__ = [
    "Nested",
    "Statistics",
    "adamw_8bit",
    "adamw_32bit",
    "dequantize_4bit",
    "dequantize_8bit",
    "matmul_4bit",
    "provider_for",
    "providers",
    "quantize_4bit",
    "quantize_8bit",
    "use_provider",
]

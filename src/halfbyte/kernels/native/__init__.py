"""The native kernels (``csrc/``) as torch functions: a file for each family of operations, ``runtime`` under them all.

The instruction-set tier is the best that this chip and this build have, or the one that the environment variable
``HALFBYTE_ISA`` names; it is looked up at every call, as is torch's thread count. The kernels run on the OpenMP threads
that torch has already. Without a C++ compiler the package installs without the extension; :func:`available` tells.

Formulas, shapes and dtypes are those of :mod:`halfbyte.kernels.reference`, and so are the bytes, bit for bit, on every
tier and for any number of threads (where a result is NaN, its payload is not promised; :func:`adamw_32bit` says what
it promises). Of the matrix products :func:`matmul_4bit` says what differs; the scalar tier has none: it dequantizes and
leaves the rest to torch.
"""

from halfbyte.kernels.native.adamw import adamw_8bit, adamw_32bit
from halfbyte.kernels.native.attention import attention, attention_backward
from halfbyte.kernels.native.bus import tell_bus_error
from halfbyte.kernels.native.decode import Decoder, multiplies
from halfbyte.kernels.native.fold_softmax import fold_softmax
from halfbyte.kernels.native.gated import gated, gated_gradient
from halfbyte.kernels.native.matmul import matmul_4bit, matmul_4bit_dx, matmul_sums
from halfbyte.kernels.native.norm import rms_norm, rms_norm_gradient, rms_norm_weight_gradient
from halfbyte.kernels.native.probe import elementary, probe, probe_lookups, probed_arithmetic
from halfbyte.kernels.native.quantize import (
    dequantize_4bit,
    dequantize_coded,
    dequantize_int8,
    quantize_4bit,
    quantize_coded,
    quantize_int8,
)
from halfbyte.kernels.native.rotary import rotary
from halfbyte.kernels.native.runtime import available, threads, tier, tiers

__all__ = [
    "Decoder",
    "adamw_8bit",
    "adamw_32bit",
    "attention",
    "attention_backward",
    "available",
    "dequantize_4bit",
    "dequantize_coded",
    "dequantize_int8",
    "elementary",
    "fold_softmax",
    "gated",
    "gated_gradient",
    "matmul_4bit",
    "matmul_4bit_dx",
    "matmul_sums",
    "multiplies",
    "probe",
    "probe_lookups",
    "probed_arithmetic",
    "quantize_4bit",
    "quantize_coded",
    "quantize_int8",
    "rms_norm",
    "rms_norm_gradient",
    "rms_norm_weight_gradient",
    "rotary",
    "tell_bus_error",
    "threads",
    "tier",
    "tiers",
]

"""Double quantization: the quantization constants are themselves quantized (paper, section 3).

One fp32 constant per 64 weights costs 0.5 bit a weight. Their mean is taken off, since constants are positive and
the 8-bit map is symmetric, and what is left is quantized to 8 bits in blocks of 256: 8/64 + 32/(64 * 256) = 0.127 bit.
"""

from torch import Tensor

from halfbyte import kernels
from halfbyte.quant.codebooks import codebook

NESTED_BLOCKSIZE = 256


def quantize_statistics(absmax: Tensor) -> tuple[Tensor, kernels.Nested]:
    """Quantize first-level constants, fp32 ``[blocks]``, to codes uint8 ``[blocks]`` and what undoes it.

    Undone by :func:`halfbyte.kernels.reference.expand_absmax`, and inside the kernels that take nested statistics.
    """
    code = codebook("dynamic", absmax.device)
    offset = absmax.mean()
    codes, nested_absmax = kernels.quantize_coded(absmax - offset, code, NESTED_BLOCKSIZE)
    return codes, kernels.Nested(nested_absmax, code, NESTED_BLOCKSIZE, offset.item())

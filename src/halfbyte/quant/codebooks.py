"""The number formats: which values the codes of a quantized tensor stand for.

A codebook is an fp32 table; ``table[q]`` is the value of code ``q`` for a block whose largest magnitude is 1.

- ``nf4``: the 4-bit NormalFloat of QLoRA (arXiv 2305.14314, section 3 and appendix E).
- ``fp4``: bitsandbytes' 4-bit float. Its order is that of the bit patterns, and its smallest step, 1/192, is
  not what one mantissa bit would give; ``e2m1`` is the format that the paper's Table 2 calls Float4 E2M1.
- ``e2m1``, ``e3m0``: sign, exponent and mantissa bits as named, with subnormals, in the order of the bit patterns.
- ``int4``, ``int8``: evenly spaced two's-complement integers over the largest positive one, so that ``-8 / 7``
  and ``-128 / 127`` exist but are never the nearest.
- ``dynamic``, ``dynamic_unsigned``: bitsandbytes' 8-bit dynamic maps (arXiv 1511.04561; arXiv 2110.02861), whose
  exponent takes as many bits as it needs and leaves the rest to the fraction. They hold optimizer states and,
  signed, the statistics under double quantization.
"""

import functools
from collections.abc import Callable

import torch
from torch import Tensor

from halfbyte.errors import InputError, nearest

# As published with the paper's code: normal_float(4) to within 2e-7, but these are what files hold.
NF4 = (
    -1.0, -0.6961928009986877, -0.5250730514526367, -0.39491748809814453,
    -0.28444138169288635, -0.18477343022823334, -0.09105003625154495, 0.0,
    0.07958029955625534, 0.16093020141124725, 0.24611230194568634, 0.33791524171829224,
    0.44070982933044434, 0.5626170039176941, 0.7229568362236023, 1.0,
)  # fmt: skip

FP4_POSITIVE = (0.0, 0.0625, 8.0, 12.0, 4.0, 6.0, 2.0, 3.0)


def normal_float(bits: int) -> Tensor:
    """The k-bit NormalFloat by the paper's construction (section 3), fp32 ``[2 ** bits]``, ascending.

    Quantiles of the standard normal at evenly spaced probabilities, ``2 ** (bits - 1)`` of them above zero and one
    fewer below so that zero is exact, over the largest. The outermost probability, which the paper leaves open, is
    the one behind its published table: midway between ``1 - 1 / (2 n)`` and ``1 - 1 / (2 (n - 1))``, ``n = 2 ** bits``.

    Args:
        bits: 2 to 8.
    """
    if not 2 <= bits <= 8:
        raise InputError(f"A NormalFloat has 2 to 8 bits, not {bits}.")
    half = 2 ** (bits - 1)
    outermost = 1 - (1 / (4 * half) + 1 / (4 * half - 2)) / 2
    positive = torch.special.ndtri(torch.linspace(outermost, 0.5, half + 1, dtype=torch.float64)[:-1])
    negative = -torch.special.ndtri(torch.linspace(outermost, 0.5, half, dtype=torch.float64)[:-1])
    values = torch.cat([negative, torch.zeros(1, dtype=torch.float64), positive.flip(0)])
    return (values / values.max()).float()


def minifloat(exponent_bits: int, mantissa_bits: int) -> Tensor:
    """A small float format with subnormals and neither infinity nor NaN, over its largest value.

    Returns:
        fp32 ``[2 ** (1 + exponent_bits + mantissa_bits)]``, indexed by the bit pattern sign, exponent, mantissa.
    """
    steps = 2**mantissa_bits
    subnormal = [m / steps for m in range(steps)]
    normal = [2.0 ** (e - 1) * (1 + m / steps) for e in range(1, 2**exponent_bits) for m in range(steps)]
    values = torch.tensor(subnormal + normal, dtype=torch.float64)
    return torch.cat([values, 0 - values]).div(values.max()).float()


def integer(bits: int) -> Tensor:
    """Two's-complement integers in ascending order, over the largest: fp32 ``[2 ** bits]``."""
    largest = 2 ** (bits - 1) - 1
    return torch.arange(-largest - 1, largest + 1, dtype=torch.float32).div(largest)


def dynamic_map(signed: bool) -> Tensor:
    """bitsandbytes' 8-bit dynamic map, fp32 ``[256]``, ascending; to the last bit that of its files.

    Decade ``i`` of 7 (``10 ** (i - 6)``) holds the midpoints of ``2 ** i`` even parts of [0.1, 1] (twice as many
    without a sign); 0 and 1 complete the table.
    """
    values = [0.0, 1.0]
    for decade in range(7):
        parts = 2**decade if signed else 2 ** (decade + 1)
        edges = torch.linspace(0.1, 1, parts + 1, dtype=torch.float32)
        midpoints = 10.0 ** (decade - 6) * ((edges[:-1] + edges[1:]) / 2)
        values += midpoints.tolist()
        if signed:
            values += (-midpoints).tolist()
    return torch.tensor(sorted(values), dtype=torch.float32)


def _fp4() -> Tensor:
    values = torch.tensor(FP4_POSITIVE, dtype=torch.float32) / 12
    return torch.cat([values, 0 - values])


CODEBOOKS: dict[str, Callable[[], Tensor]] = {
    "nf4": lambda: torch.tensor(NF4, dtype=torch.float32),
    "fp4": _fp4,
    "e2m1": lambda: minifloat(2, 1),
    "e3m0": lambda: minifloat(3, 0),
    "int4": lambda: integer(4),
    "int8": lambda: integer(8),
    "dynamic": lambda: dynamic_map(signed=True),
    "dynamic_unsigned": lambda: dynamic_map(signed=False),
}


@functools.cache
def codebook(name: str, device: torch.device | str = "cpu") -> Tensor:
    """Return the codebook ``name`` as fp32 ``[16]`` or ``[256]`` on ``device``; one shared, read-only tensor each.

    Raises:
        InputError: there is no such codebook.
    """
    if name not in CODEBOOKS:
        raise InputError(f"There is no codebook {name!r}{nearest(name, CODEBOOKS)}; there is {', '.join(CODEBOOKS)}.")
    return CODEBOOKS[name]().to(device)

"""The native kernels (``csrc/``) as torch functions: the only importer of the extension.

Without a C++ compiler the package installs without the extension; :func:`available` tells.
"""

import torch
from torch import Tensor

from halfbyte.kernels.statistics import Statistics


def available() -> bool:
    """Whether this installation has the extension."""
    return False


def tiers() -> list[str]:
    """Return the tiers that this build and this chip have, best first."""
    return []


def tier() -> str:
    """Return the tier in force."""
    raise NotImplementedError


def threads() -> int:
    """Return the number of threads that the kernels run on."""
    return torch.get_num_threads()


def quantize_8bit(x: Tensor, code: Tensor, blocksize: int) -> tuple[Tensor, Tensor]:
    raise NotImplementedError


def dequantize_8bit(codes: Tensor, absmax: Tensor, code: Tensor, blocksize: int, dtype: torch.dtype) -> Tensor:
    raise NotImplementedError


def quantize_4bit(x: Tensor, code: Tensor, blocksize: int) -> tuple[Tensor, Tensor]:
    raise NotImplementedError


def dequantize_4bit(packed: Tensor, statistics: Statistics, n: int, dtype: torch.dtype) -> Tensor:
    raise NotImplementedError


def matmul_4bit(
    x: Tensor, packed: Tensor, statistics: Statistics, shape: tuple[int, int], bias: Tensor | None
) -> Tensor:
    raise NotImplementedError


def matmul_4bit_dx(dy: Tensor, packed: Tensor, statistics: Statistics, shape: tuple[int, int]) -> Tensor:
    raise NotImplementedError

"""What several families of operations do with their arguments: checks, and the view of a tensor as rows.

A wrong argument is a ``TypeError`` (dtype, device) or ``ValueError`` (size) that names what was given and what is
needed.
"""

import torch
from torch import Tensor

from halfbyte.kernels.weights import Weight4bit, WeightInt8

FLOATING = (torch.float32, torch.bfloat16, torch.float16)


def check_floating(name: str, dtype: torch.dtype) -> None:
    """Check ``dtype``, which is that of ``name``."""
    if dtype not in FLOATING:
        raise TypeError(f"{name} is {dtype}; it must be float32, bfloat16 or float16")


def check_blocksize(blocksize: int) -> None:
    """Check that a block has values."""
    if blocksize < 1:
        raise ValueError(f"blocksize is {blocksize}; it must be 1 or more")


def check_code(code: Tensor, sizes: range, device: torch.device) -> None:
    """Check a table of values: fp32, one of ``sizes`` long, on ``device``."""
    if code.dtype != torch.float32 or code.ndim != 1 or code.numel() not in sizes or code.device != device:
        size = f"{sizes[0]}" if len(sizes) == 1 else f"{sizes[0]} to {sizes[-1]}"
        raise ValueError(
            f"code is {code.dtype} {tuple(code.shape)} on {code.device}; it must be float32 ({size},) on {device}"
        )


def check_bytes(name: str, x: Tensor, size: int) -> None:
    """Check that ``name`` is ``size`` bytes that follow each other, at any address."""
    if x.dtype != torch.uint8 or not x.is_contiguous():
        raise TypeError(f"{name} is {x.dtype} with strides {x.stride()}; it must be uint8 and contiguous")
    if x.numel() != size:
        raise ValueError(f"{name} holds {x.numel()} bytes; it must hold {size}")


def check_absmax(absmax: Tensor, dtype: torch.dtype, n: int, blocksize: int, device: torch.device) -> None:
    """Check the statistics of ``n`` values: ``dtype`` ``[ceil(n / blocksize)]`` on ``device``, contiguous."""
    blocks = -(-n // blocksize)
    if absmax.dtype != dtype or absmax.shape != (blocks,) or absmax.device != device or not absmax.is_contiguous():
        raise ValueError(
            f"absmax is {absmax.dtype} {tuple(absmax.shape)} on {absmax.device} with strides {absmax.stride()}; {n} "
            f"values in blocks of {blocksize} need {dtype} ({blocks},) on {device}, contiguous"
        )


def check_4bit(weight: Weight4bit) -> None:
    """Check a 4-bit weight, all on one device."""
    packed, statistics, n = weight.packed, weight.statistics, weight.numel()
    nested, device = statistics.nested, packed.device
    check_bytes("packed", packed, -(-n // 2))
    check_blocksize(statistics.blocksize)
    check_code(statistics.code, range(16, 17), device)
    if nested is None:
        check_absmax(statistics.absmax, torch.float32, n, statistics.blocksize, device)
    else:
        check_absmax(statistics.absmax, torch.uint8, n, statistics.blocksize, device)
        check_blocksize(nested.blocksize)
        check_code(nested.code, range(256, 257), device)
        check_absmax(nested.absmax, torch.float32, statistics.absmax.numel(), nested.blocksize, device)


def check_int8(weight: WeightInt8) -> None:
    """Check an int8 weight, all on one device."""
    codes = weight.codes
    if codes.dtype != torch.int8 or not codes.is_contiguous():
        raise TypeError(f"codes are {codes.dtype} with strides {codes.stride()}; they must be int8 and contiguous")
    if codes.ndim != 2:
        raise ValueError(f"codes have shape {tuple(codes.shape)}; they must be a matrix")
    check_blocksize(weight.blocksize)
    check_absmax(weight.absmax, torch.float32, codes.numel(), weight.blocksize, codes.device)


def check_as(name: str, x: Tensor, like_name: str, like: Tensor) -> None:
    """Check that ``x`` has dtype, device and shape of ``like``."""
    if x.dtype != like.dtype or x.device != like.device:
        raise TypeError(f"{name} is {x.dtype} on {x.device}; it must be {like.dtype} on {like.device}, as {like_name}")
    if x.shape != like.shape:
        raise ValueError(f"{name} has shape {tuple(x.shape)}; it must have {tuple(like.shape)}, as {like_name}")


def as_rows(x: Tensor) -> Tensor:
    """Return ``[..., width]`` as ``[rows, width]``."""
    return x.reshape(-1, x.shape[-1])

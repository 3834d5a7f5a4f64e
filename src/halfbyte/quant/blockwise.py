"""Block-wise quantization: every block of a flattened tensor is scaled by its own constant (paper, equations 1 and 2).

There are three kinds of 8 bits in this package, all of them block-wise:

- *coded*: the block's largest magnitude scales it onto a codebook, and a byte says which of its values is nearest. With
  the dynamic maps (arXiv 2110.02861) it holds optimizer state and the statistics under double quantization. It is
  bitsandbytes' ``quantize_blockwise``; here :func:`quantize_coded`, and under it the kernels' function of that name.
- *int8*: evenly spaced integers from -127 to 127 times a 127th of the largest magnitude (LLM.int8(), arXiv 2208.07339);
  the only one that a product reads: :func:`halfbyte.kernels.quantize_int8`, :class:`halfbyte.kernels.WeightInt8`.
- *affine* (also called asymmetric): the integers from 0 to 255 between the block's minimum and maximum, which spends no
  code on values that do not occur: :func:`quantize_affine`.
"""

from typing import NamedTuple

import torch
from torch import Tensor

from halfbyte import kernels
from halfbyte.quant.codebooks import codebook


class Coded(NamedTuple):
    """A tensor quantized onto a codebook: ``codes`` uint8 in its shape, ``absmax`` fp32 ``[blocks]``."""

    codes: Tensor
    absmax: Tensor


class Affine(NamedTuple):
    """A tensor quantized affinely: ``codes`` uint8 in its shape, ``scale`` and ``minimum`` fp32 ``[blocks]``."""

    codes: Tensor
    scale: Tensor
    minimum: Tensor


def quantize_coded(tensor: Tensor, name: str = "dynamic", blocksize: int = 256) -> Coded:
    """Quantize ``tensor`` (any shape, floating) onto the codebook ``name``, one byte per value.

    For ``int8`` the signed integers are ``codes.int() - 128``.
    """
    code = codebook(name, tensor.device)
    ascending, order = code.sort(stable=True)
    codes, absmax = kernels.quantize_coded(tensor, ascending, blocksize)
    if not torch.equal(ascending, code):
        codes = order.to(torch.uint8)[codes.int()]
    return Coded(codes, absmax)


def dequantize_coded(
    quantized: Coded, name: str = "dynamic", blocksize: int = 256, dtype: torch.dtype = torch.float32
) -> Tensor:
    """Inverse of :func:`quantize_coded`, as ``dtype`` in the shape of the codes."""
    code = codebook(name, quantized.codes.device)
    return kernels.dequantize_coded(quantized.codes, quantized.absmax, code, blocksize, dtype)


def quantize_affine(tensor: Tensor, blocksize: int | None = None) -> Affine:
    """Quantize ``tensor`` affinely to 8 bits: ``codes = round((x - minimum) / scale)``.

    Args:
        tensor: any shape, floating.
        blocksize: values per block of the flattened tensor; None takes the whole tensor as one block.
    """
    blocks = _blocks(tensor.float(), blocksize)
    minimum, maximum = blocks.aminmax(dim=1)
    scale = (maximum - minimum) / 255
    steps = (blocks - minimum[:, None]) / torch.where(scale > 0, scale, 1)[:, None]
    codes = steps.round().clamp(0, 255).to(torch.uint8)
    return Affine(codes.view(-1)[: tensor.numel()].view(tensor.shape), scale, minimum)


def dequantize_affine(quantized: Affine, blocksize: int | None = None, dtype: torch.dtype = torch.float32) -> Tensor:
    """Inverse of :func:`quantize_affine`: ``codes * scale + minimum``, as ``dtype`` in the shape of the codes."""
    codes = quantized.codes
    values = _blocks(codes.float(), blocksize) * quantized.scale[:, None] + quantized.minimum[:, None]
    return values.view(-1)[: codes.numel()].view(codes.shape).to(dtype)


def _blocks(tensor: Tensor, blocksize: int | None) -> Tensor:
    """Return the flattened ``tensor`` as ``[blocks, blocksize]``, a short last block filled up with its last value."""
    flat = tensor.reshape(-1)
    size = blocksize or len(flat)
    missing = -len(flat) % size
    return torch.cat([flat, flat[-1:].expand(missing)]).view(-1, size)

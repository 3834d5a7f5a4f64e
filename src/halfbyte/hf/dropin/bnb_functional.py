"""bitsandbytes' functions on tensors (0.50 ``bitsandbytes.functional``), over our kernels, on the same bytes.

Where bitsandbytes' CPU library takes the second nearest 8-bit code (about one in 500), here is the nearest, as on its
other devices. Errors are of the types that bitsandbytes raises.
"""

import functools
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import linear

from halfbyte import kernels
from halfbyte.hf.dropin.bnb_state import FLOATING, QUANT_TYPES, QuantState, as_weight, check_4bit
from halfbyte.quant import codebook
from halfbyte.quant import quantize_4bit as quantized_4bit


def quantize_4bit(
    A: Tensor,
    absmax: Tensor | None = None,
    out: Tensor | None = None,
    blocksize: int | None = None,
    compress_statistics: bool = False,
    quant_type: str = "fp4",
    quant_storage: torch.dtype = torch.uint8,
) -> tuple[Tensor, QuantState]:
    """Quantize ``A`` to 4 bits: ``[ceil(n / 2), 1]`` bytes, seen as ``quant_storage``, and their state."""
    blocksize = 64 if blocksize is None else blocksize
    check_4bit(blocksize, quant_type, A.dtype)
    weight = quantized_4bit(A, quant_type, blocksize, compress_statistics)
    packed, state = weight.packed.view(-1).view(quant_storage).view(-1, 1), QuantState.of(weight)
    if out is not None:
        packed = out.copy_(packed)
    if absmax is not None:
        state.absmax = absmax.copy_(state.absmax)
    return packed, state


def dequantize_4bit(
    A: Tensor,
    quant_state: Any = None,
    absmax: Tensor | None = None,
    out: Tensor | None = None,
    blocksize: int | None = None,
    quant_type: str = "fp4",
) -> Tensor:
    """Inverse of :func:`quantize_4bit`, in the state's dtype and shape (transposed where ``A`` is a row)."""
    if quant_state is None:
        if absmax is None or out is None:
            raise ValueError("dequantize_4bit requires both absmax and out when quant_state is not provided")
        quant_state = QuantState(
            absmax, out.shape, blocksize=64 if blocksize is None else blocksize, quant_type=quant_type, dtype=out.dtype
        )
    dense = as_weight(A, quant_state).dequantize()
    dense = dense if out is None else out.copy_(dense)
    return dense.t() if A.shape[0] == 1 else dense


quantize_nf4 = functools.partial(quantize_4bit, quant_type="nf4")
quantize_fp4 = functools.partial(quantize_4bit, quant_type="fp4")
dequantize_nf4 = functools.partial(dequantize_4bit, quant_type="nf4")
dequantize_fp4 = functools.partial(dequantize_4bit, quant_type="fp4")


def get_4bit_type(typename: str, device: torch.device | str | None = None, blocksize: int = 64) -> Tensor:
    """Return the table of ``nf4`` or ``fp4``, fp32 ``[16]``."""
    if typename not in QUANT_TYPES:
        raise NotImplementedError(f"Typename {typename} not supported")
    return codebook(typename, "cpu" if device is None else torch.device(device)).clone()


def create_dynamic_map(signed: bool = True, max_exponent_bits: int = 7, total_bits: int = 8) -> Tensor:
    """Return the table of 8-bit dynamic numbers, fp32 ``[256]``."""
    if (max_exponent_bits, total_bits) != (7, 8):
        raise NotImplementedError("Dynamic maps have 7 exponent bits of 8 here; others are bitsandbytes' own.")
    return codebook("dynamic" if signed else "dynamic_unsigned").clone()


def quantize_blockwise(
    A: Tensor,
    code: Tensor | None = None,
    absmax: Tensor | None = None,
    out: Tensor | None = None,
    blocksize: int = 4096,
    nested: bool = False,
) -> tuple[Tensor, QuantState]:
    """Quantize ``A`` to bytes in its shape, each the index of the nearest value of ``code``, and their state."""
    if blocksize <= 0:
        raise ValueError(f"blocksize must be positive, got {blocksize}")
    if A.dtype not in FLOATING:
        raise ValueError(f"Blockwise quantization only supports 16/32-bit floats, but got {A.dtype}")
    code = (codebook("dynamic", A.device) if code is None else code.to(A.device, torch.float32)).clone()
    ascending, order = code.sort(stable=True)
    codes, constants = kernels.quantize_coded(A.detach(), ascending, blocksize)
    if not torch.equal(ascending, code):
        codes = order.to(torch.uint8)[codes.int()]
    state = QuantState(constants, code=code, blocksize=blocksize, dtype=A.dtype)
    if nested:
        state.offset = constants.mean()
        state.absmax, state.state2 = quantize_blockwise(constants - state.offset, blocksize=blocksize)
        state.nested = True
    if absmax is not None:
        state.absmax = absmax.copy_(state.absmax)
    return (codes if out is None else out.copy_(codes)), state


def dequantize_blockwise(
    A: Tensor,
    quant_state: Any = None,
    absmax: Tensor | None = None,
    code: Tensor | None = None,
    out: Tensor | None = None,
    blocksize: int = 4096,
    nested: bool = False,
) -> Tensor:
    """Inverse of :func:`quantize_blockwise`, in the state's dtype, or fp32 where constants are given instead."""
    if quant_state is None and absmax is None:
        raise ValueError("dequantize_blockwise requires either quant_state or absmax")
    if A.dtype != torch.uint8:
        raise ValueError(f"A must be uint8, got {A.dtype}")
    if quant_state is None:
        assert absmax is not None
        code = codebook("dynamic", A.device) if code is None else code.to(A.device)
        quant_state = QuantState(absmax, code=code, blocksize=blocksize, dtype=torch.float32)
    constants = quant_state.absmax
    if quant_state.nested:
        constants = dequantize_blockwise(constants, quant_state.state2) + quant_state.offset
    dense = kernels.dequantize_coded(
        A.contiguous(), constants.float(), quant_state.code.to(A.device), quant_state.blocksize, quant_state.dtype
    )
    return dense if out is None else out.copy_(dense)


def matmul_4bit(
    A: Tensor, B: Tensor, quant_state: Any, out: Tensor | None = None, bias: Tensor | None = None
) -> Tensor:
    """``A Wᵀ + bias``, ``W`` ``[N, K]`` being ``B`` with its state; differentiable in ``A`` and ``bias``."""
    if quant_state is None:
        raise ValueError("quant_state is required")
    if len(quant_state.shape) != 2:
        raise ValueError("matmul_4bit: quant_state.shape must be 2D [N, K]")
    weight = as_weight(B, quant_state)
    rows, columns = weight.shape
    if A.shape[-1] == rows != columns:  # quantized as [K, N]
        y = linear(A, weight.dequantize(A.dtype).t(), bias)
    else:
        y = kernels.matmul_4bit(A, weight, bias)
    return y if out is None else out.copy_(y)


def int8_vectorwise_quant(A: Tensor, threshold: float = 0.0) -> tuple[Tensor, Tensor, Tensor | None]:
    """Quantize the rows of ``A`` ``[..., K]``: int8 in its shape, largest magnitudes fp32, one a row, no outliers."""
    if threshold > 0:
        raise NotImplementedError("int8_vectorwise_quant(threshold=...): outliers are not taken out here; leave it 0.")
    weight = kernels.quantize_int8(A.detach().reshape(-1, A.shape[-1]), A.shape[-1])
    return weight.codes.view(A.shape), weight.absmax, None


def int8_vectorwise_dequant(A: Tensor, stats: Tensor) -> Tensor:
    """Inverse of :func:`int8_vectorwise_quant`, fp32."""
    return A * stats.view(-1, 1) * (1 / 127)

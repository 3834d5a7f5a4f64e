"""bitsandbytes' kernels (0.50, ``torch.ops.bitsandbytes``) as a provider, on the same bytes.

The default for CUDA tensors where bitsandbytes is installed. On a CPU it has to be asked for, with
``use_provider("bitsandbytes")``; that is how the wiring here is tested: the CUDA kernels behind it were not run.

What bitsandbytes cannot do the reference does:

- 4 bits: tables other than nf4 and fp4; blocks of other sizes than the powers of two from 32 to 4096 (to 1024 on a
  CPU, where it hands larger ones to ``torch.compile``).
- Coded 8 bits: tables of fewer than 256 values; blocks of other sizes than the powers of two from 64 to 4096.
- 8-bit optimizer state: blocks of other sizes than 256.
- Tensors of 2³¹ elements and more, which its kernels count in 32 bits, and empty ones.
- Block-wise int8 weights, and attention (which on a GPU does not come here: :mod:`halfbyte.hf.layers.attention`).

Norms, gating, rotary embedding and the softmax of the output head are :mod:`halfbyte.kernels.gpu`'s.

Its fused product takes rows of whole blocks and double quantization in blocks of 256; for others, and for the gradient,
the weight is dequantized and torch multiplies. A short last block is filled up first, since its AVX-512 kernel places
the scales of such blocks wrongly.

Where its numbers depart from the reference: on a CPU about one 8-bit code in 500 is the second nearest (a table of
65,536 even steps), and with it everything made from 8-bit codes: double quantization, 8-bit optimizer state. On CUDA,
by its source: its 8-bit kernel decays weights after the update, moves a first moment that rounding took across zero to
the smallest code of its old sign, and skips elements whose gradient is not finite (which the CPU does not).
"""

import functools
import importlib
import importlib.util
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.utils.weak import WeakIdKeyDictionary

from halfbyte.kernels import gpu, reference
from halfbyte.kernels.adamw_step import AdamwStep
from halfbyte.kernels.terms import Sum
from halfbyte.kernels.weights import Statistics, Weight4bit, WeightInt8

BLOCKSIZES_4BIT = (32, 64, 128, 256, 512, 1024, 2048, 4096)
BLOCKSIZES_8BIT = BLOCKSIZES_4BIT[1:]
LARGEST_ON_CPU = 1024
BLOCKSIZE_NESTED = BLOCKSIZE_STATE = 256
LARGEST_COUNT = 2**31 - 1

quantize_int8, dequantize_int8 = reference.quantize_int8, reference.dequantize_int8
attention, attention_backward = reference.attention, reference.attention_backward
rms_norm, rms_norm_gradient = gpu.rms_norm, gpu.rms_norm_gradient
rms_norm_weight_gradient = reference.rms_norm_weight_gradient
gated, gated_gradient, rotary = gpu.gated, gpu.gated_gradient, gpu.rotary
fold_softmax = gpu.fold_softmax

TAKES_OUT_DTYPE = tuple(int(part) for part in torch.__version__.split(".")[:2]) >= (2, 8)
"""Whether ``torch.mm`` gives fp32 of 16-bit factors, on CUDA."""
FEW = 64
"""Rows up to which its fused product serves in a sum: above, a dense weight and one large product are faster."""


@functools.cache
def available() -> bool:
    """Return whether bitsandbytes is installed."""
    return importlib.util.find_spec("bitsandbytes") is not None


def quantize_coded(x: Tensor, code: Tensor, blocksize: int) -> tuple[Tensor, Tensor]:
    """Block-wise quantization to a table; ``code`` must be ascending."""
    if not _takes_coded(x.numel(), code, blocksize):
        return reference.quantize_coded(x, code, blocksize)
    codes, absmax = _operations().quantize_blockwise.default(x, code.contiguous(), blocksize)
    return codes.view(-1), absmax


def dequantize_coded(codes: Tensor, absmax: Tensor, code: Tensor, blocksize: int, dtype: torch.dtype) -> Tensor:
    """Inverse of :func:`quantize_coded`."""
    if not _takes_coded(codes.numel(), code, blocksize):
        return reference.dequantize_coded(codes, absmax, code, blocksize, dtype)
    out: Tensor = _operations().dequantize_blockwise.default(codes, absmax, code.contiguous(), blocksize, dtype)
    return out.view(-1)


def quantize_4bit(x: Tensor, code: Tensor, blocksize: int) -> tuple[Tensor, Tensor]:
    """Block-wise 4-bit quantization."""
    name = _table(x.numel(), code, blocksize)
    if name is None:
        return reference.quantize_4bit(x, code, blocksize)
    packed, absmax = _operations().quantize_4bit.default(x, blocksize, name, torch.uint8)
    return packed.view(-1), absmax


def dequantize_4bit(weight: Weight4bit, dtype: torch.dtype) -> Tensor:
    """Inverse of :func:`quantize_4bit`."""
    statistics, n = weight.statistics, weight.numel()
    blocksize = statistics.blocksize
    name = _table(n, statistics.code, blocksize)
    if name is None:
        return reference.dequantize_4bit(weight, dtype)
    absmax, blocks, packed = _expand_absmax(statistics), len(statistics.absmax), weight.packed.view(-1)
    if n % blocksize:
        packed = torch.nn.functional.pad(packed, (0, blocks * blocksize // 2 - len(packed)))
    out: Tensor = _operations().dequantize_4bit.default(packed, absmax, blocksize, name, (blocks, blocksize), dtype)
    return out.view(-1)[:n].view(weight.shape)


def matmul_4bit(x: Tensor, weight: Weight4bit, bias: Tensor | None) -> Tensor:
    """The 4-bit linear product ``y = x Wᵀ + bias``."""
    statistics, shape = weight.statistics, weight.shape
    nested, name = statistics.nested, _table(weight.numel(), statistics.code, statistics.blocksize)
    fused = name is not None and x.numel() > 0 and shape[1] % statistics.blocksize == 0
    if not fused or (nested is not None and nested.blocksize != BLOCKSIZE_NESTED):
        return torch.nn.functional.linear(x, dequantize_4bit(weight, x.dtype), bias)
    multiply = _operations().gemm_4bit.default
    packed = weight.packed.view(-1, 1)
    if nested is None:
        y: Tensor = multiply(x, packed, shape, statistics.absmax, statistics.blocksize, name, bias)
        return y
    offset = torch.full((), nested.offset, dtype=torch.float32, device=x.device)
    y = multiply(
        x, packed, shape, nested.absmax, statistics.blocksize, name, bias, statistics.absmax, nested.code, offset
    )
    return y


def matmul_4bit_dx(dy: Tensor, weight: Weight4bit) -> Tensor:
    """The gradient of :func:`matmul_4bit` with respect to ``x``."""
    return dy @ dequantize_4bit(weight, dy.dtype)


def matmul_sums(sums: Sequence[Sum]) -> None:
    """Sums of products, the factors in the dtype of ``x``.

    One or two terms (a projection and its adapter) are summed by the second product itself, over the narrower one
    rounded: what an adapter adds is rounded by itself, at its own size. More than two, and sums in fp32, are fp32.
    """
    for terms, out, bias, _ in sums:
        products = [_factors(x, factor, transposed) for x, factor, transposed in sorted(terms, key=_width)]
        if len(products) > 2 or out.dtype != terms[0].x.dtype:
            total = None if bias is None else bias.float().expand_as(out)
            for x, factor in products:
                y = x.float() if factor is None else _product(x, factor)
                total = y if total is None else total + y
            out.copy_(torch.zeros_like(out) if total is None else total)
            continue
        if bias is not None:
            out.copy_(bias.expand_as(out))
        for number, (x, factor) in enumerate(products):
            begun = bias is not None or number > 0
            if factor is None:
                out.copy_(out + x if begun else x)
            elif begun:
                out.addmm_(x, factor)
            else:
                torch.mm(x, factor, out=out)


def _width(term: Any) -> int:
    """The length of a term's products; an adapter's is its rank."""
    width: int = term.x.shape[1]
    return width


def _factors(x: Tensor, factor: Any, transposed: bool) -> tuple[Tensor, Tensor | None]:
    """Return the two factors of a term's product; of few rows and 4 bits the product, and None."""
    if isinstance(factor, Weight4bit) and transposed and len(x) <= FEW:
        return matmul_4bit(x.contiguous(), factor, None), None
    if isinstance(factor, Weight4bit):
        factor = dequantize_4bit(factor, x.dtype)
    elif isinstance(factor, WeightInt8):
        factor = reference.dequantize_int8(factor, x.dtype)
    factor = factor.to(x.dtype)
    return x, factor.T if transposed else factor


def _product(x: Tensor, factor: Tensor) -> Tensor:
    """The product in fp32 of factors that may be rounded."""
    if x.dtype == torch.float32:
        return x @ factor
    if x.is_cuda and TAKES_OUT_DTYPE:
        return torch.mm(x, factor, out_dtype=torch.float32)
    return x.float() @ factor.float() if x.device.type == "cpu" else (x @ factor).float()


def adamw_32bit(
    params: list[Tensor],
    grads: list[Tensor],
    exp_avgs: list[Tensor],
    exp_avg_sqs: list[Tensor],
    step: AdamwStep,
) -> None:
    """One AdamW step over many tensors with fp32 moments."""
    update = _operations().optimizer_update_32bit.default
    number, lr, betas, eps, weight_decay = step
    for param, grad, m, v in zip(params, grads, exp_avgs, exp_avg_sqs, strict=True):
        # Without its bounds on an update's norm, and without AdEMAMix's beta3 and alpha.
        update("adam", grad, param, m, v, None, 0.0, 0.0, *betas, 0.0, 0.0, eps, weight_decay, number, lr, 1.0)
    torch.autograd.graph.increment_version(params)


def adamw_8bit(
    params: list[Tensor],
    grads: list[Tensor],
    exp_avgs: list[tuple[Tensor, Tensor]],
    exp_avg_sqs: list[tuple[Tensor, Tensor]],
    code: Tensor,
    code_unsigned: Tensor,
    blocksize: int,
    step: AdamwStep,
) -> None:
    """One AdamW step over many tensors with block-wise 8-bit moments; both tables must be ascending."""
    if blocksize != BLOCKSIZE_STATE:
        return reference.adamw_8bit(params, grads, exp_avgs, exp_avg_sqs, code, code_unsigned, blocksize, step)
    update = _operations().optimizer_update_8bit_blockwise.default
    number, lr, betas, eps, weight_decay = step
    code, code_unsigned = code.contiguous(), code_unsigned.contiguous()
    for param, grad, (m, m_absmax), (v, v_absmax) in zip(params, grads, exp_avgs, exp_avg_sqs, strict=True):
        update(
            "adam", grad, param, m, v, *betas, 0.0, 0.0, eps, number, lr,
            code, code_unsigned, m_absmax, v_absmax, weight_decay, 1.0,
        )  # fmt: skip
    torch.autograd.graph.increment_version(params)


def managed_memory(size: int, device: torch.device) -> Tensor:
    """Return ``size`` zero bytes of CUDA managed memory as a tensor on ``device``: what paged optimizers live in.

    The driver moves its pages between the GPU and the CPU (QLoRA, section 3, "Paged Optimizers"). bitsandbytes hands
    managed memory out as a CPU tensor; here the same address is wrapped by ``__cuda_array_interface__``, so that every
    operation takes it for what it is. bitsandbytes has no way to free it, so it lasts as long as the process. Written
    from the documentation of both; not run, for want of a GPU.
    """
    memory = importlib.import_module("bitsandbytes.functional").get_paged(size, dtype=torch.uint8, device=device)
    return torch.as_tensor(_CudaArray(memory.data_ptr(), size), device=device).zero_()


class _CudaArray:
    def __init__(self, address: int, size: int) -> None:
        self.__cuda_array_interface__ = {"data": (address, False), "shape": (size,), "typestr": "|u1", "version": 3}


@functools.cache
def _operations() -> Any:
    importlib.import_module("bitsandbytes")  # registers them
    return torch.ops.bitsandbytes


def _takes_coded(n: int, code: Tensor, blocksize: int) -> bool:
    return 0 < n <= LARGEST_COUNT and len(code) == 256 and blocksize in BLOCKSIZES_8BIT


def _table(n: int, code: Tensor, blocksize: int) -> str | None:
    """Return bitsandbytes' name for a 4-bit table, or None where it has none or does not take the sizes."""
    largest = BLOCKSIZES_4BIT[-1] if code.is_cuda else LARGEST_ON_CPU
    if not 0 < n <= LARGEST_COUNT or blocksize not in BLOCKSIZES_4BIT or blocksize > largest:
        return None
    if code not in _tables:
        get = importlib.import_module("bitsandbytes.functional").get_4bit_type
        names = (name for name in ("nf4", "fp4") if torch.equal(get(name, code.device), code))
        _tables[code] = next(names, None)
    name: str | None = _tables[code]
    return name


_tables = WeakIdKeyDictionary()  # by identity: comparing values on a GPU would wait for it at each call


def _expand_absmax(statistics: Statistics) -> Tensor:
    nested = statistics.nested
    if nested is None:
        return statistics.absmax
    absmax = dequantize_coded(statistics.absmax, nested.absmax, nested.code, nested.blocksize, torch.float32)
    return absmax + nested.offset

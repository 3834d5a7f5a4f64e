"""Products with quantized weights, and sums of products: arguments checked, then handed to a provider.

Formulas, shapes and dtypes are those of :mod:`halfbyte.kernels.reference`; errors as in :mod:`halfbyte.kernels.checks`.
"""

import contextlib
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from halfbyte.kernels import pool
from halfbyte.kernels.checks import FLOATING, check_4bit, check_floating, check_int8
from halfbyte.kernels.provider import provider_for
from halfbyte.kernels.terms import Sum, Term
from halfbyte.kernels.weights import Weight4bit, WeightInt8


def matmul_4bit(x: Tensor, weight: Weight4bit, bias: Tensor | None = None) -> Tensor:
    """The 4-bit linear product ``y = x Wᵀ + bias``, differentiable in ``x`` and ``bias``.

    The dense weight lives no longer than the product: the backward reads the 4-bit bytes again (``dx = dy W``).

    Args:
        x: ``[..., K]``, fp32, bf16 or fp16.
        weight: ``[N, K]``.
        bias: ``[N]`` in the dtype of ``x``, or None.

    Returns:
        ``[..., N]`` in the dtype of ``x``.
    """
    check_floating("x", x.dtype)
    check_4bit(weight)
    device = weight.packed.device
    if len(weight.shape) != 2:
        raise ValueError(f"the weight has shape {tuple(weight.shape)}; it must be a matrix")
    _check_product(x, weight.shape, device, bias)
    if torch.is_grad_enabled() and (x.requires_grad or (bias is not None and bias.requires_grad)):
        y: Tensor = _Matmul4bit.apply(x, bias, weight)  # type: ignore[no-untyped-call]
        return y
    # In decoding one product takes as long as fifteen calls of autograd's machinery.
    with _no_autocast(device):
        return provider_for(device).matmul_4bit(x, weight, bias)


def matmul_int8(x: Tensor, weight: WeightInt8, bias: Tensor | None = None) -> Tensor:
    """The int8 linear product ``y = x Wᵀ + bias``, differentiable in ``x`` and ``bias``; ``W`` is never whole.

    Args:
        x: ``[..., K]``, fp32, bf16 or fp16.
        weight: ``[N, K]``.
        bias: ``[N]`` in the dtype of ``x``, or None.

    Returns:
        ``[..., N]`` in the dtype of ``x``.
    """
    check_int8(weight)
    check_floating("x", x.dtype)
    _check_product(x, weight.shape, weight.codes.device, bias)
    rows, columns = weight.shape
    flat = x.reshape(x.shape[:-1].numel(), columns)
    if torch.is_grad_enabled() and (x.requires_grad or (bias is not None and bias.requires_grad)):
        y: Tensor = _MatmulInt8.apply(flat, bias, weight)  # type: ignore[no-untyped-call]
    else:
        y = _product_int8(flat, weight, bias)
    return y.view(*x.shape[:-1], rows)


def matmul_sums(sums: Sequence[Sum]) -> None:
    """Sums of products ``y = Σ x Rᵀ + bias`` (``x R`` where a term is not ``transposed``), each into its ``out``.

    The factors ``R`` are rounded to the dtype of ``x``; sums are fp32 and rounded once. The sums must not depend on
    each other. Not differentiable: gradients are such sums themselves (:mod:`halfbyte.nn.lora`).

    Args:
        sums: on one device; shapes and dtypes as in :class:`Sum` and :class:`Term`.
    """
    if not sums:
        return
    device = sums[0].out.device
    for terms, out, bias, _ in sums:
        _check_sum(terms, out, bias, device)
    with _no_autocast(device):
        provider_for(device).matmul_sums(sums)


class _Matmul4bit(torch.autograd.Function):
    """Keeps nothing dense for the backward: only the 4-bit bytes, which the layer holds anyway."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, bias: Tensor | None, weight: Weight4bit) -> Tensor:
        ctx.save_for_backward(weight.packed)
        ctx.statistics, ctx.shape = weight.statistics, weight.shape
        with _no_autocast(x.device):
            return provider_for(x.device).matmul_4bit(x, weight, bias)

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
        (packed,) = ctx.saved_tensors
        dx = dbias = None
        if ctx.needs_input_grad[0]:
            with _no_autocast(dy.device):
                dx = provider_for(dy.device).matmul_4bit_dx(dy, Weight4bit(packed, ctx.statistics, ctx.shape))
        if ctx.needs_input_grad[1]:
            dbias = dy.reshape(-1, ctx.shape[0]).sum(0)
        return dx, dbias, None


def _product_int8(x: Tensor, weight: WeightInt8, bias: Tensor | None) -> Tensor:
    y = pool.empty((x.shape[0], weight.shape[0]), x.dtype, x.device)
    terms = [Term(x, weight)]
    with _no_autocast(x.device):
        provider_for(x.device).matmul_sums([Sum(terms, y, None if bias is None else bias.contiguous())])
    return y


class _MatmulInt8(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, bias: Tensor | None, weight: WeightInt8) -> Tensor:
        ctx.weight = weight
        return _product_int8(x, weight, bias)

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
        dx = dbias = None
        if ctx.needs_input_grad[0]:
            dx = pool.empty((dy.shape[0], ctx.weight.shape[1]), dy.dtype, dy.device)
            matmul_sums([Sum([Term(dy, ctx.weight, transposed=False)], dx)])
        if ctx.needs_input_grad[1]:
            dbias = dy.sum(0)
        return dx, dbias, None


_UNCHANGED = contextlib.nullcontext()


def _no_autocast(device: torch.device) -> contextlib.AbstractContextManager[object]:
    if torch.is_autocast_enabled(device.type):
        return torch.autocast(device.type, enabled=False)
    return _UNCHANGED


def _check_product(x: Tensor, shape: tuple[int, ...], device: torch.device, bias: Tensor | None) -> None:
    """Check the operands of a product with a weight of this shape, ``[N, K]``, on this device."""
    if x.device != device:
        raise TypeError(f"x is on {x.device} and the weight on {device}; both must be on one device")
    if x.ndim == 0 or x.shape[-1] != shape[1]:
        raise ValueError(f"x has shape {tuple(x.shape)}, but a weight of shape {tuple(shape)} needs [..., {shape[1]}]")
    if bias is not None and (bias.shape != shape[:1] or bias.dtype != x.dtype or bias.device != device):
        raise ValueError(
            f"bias is {bias.dtype} {tuple(bias.shape)} on {bias.device}, but this product needs {x.dtype} "
            f"({shape[0]},) on {device}"
        )


def _check_sum(terms: Sequence[Term], out: Tensor, bias: Tensor | None, device: torch.device) -> None:
    if not terms:
        raise ValueError("there are no terms; a sum of products needs one or more")
    check_floating("out", out.dtype)
    _check_matrix("out", out, device)
    rows, width = out.shape
    for i, (x, factor, transposed) in enumerate(terms):
        _check_matrix(f"x of term {i}", x, device, any_strides=True)
        if isinstance(factor, Tensor):
            check_floating(f"the factor of term {i}", factor.dtype)
            _check_matrix(f"the factor of term {i}", factor, device)
        elif isinstance(factor, WeightInt8):
            check_int8(factor)
            _check_device(f"the weight of term {i}", factor.codes, device)
        else:
            check_4bit(factor)
            _check_device(f"the weight of term {i}", factor.packed, device)
        if x.dtype not in FLOATING or x.dtype != terms[0].x.dtype:
            raise TypeError(
                f"x of term {i} is {x.dtype} and that of term 0 {terms[0].x.dtype}; all must be one of float32, "
                "bfloat16 and float16"
            )
        needed = (width, x.shape[1]) if transposed else (x.shape[1], width)
        if x.shape[0] != rows or tuple(factor.shape) != needed:
            raise ValueError(
                f"term {i} multiplies {tuple(x.shape)} by {'the transpose of ' if transposed else ''}"
                f"{tuple(factor.shape)}, but out is {tuple(out.shape)}"
            )
    if bias is not None and (bias.shape != (width,) or bias.dtype != out.dtype or bias.device != device):
        raise ValueError(
            f"bias is {bias.dtype} {tuple(bias.shape)} on {bias.device}, but out needs {out.dtype} ({width},) on "
            f"{device}"
        )
    if bias is not None and not bias.is_contiguous():
        raise ValueError(f"bias has strides {bias.stride()}; it must be contiguous")


def _check_matrix(name: str, x: Tensor, device: torch.device, any_strides: bool = False) -> None:
    _check_device(name, x, device)
    if x.ndim != 2 or not (any_strides or x.shape[1] <= 1 or x.stride(1) == 1):
        raise ValueError(
            f"{name} has shape {tuple(x.shape)} and strides {x.stride()}; it must be a matrix with contiguous rows"
        )


def _check_device(name: str, x: Tensor, device: torch.device) -> None:
    if x.device != device:
        raise TypeError(f"{name} is on {x.device} and the first out on {device}; all must be on one device")

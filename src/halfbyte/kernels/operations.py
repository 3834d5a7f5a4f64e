"""The operations that the rest of the package calls: arguments checked once, then handed to a provider.

Formulas, shapes and dtypes are those of :mod:`halfbyte.kernels.reference`. A wrong argument is a ``TypeError``
(dtype, device) or ``ValueError`` (size) that names what was given and what is needed.
"""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from halfbyte.kernels.provider import provider_for
from halfbyte.kernels.statistics import Statistics
from halfbyte.kernels.terms import Sum, Term, Weight8bit

FLOATING = (torch.float32, torch.bfloat16, torch.float16)


def quantize_8bit(x: Tensor, code: Tensor, blocksize: int) -> tuple[Tensor, Tensor]:
    """Quantize block-wise to 8 bits: codes uint8 in the shape of ``x``, and ``absmax`` fp32 ``[blocks]``."""
    _check_floating("x", x)
    _check_code(code, range(2, 257), x.device)
    _check_blocksize(blocksize)
    codes, absmax = provider_for(x.device).quantize_8bit(x.contiguous(), code, blocksize)
    return codes.view(x.shape), absmax


def dequantize_8bit(
    codes: Tensor, absmax: Tensor, code: Tensor, blocksize: int, dtype: torch.dtype = torch.float32
) -> Tensor:
    """Inverse of :func:`quantize_8bit`, as ``dtype`` in the shape of ``codes``."""
    _check_bytes("codes", codes, codes.numel())
    _check_blocksize(blocksize)
    _check_dtype(dtype)
    _check_code(code, range(2, 257), codes.device)
    _check_absmax(absmax, torch.float32, codes.numel(), blocksize, codes.device)
    flat = provider_for(codes.device).dequantize_8bit(codes, absmax, code, blocksize, dtype)
    return flat.view(codes.shape)


def quantize_4bit(x: Tensor, code: Tensor, blocksize: int) -> tuple[Tensor, Tensor]:
    """Quantize block-wise to 4 bits: ``packed`` uint8 ``[ceil(n / 2)]`` and ``absmax`` fp32 ``[blocks]``."""
    _check_floating("x", x)
    _check_code(code, range(16, 17), x.device)
    _check_blocksize(blocksize)
    return provider_for(x.device).quantize_4bit(x.contiguous(), code, blocksize)


def dequantize_4bit(packed: Tensor, statistics: Statistics, shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
    """Inverse of :func:`quantize_4bit`, as ``dtype`` in ``shape``."""
    n = torch.Size(shape).numel()
    _check_dtype(dtype)
    _check_weight(packed, statistics, n)
    return provider_for(packed.device).dequantize_4bit(packed, statistics, n, dtype).view(shape)


def matmul_4bit(
    x: Tensor, packed: Tensor, statistics: Statistics, shape: tuple[int, int], bias: Tensor | None = None
) -> Tensor:
    """The 4-bit linear product ``y = x Wᵀ + bias``, differentiable in ``x`` and ``bias``.

    The dense weight lives no longer than the product: the backward reads the 4-bit bytes again (``dx = dy W``).

    Args:
        x: ``[..., K]``, fp32, bf16 or fp16.
        packed: uint8, ``ceil(N K / 2)`` bytes, any address.
        statistics: those of ``W``.
        shape: ``(N, K)``.
        bias: ``[N]`` in the dtype of ``x``, or None.

    Returns:
        ``[..., N]`` in the dtype of ``x``.
    """
    _check_floating("x", x)
    _check_weight(packed, statistics, shape[0] * shape[1])
    if x.device != packed.device:
        raise TypeError(f"x is on {x.device} and the weight on {packed.device}; both must be on one device")
    if x.ndim == 0 or x.shape[-1] != shape[1]:
        raise ValueError(f"x has shape {tuple(x.shape)}, but a weight of shape {tuple(shape)} needs [..., {shape[1]}]")
    if bias is not None and (bias.shape != shape[:1] or bias.dtype != x.dtype):
        raise ValueError(f"bias is {bias.dtype} {tuple(bias.shape)}, but this product needs {x.dtype} ({shape[0]},)")
    y: Tensor = _Matmul4bit.apply(x, bias, packed, statistics, shape)  # type: ignore[no-untyped-call]
    return y


def quantize_int8(x: Tensor, blocksize: int) -> Weight8bit:
    """Quantize a matrix block-wise to int8; see :func:`halfbyte.kernels.reference.quantize_int8`."""
    _check_floating("x", x)
    _check_blocksize(blocksize)
    if x.ndim != 2:
        raise ValueError(f"x has shape {tuple(x.shape)}; it must be a matrix")
    return provider_for(x.device).quantize_int8(x, blocksize)


def dequantize_int8(weight: Weight8bit, dtype: torch.dtype = torch.float32) -> Tensor:
    """Inverse of :func:`quantize_int8`, as ``dtype`` ``[N, K]``."""
    _check_int8(weight)
    _check_dtype(dtype)
    return provider_for(weight.codes.device).dequantize_int8(weight, dtype)


def matmul_int8(x: Tensor, weight: Weight8bit, bias: Tensor | None = None) -> Tensor:
    """The 8-bit linear product ``y = x Wᵀ + bias``, differentiable in ``x`` and ``bias``; ``W`` is never whole.

    Args:
        x: ``[..., K]``, fp32, bf16 or fp16.
        weight: ``[N, K]``.
        bias: ``[N]`` in the dtype of ``x``, or None.

    Returns:
        ``[..., N]`` in the dtype of ``x``.
    """
    _check_int8(weight)
    _check_floating("x", x)
    rows, columns = weight.shape
    if x.ndim == 0 or x.shape[-1] != columns:
        raise ValueError(f"x has shape {tuple(x.shape)}, but a weight of shape {weight.shape} needs [..., {columns}]")
    flat = x.reshape(-1, columns)
    y: Tensor = _MatmulInt8.apply(flat, bias, weight)  # type: ignore[no-untyped-call]
    return y.view(*x.shape[:-1], rows)


def matmul_sums(sums: Sequence[Sum]) -> None:
    """Sums of products ``y = Σ x Rᵀ + bias`` (``x R`` where a term is a gradient), each into its ``out``.

    The factors ``R`` are rounded to the dtype of ``x``; sums are fp32 and rounded once. The sums must not depend on
    each other. Not differentiable: gradients are such sums themselves (:mod:`halfbyte.nn.lora`).

    Args:
        sums: on one device; shapes and dtypes as in :class:`Sum` and :class:`Term`.
    """
    if not sums:
        return
    device = sums[0].out.device
    for terms, out, bias in sums:
        _check_sum(terms, out, bias, device)
    with torch.autocast(device.type, enabled=False):
        provider_for(device).matmul_sums(sums)


def adamw_32bit(
    params: list[Tensor],
    grads: list[Tensor],
    exp_avgs: list[Tensor],
    exp_avg_sqs: list[Tensor],
    *,
    step: int,
    lr: float,
    betas: tuple[float, float],
    eps: float,
    weight_decay: float,
) -> None:
    """One AdamW step over many tensors of one device, in place, with fp32 moments.

    See :func:`halfbyte.kernels.reference.adamw_32bit`.
    """
    if not params:
        return
    device = params[0].device
    for i, (param, grad, m, v) in enumerate(zip(params, grads, exp_avgs, exp_avg_sqs, strict=True)):
        _check_step(i, param, grad, device)
        for name, x in (("exp_avgs", m), ("exp_avg_sqs", v)):
            _check_like(name, i, x, torch.float32, param)
    provider_for(device).adamw_32bit(
        params, grads, exp_avgs, exp_avg_sqs, step=step, lr=lr, betas=betas, eps=eps, weight_decay=weight_decay
    )


def adamw_8bit(
    params: list[Tensor],
    grads: list[Tensor],
    exp_avgs: list[tuple[Tensor, Tensor]],
    exp_avg_sqs: list[tuple[Tensor, Tensor]],
    code: Tensor,
    code_unsigned: Tensor,
    blocksize: int,
    *,
    step: int,
    lr: float,
    betas: tuple[float, float],
    eps: float,
    weight_decay: float,
) -> None:
    """One AdamW step over many tensors of one device, in place, with block-wise 8-bit moments.

    See :func:`halfbyte.kernels.reference.adamw_8bit`.
    """
    if not params:
        return
    device = params[0].device
    _check_blocksize(blocksize)
    for table in (code, code_unsigned):
        _check_code(table, range(256, 257), device)
    for i, (param, grad, first, second) in enumerate(zip(params, grads, exp_avgs, exp_avg_sqs, strict=True)):
        _check_step(i, param, grad, device)
        for name, (codes, absmax) in (("exp_avgs", first), ("exp_avg_sqs", second)):
            _check_like(name, i, codes, torch.uint8, param)
            _check_absmax(absmax, torch.float32, param.numel(), blocksize, device)
    provider_for(device).adamw_8bit(
        params, grads, exp_avgs, exp_avg_sqs, code, code_unsigned, blocksize,
        step=step, lr=lr, betas=betas, eps=eps, weight_decay=weight_decay,
    )  # fmt: skip


class _Matmul4bit(torch.autograd.Function):
    """Keeps nothing dense for the backward: only the 4-bit bytes, which the layer holds anyway."""

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        bias: Tensor | None,
        packed: Tensor,
        statistics: Statistics,
        shape: tuple[int, int],
    ) -> Tensor:
        ctx.save_for_backward(packed)
        ctx.statistics, ctx.shape = statistics, shape
        with torch.autocast(x.device.type, enabled=False):
            return provider_for(x.device).matmul_4bit(x, packed, statistics, shape, bias)

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
        (packed,) = ctx.saved_tensors
        dx = dbias = None
        if ctx.needs_input_grad[0]:
            with torch.autocast(dy.device.type, enabled=False):
                dx = provider_for(dy.device).matmul_4bit_dx(dy, packed, ctx.statistics, ctx.shape)
        if ctx.needs_input_grad[1]:
            dbias = dy.reshape(-1, ctx.shape[0]).sum(0)
        return dx, dbias, None, None, None


class _MatmulInt8(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, bias: Tensor | None, weight: Weight8bit) -> Tensor:
        ctx.weight = weight
        y = x.new_empty(x.shape[0], weight.shape[0])
        matmul_sums([Sum([Term(x, weight)], y, None if bias is None else bias.contiguous())])
        return y

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
        dx = dbias = None
        if ctx.needs_input_grad[0]:
            dx = dy.new_empty(dy.shape[0], ctx.weight.shape[1])
            matmul_sums([Sum([Term(dy, ctx.weight, gradient=True)], dx)])
        if ctx.needs_input_grad[1]:
            dbias = dy.sum(0)
        return dx, dbias, None


def _check_floating(name: str, x: Tensor) -> None:
    if x.dtype not in FLOATING:
        raise TypeError(f"{name} is {x.dtype}; it must be float32, bfloat16 or float16")


def _check_sum(terms: Sequence[Term], out: Tensor, bias: Tensor | None, device: torch.device) -> None:
    if not terms:
        raise ValueError("there are no terms; a sum of products needs one or more")
    _check_floating("out", out)
    _check_matrix("out", out, device)
    rows, width = out.shape
    for i, (x, factor, gradient) in enumerate(terms):
        _check_matrix(f"x of term {i}", x, device, any_strides=True)
        if isinstance(factor, Tensor):
            _check_floating(f"the factor of term {i}", factor)
            _check_matrix(f"the factor of term {i}", factor, device)
        elif isinstance(factor, Weight8bit):
            _check_int8(factor)
            _check_device(f"the weight of term {i}", factor.codes, device)
        else:
            _check_weight(factor.packed, factor.statistics, factor.shape[0] * factor.shape[1])
            _check_device(f"the weight of term {i}", factor.packed, device)
        if x.dtype not in FLOATING or x.dtype != terms[0].x.dtype:
            raise TypeError(
                f"x of term {i} is {x.dtype} and that of term 0 {terms[0].x.dtype}; all must be one of float32, "
                "bfloat16 and float16"
            )
        needed = (x.shape[1], width) if gradient else (width, x.shape[1])
        if len(x) != rows or tuple(factor.shape) != needed:
            raise ValueError(
                f"term {i} multiplies {tuple(x.shape)} by {'' if gradient else 'the transpose of '}"
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


def _check_int8(weight: Weight8bit) -> None:
    codes = weight.codes
    if codes.dtype != torch.int8 or not codes.is_contiguous():
        raise TypeError(f"codes are {codes.dtype} with strides {codes.stride()}; they must be int8 and contiguous")
    if codes.ndim != 2:
        raise ValueError(f"codes have shape {tuple(codes.shape)}; they must be a matrix")
    _check_blocksize(weight.blocksize)
    _check_absmax(weight.absmax, torch.float32, codes.numel(), weight.blocksize, codes.device)


def _check_dtype(dtype: torch.dtype) -> None:
    if dtype not in FLOATING:
        raise TypeError(f"dtype is {dtype}; it must be float32, bfloat16 or float16")


def _check_blocksize(blocksize: int) -> None:
    if blocksize < 1:
        raise ValueError(f"blocksize is {blocksize}; it must be 1 or more")


def _check_code(code: Tensor, sizes: range, device: torch.device) -> None:
    if code.dtype != torch.float32 or code.ndim != 1 or len(code) not in sizes or code.device != device:
        size = f"{sizes[0]}" if len(sizes) == 1 else f"{sizes[0]} to {sizes[-1]}"
        raise ValueError(
            f"code is {code.dtype} {tuple(code.shape)} on {code.device}; it must be float32 ({size},) on {device}"
        )


def _check_bytes(name: str, x: Tensor, size: int) -> None:
    if x.dtype != torch.uint8 or not x.is_contiguous():
        raise TypeError(f"{name} is {x.dtype} with strides {x.stride()}; it must be uint8 and contiguous")
    if x.numel() != size:
        raise ValueError(f"{name} holds {x.numel()} bytes; it must hold {size}")


def _check_absmax(absmax: Tensor, dtype: torch.dtype, n: int, blocksize: int, device: torch.device) -> None:
    blocks = -(-n // blocksize)
    if absmax.dtype != dtype or absmax.shape != (blocks,) or absmax.device != device or not absmax.is_contiguous():
        raise ValueError(
            f"absmax is {absmax.dtype} {tuple(absmax.shape)} on {absmax.device}; {n} values in blocks of {blocksize} "
            f"need {dtype} ({blocks},) on {device}"
        )


def _check_weight(packed: Tensor, statistics: Statistics, n: int) -> None:
    _check_bytes("packed", packed, -(-n // 2))
    _check_blocksize(statistics.blocksize)
    _check_code(statistics.code, range(16, 17), packed.device)
    nested = statistics.nested
    if nested is None:
        _check_absmax(statistics.absmax, torch.float32, n, statistics.blocksize, packed.device)
    else:
        _check_absmax(statistics.absmax, torch.uint8, n, statistics.blocksize, packed.device)
        _check_blocksize(nested.blocksize)
        _check_code(nested.code, range(256, 257), packed.device)
        _check_absmax(nested.absmax, torch.float32, len(statistics.absmax), nested.blocksize, packed.device)


def _check_step(i: int, param: Tensor, grad: Tensor, device: torch.device) -> None:
    if param.dtype not in FLOATING or param.device != device or not param.is_contiguous():
        raise TypeError(
            f"params[{i}] is {param.dtype} on {param.device} with strides {param.stride()}; it must be float32, "
            f"bfloat16 or float16, on {device} and contiguous"
        )
    _check_like("grads", i, grad, param.dtype, param)


def _check_like(name: str, i: int, x: Tensor, dtype: torch.dtype, param: Tensor) -> None:
    if x.dtype != dtype or x.device != param.device or not x.is_contiguous():
        raise TypeError(
            f"{name}[{i}] is {x.dtype} on {x.device} with strides {x.stride()}; it must be {dtype} on {param.device} "
            "and contiguous"
        )
    if x.shape != param.shape:
        raise ValueError(f"{name}[{i}] has shape {tuple(x.shape)}; its parameter has {tuple(param.shape)}")

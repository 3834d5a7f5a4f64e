"""The operations that the rest of the package calls: arguments checked once, then handed to a provider.

Formulas, shapes and dtypes are those of :mod:`halfbyte.kernels.reference`. A wrong argument is a ``TypeError``
(dtype, device) or ``ValueError`` (size) that names what was given and what is needed.
"""

import contextlib
from typing import Any

import torch
from torch import Tensor

from halfbyte.kernels.provider import provider_for
from halfbyte.kernels.statistics import Statistics

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
    if torch.is_grad_enabled() and (x.requires_grad or (bias is not None and bias.requires_grad)):
        y: Tensor = _Matmul4bit.apply(x, bias, packed, statistics, shape)  # type: ignore[no-untyped-call]
        return y
    # In decoding one product takes as long as fifteen calls of autograd's machinery.
    with _no_autocast(x.device):
        return provider_for(x.device).matmul_4bit(x, packed, statistics, shape, bias)


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
        with _no_autocast(x.device):
            return provider_for(x.device).matmul_4bit(x, packed, statistics, shape, bias)

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
        (packed,) = ctx.saved_tensors
        dx = dbias = None
        if ctx.needs_input_grad[0]:
            with _no_autocast(dy.device):
                dx = provider_for(dy.device).matmul_4bit_dx(dy, packed, ctx.statistics, ctx.shape)
        if ctx.needs_input_grad[1]:
            dbias = dy.reshape(-1, ctx.shape[0]).sum(0)
        return dx, dbias, None, None, None


def _no_autocast(device: torch.device) -> contextlib.AbstractContextManager[object]:
    if torch.is_autocast_enabled(device.type):
        return torch.autocast(device.type, enabled=False)
    return contextlib.nullcontext()


def _check_floating(name: str, x: Tensor) -> None:
    if x.dtype not in FLOATING:
        raise TypeError(f"{name} is {x.dtype}; it must be float32, bfloat16 or float16")


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

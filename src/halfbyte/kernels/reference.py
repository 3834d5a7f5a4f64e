"""Every operation of the contract once, plainly, in torch: the oracle that each provider is tested against.

Notation: a tensor is flattened row-major into ``n`` values and cut into ``ceil(n / blocksize)`` blocks
(the last may be short; blocks cross rows). ``code`` is the table of values that the codes stand for,
``code[q]`` being the value of code ``q``; 4-bit tables have 16 entries in any order, 8-bit tables 256 in
ascending order. Arithmetic is fp32 with each product and sum rounded on its own.

The rounding rule is "nearest code, a tie to the lower": the values are scaled by their block's largest
magnitude (QLoRA, arXiv 2305.14314, equation 1) and placed among the midpoints of neighbouring codes. To
the last bit it is that of bitsandbytes' torch backend (0.50.2, ``backends/default/ops.py``), including its
two oddities: full blocks are multiplied by the reciprocal of ``absmax`` while a short last block is
divided by it, and only the short block's ``absmax`` is raised to 1e-38 in the result.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from halfbyte.kernels.statistics import Statistics
from halfbyte.kernels.terms import Sum, Weight4bit, Weight8bit

SMALLEST_ABSMAX = 1e-38


def scale_blocks(x: Tensor, blocksize: int) -> tuple[Tensor, Tensor]:
    """Scale each block of ``x`` by its largest magnitude.

    Args:
        x: any shape and floating dtype, ``n`` values.
        blocksize: values per block.

    Returns:
        The scaled values, fp32 ``[n]`` in [-1, 1], and ``absmax``, fp32 ``[ceil(n / blocksize)]``.
    """
    flat = x.reshape(-1).float()
    whole = flat.numel() // blocksize * blocksize
    blocks = flat[:whole].view(-1, blocksize)
    absmax = blocks.abs().amax(dim=1) if len(blocks) else flat.new_empty(0)
    scaled = (blocks * (1.0 / absmax.clamp(min=SMALLEST_ABSMAX)).unsqueeze(1)).clamp(-1, 1).view(-1)
    if whole < flat.numel():
        rest = flat[whole:]
        rest_absmax = rest.abs().amax().clamp(min=SMALLEST_ABSMAX)
        absmax = torch.cat([absmax, rest_absmax.unsqueeze(0)])
        scaled = torch.cat([scaled, (rest / rest_absmax).clamp(-1, 1)])
    return scaled, absmax


def nearest_code(scaled: Tensor, code: Tensor) -> Tensor:
    """Return the code whose value is nearest to each of ``scaled`` (NaN gets the largest value's).

    Args:
        scaled: fp32 ``[n]``.
        code: fp32 ``[c]``, the table of values, in any order.

    Returns:
        int64 ``[n]``, indices into ``code``.
    """
    values, order = torch.sort(code, stable=True)
    midpoints = (values[:-1] + values[1:]) / 2
    return order[torch.bucketize(scaled, midpoints)]


def unscale_blocks(values: Tensor, absmax: Tensor, blocksize: int) -> Tensor:
    """Multiply each block of ``values`` (fp32 ``[n]``) by its ``absmax`` (fp32); inverse of :func:`scale_blocks`."""
    return values * absmax.repeat_interleave(blocksize)[: values.numel()]


def quantize_8bit(x: Tensor, code: Tensor, blocksize: int) -> tuple[Tensor, Tensor]:
    """Block-wise 8-bit quantization: codes uint8 ``[n]`` and ``absmax`` fp32 (see the module's notation)."""
    scaled, absmax = scale_blocks(x, blocksize)
    return nearest_code(scaled, code).to(torch.uint8), absmax


def dequantize_8bit(codes: Tensor, absmax: Tensor, code: Tensor, blocksize: int, dtype: torch.dtype) -> Tensor:
    """Inverse of :func:`quantize_8bit`: ``code[codes] * absmax`` as ``dtype`` ``[n]``."""
    return unscale_blocks(code[codes.reshape(-1).long()], absmax, blocksize).to(dtype)


def quantize_4bit(x: Tensor, code: Tensor, blocksize: int) -> tuple[Tensor, Tensor]:
    """Block-wise 4-bit quantization, two codes to a byte, the first in the high half.

    An odd count is filled up with a zero value before it is packed.

    Returns:
        ``packed``, uint8 ``[ceil(n / 2)]``, and ``absmax``, fp32 ``[ceil(n / blocksize)]``.
    """
    scaled, absmax = scale_blocks(x, blocksize)
    if scaled.numel() % 2:
        scaled = torch.cat([scaled, scaled.new_zeros(1)])
    q = nearest_code(scaled, code).to(torch.uint8)
    return (q[::2] << 4) | q[1::2], absmax


def expand_absmax(statistics: Statistics) -> Tensor:
    """Return the fp32 ``absmax`` ``[blocks]``, undoing double quantization (paper, section 3) where it was used."""
    if statistics.nested is None:
        return statistics.absmax
    nested = statistics.nested
    return (
        dequantize_8bit(statistics.absmax, nested.absmax, nested.code, nested.blocksize, torch.float32) + nested.offset
    )


def dequantize_4bit(packed: Tensor, statistics: Statistics, n: int, dtype: torch.dtype) -> Tensor:
    """Inverse of :func:`quantize_4bit`: the ``n`` values ``code[q] * absmax`` as ``dtype`` ``[n]``."""
    packed = packed.reshape(-1)
    q = torch.stack([packed >> 4, packed & 15], dim=1).view(-1)[:n]
    return unscale_blocks(statistics.code[q.long()], expand_absmax(statistics), statistics.blocksize).to(dtype)


def quantize_int8(x: Tensor, blocksize: int) -> Weight8bit:
    """Block-wise quantization to evenly spaced integers: ``codes = round(x * (127 / absmax))``, halves to even.

    Where a block is a row, the codes are those of ``LLM.int8()`` (arXiv 2208.07339) as bitsandbytes' torch backend
    computes them (0.50.2, ``int8_vectorwise_quant``). A block of zeros gets zeros.

    Args:
        x: ``[N, K]``, floating.
        blocksize: values per block of the flattened weight.
    """
    flat = x.reshape(-1).float()
    rest = -flat.numel() % blocksize
    blocks = torch.nn.functional.pad(flat, (0, rest)).view(-1, blocksize)
    absmax = blocks.abs().amax(dim=1) if len(blocks) else flat.new_empty(0)
    factor = torch.where(absmax > 0, 127.0 / absmax, 0.0)
    codes = (blocks * factor.unsqueeze(1)).round().clamp(-127, 127).to(torch.int8)
    return Weight8bit(codes.view(-1)[: flat.numel()].view(x.shape), absmax, blocksize)


def dequantize_int8(weight: Weight8bit, dtype: torch.dtype) -> Tensor:
    """Inverse of :func:`quantize_int8`: ``codes * (absmax / 127)`` as ``dtype`` ``[N, K]``."""
    values = unscale_blocks(weight.codes.reshape(-1).float(), weight.absmax / 127.0, weight.blocksize)
    return values.to(dtype).view(weight.shape)


def matmul_4bit(
    x: Tensor, packed: Tensor, statistics: Statistics, shape: tuple[int, int], bias: Tensor | None
) -> Tensor:
    """The 4-bit linear product ``y = x Wᵀ + bias`` with ``W`` dequantized to the dtype of ``x``.

    Args:
        x: ``[..., K]``, floating.
        packed: uint8, ``ceil(N K / 2)`` bytes.
        statistics: those of ``W``.
        shape: ``(N, K)``, that of ``W``.
        bias: ``[N]`` in the dtype of ``x``, or None.

    Returns:
        ``[..., N]`` in the dtype of ``x``.
    """
    rows, columns = shape
    weight = dequantize_4bit(packed, statistics, rows * columns, x.dtype).view(shape)
    return torch.nn.functional.linear(x, weight, bias)


def matmul_4bit_dx(dy: Tensor, packed: Tensor, statistics: Statistics, shape: tuple[int, int]) -> Tensor:
    """The gradient of :func:`matmul_4bit` with respect to ``x``: ``dx = dy W``, ``[..., N]`` to ``[..., K]``."""
    rows, columns = shape
    return dy @ dequantize_4bit(packed, statistics, rows * columns, dy.dtype).view(shape)


def matmul_sums(sums: Sequence[Sum]) -> None:
    """Sums of products ``y = Σ x Rᵀ + bias`` (``x R`` where a term is a gradient), each into its ``out``.

    The factors ``R`` are rounded to the dtype of ``x``; sums are fp32 and rounded once.
    """
    for terms, out, bias in sums:
        y = torch.zeros_like(out, dtype=torch.float32) if bias is None else bias.float().expand_as(out)
        for x, factor, gradient in terms:
            if isinstance(factor, Weight8bit):
                factor = dequantize_int8(factor, x.dtype)
            elif isinstance(factor, Weight4bit):
                rows, columns = factor.shape
                factor = dequantize_4bit(factor.packed, factor.statistics, rows * columns, x.dtype).view(factor.shape)
            rounded = factor.to(x.dtype).float()
            y = y + x.float() @ (rounded if gradient else rounded.T)
        out.copy_(y)


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
    """One AdamW step (arXiv 1711.05101, algorithm 2) over many tensors in place, with fp32 moments.

        m = beta1 m + (1 - beta1) g,   v = beta2 v + (1 - beta2) g^2
        p = (1 - lr weight_decay) p - lr / (1 - beta1^step)  m / (sqrt(v) / sqrt(1 - beta2^step) + eps)

    These are torch 2.13's own operations in the order of its ``_multi_tensor_adam``: fp32 parameters and moments are
    bitwise those of ``torch.optim.AdamW``. Others are computed in fp32 and rounded once into the parameter.

    Args:
        params: fp32, bf16 or fp16, any shapes.
        grads: of the same shapes.
        exp_avgs: ``m``, fp32 of the same shapes.
        exp_avg_sqs: ``v``, fp32 of the same shapes.
        step: 1 for the first step of these tensors.
    """
    beta1, beta2 = betas
    p, g = [x.float() for x in params], [x.float() for x in grads]
    if weight_decay != 0:
        torch._foreach_mul_(p, 1 - lr * weight_decay)
    torch._foreach_lerp_(exp_avgs, g, 1 - beta1)
    torch._foreach_mul_(exp_avg_sqs, beta2)
    torch._foreach_addcmul_(exp_avg_sqs, g, g, 1 - beta2)
    denominators = torch._foreach_sqrt(exp_avg_sqs)
    torch._foreach_div_(denominators, (1 - beta2**step) ** 0.5)
    torch._foreach_add_(denominators, eps)
    torch._foreach_addcdiv_(p, exp_avgs, denominators, -(lr / (1 - beta1**step)))
    torch._foreach_copy_(params, p)


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
    """The step of :func:`adamw_32bit` with block-wise 8-bit moments (arXiv 2110.02861), in place.

    Each tensor's moments are dequantized, updated, used, and quantized again, all in fp32. A gradient whose square is
    not finite leaves its parameter alone and sets its moments to zero, as in bitsandbytes' CUDA kernel: through
    ``absmax`` it would spoil its whole block.

    Args:
        params: fp32, bf16 or fp16, any shapes, contiguous.
        grads: of the same shapes.
        exp_avgs: ``m`` as :func:`quantize_8bit` returns it, ``(codes, absmax)``: uint8 in the shape of the parameter
            and fp32 ``[ceil(n / blocksize)]``.
        exp_avg_sqs: ``v`` in the same form.
        code: the table of ``m``, fp32 ``[256]``.
        code_unsigned: the table of ``v``, fp32 ``[256]``.
        step: 1 for the first step of these tensors.
    """
    beta1, beta2 = betas
    for param, grad, first, second in zip(params, grads, exp_avgs, exp_avg_sqs, strict=True):
        p, g = param.reshape(-1).float(), grad.reshape(-1).float()
        square = g * g
        finite = square.isfinite()
        m = beta1 * dequantize_8bit(*first, code, blocksize, torch.float32).view(-1) + (1 - beta1) * g
        v = beta2 * dequantize_8bit(*second, code_unsigned, blocksize, torch.float32).view(-1) + (1 - beta2) * square
        m, v = m.where(finite, 0.0), v.where(finite, 0.0)
        root = v.double().sqrt().float()  # rounded once, which torch's fp32 square root is not (MKL, a fifth of cases)
        denominator = root / (1 - beta2**step) ** 0.5 + eps
        updated = (1 - lr * weight_decay) * p - (lr / (1 - beta1**step)) * m / denominator
        param.copy_(updated.where(finite, p).view_as(param))
        for moment, (codes, absmax), table in ((m, first, code), (v, second, code_unsigned)):
            new_codes, new_absmax = quantize_8bit(moment, table, blocksize)
            codes.copy_(new_codes.view_as(codes))
            absmax.copy_(new_absmax)

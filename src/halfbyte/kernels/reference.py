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

from halfbyte.kernels.adamw_step import AdamwStep
from halfbyte.kernels.softmax import RunningSoftmax
from halfbyte.kernels.terms import Sum
from halfbyte.kernels.weights import Statistics, Weight4bit, WeightInt8

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


def quantize_coded(x: Tensor, code: Tensor, blocksize: int) -> tuple[Tensor, Tensor]:
    """Block-wise quantization to a table of up to 256 values: codes uint8 ``[n]`` and ``absmax`` fp32."""
    scaled, absmax = scale_blocks(x, blocksize)
    return nearest_code(scaled, code).to(torch.uint8), absmax


def dequantize_coded(codes: Tensor, absmax: Tensor, code: Tensor, blocksize: int, dtype: torch.dtype) -> Tensor:
    """Inverse of :func:`quantize_coded`: ``code[codes] * absmax`` as ``dtype`` ``[n]``."""
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
        dequantize_coded(statistics.absmax, nested.absmax, nested.code, nested.blocksize, torch.float32) + nested.offset
    )


def dequantize_4bit(weight: Weight4bit, dtype: torch.dtype) -> Tensor:
    """Inverse of :func:`quantize_4bit`: the values ``code[q] * absmax`` as ``dtype`` in the shape of the weight."""
    packed, statistics = weight.packed.reshape(-1), weight.statistics
    q = torch.stack([packed >> 4, packed & 15], dim=1).view(-1)[: weight.numel()]
    values = unscale_blocks(statistics.code[q.long()], expand_absmax(statistics), statistics.blocksize)
    return values.to(dtype).view(weight.shape)


def quantize_int8(x: Tensor, blocksize: int) -> WeightInt8:
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
    return WeightInt8(codes.view(-1)[: flat.numel()].view(x.shape), absmax, blocksize)


def dequantize_int8(weight: WeightInt8, dtype: torch.dtype) -> Tensor:
    """Inverse of :func:`quantize_int8`: ``codes * (absmax / 127)`` as ``dtype`` ``[N, K]``."""
    values = unscale_blocks(weight.codes.reshape(-1).float(), weight.absmax / 127.0, weight.blocksize)
    return values.to(dtype).view(weight.shape)


def matmul_4bit(x: Tensor, weight: Weight4bit, bias: Tensor | None) -> Tensor:
    """The 4-bit linear product ``y = x Wᵀ + bias`` with ``W`` dequantized to the dtype of ``x``.

    Args:
        x: ``[..., K]``, floating.
        weight: ``W``, ``[N, K]``.
        bias: ``[N]`` in the dtype of ``x``, or None.

    Returns:
        ``[..., N]`` in the dtype of ``x``.
    """
    return torch.nn.functional.linear(x, dequantize_4bit(weight, x.dtype), bias)


def matmul_4bit_dx(dy: Tensor, weight: Weight4bit) -> Tensor:
    """The gradient of :func:`matmul_4bit` with respect to ``x``: ``dx = dy W``, ``[..., N]`` to ``[..., K]``."""
    return dy @ dequantize_4bit(weight, dy.dtype)


def matmul_sums(sums: Sequence[Sum]) -> None:
    """Sums of products ``y = Σ x Rᵀ + bias`` (``x R`` where a term is not ``transposed``), each into its ``out``.

    The factors ``R`` are rounded to the dtype of ``x``; sums are fp32 and rounded once.
    """
    for terms, out, bias, _ in sums:
        y = torch.zeros_like(out, dtype=torch.float32) if bias is None else bias.float().expand_as(out)
        for x, factor, transposed in terms:
            if isinstance(factor, WeightInt8):
                factor = dequantize_int8(factor, x.dtype)
            elif isinstance(factor, Weight4bit):
                factor = dequantize_4bit(factor, x.dtype)
            rounded = factor.to(x.dtype).float()
            y = y + x.float() @ (rounded.T if transposed else rounded)
        out.copy_(y)


def attention(q: Tensor, k: Tensor, v: Tensor, ranges: Tensor, scale: float, softcap: float) -> tuple[Tensor, Tensor]:
    """Softmax attention of each query over its range of keys (arXiv 1706.03762, section 3.2.1).

        z = scale q kᵀ, or softcap tanh(scale q kᵀ / softcap);   lse = log sum exp z;   out = exp(z - lse) v

    Query head ``h`` reads key/value head ``h // (H / G)``.

    Args:
        q: ``[B, H, L, D]``, floating.
        k: ``[B, G, S, D]`` in the dtype of ``q``; ``H`` is a multiple of ``G``.
        v: as ``k``.
        ranges: int32 ``[B, L, 2]``: query ``i`` reads the keys from ``ranges[b, i, 0]`` to before ``ranges[b, i, 1]``.
            Without any its output is 0.
        scale: factor of the products.
        softcap: bound of the logits; 0 for none.

    Returns:
        ``out``, ``[B, H, L, D]`` in the dtype of ``q``, and ``lse``, fp32 ``[B, H, L]``, -inf for a query without keys.
    """
    z, _ = _logits(q, k, ranges, scale, softcap)
    lse = torch.logsumexp(z, dim=-1)
    p = (z - lse.unsqueeze(-1)).exp().where(z > -torch.inf, 0)
    return (p @ _for_queries(v, q)).to(q.dtype), lse


def attention_backward(
    dout: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor,
    lse: Tensor,
    ranges: Tensor,
    scale: float,
    softcap: float,
) -> tuple[Tensor, Tensor, Tensor]:
    """The gradients ``dq``, ``dk`` and ``dv`` of :func:`attention` (arXiv 2205.14135, appendix B.2).

    p = exp(z - lse);   dv = pᵀ dout;   ds = scale (1 - (z / softcap)²) p (dout vᵀ - rowsum(dout out));
    dq = ds k;   dk = dsᵀ q

    Those of a key/value head are the sums over the query heads that read it. ``dout`` has the shape of ``out``.
    """
    z, slope = _logits(q, k, ranges, scale, softcap)
    p = (z - lse.unsqueeze(-1)).exp().where(z > -torch.inf, 0)
    d = (dout.float() * out.float()).sum(-1, keepdim=True)
    ds = p * (dout.float() @ _for_queries(v, q).mT - d) * slope * scale
    dq = ds @ _for_queries(k, q)
    dk, dv = ds.mT @ q.float(), p.mT @ dout.float()
    shape = *k.shape[:2], q.shape[1] // k.shape[1], *k.shape[2:]
    dk, dv = (x.view(shape).sum(2) for x in (dk, dv))
    return dq.to(q.dtype), dk.to(q.dtype), dv.to(q.dtype)


def _logits(q: Tensor, k: Tensor, ranges: Tensor, scale: float, softcap: float) -> tuple[Tensor, Tensor | float]:
    """Return fp32 ``z`` ``[B, H, L, S]``, -inf out of range, and the derivative of the soft cap there."""
    z = q.float() @ _for_queries(k, q).mT * scale
    slope: Tensor | float = 1.0
    if softcap:
        t = torch.tanh(z / softcap)
        z, slope = softcap * t, 1 - t * t
    key = torch.arange(k.shape[2], device=k.device)
    begin, end = ranges.unsqueeze(1).unbind(-1)
    return z.masked_fill((key < begin.unsqueeze(-1)) | (key >= end.unsqueeze(-1)), -torch.inf), slope


def _for_queries(x: Tensor, q: Tensor) -> Tensor:
    """Return fp32 keys or values ``[B, G, S, D]`` once for each query head, ``[B, H, S, D]``."""
    return x.float().repeat_interleave(q.shape[1] // x.shape[1], dim=1)


def adamw_32bit(
    params: list[Tensor],
    grads: list[Tensor],
    exp_avgs: list[Tensor],
    exp_avg_sqs: list[Tensor],
    step: AdamwStep,
) -> None:
    """One AdamW step (arXiv 1711.05101, algorithm 2) over many tensors in place, with fp32 moments.

        m = beta1 m + (1 - beta1) g,   v = beta2 v + (1 - beta2) g^2
        p = (1 - lr weight_decay) p - lr / (1 - beta1^t)  m / (sqrt(v) / sqrt(1 - beta2^t) + eps)

    These are torch 2.13's own operations in the order of its ``_multi_tensor_adam``: fp32 parameters and moments are
    bitwise those of ``torch.optim.AdamW``. Others are computed in fp32 and rounded once into the parameter.

    Args:
        params: fp32, bf16 or fp16, any shapes.
        grads: of the same shapes.
        exp_avgs: ``m``, fp32 of the same shapes.
        exp_avg_sqs: ``v``, fp32 of the same shapes.
        step: t, lr, betas, eps and weight_decay.
    """
    t, lr, (beta1, beta2), eps, weight_decay = step
    p, g = [x.float() for x in params], [x.float() for x in grads]
    if weight_decay != 0:
        torch._foreach_mul_(p, 1 - lr * weight_decay)
    torch._foreach_lerp_(exp_avgs, g, 1 - beta1)
    torch._foreach_mul_(exp_avg_sqs, beta2)
    torch._foreach_addcmul_(exp_avg_sqs, g, g, 1 - beta2)
    denominators = torch._foreach_sqrt(exp_avg_sqs)
    torch._foreach_div_(denominators, (1 - beta2**t) ** 0.5)
    torch._foreach_add_(denominators, eps)
    torch._foreach_addcdiv_(p, exp_avgs, denominators, -(lr / (1 - beta1**t)))
    torch._foreach_copy_(params, p)


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
    """The step of :func:`adamw_32bit` with block-wise 8-bit moments (arXiv 2110.02861), in place.

    Each tensor's moments are dequantized, updated, used, and quantized again, all in fp32. A gradient whose square is
    not finite leaves its parameter alone and sets its moments to zero, as in bitsandbytes' CUDA kernel: through
    ``absmax`` it would spoil its whole block.

    Args:
        params: fp32, bf16 or fp16, any shapes, contiguous.
        grads: of the same shapes.
        exp_avgs: ``m`` as :func:`quantize_coded` returns it, ``(codes, absmax)``: uint8 in the shape of the parameter
            and fp32 ``[ceil(n / blocksize)]``.
        exp_avg_sqs: ``v`` in the same form.
        code: the table of ``m``, fp32 ``[256]``.
        code_unsigned: the table of ``v``, fp32 ``[256]``.
        step: t, lr, betas, eps and weight_decay.
    """
    t, lr, (beta1, beta2), eps, weight_decay = step
    for param, grad, first, second in zip(params, grads, exp_avgs, exp_avg_sqs, strict=True):
        p, g = param.reshape(-1).float(), grad.reshape(-1).float()
        square = g * g
        finite = square.isfinite()
        m = beta1 * dequantize_coded(*first, code, blocksize, torch.float32).view(-1) + (1 - beta1) * g
        v = beta2 * dequantize_coded(*second, code_unsigned, blocksize, torch.float32).view(-1) + (1 - beta2) * square
        m, v = m.where(finite, 0.0), v.where(finite, 0.0)
        root = v.double().sqrt().float()  # rounded once, which torch's fp32 square root is not (MKL, a fifth of cases)
        denominator = root / (1 - beta2**t) ** 0.5 + eps
        updated = (1 - lr * weight_decay) * p - (lr / (1 - beta1**t)) * m / denominator
        param.copy_(updated.where(finite, p).view_as(param))
        for moment, (codes, absmax), table in ((m, first, code), (v, second, code_unsigned)):
            new_codes, new_absmax = quantize_coded(moment, table, blocksize)
            codes.copy_(new_codes.view_as(codes))
            absmax.copy_(new_absmax)


def rms_norm(
    x: Tensor, residual: Tensor | None, weight: Tensor, eps: float, offset: float, rounded: bool
) -> tuple[Tensor, Tensor, Tensor]:
    """RMSNorm (arXiv 1910.07467) of ``h = x + residual``.

    ``y = h s (offset + weight)`` with ``s = 1 / sqrt(mean(h²) + eps)`` over the last dimension.

    Args:
        x: ``[rows, width]``.
        residual: as ``x``, or None.
        weight: ``[width]`` in the dtype of ``x``.
        eps: added to the mean square.
        offset: 0, or 1 (Gemma).
        rounded: whether ``h s`` is rounded to the dtype of ``x`` before the weight multiplies it (Llama).

    Returns:
        ``h`` (``x`` itself without a residual), ``y``, and ``s`` fp32 ``[rows]``.
    """
    h = x if residual is None else x + residual
    scale = torch.rsqrt(h.float().square().mean(dim=1, keepdim=True) + eps)
    normalized = h.float() * scale
    if rounded:
        normalized = normalized.to(x.dtype).float()
    return h, (normalized * (offset + weight.float())).to(x.dtype), scale.squeeze(1)


def rms_norm_gradient(dy: Tensor, dh: Tensor | None, h: Tensor, weight: Tensor, scale: Tensor, offset: float) -> Tensor:
    """Return the gradient of :func:`rms_norm` with respect to ``x``, which is also that of ``residual``.

    ``dx = dh + s (g - h s² mean(g h))`` with ``g = dy (offset + weight)``.

    Args:
        dy: the gradient of ``y``.
        dh: that of ``h`` from elsewhere, or None.
        h: as returned, like ``scale``.
        weight: as given, like ``offset``.
        scale: s.
        offset: 0 or 1.
    """
    s, wide = scale.unsqueeze(1), h.float()
    g = dy.float() * (offset + weight.float())
    dx = s * (g - wide * s.square() * (g * wide).mean(dim=1, keepdim=True))
    return (dx if dh is None else dx + dh.float()).to(h.dtype)


def rms_norm_weight_gradient(dy: Tensor, h: Tensor, scale: Tensor) -> Tensor:
    """Return the gradient of :func:`rms_norm` with respect to ``weight``: ``Σ dy h s`` over the rows, fp32."""
    return (dy.float() * h.float() * scale.unsqueeze(1)).sum(dim=0)


def activation(x: Tensor, name: str) -> tuple[Tensor, Tensor]:
    """Return ``f(x)`` and ``f'(x)`` for ``silu``, ``x σ(x)``, or ``gelu_tanh``, ``x σ(2 sqrt(2/π) (x + 0.044715 x³))``.

    The latter is the usual ``x/2 (1 + tanh(...))``.
    """
    factor = 2 * (2 / torch.pi) ** 0.5
    inner, slope = (x, 1) if name == "silu" else (factor * (x + 0.044715 * x**3), factor * (1 + 0.134145 * x**2))
    s = torch.sigmoid(inner)
    return x * s, s + x * s * (1 - s) * slope


def gated(gate: Tensor, up: Tensor, name: str) -> Tensor:
    """A gated linear unit (arXiv 2002.05202): ``f(gate) up``, all ``[rows, width]`` of one dtype."""
    return (activation(gate.float(), name)[0] * up.float()).to(gate.dtype)


def gated_gradient(dy: Tensor, gate: Tensor, up: Tensor, name: str, dgate: Tensor, dup: Tensor) -> None:
    """Write the gradients of :func:`gated` with respect to ``gate`` and ``up`` into ``dgate`` and ``dup``."""
    value, slope = activation(gate.float(), name)
    dgate.copy_(dy.float() * up.float() * slope)
    dup.copy_(dy.float() * value)


def rotary(x: Tensor, cos: Tensor, sin: Tensor, inverse: bool) -> Tensor:
    """Rotary position embedding (arXiv 2104.09864), the halves of a head as transformers pairs them.

    ``(a, b)`` becomes ``(a cos_a - b sin_a, b cos_b + a sin_b)``.

    Args:
        x: ``[batch, length, heads, size]``.
        cos: ``[batch, length, 2 half]``, fp32 or as ``x``; what a head has beyond ``2 half`` stays as it is.
        sin: as ``cos``.
        inverse: apply the transposed matrix instead, which is the gradient.

    Returns:
        As ``x``.
    """
    half = cos.shape[-1] // 2
    a, b, rest = x.float().tensor_split([half, 2 * half], dim=-1)
    (cos_a, cos_b), (sin_a, sin_b) = (t.float().unsqueeze(2).chunk(2, dim=-1) for t in (cos, sin))
    if inverse:
        turned = (a * cos_a + b * sin_b, b * cos_b - a * sin_a)
    else:
        turned = (a * cos_a - b * sin_a, b * cos_b + a * sin_b)
    return torch.cat([*turned, rest], dim=-1).to(x.dtype)


def fold_softmax(
    logits: Tensor, labels: Tensor, first: int, softmax: RunningSoftmax, scale: float, cap: float | None, gradient: bool
) -> None:
    """Take a chunk of the vocabulary into the softmax of each row.

        z = scale logits, or with a soft cap  z = cap tanh(scale logits / cap);   z' = dz / dlogits

    With ``gradient`` the logits are overwritten with exp(z - m) z', m being the largest z up to this chunk, and with 0
    at the label: that, over the sum of all exp(z - m), is what each logit takes from the logarithm of the label's
    probability. (What the label itself gives, (1 - p) z', is left to fp32: in bf16 a p close to 1 would swallow it.)

    Args:
        logits: ``[n, width]``, floating; changed in place.
        labels: int64 ``[n]``, indices into the whole vocabulary.
        first: the chunk's first index in the vocabulary.
        softmax: of the rows; changed in place.
        scale: what the logits are multiplied by.
        cap: the soft cap, or None.
        gradient: whether to write over the logits.
    """
    z = logits.float() * scale
    slope = torch.full_like(z, scale)
    top = z.argmax(dim=1)
    if cap is not None:
        tanh = (z / cap).tanh()
        z, slope = cap * tanh, scale * (1 - tanh * tanh)
    largest = z.amax(dim=1)
    softmax.top.copy_(torch.where(largest > softmax.maximum, first + top, softmax.top))
    maximum = torch.maximum(softmax.maximum, largest)
    softmax.shrink.copy_((softmax.maximum - maximum).exp())
    below = z - maximum.unsqueeze(1)
    e = below.exp()
    softmax.weighted.add_(softmax.sum * (softmax.maximum - maximum)).mul_(softmax.shrink).add_((e * below).sum(1))
    softmax.squares.mul_(softmax.shrink.square()).add_(e.square().sum(1))
    softmax.sum.mul_(softmax.shrink).add_(e.sum(1))
    softmax.total.add_(z.sum(1))
    softmax.maximum.copy_(maximum)
    rows = ((labels >= first) & (labels < first + logits.shape[1])).nonzero().squeeze(1)
    columns = labels[rows] - first
    softmax.label[rows], softmax.slope[rows] = z[rows, columns], slope[rows, columns]
    if gradient:
        e[rows, columns] = 0
        logits.copy_(e * slope)

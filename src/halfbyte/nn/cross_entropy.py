"""The output head and the cross entropy as one operation, of which the logits are never whole.

    z = scale h Wᵀ (+ bias), soft-capped where the family does so;   log p = z[label] - log Σ exp(z)

The vocabulary is taken in chunks. A chunk's logits go into a running softmax, are overwritten with their gradients up
to a factor known only in the end, and multiplied by the same rows of W, still in cache, into an fp32 sum that shrinks
with the softmax (the scheme of FlashAttention, arXiv 2205.14135, with W for both keys and values):

    d log p / dh = z'[label] (1 - p) W[label] - Σ exp(z - m) z' W / Σ exp(z - m)      (the sums over all but the label)

So W is read once for loss and gradient, and memory is a chunk of logits and one row for each position: it does not
grow with the vocabulary. The gradient is taken in the forward, once, and scaled in the backward by what comes in. A
head that is trained itself gets its own gradient in the backward, from the chunks computed again.

Left out: gradients through anything but the label's probability; entropy and the others are for the log.
"""

from collections.abc import Iterator
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import linear

from halfbyte import kernels
from halfbyte.kernels import RunningSoftmax, pool
from halfbyte.quant import QuantizedInt8, QuantizedWeight

ROWS = 2048
"""Positions that are taken together."""
WIDTH = 2048
"""Vocabulary in a chunk: its logits and rows of W stay in cache, and the products run at the speed of large ones."""
GPU_CHUNK = 2**24
"""Logits in a chunk on a GPU, where each operation has to be worth its launch."""


Weight = Tensor | QuantizedWeight | QuantizedInt8


class Scores(NamedTuple):
    """What the head says about each of ``n`` positions; all fp32 ``[n]`` but for ``top``.

    Attributes:
        log_prob: the logarithm of the label's probability; the only one with a gradient.
        entropy: of the distribution, in nats.
        log_sum_squares: log Σ p².
        mean_logit: the mean of z over the vocabulary.
        top: int64 ``[n]``, the first index of the largest logit.
    """

    log_prob: Tensor
    entropy: Tensor
    log_sum_squares: Tensor
    mean_logit: Tensor
    top: Tensor


def linear_cross_entropy(
    hidden: Tensor,
    weight: Weight,
    labels: Tensor,
    bias: Tensor | None = None,
    *,
    scale: float = 1.0,
    cap: float | None = None,
) -> Scores:
    """Score ``labels`` by the output head ``weight`` at the positions ``hidden``.

    Operands of products are in the dtype of ``hidden``, or in autocast's, the products in what the processor has for it
    (:func:`halfbyte.kernels.product_dtype`); everything between them is fp32.

    Args:
        hidden: ``[n, H]``, floating.
        weight: ``[V, H]``, floating, or in 4 or 8 bits, of which a chunk at a time is expanded.
        labels: int64 ``[n]``, each within ``[0, V)``.
        bias: ``[V]`` or None.
        scale: what the logits are multiplied by.
        cap: the soft cap, ``cap tanh(z / cap)``, or None.

    Raises:
        ValueError: shapes do not fit each other, or a label lies outside the vocabulary.
    """
    if hidden.ndim != 2 or len(weight.shape) != 2 or hidden.shape[1] != weight.shape[1]:
        raise ValueError(f"hidden {tuple(hidden.shape)} and weight {tuple(weight.shape)} must be [n, H] and [V, H]")
    if bias is not None and bias.shape != weight.shape[:1]:
        raise ValueError(
            f"bias has shape {tuple(bias.shape)}; a weight {tuple(weight.shape)} needs ({weight.shape[0]},)"
        )
    if labels.shape != hidden.shape[:1]:
        raise ValueError(f"labels have shape {tuple(labels.shape)}; {len(hidden)} positions need ({len(hidden)},)")
    if len(labels) and not 0 <= int(labels.min()) <= int(labels.max()) < weight.shape[0]:
        raise ValueError(
            f"labels go from {int(labels.min())} to {int(labels.max())}; the vocabulary from 0 to {weight.shape[0] - 1}"
        )
    device = hidden.device.type
    dtype = torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else hidden.dtype
    with torch.autocast(device, enabled=False):
        scores = _LinearCrossEntropy.apply(  # type: ignore[no-untyped-call]
            hidden, weight, bias, labels, scale, cap, dtype, torch.is_grad_enabled()
        )
    return Scores(*scores)


class _LinearCrossEntropy(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        hidden: Tensor,
        weight: Weight,
        bias: Tensor | None,
        labels: Tensor,
        scale: float,
        cap: float | None,
        dtype: torch.dtype,
        grad_enabled: bool,
    ) -> tuple[Tensor, ...]:
        gradient = grad_enabled and ctx.needs_input_grad[0]
        dhidden = pool.empty(hidden.shape, hidden.dtype, hidden.device) if gradient else None
        log_prob, entropy, log_sum_squares, mean_logit = hidden.new_empty(4, len(hidden), dtype=torch.float32)
        scores = Scores(log_prob, entropy, log_sum_squares, mean_logit, torch.empty_like(labels))
        log_sum = torch.empty_like(scores.log_prob)
        for first in range(0, len(hidden), ROWS):
            rows = slice(first, first + ROWS)
            softmax, own, taken = _fold_vocabulary(
                _operand(hidden[rows], dtype), weight, bias, labels[rows], scale, cap, dtype, gradient
            )
            known = softmax.log_prob()
            if dhidden is not None and own is not None and taken is not None:
                given = -known.expm1() * softmax.slope
                taken.div_(softmax.sum.unsqueeze(1))
                dhidden[rows] = taken.neg_().addcmul_(given.unsqueeze(1), own)
            log_sum[rows] = softmax.log_sum()
            results = (
                known,
                softmax.entropy(),
                softmax.log_sum_squares(),
                softmax.total / weight.shape[0],
                softmax.top,
            )
            for score, result in zip(scores, results, strict=True):
                score[rows] = result
        ctx.mark_non_differentiable(*scores[1:])
        ctx.set_materialize_grads(False)
        head = (hidden, bias, labels, log_sum) if grad_enabled and any(ctx.needs_input_grad[1:3]) else ()
        dense = weight if isinstance(weight, Tensor) and head else None
        ctx.save_for_backward(dhidden, dense, *head)
        ctx.quantized, ctx.options = None if isinstance(weight, Tensor) else weight, (scale, cap, dtype)
        return tuple(scores)

    @staticmethod
    def backward(ctx: Any, given: Tensor | None, *_: None) -> tuple[Tensor | None, ...]:
        dhidden, dense, *head = ctx.saved_tensors
        none = (None,) * 5
        if given is None:
            return None, None, None, *none
        if dhidden is not None:
            dhidden = (dhidden * given.unsqueeze(1)).to(dhidden.dtype)
        dweight = dbias = None
        if head:
            weight = ctx.quantized if dense is None else dense
            dweight, dbias = _head_gradient(given, weight, *ctx.needs_input_grad[1:3], *head, *ctx.options)
        return dhidden, dweight, dbias, *none


def chunk_width(rows: int, device: str) -> int:
    """Return how much of the vocabulary is taken at once for so many rows; a power of two."""
    return WIDTH if device == "cpu" else max(WIDTH, 1 << (GPU_CHUNK // max(rows, 1)).bit_length() - 1)


def _chunks(
    weight: Weight, bias: Tensor | None, dtype: torch.dtype, width: int
) -> Iterator[tuple[int, Tensor, Tensor | None]]:
    """The head in chunks of the vocabulary: the first index, and its part of weight and bias as operands."""
    for first in range(0, weight.shape[0], width):
        last = min(first + width, weight.shape[0])
        dense = weight[first:last] if isinstance(weight, Tensor) else weight.rows(first, last).dequantize(dtype)
        yield first, _operand(dense, dtype), None if bias is None else _operand(bias[first:last], dtype)


def _operand(x: Tensor, dtype: torch.dtype) -> Tensor:
    return x.to(dtype).to(kernels.product_dtype(dtype, x.device.type))


def _fold_vocabulary(
    hidden: Tensor,
    weight: Weight,
    bias: Tensor | None,
    labels: Tensor,
    scale: float,
    cap: float | None,
    dtype: torch.dtype,
    gradient: bool,
) -> tuple[RunningSoftmax, Tensor | None, Tensor | None]:
    """The softmax of each row; for a gradient also ``W[label]`` and Σ exp(z - m) z' W over the others, fp32."""
    rows = len(hidden)
    softmax = RunningSoftmax.empty(rows, hidden.device)
    width = chunk_width(rows, hidden.device.type)
    device = hidden.device
    own, taken = (pool.empty(hidden.shape, torch.float32, device).zero_() if gradient else None for _ in range(2))
    if own is not None and isinstance(weight, Tensor):
        own.copy_(weight.index_select(0, labels).to(dtype))
    buffer = pool.empty((rows * min(width, weight.shape[0]),), hidden.dtype, device)
    product = pool.empty(hidden.shape, hidden.dtype, device)
    for first, head, offset in _chunks(weight, bias, dtype, width):
        logits = buffer[: rows * len(head)].view(rows, len(head))
        torch.mm(hidden, head.T, out=logits)
        if offset is not None:
            logits.add_(offset)
        kernels.fold_softmax(logits, labels, first, softmax, scale=scale, cap=cap, gradient=gradient)
        if own is not None and taken is not None:
            if not isinstance(weight, Tensor):
                inside = ((labels >= first) & (labels < first + len(head))).nonzero().squeeze(1)
                own[inside] = head[labels[inside] - first].float()
            taken.mul_(softmax.shrink.unsqueeze(1)).add_(torch.mm(logits, head, out=product))
    return softmax, own, taken


def _head_gradient(
    given: Tensor,
    weight: Weight,
    weight_is_trained: bool,
    bias_is_trained: bool,
    hidden: Tensor,
    bias: Tensor | None,
    labels: Tensor,
    log_sum: Tensor,
    scale: float,
    cap: float | None,
    dtype: torch.dtype,
) -> tuple[Tensor | None, Tensor | None]:
    """The gradients of weight and bias: dz = given z' (1[label] - p), dW = dzᵀ h, over chunks computed again."""
    dweight = torch.empty_like(weight) if weight_is_trained and isinstance(weight, Tensor) else None
    dbias = torch.empty_like(bias) if bias_is_trained and bias is not None else None
    inner = _operand(hidden, dtype)
    for first, head, offset in _chunks(weight, bias, dtype, chunk_width(len(inner), inner.device.type)):
        z = linear(inner, head, offset).float() * scale
        slope = torch.full_like(z, scale)
        if cap is not None:
            tanh = (z / cap).tanh()
            z, slope = cap * tanh, scale * (1 - tanh * tanh)
        dz = -(z - log_sum.unsqueeze(1)).exp()
        rows = ((labels >= first) & (labels < first + len(head))).nonzero().squeeze(1)
        dz[rows, labels[rows] - first] += 1
        dz *= slope * given.unsqueeze(1)
        part = slice(first, first + len(head))
        if dweight is not None:
            dweight[part] = dz.to(inner.dtype).T @ inner
        if dbias is not None:
            dbias[part] = dz.sum(0)
    return dweight, dbias

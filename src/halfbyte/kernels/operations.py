"""The operations that the rest of the package calls: arguments checked once, then handed to a provider.

Formulas, shapes and dtypes are those of :mod:`halfbyte.kernels.reference`. A wrong argument is a ``TypeError``
(dtype, device) or ``ValueError`` (size) that names what was given and what is needed.
"""

import contextlib
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from halfbyte.kernels.provider import provider_for
from halfbyte.kernels.softmax import RunningSoftmax
from halfbyte.kernels.statistics import Statistics
from halfbyte.kernels.terms import Sum, Term, Weight8bit

FLOATING = (torch.float32, torch.bfloat16, torch.float16)
LARGEST_HEAD = 512  # values of a head in attention: as many as a panel is deep (csrc/matmul.h)
MOST_KEYS = 2**24  # keys are counted in fp32 (csrc/attention.h)
ACTIVATIONS = ("silu", "gelu_tanh")


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
    if bias is not None and (bias.shape != shape[:1] or bias.dtype != x.dtype or bias.device != x.device):
        raise ValueError(
            f"bias is {bias.dtype} {tuple(bias.shape)} on {bias.device}, but this product needs {x.dtype} "
            f"({shape[0]},) on {x.device}"
        )
    if torch.is_grad_enabled() and (x.requires_grad or (bias is not None and bias.requires_grad)):
        y: Tensor = _Matmul4bit.apply(x, bias, packed, statistics, shape)  # type: ignore[no-untyped-call]
        return y
    # In decoding one product takes as long as fifteen calls of autograd's machinery.
    with _no_autocast(x.device):
        return provider_for(x.device).matmul_4bit(x, packed, statistics, shape, bias)


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
    with _no_autocast(device):
        provider_for(device).matmul_sums(sums)


def attention(
    q: Tensor, k: Tensor, v: Tensor, ranges: Tensor, *, scale: float, softcap: float = 0.0
) -> tuple[Tensor, Tensor]:
    """Softmax attention over key ranges: ``out`` and ``lse``. See :func:`halfbyte.kernels.reference.attention`.

    The gradient is :func:`attention_backward`; :func:`halfbyte.nn.attention` joins the two.
    """
    _check_attention(q, k, v, ranges, softcap)
    return provider_for(q.device).attention(q, k, v, ranges.contiguous(), scale, softcap)


def attention_backward(
    dout: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor,
    lse: Tensor,
    ranges: Tensor,
    *,
    scale: float,
    softcap: float = 0.0,
) -> tuple[Tensor, Tensor, Tensor]:
    """The gradients ``dq``, ``dk`` and ``dv`` of :func:`attention`, whose results ``out`` and ``lse`` are."""
    _check_attention(q, k, v, ranges, softcap)
    for name, x in (("dout", dout), ("out", out)):
        _check_heads(name, x, q, q.shape)
    if lse.dtype != torch.float32 or lse.shape != q.shape[:3] or not lse.is_contiguous() or lse.device != q.device:
        raise ValueError(
            f"lse is {lse.dtype} {tuple(lse.shape)} on {lse.device}; it must be float32 {tuple(q.shape[:3])}, "
            f"contiguous, on {q.device}"
        )
    return provider_for(q.device).attention_backward(dout, q, k, v, out, lse, ranges.contiguous(), scale, softcap)


def rms_norm(
    x: Tensor,
    residual: Tensor | None,
    weight: Tensor,
    *,
    eps: float,
    offset: float = 0.0,
    rounded: bool = True,
) -> tuple[Tensor, Tensor, Tensor]:
    """RMSNorm of ``x + residual``, all ``[..., width]``; see :func:`halfbyte.kernels.reference.rms_norm`.

    Returns:
        The sum and its norm in the shape of ``x``, and what :func:`rms_norm_gradient` needs, fp32 ``[rows]``.
    """
    _check_floating("x", x)
    _check_norm_weight(weight, x)
    if residual is not None:
        _check_as("residual", residual, "x", x)
    flat = None if residual is None else _flat(residual)
    h, y, scale = provider_for(x.device).rms_norm(_flat(x), flat, weight, eps, offset, rounded)
    return (x if residual is None else h.view(x.shape)), y.view(x.shape), scale


def rms_norm_gradient(
    dy: Tensor, dh: Tensor | None, h: Tensor, weight: Tensor, scale: Tensor, *, offset: float = 0.0
) -> Tensor:
    """Gradient of :func:`rms_norm` with respect to ``x`` and to ``residual``, in the shape of ``h``."""
    _check_floating("h", h)
    _check_norm_weight(weight, h)
    _check_scale(scale, h)
    _check_as("dy", dy, "h", h)
    if dh is not None:
        _check_as("dh", dh, "h", h)
    flat = None if dh is None else _flat(dh)
    dx = provider_for(h.device).rms_norm_gradient(_flat(dy), flat, _flat(h), weight, scale, offset)
    return dx.view(h.shape)


def rms_norm_weight_gradient(dy: Tensor, h: Tensor, scale: Tensor) -> Tensor:
    """Gradient of :func:`rms_norm` with respect to ``weight``, fp32 ``[width]``."""
    _check_floating("h", h)
    _check_scale(scale, h)
    _check_as("dy", dy, "h", h)
    return provider_for(h.device).rms_norm_weight_gradient(_flat(dy), _flat(h), scale)


def gated(gate: Tensor, up: Tensor, activation: str) -> Tensor:
    """Gated linear unit ``f(gate) up``, all ``[..., width]``; ``activation`` is one of :data:`ACTIVATIONS`."""
    _check_gated(gate, up, activation)
    return provider_for(gate.device).gated(_flat(gate), _flat(up), activation).view(gate.shape)


def gated_gradient(dy: Tensor, gate: Tensor, up: Tensor, activation: str) -> tuple[Tensor, Tensor]:
    """Gradients of :func:`gated` with respect to ``gate`` and ``up``, in their shape."""
    _check_gated(gate, up, activation)
    _check_as("dy", dy, "gate", gate)
    gate_rows = _flat(gate)
    dgate, dup = (torch.empty(gate_rows.shape, dtype=gate.dtype, device=gate.device) for _ in range(2))
    provider_for(gate.device).gated_gradient(_flat(dy), gate_rows, _flat(up), activation, dgate, dup)
    return dgate.view(gate.shape), dup.view(gate.shape)


def gated_halves_gradient(dy: Tensor, gate_up: Tensor, activation: str) -> Tensor:
    """Gradient of :func:`gated` with respect to one tensor ``[..., 2 width]`` that holds ``gate`` and ``up``."""
    rows = _flat(gate_up)
    gate, up = rows.chunk(2, dim=1)
    dy_rows = _flat(dy)
    _check_gated(gate, up, activation)
    _check_as("dy", dy_rows, "gate", gate)
    gradient = torch.empty(rows.shape, dtype=rows.dtype, device=rows.device)
    provider_for(rows.device).gated_gradient(dy_rows, gate, up, activation, *gradient.chunk(2, dim=1))
    return gradient.view(gate_up.shape)


def rotary(x: Tensor, cos: Tensor, sin: Tensor, *, inverse: bool = False) -> Tensor:
    """Rotary position embedding of ``[batch, length, heads, size]``; see :func:`halfbyte.kernels.reference.rotary`.

    Args:
        x: any strides.
        cos: ``[batch or 1, length, turned]``, fp32 or as ``x``; ``turned`` is even and at most ``size``.
        sin: as ``cos``.
        inverse: the gradient instead.

    Returns:
        A new contiguous tensor in the shape of ``x``.
    """
    _check_floating("x", x)
    for name, table in (("cos", cos), ("sin", sin)):
        if table.dtype not in (torch.float32, x.dtype) or table.device != x.device:
            raise TypeError(
                f"{name} is {table.dtype} on {table.device}; x needs {x.dtype} or torch.float32 on {x.device}"
            )
    turned = cos.shape[-1] if cos.ndim == 3 else 1
    fits = x.ndim == 4 and turned % 2 == 0 and turned <= x.shape[-1]
    if not fits or cos.shape[0] not in (1, x.shape[0]) or cos.shape[1] != x.shape[1] or sin.shape != cos.shape:
        raise ValueError(
            f"cos is {tuple(cos.shape)} and sin {tuple(sin.shape)}; x of shape {tuple(x.shape)} needs both as "
            "(batch or 1, length, turned), where x is (batch, length, heads, size) and turned even, at most size"
        )
    shape = (x.shape[0], *cos.shape[1:])
    return provider_for(x.device).rotary(x, cos.expand(shape), sin.expand(shape), inverse)


def fold_softmax(
    logits: Tensor,
    labels: Tensor,
    first: int,
    softmax: RunningSoftmax,
    *,
    scale: float = 1.0,
    cap: float | None = None,
    gradient: bool = False,
) -> None:
    """Take the logits ``[n, width]`` of a chunk of the vocabulary into the softmax of each row, in place.

    See :func:`halfbyte.kernels.reference.fold_softmax`.
    """
    _check_floating("logits", logits)
    if logits.ndim != 2 or logits.shape[1] == 0 or not logits.is_contiguous():
        raise ValueError(
            f"logits have shape {tuple(logits.shape)} and strides {logits.stride()}; they must be [n, width] with a "
            "width of at least 1, and contiguous"
        )
    n = len(logits)
    if labels.dtype != torch.int64 or labels.device != logits.device or not labels.is_contiguous():
        raise TypeError(
            f"labels are {labels.dtype} on {labels.device} with strides {labels.stride()}; they must be int64 on "
            f"{logits.device} and contiguous"
        )
    if labels.shape != (n,) or softmax.sum.shape != (n,):
        raise ValueError(f"{n} rows of logits, labels {tuple(labels.shape)} and a softmax of {len(softmax.sum)} rows")
    if cap is not None and not cap > 0:
        raise ValueError(f"cap is {cap}; it must be above 0, or None")
    provider_for(logits.device).fold_softmax(logits, labels, first, softmax, scale, cap, gradient)


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


def _check_attention(q: Tensor, k: Tensor, v: Tensor, ranges: Tensor, softcap: float) -> None:
    _check_floating("q", q)
    if q.ndim != 4 or k.ndim != 4 or 0 in (q.shape[1], k.shape[1]) or q.shape[1] % k.shape[1]:
        raise ValueError(
            f"q has shape {tuple(q.shape)} and k {tuple(k.shape)}; they must be [B, H, L, D] and [B, G, S, D] with H a "
            "multiple of G"
        )
    batches, _, queries, size = q.shape
    for name, x in (("k", k), ("v", v)):
        _check_heads(name, x, q, torch.Size([batches, *k.shape[1:3], size]))
    if not 0 < size <= LARGEST_HEAD:
        raise ValueError(f"the head size is {size}; it must be from 1 to {LARGEST_HEAD}")
    if k.shape[2] >= MOST_KEYS:
        raise ValueError(f"there are {k.shape[2]} keys; there must be fewer than {MOST_KEYS}")
    if softcap < 0:
        raise ValueError(f"softcap is {softcap}; it must be positive, or 0 for none")
    if ranges.dtype != torch.int32 or ranges.shape != (batches, queries, 2) or ranges.device != q.device:
        raise ValueError(
            f"ranges is {ranges.dtype} {tuple(ranges.shape)} on {ranges.device}; it must be int32 "
            f"{(batches, queries, 2)} on {q.device}"
        )
    if ranges.numel() and (int(ranges.min()) < 0 or int(ranges.max()) > k.shape[2]):
        raise ValueError(f"ranges holds {int(ranges.min())} to {int(ranges.max())}; the keys are 0 to {k.shape[2]}")


def _check_heads(name: str, x: Tensor, q: Tensor, shape: torch.Size) -> None:
    if x.dtype != q.dtype or x.device != q.device:
        raise TypeError(f"{name} is {x.dtype} on {x.device}, but q is {q.dtype} on {q.device}")
    if x.shape != shape:
        raise ValueError(f"{name} has shape {tuple(x.shape)}; with q {tuple(q.shape)} it must be {tuple(shape)}")


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


def _no_autocast(device: torch.device) -> contextlib.AbstractContextManager[object]:
    if torch.is_autocast_enabled(device.type):
        return torch.autocast(device.type, enabled=False)
    return contextlib.nullcontext()


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
            f"absmax is {absmax.dtype} {tuple(absmax.shape)} on {absmax.device} with strides {absmax.stride()}; {n} "
            f"values in blocks of {blocksize} need {dtype} ({blocks},) on {device}, contiguous"
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


def _flat(x: Tensor) -> Tensor:
    """Return ``[..., width]`` as ``[rows, width]``."""
    return x.reshape(-1, x.shape[-1])


def _check_as(name: str, x: Tensor, like_name: str, like: Tensor) -> None:
    if x.dtype != like.dtype or x.device != like.device:
        raise TypeError(f"{name} is {x.dtype} on {x.device}; it must be {like.dtype} on {like.device}, as {like_name}")
    if x.shape != like.shape:
        raise ValueError(f"{name} has shape {tuple(x.shape)}; it must have {tuple(like.shape)}, as {like_name}")


def _check_norm_weight(weight: Tensor, x: Tensor) -> None:
    if weight.dtype != x.dtype or weight.device != x.device:
        raise TypeError(f"weight is {weight.dtype} on {weight.device}; it must be {x.dtype} on {x.device}, as x")
    if x.ndim == 0 or weight.shape != x.shape[-1:]:
        raise ValueError(f"weight has shape {tuple(weight.shape)}; x of shape {tuple(x.shape)} needs its last size")


def _check_scale(scale: Tensor, h: Tensor) -> None:
    rows = h.shape[:-1].numel()
    if scale.dtype != torch.float32 or scale.shape != (rows,) or scale.device != h.device or not scale.is_contiguous():
        raise ValueError(
            f"scale is {scale.dtype} {tuple(scale.shape)} on {scale.device}; {rows} rows need torch.float32 "
            f"({rows},) on {h.device}"
        )


def _check_gated(gate: Tensor, up: Tensor, activation: str) -> None:
    _check_floating("gate", gate)
    _check_as("up", up, "gate", gate)
    if activation not in ACTIVATIONS:
        raise ValueError(f"activation is {activation!r}; it must be one of {', '.join(ACTIVATIONS)}")
    if gate.ndim == 0:
        raise ValueError("gate is a scalar; it must be [..., width]")

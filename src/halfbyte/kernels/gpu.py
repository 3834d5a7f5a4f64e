"""The pieces of a training step that bitsandbytes lacks, for a GPU: element-wise ones and the softmax of the head.

Liger's Triton kernels (liger-kernel 0.8, ``liger_kernel.ops``) where they are installed and the tensors are on CUDA:
RMSNorm, SwiGLU and GeGLU, rotary embedding. They are called by our own fused layers, so that no class of transformers
is changed. Otherwise torch operations, chosen for few passes over memory and without a look at any value, for which the
CPU would wait: the same formulas as :mod:`halfbyte.kernels.reference`, on every device.

Liger rounds an activation to the dtype before the product, and a norm's gradient before ``dh`` is added.
"""

import functools
import importlib
import importlib.util
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

from halfbyte.kernels import reference
from halfbyte.kernels.softmax import RunningSoftmax

CASTING = {True: 0, False: 1}
"""Liger's casting modes by whether the normalized value is rounded before the weight: Llama's and Gemma's."""
WIDEST = 65536
"""Columns that a kernel of Liger's takes."""


class _Liger(NamedTuple):
    """Its functions over tensors; those with gradients write over what they are given."""

    rms_norm: Any
    rms_norm_gradient: Any
    gated: dict[str, Any]
    gated_gradient: dict[str, Any]
    rotary: Any
    rotary_gradient: Any
    settings: Any


def available() -> bool:
    """Return whether liger-kernel and Triton are installed."""
    return all(importlib.util.find_spec(name) is not None for name in ("liger_kernel", "triton"))


@functools.cache
def _installed() -> _Liger | None:
    if not available():
        return None
    norm, swiglu, geglu, rope, utils = (
        importlib.import_module(f"liger_kernel.ops.{name}") for name in ("rms_norm", "swiglu", "geglu", "rope", "utils")
    )
    return _Liger(
        norm.rms_norm_forward,
        norm.rms_norm_backward,
        {"silu": swiglu.swiglu_forward, "gelu_tanh": geglu.geglu_forward},
        {"silu": swiglu.swiglu_backward, "gelu_tanh": geglu.geglu_backward},
        rope.rope_forward,
        rope.rope_backward,
        utils.calculate_settings,
    )


def _liger(*tensors: Tensor) -> _Liger | None:
    """Return Liger's kernels if they take these tensors ``[rows, columns]``."""
    if not tensors[0].is_cuda or tensors[0].numel() == 0 or tensors[0].shape[-1] > WIDEST:
        return None
    return _installed() if all(x.is_contiguous() for x in tensors) else None


def rms_norm(
    x: Tensor, residual: Tensor | None, weight: Tensor, eps: float, offset: float, rounded: bool
) -> tuple[Tensor, Tensor, Tensor]:
    """See :func:`halfbyte.kernels.reference.rms_norm`."""
    h = x if residual is None else x + residual
    liger = _liger(h)
    if liger is None:
        return reference.rms_norm(h, None, weight, eps, offset, rounded)
    y, _, scale, *_ = liger.rms_norm(h, weight, eps, offset, CASTING[rounded], False)
    return h, y, scale


def rms_norm_gradient(dy: Tensor, dh: Tensor | None, h: Tensor, weight: Tensor, scale: Tensor, offset: float) -> Tensor:
    """See :func:`halfbyte.kernels.reference.rms_norm_gradient`."""
    liger = _liger(h, dy)
    if liger is None:
        return reference.rms_norm_gradient(dy, dh, h, weight, scale, offset)
    # In Gemma's mode the gradient is fp32 up to its end, which is right whatever the forward rounded.
    mode, (size, warps) = CASTING[False], liger.settings(h.shape[1])
    dx: Tensor = liger.rms_norm_gradient(dy, h, weight, scale, offset, mode, size, warps, False, False, False)[0]
    return dx if dh is None else dx.add_(dh)


def gated(gate: Tensor, up: Tensor, name: str) -> Tensor:
    """See :func:`halfbyte.kernels.reference.gated`."""
    liger = _liger(gate, up)
    if liger is not None:
        y: Tensor = liger.gated[name](gate, up)[2]
        return y
    return _activation(gate.float(), name).mul_(up).to(gate.dtype)


def gated_gradient(dy: Tensor, gate: Tensor, up: Tensor, name: str, dgate: Tensor, dup: Tensor) -> None:
    """See :func:`halfbyte.kernels.reference.gated_gradient`."""
    liger = _liger(dgate, dup, dy)
    if liger is not None:
        liger.gated_gradient[name](dgate.copy_(gate), dup.copy_(up), dy)
        return
    wide = gate.float()
    dup.copy_(_activation(wide, name).mul_(dy))
    of_value = dy.float() * up
    if name == "silu":
        dgate.copy_(torch.ops.aten.silu_backward.default(of_value, wide))
    else:
        dgate.copy_(torch.ops.aten.gelu_backward.default(of_value, wide, approximate="tanh"))


def _activation(x: Tensor, name: str) -> Tensor:
    return F.silu(x) if name == "silu" else F.gelu(x, approximate="tanh")


def rotary(x: Tensor, cos: Tensor, sin: Tensor, inverse: bool) -> Tensor:
    """See :func:`halfbyte.kernels.reference.rotary`; of ``cos`` and ``sin`` Liger reads the first half alone."""
    turned = x.clone(memory_format=torch.contiguous_format)
    liger = _liger(turned)
    if liger is not None:
        turn = liger.rotary_gradient if inverse else liger.rotary
        other = turned.new_zeros(*turned.shape[:2], 1, turned.shape[3])  # it turns queries and keys together
        turn(turned.transpose(1, 2), other.transpose(1, 2), cos, sin, rotary_dim=cos.shape[-1])
        return turned
    half = cos.shape[-1] // 2
    a, b = x[..., :half].float(), x[..., half : 2 * half].float()
    (cos_a, cos_b), (sin_a, sin_b) = (t.float().unsqueeze(2).chunk(2, dim=-1) for t in (cos, sin))
    if inverse:
        turned[..., :half] = (a * cos_a).addcmul_(b, sin_b)
        turned[..., half : 2 * half] = (b * cos_b).addcmul_(a, sin_a, value=-1)
    else:
        turned[..., :half] = (a * cos_a).addcmul_(b, sin_a, value=-1)
        turned[..., half : 2 * half] = (b * cos_b).addcmul_(a, sin_b)
    return turned


def fold_softmax(
    logits: Tensor, labels: Tensor, first: int, softmax: RunningSoftmax, scale: float, cap: float | None, gradient: bool
) -> None:
    """See :func:`halfbyte.kernels.reference.fold_softmax`."""
    z = logits.float() if logits.dtype != torch.float32 else logits.clone()
    z.mul_(scale)
    slope: Tensor | float = scale
    top = z.argmax(dim=1)
    if cap is not None:
        tanh = z.div_(cap).tanh_()
        slope = (1 - tanh * tanh).mul_(scale)
        z = tanh * cap
    largest = z.amax(dim=1)
    softmax.top.copy_(torch.where(largest > softmax.maximum, first + top, softmax.top))
    maximum = torch.maximum(softmax.maximum, largest)
    softmax.shrink.copy_((softmax.maximum - maximum).exp())
    softmax.total.add_(z.sum(1))
    inside = (labels >= first) & (labels < first + logits.shape[1])
    column = (labels - first).clamp(0, logits.shape[1] - 1).unsqueeze(1)
    softmax.label.copy_(torch.where(inside, z.gather(1, column).squeeze(1), softmax.label))
    at_label = slope.gather(1, column).squeeze(1) if isinstance(slope, Tensor) else torch.full_like(maximum, slope)
    softmax.slope.copy_(torch.where(inside, at_label, softmax.slope))
    below = z.sub_(maximum.unsqueeze(1))
    e = below.exp()
    # the formulas want the sum before, so in this order
    softmax.weighted.add_(softmax.sum * (softmax.maximum - maximum)).mul_(softmax.shrink).add_(below.mul_(e).sum(1))
    softmax.squares.mul_(softmax.shrink.square()).add_(torch.linalg.vector_norm(e, dim=1).square())
    softmax.sum.mul_(softmax.shrink).add_(e.sum(1))
    softmax.maximum.copy_(maximum)
    if gradient:
        e.scatter_(1, column, e.gather(1, column).masked_fill(inside.unsqueeze(1), 0.0))
        logits.copy_(e.mul_(slope) if isinstance(slope, Tensor) or slope != 1 else e)

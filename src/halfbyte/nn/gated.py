"""Gated linear units (arXiv 2002.05202): ``f(gate) up`` with ``f`` SiLU (SwiGLU) or tanh's GELU (GeGLU).

One pass each way. Only ``gate`` and ``up`` are kept; the backward computes ``f`` again, and the result too for a
projection that reads it (:mod:`halfbyte.nn.recomputed`).
"""

from typing import Any

from torch import Tensor
from torch.autograd import Function
from torch.autograd.function import once_differentiable

from halfbyte import kernels
from halfbyte.nn.recomputed import recomputed


def gated(gate: Tensor, up: Tensor, activation: str) -> Tensor:
    """Return ``f(gate) up``.

    Args:
        gate: ``[..., width]``, fp32, bf16 or fp16.
        up: as ``gate``.
        activation: ``silu`` or ``gelu_tanh``.
    """
    y: Tensor = _Gated.apply(gate, up, activation)  # type: ignore[no-untyped-call]
    return recomputed(y, lambda gate, up: kernels.gated(gate, up, activation), gate, up)


def gated_halves(gate_up: Tensor, activation: str) -> Tensor:
    """Return :func:`gated` of the halves of ``[..., 2 width]``, where one projection makes both."""
    y: Tensor = _GatedHalves.apply(gate_up, activation)  # type: ignore[no-untyped-call]
    return recomputed(y, lambda gate_up: _gated_halves(gate_up, activation), gate_up)


class _Gated(Function):
    @staticmethod
    def forward(ctx: Any, gate: Tensor, up: Tensor, activation: str) -> Tensor:
        ctx.save_for_backward(gate, up)
        ctx.activation = activation
        return kernels.gated(gate, up, activation)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
        gate, up = ctx.saved_tensors
        return *kernels.gated_gradient(dy, gate, up, ctx.activation), None


class _GatedHalves(Function):
    @staticmethod
    def forward(ctx: Any, gate_up: Tensor, activation: str) -> Tensor:
        ctx.save_for_backward(gate_up)
        ctx.activation = activation
        return _gated_halves(gate_up, activation)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
        (gate_up,) = ctx.saved_tensors
        return kernels.gated_halves_gradient(dy, gate_up, ctx.activation), None


def _gated_halves(gate_up: Tensor, activation: str) -> Tensor:
    gate, up = gate_up.chunk(2, dim=-1)
    return kernels.gated(gate, up, activation)

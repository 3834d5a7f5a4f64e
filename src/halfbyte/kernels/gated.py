"""Gated linear units and their gradients: arguments checked, then handed to a provider.

Formulas, shapes and dtypes are those of :mod:`halfbyte.kernels.reference`; errors as in :mod:`halfbyte.kernels.checks`.
"""

from torch import Tensor

from halfbyte.kernels import pool
from halfbyte.kernels.checks import as_rows, check_as, check_floating
from halfbyte.kernels.provider import provider_for

ACTIVATIONS = ("silu", "gelu_tanh")


def gated(gate: Tensor, up: Tensor, activation: str) -> Tensor:
    """Gated linear unit ``f(gate) up``, all ``[..., width]``; ``activation`` is one of :data:`ACTIVATIONS`."""
    _check_gated(gate, up, activation)
    return provider_for(gate.device).gated(as_rows(gate), as_rows(up), activation).view(gate.shape)


def gated_gradient(dy: Tensor, gate: Tensor, up: Tensor, activation: str) -> tuple[Tensor, Tensor]:
    """Gradients of :func:`gated` with respect to ``gate`` and ``up``, in their shape."""
    _check_gated(gate, up, activation)
    check_as("dy", dy, "gate", gate)
    gate_rows = as_rows(gate)
    dgate, dup = (pool.empty(gate_rows.shape, gate.dtype, gate.device) for _ in range(2))
    provider_for(gate.device).gated_gradient(as_rows(dy), gate_rows, as_rows(up), activation, dgate, dup)
    return dgate.view(gate.shape), dup.view(gate.shape)


def gated_halves_gradient(dy: Tensor, gate_up: Tensor, activation: str) -> Tensor:
    """Gradient of :func:`gated` with respect to one tensor ``[..., 2 width]`` that holds ``gate`` and ``up``."""
    rows = as_rows(gate_up)
    gate, up = rows.chunk(2, dim=1)
    dy_rows = as_rows(dy)
    _check_gated(gate, up, activation)
    check_as("dy", dy_rows, "gate", gate)
    gradient = pool.empty(rows.shape, rows.dtype, rows.device)
    provider_for(rows.device).gated_gradient(dy_rows, gate, up, activation, *gradient.chunk(2, dim=1))
    return gradient.view(gate_up.shape)


def _check_gated(gate: Tensor, up: Tensor, activation: str) -> None:
    check_floating("gate", gate.dtype)
    check_as("up", up, "gate", gate)
    if activation not in ACTIVATIONS:
        raise ValueError(f"activation is {activation!r}; it must be one of {', '.join(ACTIVATIONS)}")
    if gate.ndim == 0:
        raise ValueError("gate is a scalar; it must be [..., width]")

"""Gated linear units and their gradients (csrc/gated.inl)."""

from torch import Tensor

from halfbyte.kernels import pool
from halfbyte.kernels.native.rows import dense_rows, row_address, row_arguments
from halfbyte.kernels.native.runtime import extension

ACTIVATIONS = {"silu": 0, "gelu_tanh": 1}  # enum Activation in csrc/rows.h


def gated(gate: Tensor, up: Tensor, name: str) -> Tensor:
    """A gated linear unit."""
    gate, up = dense_rows(gate), dense_rows(up)
    y = pool.empty(gate.shape, gate.dtype)
    extension.gated(*row_arguments(gate), ACTIVATIONS[name], row_address(gate), row_address(up), y.data_ptr())
    return y


def gated_gradient(dy: Tensor, gate: Tensor, up: Tensor, name: str, dgate: Tensor, dup: Tensor) -> None:
    """The gradients of :func:`gated`, into tensors of equal strides."""
    dy, gate, up = dense_rows(dy), dense_rows(gate), dense_rows(up)
    extension.gated_gradient(
        *row_arguments(gate),
        ACTIVATIONS[name],
        row_address(dy),
        row_address(gate),
        row_address(up),
        dgate.data_ptr(),
        dup.data_ptr(),
        dgate.stride(0),
    )

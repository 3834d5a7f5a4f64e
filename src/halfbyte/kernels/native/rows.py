"""Matrices of rows as the extension takes them (csrc/rows.h): the values of a row lie side by side."""

from torch import Tensor

from halfbyte.kernels.native.runtime import TYPES, threads, tier_index


def dense_rows(x: Tensor) -> Tensor:
    """Return ``x``, copied unless the values of a row lie side by side."""
    return x if x.stride(-1) == 1 else x.contiguous()


def row_arguments(x: Tensor) -> tuple[int, int, int, int, int]:
    """Return what each call over rows begins with: tier, threads, type, rows and width."""
    return tier_index(), threads(), TYPES[x.dtype], *x.shape


def row_address(x: Tensor | None) -> tuple[int, int]:
    """Return the address and the distance of rows, as the extension takes them; zeros for none."""
    return (0, 0) if x is None else (x.data_ptr(), x.stride(0))

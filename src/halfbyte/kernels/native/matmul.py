"""Products with 4-bit weights, and sums of products (csrc/matmul.h); torch's on the scalar tier, which has none."""

from collections.abc import Sequence

import torch
from torch import Tensor

from halfbyte.kernels import pool, reference
from halfbyte.kernels.native.quantize import code_tables, dequantize_4bit, scale_arguments
from halfbyte.kernels.native.runtime import TYPES, extension, threads, tier_index
from halfbyte.kernels.terms import Sum
from halfbyte.kernels.weights import Weight4bit, WeightInt8


def matmul_4bit(x: Tensor, weight: Weight4bit, bias: Tensor | None) -> Tensor:
    """The 4-bit linear product ``y = x Wᵀ + bias``.

    Sums are fp32 and rounded once, with the bias. On a vector tier each row of the result is bitwise the same for any
    number of threads and whatever the other rows are, except that few rows (up to 16; on Arm 8) are summed in another
    order than more (csrc/matmul.h), where block size and depth are multiples of 64.
    """
    return _matmul(x, weight, bias, transposed=True)


def matmul_4bit_dx(dy: Tensor, weight: Weight4bit) -> Tensor:
    """The gradient of :func:`matmul_4bit` with respect to ``x``; of any number of rows in one order."""
    return _matmul(dy, weight, None, transposed=False)


def matmul_sums(sums: Sequence[Sum]) -> None:
    """Sums of products, each value rounded once, all in one parallel region.

    As :func:`matmul_4bit`, bitwise the same for any number of threads and whatever the other rows are; few rows are
    summed in another order than more where the first term is a quantized weight, transposed, but for those ``as_many``.
    """
    isa = tier_index()
    if not extension.multiplies(isa):
        return reference.matmul_sums(sums)
    gathered, kept = [], []
    for terms, out, bias, as_many in sums:
        rows, width = out.shape
        types = TYPES[terms[0].x.dtype], TYPES[out.dtype]
        addresses = 0 if bias is None else bias.data_ptr(), out.data_ptr()
        gathered.append(extension.Sum(isa, rows, width, *types, *addresses, out.stride(0), as_many))
        for x, factor, transposed in terms:
            gradient = not transposed
            address, stride, step = x.data_ptr(), x.stride(0), x.stride(1) if x.shape[1] > 1 else 1
            rows, columns = factor.shape
            if isinstance(factor, Weight4bit):
                code, nested_code = code_tables(factor.statistics)
                kept.append((code, nested_code))
                packed, table, blocksize = factor.packed.data_ptr(), code.data_ptr(), factor.statistics.blocksize
                scales = scale_arguments(factor.statistics, nested_code)
                gathered[-1].add_weight(
                    address, stride, step, gradient, packed, table, *scales, blocksize, rows, columns
                )
            elif isinstance(factor, WeightInt8):
                codes, absmax, blocksize = factor.codes.data_ptr(), factor.absmax.data_ptr(), factor.blocksize
                gathered[-1].add_bytes(address, stride, step, gradient, codes, absmax, blocksize, rows, columns)
            else:
                values, dtype, row = factor.data_ptr(), TYPES[factor.dtype], factor.stride(0)
                gathered[-1].add_dense(address, stride, step, gradient, values, dtype, rows, columns, row)
    extension.matmul_sums(threads(), gathered)


def _matmul(x: Tensor, weight: Weight4bit, bias: Tensor | None, *, transposed: bool) -> Tensor:
    isa = tier_index()
    rows, columns = weight.shape
    if not (rows and columns and extension.multiplies(isa)):
        dense = dequantize_4bit(weight, x.dtype)
        return torch.nn.functional.linear(x, dense, bias) if transposed else x @ dense
    x = x.contiguous()
    bias = None if bias is None else bias.contiguous()
    statistics = weight.statistics
    code, nested_code = code_tables(statistics)
    y = pool.empty((*x.shape[:-1], rows if transposed else columns), x.dtype)
    extension.matmul_4bit(
        isa,
        threads(),
        not transposed,
        x.data_ptr(),
        x.shape[:-1].numel(),
        TYPES[x.dtype],
        weight.packed.data_ptr(),
        code.data_ptr(),
        *scale_arguments(statistics, nested_code),
        statistics.blocksize,
        rows,
        columns,
        0 if bias is None else bias.data_ptr(),
        y.data_ptr(),
    )
    return y

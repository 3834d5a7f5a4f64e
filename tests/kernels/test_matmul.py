"""Each native tier's 4-bit products against the fp64 product of the dequantized weight."""

from collections.abc import Callable, Iterator

import pytest
import torch
from torch import Tensor

from halfbyte.kernels import Nested, Statistics, Weight4bit, native, reference
from halfbyte.quant import codebook

# The result is rounded once to its type, by at most this part of it. The sums before are fp32: their errors grow with
# the magnitudes that were added.
ROUNDING = {torch.float32: 2**-24, torch.bfloat16: 2**-8, torch.float16: 2**-11}
SUMMING = 2e-6
# (N, K): codes that begin within a byte, blocks that cross rows, a short last block, one row, one column, more depth
# than a panel holds, a strip that is not full.
SHAPES = [(1, 1), (1, 2), (2, 33), (33, 65), (1, 64), (96, 1), (7, 1000), (64, 128), (70, 96), (130, 2112), (65, 1057)]
FEW_ROWS = 16  # up to so many rows of x are multiplied without a panel


@pytest.fixture(params=[tier for tier in native.tiers() if tier != "scalar"])
def vector_tier(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HALFBYTE_ISA", request.param)


@pytest.fixture(params=native.tiers())
def tier(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HALFBYTE_ISA", request.param)


@pytest.fixture(autouse=True)
def poisoned(monkeypatch: pytest.MonkeyPatch) -> None:
    """What the kernels are to fill is full of NaN (or 255) before."""
    empty = torch.empty

    def filled(*size: int, dtype: torch.dtype, device: str) -> Tensor:
        return empty(*size, dtype=dtype, device=device).fill_(torch.nan if dtype.is_floating_point else 255)

    monkeypatch.setattr(torch, "empty", filled)


@pytest.fixture
def threads() -> Iterator[Callable[[int], None]]:
    before = torch.get_num_threads()
    yield torch.set_num_threads
    torch.set_num_threads(before)


def seeded(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def make_weight(
    shape: tuple[int, int], blocksize: int, nested_blocksize: int | None = 256, name: str = "nf4"
) -> Weight4bit:
    n = shape[0] * shape[1]
    generator = seeded(n + blocksize)
    packed = torch.randint(256, (-(-n // 2),), dtype=torch.uint8, generator=generator)
    blocks = -(-n // blocksize)
    absmax = torch.rand(blocks, generator=generator) + 0.1
    if nested_blocksize is None:
        return Weight4bit(packed, Statistics(absmax, codebook(name), blocksize), shape)
    offset = absmax.mean().item()
    codes, second = reference.quantize_coded(absmax - offset, codebook("dynamic"), nested_blocksize)
    nested = Nested(second, codebook("dynamic"), nested_blocksize, offset)
    return Weight4bit(packed, Statistics(codes, codebook(name), blocksize, nested), shape)


def dense(weight: Weight4bit, dtype: torch.dtype) -> Tensor:
    return reference.dequantize_4bit(weight, dtype).double()


def close(got: Tensor, x: Tensor, factor: Tensor, bias: Tensor | None = None) -> bool:
    """Whether ``got`` is ``x factor + bias``, each element within its own bound."""
    expected, magnitude = x.double() @ factor, x.double().abs() @ factor.abs()
    if bias is not None:
        expected, magnitude = expected + bias.double(), magnitude + bias.double().abs()
    if got.shape != expected.shape or got.dtype != x.dtype:
        return False
    bound = ROUNDING[x.dtype] * expected.abs().clamp(min=torch.finfo(x.dtype).tiny)
    bound += (1 + ROUNDING[x.dtype]) * SUMMING * magnitude
    return bool(((got.double() - expected).abs() <= bound).all())


def check(weight: Weight4bit, rows: int, dtype: torch.dtype) -> None:
    generator = seeded(rows)
    shape, values = weight.shape, dense(weight, dtype)
    x, dy = (torch.randn(rows, size, generator=generator).to(dtype) for size in reversed(shape))
    bias = torch.randn(shape[0], generator=generator).to(dtype)
    assert close(native.matmul_4bit(x, weight, bias), x, values.T, bias), (shape, rows)
    assert close(native.matmul_4bit(x, weight, None), x, values.T), (shape, rows)
    assert close(native.matmul_4bit_dx(dy, weight), dy, values), (shape, rows)


@pytest.mark.parametrize("dtype", ROUNDING)
@pytest.mark.parametrize("blocksize", [64, 32, 4096, 48, 7])
def test_products_are_those_of_the_dequantized_weight(tier: None, blocksize: int, dtype: torch.dtype) -> None:
    for shape in SHAPES:
        weight = make_weight(shape, blocksize)
        for rows in (1, 2, 3, 4, 5, 7, 8, 9, 12, 16, 17):
            check(weight, rows, dtype)


@pytest.mark.parametrize("dtype", ROUNDING)
@pytest.mark.parametrize("rows", [0, 64, 513, 601])
def test_many_rows_are_multiplied_as_few_are(tier: None, rows: int, dtype: torch.dtype) -> None:
    for shape in [(96, 1088), (70, 33)]:
        check(make_weight(shape, 64), rows, dtype)


@pytest.mark.parametrize("nested_blocksize", [None, 256, 7], ids="nested {}".format)
@pytest.mark.parametrize("name", ["nf4", "fp4", "e2m1"])
def test_any_codebook_and_any_statistics_do(tier: None, name: str, nested_blocksize: int | None) -> None:
    for shape in [(65, 192), (9, 50)]:
        for rows in (2, 33):
            check(make_weight(shape, 64, nested_blocksize, name), rows, torch.bfloat16)


@pytest.mark.parametrize("dtype", ROUNDING)
def test_leading_dimensions_stay_and_strides_do_not_matter(vector_tier: None, dtype: torch.dtype) -> None:
    weight = make_weight((33, 64), 64)
    values = dense(weight, dtype)
    x = torch.randn(64, 3, 2, generator=seeded(0)).to(dtype).permute(2, 1, 0)
    assert close(native.matmul_4bit(x, weight, None), x, values.T)
    bias = torch.randn(66, generator=seeded(1)).to(dtype)[::2]
    assert close(native.matmul_4bit(x[0, 0], weight, bias), x[0, 0], values.T, bias)


@pytest.mark.parametrize("dtype", ROUNDING)
def test_bytes_may_lie_at_any_address(vector_tier: None, dtype: torch.dtype) -> None:
    shape = (70, 160)
    weight = make_weight(shape, 32)
    moved = Weight4bit(torch.cat([weight.packed.new_zeros(3), weight.packed])[3:], weight.statistics, shape)
    assert moved.packed.data_ptr() % 4 == 3
    for rows in (2, 20):
        x, dy = (torch.randn(rows * n + 1, generator=seeded(rows)).to(dtype)[1:].view(rows, n) for n in reversed(shape))
        y = native.matmul_4bit(x, moved, None)
        dx = native.matmul_4bit_dx(dy, moved)
        assert torch.equal(y, native.matmul_4bit(x.clone(), weight, None))
        assert torch.equal(dx, native.matmul_4bit_dx(dy.clone(), weight))
        assert close(y, x, dense(weight, dtype).T)


@pytest.mark.parametrize("dtype", ROUNDING)
def test_neither_threads_nor_repetition_change_a_bit(
    vector_tier: None, dtype: torch.dtype, threads: Callable[[int], None]
) -> None:
    shape = (320, 1536)
    weight = make_weight(shape, 64)
    for rows in (1, 8, 16, 19, 530):
        x, dy = (torch.randn(rows, n, generator=seeded(rows)).to(dtype) for n in reversed(shape))
        results = []
        for count in (1, 2, 3, 2):
            threads(count)
            y = native.matmul_4bit(x, weight, None)
            results.append((y, native.matmul_4bit_dx(dy, weight)))
        for y, dx in results[1:]:
            assert torch.equal(y, results[0][0]) and torch.equal(dx, results[0][1]), rows


@pytest.mark.parametrize("dtype", ROUNDING)
@pytest.mark.parametrize("shape", [(130, 2112), (33, 1065)])
def test_a_row_s_result_does_not_depend_on_the_others(
    vector_tier: None, shape: tuple[int, int], dtype: torch.dtype
) -> None:
    weight = make_weight(shape, 64)
    x, dy = (torch.randn(601, n, generator=seeded(0)).to(dtype) for n in reversed(shape))
    few, many = (native.matmul_4bit(x[:rows], weight, None) for rows in (FEW_ROWS, 601))
    dx = native.matmul_4bit_dx(dy, weight)
    for rows in (1, 2, 3, 4, 5, 7, 8, 11):
        assert torch.equal(native.matmul_4bit(x[:rows], weight, None), few[:rows]), rows
        assert torch.equal(native.matmul_4bit_dx(dy[:rows], weight), dx[:rows]), rows
    for begin, end in [(0, 17), (3, 22), (500, 564), (1, 601)]:
        assert torch.equal(native.matmul_4bit(x[begin:end], weight, None), many[begin:end]), begin
        assert torch.equal(native.matmul_4bit_dx(dy[begin:end], weight), dx[begin:end]), begin


@pytest.mark.parametrize("dtype", ROUNDING)
@pytest.mark.parametrize("shape, blocksize", [((66, 96), 32), ((35, 33), 5)])
def test_nan_and_infinity_come_out_where_the_dense_product_has_them(
    tier: None, shape: tuple[int, int], blocksize: int, dtype: torch.dtype
) -> None:
    weight = make_weight(shape, blocksize, None)
    weight.statistics.absmax[-1] = torch.inf  # within the last row
    weight.statistics.absmax[1] = torch.nan
    values = dense(weight, dtype)
    for rows in (5, 20):
        x, dy = (torch.randn(rows, n, generator=seeded(rows)) for n in reversed(shape))
        for rows_of in (x, dy):
            rows_of[0, 0], rows_of[1, -1], rows_of[-1, 5] = torch.inf, -torch.inf, torch.nan
        x, dy = x.to(dtype), dy.to(dtype)
        y = native.matmul_4bit(x, weight, None)
        dx = native.matmul_4bit_dx(dy, weight)
        for got, expected in ((y, x.double() @ values.T), (dx, dy.double() @ values)):
            assert expected.isfinite().any() and not expected.isfinite().all()
            assert torch.equal(got.isnan(), expected.isnan()) and torch.equal(got.isfinite(), expected.isfinite())
            infinite = expected.isinf()
            assert torch.equal(got.double()[infinite], expected[infinite])

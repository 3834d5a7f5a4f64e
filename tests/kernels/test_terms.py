"""Sums of products with 4-bit and dense factors, on each native tier, against their fp64 products."""

from collections.abc import Callable, Iterator

import pytest
import torch
from torch import Tensor

from halfbyte import kernels
from halfbyte.kernels import Nested, Statistics, Sum, Term, Weight4bit, WeightInt8, native, reference
from halfbyte.quant import codebook

# As in test_matmul.py: one rounding of the result, and the errors of fp32 sums.
ROUNDING = {torch.float32: 2**-24, torch.bfloat16: 2**-8, torch.float16: 2**-11}
SUMMING = 2e-6
DTYPES = list(ROUNDING)
FEW_ROWS = 16  # as in test_matmul.py


@pytest.fixture(params=native.tiers())
def tier(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HALFBYTE_ISA", request.param)


@pytest.fixture(params=[tier for tier in native.tiers() if tier != "scalar"])
def vector_tier(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HALFBYTE_ISA", request.param)


@pytest.fixture
def threads() -> Iterator[Callable[[int], None]]:
    before = torch.get_num_threads()
    yield torch.set_num_threads
    torch.set_num_threads(before)


class Random:
    """Random factors from a seed."""

    def __init__(self, seed: int) -> None:
        self.generator = torch.Generator().manual_seed(seed)

    def dense(self, rows: int, columns: int, dtype: torch.dtype, stride: int | None = None) -> Tensor:
        """Return a matrix whose rows are ``stride`` values apart, between which there is NaN."""
        whole = torch.full((rows, stride or columns), torch.nan, dtype=dtype)
        whole[:, :columns] = torch.randn(rows, columns, generator=self.generator).to(dtype)
        return whole[:, :columns]

    def weight(self, rows: int, columns: int, blocksize: int = 64) -> Weight4bit:
        n = rows * columns
        packed = torch.randint(256, (-(-n // 2),), dtype=torch.uint8, generator=self.generator)
        absmax = torch.rand(-(-n // blocksize), generator=self.generator) + 0.1
        offset = absmax.mean().item()
        codes, second = reference.quantize_coded(absmax - offset, codebook("dynamic"), 256)
        nested = Nested(second, codebook("dynamic"), 256, offset)
        return Weight4bit(packed, Statistics(codes, codebook("nf4"), blocksize, nested), (rows, columns))

    def bytes(self, rows: int, columns: int, blocksize: int) -> WeightInt8:
        """Return a weight whose codes begin at an odd address."""
        codes = torch.randint(-128, 128, (rows * columns + 1,), dtype=torch.int8, generator=self.generator)[1:]
        absmax = torch.rand(-(-rows * columns // blocksize), generator=self.generator) + 0.1
        return WeightInt8(codes.view(rows, columns), absmax, blocksize)


def right_factor(term: Term) -> Tensor:
    """Return R of a term, rounded to the dtype of its x, in fp64."""
    x, factor, transposed = term
    if isinstance(factor, WeightInt8):
        steps = (factor.absmax / 127).repeat_interleave(factor.blocksize)[: factor.codes.numel()]
        factor = factor.codes * steps.view(factor.shape)
    elif isinstance(factor, Weight4bit):
        factor = reference.dequantize_4bit(factor, x.dtype)
    factor = factor.to(x.dtype).double()
    return factor.T if transposed else factor


def check(terms: list[Term], dtype: torch.dtype, bias: Tensor | None = None) -> Tensor:
    rows, width = len(terms[0].x), right_factor(terms[0]).shape[1]
    whole = torch.full((rows + 2, width + 7), torch.nan, dtype=dtype)
    got = whole[1:-1, 3 : width + 3]
    native.matmul_sums([Sum(terms, got, bias)])
    assert whole.isnan().sum() == whole.numel() - got.numel()  # nothing beside it was written
    expected = sum(term.x.double() @ right_factor(term) for term in terms)
    magnitude = sum(term.x.double().abs() @ right_factor(term).abs() for term in terms)
    assert isinstance(expected, Tensor) and isinstance(magnitude, Tensor)
    if bias is not None:
        expected, magnitude = expected + bias.double(), magnitude + bias.double().abs()
    bound = ROUNDING[dtype] * expected.abs().clamp(min=torch.finfo(dtype).tiny)
    bound += (1 + ROUNDING[dtype]) * SUMMING * magnitude
    assert ((got.double() - expected).abs() <= bound).all()
    return got


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("stored", DTYPES)
def test_dense_factors_of_any_type_and_stride_do(tier: None, dtype: torch.dtype, stored: torch.dtype) -> None:
    for rows, depth, width in [(1, 1, 1), (5, 16, 64), (7, 33, 65), (13, 65, 16), (40, 8, 130), (3, 1100, 17)]:
        random = Random(rows)
        x = random.dense(rows, depth, dtype, depth + 3)
        check([Term(x, random.dense(width, depth, stored, depth + 5))], dtype)
        check([Term(x, random.dense(depth, width, stored, width + 5), transposed=False)], dtype)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("out", DTYPES)
def test_terms_of_every_kind_add_up(tier: None, dtype: torch.dtype, out: torch.dtype) -> None:
    for rows, depths, width in [(1, (64, 3, 5, 16), 33), (4, (96, 1), 70), (9, (65, 16), 17), (30, (1090, 8, 64), 64)]:
        random = Random(rows)
        bias = random.dense(1, width, out)[0]
        for transposed in (True, False):
            terms = []
            for i, depth in enumerate(depths):
                shape = (width, depth) if transposed else (depth, width)
                factor = random.weight(*shape) if i % 2 == 0 else random.dense(*shape, torch.float32)
                terms.append(Term(random.dense(rows, depth, dtype, depth + i), factor, transposed))
            check(terms, out, bias)
            check(terms[::-1], out)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("blocksize", [64, 32, 4096, 48, 7])
def test_int8_weights_are_those_of_their_codes(tier: None, dtype: torch.dtype, blocksize: int) -> None:
    for rows, depth, width in [(1, 1, 1), (3, 64, 96), (9, 33, 65), (13, 160, 70), (20, 1088, 17), (7, 65, 1057)]:
        random = Random(rows)
        weight, across = random.bytes(width, depth, blocksize), random.bytes(depth, width, blocksize)
        x, u = random.dense(rows, depth, dtype), random.dense(rows, 5, dtype)
        check([Term(x, weight)], dtype, random.dense(1, width, dtype)[0])
        check([Term(u, random.dense(width, 5, dtype)), Term(x, across, transposed=False)], dtype)


@pytest.mark.parametrize("dtype", DTYPES)
def test_left_factors_may_have_any_strides(tier: None, dtype: torch.dtype) -> None:
    for rows, depth, width in [(16, 100, 70), (1, 64, 3), (5, 1, 9), (9, 1064, 20)]:
        random = Random(depth)
        x = random.dense(depth, rows, dtype, rows + 3).T
        once = random.dense(1, depth, dtype).expand(rows, depth)
        weight = random.weight(width, depth)
        check([Term(x, random.dense(depth, width, dtype), False), Term(once, weight)], torch.float32)
        check([Term(random.dense(rows, 2 * depth, dtype)[:, ::2], weight), Term(x, weight)], dtype)


def test_sums_of_different_types_and_sizes_are_taken_together(tier: None) -> None:
    random = Random(0)
    sums, expected = [], []
    for i, (rows, depth, width) in enumerate([(0, 3, 4), (130, 64, 200), (3, 7, 0), (1, 128, 30), (16, 700, 90)]):
        for dtype in (torch.float32, torch.bfloat16):
            x, factor = random.dense(rows, depth, dtype), random.dense(width, depth, dtype)
            if i % 2:
                x = x.T.contiguous().T
            sums.append(Sum([Term(x, factor)], torch.full((rows, width), torch.nan)))
            expected.append(x.double() @ factor.double().T)
    native.matmul_sums(sums)
    for one, result in zip(sums, expected, strict=True):
        torch.testing.assert_close(one.out.double(), result, rtol=1e-5, atol=1e-4)


def test_any_number_of_terms_and_any_depth_do(tier: None) -> None:
    """Panels that fill up in the middle of a term, more terms than there are panels, terms without depth."""
    for dtype in (torch.float32, torch.bfloat16):
        for depths in [(1000, 1000, 100), (500, 30, 520, 1100), (16,) * 11, (0, 5, 0), (2048, 16), (2048, 200)]:
            random = Random(len(depths))
            xs = [random.dense(7, depth, dtype) for depth in depths]
            check([Term(x, random.dense(40, x.shape[1], dtype)) for x in xs], dtype)
        check([Term(random.dense(3, 0, dtype), random.dense(200, 0, dtype))], dtype, random.dense(1, 200, dtype)[0])


@pytest.mark.parametrize("dtype", DTYPES)
def test_neither_threads_nor_other_rows_change_a_bit(
    vector_tier: None, dtype: torch.dtype, threads: Callable[[int], None]
) -> None:
    random = Random(0)
    weight, low, across = random.weight(200, 1088), random.dense(200, 16, torch.float32), random.weight(64, 200)
    x, u, dy = (random.dense(300, depth, dtype) for depth in (1088, 16, 64))

    def products(rows: int) -> list[Tensor]:
        ys = [torch.empty(rows, 200, dtype=dtype) for _ in range(2)]
        first = Sum([Term(x[:rows], weight), Term(u[:rows], low)], ys[0])
        native.matmul_sums([first, Sum([Term(dy[:rows], across, False), Term(u[:rows], low)], ys[1])])
        return ys

    expected = products(300)
    for rows in (300, FEW_ROWS + 1, 57):
        for count in (1, 2, 3):
            threads(count)
            for got, whole in zip(products(rows), expected, strict=True):
                assert torch.equal(got, whole[:rows])
    few = products(FEW_ROWS)
    for rows in (3, 11):
        assert all(torch.equal(got, whole[:rows]) for got, whole in zip(products(rows), few, strict=True))


@pytest.mark.parametrize("dtype", DTYPES)
def test_one_row_gives_the_same_wherever_the_next_would_be(vector_tier: None, dtype: torch.dtype) -> None:
    random = Random(0)
    weight, wide = random.weight(200, 1088), random.dense(3, 2000, dtype)
    row = wide[1:2, :1088]
    close = torch.as_strided(row, (1, 1088), (1088, 1))
    results = [check([Term(x, weight)], torch.float32) for x in (close, row)]
    assert torch.equal(*results)


def test_wrong_terms_are_named() -> None:
    random = Random(0)
    x, factor, weight = random.dense(3, 8, torch.float32), random.dense(5, 8, torch.float32), random.weight(5, 8)
    out = torch.empty(3, 5)
    kernels.matmul_sums([])
    kernels.matmul_sums([Sum([Term(x, factor), Term(x, weight)], out)])
    for terms, target, bias, error, message in [
        ([], out, None, ValueError, "no terms"),
        ([Term(x, factor)], out.int(), None, TypeError, "out is torch.int32"),
        ([Term(x, factor)], torch.empty(3), None, ValueError, r"out has shape \(3,\)"),
        ([Term(x, factor)], torch.empty(5, 3).T, None, ValueError, r"out has shape \(3, 5\) and strides \(1, 3\)"),
        ([Term(x, factor)], torch.empty(3, 4), None, ValueError, r"transpose of \(5, 8\), but out is \(3, 4\)"),
        ([Term(x, weight, transposed=False)], out, None, ValueError, r"\(3, 8\) by \(5, 8\), but out is \(3, 5\)"),
        ([Term(x, factor), Term(x[:2], factor)], out, None, ValueError, r"term 1 multiplies \(2, 8\)"),
        ([Term(x[0], factor)], out, None, ValueError, r"x of term 0 has shape \(8,\)"),
        ([Term(x, factor.T.contiguous().T)], out, None, ValueError, "the factor of term 0 has shape"),
        ([Term(x, factor), Term(x.half(), factor)], out, None, TypeError, "x of term 1 is torch.float16"),
        ([Term(x.int(), factor)], out, None, TypeError, "x of term 0 is torch.int32"),
        ([Term(x, factor.int())], out, None, TypeError, "the factor of term 0 is torch.int32"),
        ([Term(x.to("meta"), factor)], out, None, TypeError, "x of term 0 is on meta and the first out on cpu"),
        ([Term(x, factor)], out, torch.zeros(4), ValueError, r"bias is torch.float32 \(4,\)"),
        ([Term(x, factor)], out, torch.zeros(5).half(), ValueError, "bias is torch.float16"),
        ([Term(x, factor)], out, torch.zeros(10)[::2], ValueError, r"bias has strides \(2,\)"),
    ]:
        with pytest.raises(error, match=message):
            kernels.matmul_sums([Sum([Term(x, factor)], out), Sum(terms, target, bias)])
    short = Weight4bit(weight.packed[:-1], weight.statistics, weight.shape)
    with pytest.raises(ValueError, match="packed holds 19 bytes; it must hold 20"):
        kernels.matmul_sums([Sum([Term(x, short)], out)])


@pytest.mark.parametrize("dtype", DTYPES)
def test_few_rows_as_many_are_bitwise_rows_of_many(tier: None, dtype: torch.dtype) -> None:
    if not native.multiplies():
        pytest.skip("its products are torch's")
    random = Random(1)
    x, weight = random.dense(40, 640, dtype), random.weight(96, 640)
    many = torch.empty(40, 96, dtype=torch.float32)
    native.matmul_sums([Sum([Term(x, weight)], many)])
    for rows in (1, 5, 16):
        few = torch.empty(rows, 96, dtype=torch.float32)
        native.matmul_sums([Sum([Term(x[:rows], weight)], few, as_many=True)])
        assert torch.equal(few, many[:rows])

"""Sums of products with 4-bit and dense factors, on each native tier, against their fp64 products."""

from collections.abc import Callable, Iterator

import pytest
import torch
from torch import Tensor

from halfbyte.kernels import Nested, Statistics, native, reference
from halfbyte.kernels.terms import Term, Weight4bit
from halfbyte.quant import codebook

# As in test_matmul.py: one rounding of the result, and the errors of fp32 sums.
ROUNDING = {torch.float32: 2**-24, torch.bfloat16: 2**-8, torch.float16: 2**-11}
SUMMING = 2e-6
DTYPES = list(ROUNDING)


@pytest.fixture(params=native.tiers())
def tier(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HALFBYTE_ISA", request.param)


@pytest.fixture(autouse=True)
def poisoned(monkeypatch: pytest.MonkeyPatch) -> None:
    """What the kernels are to fill is full of NaN before."""
    empty = torch.empty

    def filled(*size: int, dtype: torch.dtype, device: str) -> Tensor:
        return empty(*size, dtype=dtype, device=device).fill_(torch.nan)

    monkeypatch.setattr(torch, "empty", filled)


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
        codes, second = reference.quantize_8bit(absmax - offset, codebook("dynamic"), 256)
        nested = Nested(second, codebook("dynamic"), 256, offset)
        return Weight4bit(packed, Statistics(codes, codebook("nf4"), blocksize, nested), (rows, columns))


def right_factor(term: Term) -> Tensor:
    """Return R of a term, rounded to the dtype of its x, in fp64."""
    x, factor, gradient = term
    if isinstance(factor, Weight4bit):
        rows, columns = factor.shape
        factor = reference.dequantize_4bit(factor.packed, factor.statistics, rows * columns, x.dtype)
        factor = factor.view(rows, columns)
    factor = factor.to(x.dtype).double()
    return factor if gradient else factor.T


def check(terms: list[Term], dtype: torch.dtype, bias: Tensor | None = None) -> Tensor:
    got = native.matmul_terms(terms, dtype, bias)
    expected = sum(term.x.double() @ right_factor(term) for term in terms)
    magnitude = sum(term.x.double().abs() @ right_factor(term).abs() for term in terms)
    assert isinstance(expected, Tensor) and isinstance(magnitude, Tensor)
    if bias is not None:
        expected, magnitude = expected + bias.double(), magnitude + bias.double().abs()
    assert got.shape == expected.shape and got.dtype == dtype
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
        check([Term(x, random.dense(depth, width, stored, width + 5), gradient=True)], dtype)

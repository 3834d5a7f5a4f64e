"""int8 weights against bitsandbytes' LLM.int8 codes, and their products against the dequantized weight in fp64."""

from collections.abc import Iterator

import bitsandbytes.functional as bnb
import pytest
import torch

from halfbyte import kernels
from halfbyte.kernels import WeightInt8, native, providers

DTYPES = [torch.float32, torch.bfloat16, torch.float16]
FEW_ROWS = 16 if "neon" not in native.tiers() else 8


@pytest.fixture(params=[tier for tier in native.tiers() if tier != "scalar"])
def vector_tier(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setenv("HALFBYTE_ISA", request.param)
    before = torch.get_num_threads()
    with kernels.use_provider("native"):
        yield
    torch.set_num_threads(before)


@pytest.fixture(params=list(providers()))
def provider(request: pytest.FixtureRequest) -> object:
    with kernels.use_provider(request.param):
        yield request.param


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_rows_are_quantized_as_bitsandbytes_does(provider: str, dtype: torch.dtype) -> None:
    x = torch.randn(37, 129)
    x[3] *= 1e-3
    x = x.to(dtype)
    weight = kernels.quantize_int8(x, 129)
    codes, absmax, _ = bnb.int8_vectorwise_quant(x.float())
    assert torch.equal(weight.codes, codes) and torch.equal(weight.absmax, absmax)
    dense = bnb.int8_vectorwise_dequant(codes, absmax)
    torch.testing.assert_close(kernels.dequantize_int8(weight), dense, rtol=3e-7, atol=0)  # three roundings


@pytest.mark.parametrize("blocksize", [1, 7, 64, 1000])
def test_every_value_is_within_half_a_step(provider: str, blocksize: int) -> None:
    x = torch.randn(9, 33)
    x[2, :10] = 0
    weight = kernels.quantize_int8(x, blocksize)
    assert weight.codes.shape == x.shape and len(weight.absmax) == -(-9 * 33 // blocksize)
    step = (weight.absmax / 127).repeat_interleave(blocksize)[: x.numel()].view_as(x)
    assert ((kernels.dequantize_int8(weight) - x).abs() <= step * (0.5 + 1e-5)).all()
    again = kernels.quantize_int8(kernels.dequantize_int8(weight), blocksize)
    assert torch.equal(again.codes, weight.codes)


def test_a_block_of_zeros_and_an_empty_matrix_stay_what_they_are(provider: str) -> None:
    for shape in [(4, 8), (0, 5)]:
        weight = kernels.quantize_int8(torch.zeros(shape), 16)
        assert torch.equal(kernels.dequantize_int8(weight), torch.zeros(shape))
    for rows, columns in [(0, 5), (4, 0)]:
        weight, bias = kernels.quantize_int8(torch.zeros(rows, columns), 16), torch.arange(float(rows))
        y = kernels.matmul_int8(torch.ones(2, 3, columns), weight, bias)
        assert torch.equal(y, bias.expand(2, 3, rows))


@pytest.mark.parametrize("dtype, bound", [(torch.float32, 1e-5), (torch.bfloat16, 4e-3), (torch.float16, 1e-3)])
def test_products_and_gradients_are_those_of_the_dequantized_weight(
    provider: str, dtype: torch.dtype, bound: float
) -> None:
    for blocksize in (96, 64, 5):
        weight = kernels.quantize_int8(torch.randn(70, 96), blocksize)
        x = torch.randn(2, 5, 96).to(dtype).requires_grad_()
        bias = torch.randn(70).to(dtype).requires_grad_()
        y = kernels.matmul_int8(x, weight, bias)
        dense = kernels.dequantize_int8(weight, dtype).double()
        expected = x.double() @ dense.T + bias.double()
        dy = torch.randn_like(y)
        results = [y, *torch.autograd.grad(y, [x, bias], dy)]
        for got, result in zip(
            results, [expected, *torch.autograd.grad(expected, [x, bias], dy.double())], strict=True
        ):
            assert got.dtype == dtype and got.shape == result.shape
            assert (got.double() - result).norm() <= bound * result.norm()


@pytest.mark.parametrize("dtype, rounding", [(torch.float32, 2**-24), (torch.bfloat16, 2**-8), (torch.float16, 2**-11)])
@pytest.mark.parametrize("shape", [(1, 32), (5, 96), (35, 1056), (18, 2144), (9, 100)])
def test_few_rows_are_multiplied_within_the_rounding_of_each_value(
    vector_tier: None, shape: tuple[int, int], dtype: torch.dtype, rounding: float
) -> None:
    torch.manual_seed(0)
    values = torch.randn(shape) * torch.logspace(-2, 1, shape[0])[:, None]
    for blocksize in (32, 64, 4096, shape[1]):
        weight = kernels.quantize_int8(values, blocksize)
        dense = kernels.reference.dequantize_int8(weight, dtype).double()
        for rows in (1, 2, 3, 4, 5, 7, 8, 16, 17):
            x, bias = torch.randn(rows, shape[1]).to(dtype), torch.randn(shape[0]).to(dtype)
            expected = x.double() @ dense.T + bias.double()
            sizes = x.double().abs() @ dense.T.abs() + bias.double().abs()
            apart = (kernels.matmul_int8(x, weight, bias).double() - expected).abs()
            assert (apart <= rounding * expected.abs() + 2e-6 * sizes).all(), (blocksize, rows)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("blocksize", [64, "row"])
def test_neither_neighbours_nor_threads_nor_addresses_change_a_bit(
    vector_tier: None, blocksize: int | str, dtype: torch.dtype
) -> None:
    torch.manual_seed(0)
    columns = 2144
    weight = kernels.quantize_int8(torch.randn(130, columns), columns if isinstance(blocksize, str) else blocksize)
    codes = torch.cat([weight.codes.new_zeros(3), weight.codes.view(-1)])[3:].view(130, columns)
    moved = WeightInt8(codes, weight.absmax, weight.blocksize)
    x = torch.randn(FEW_ROWS, columns).to(dtype)
    torch.set_num_threads(1)
    together = kernels.matmul_int8(x, weight)
    assert torch.equal(together, kernels.matmul_int8(x, moved))
    for rows in range(1, FEW_ROWS):
        assert torch.equal(kernels.matmul_int8(x[:rows], weight), together[:rows]), rows
    for threads in (2, 3):
        torch.set_num_threads(threads)
        assert torch.equal(kernels.matmul_int8(x, weight), together)
        assert torch.equal(kernels.matmul_int8(x[:1], weight), together[:1])


@pytest.mark.parametrize("dtype", DTYPES)
def test_every_tier_dequantizes_to_the_bits_of_the_formula(vector_tier: None, dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    for shape, blocksize in [((9, 96), 32), ((5, 160), 160), ((7, 100), 100), ((6, 33), 7), ((3, 70), 64)]:
        weight = kernels.quantize_int8(torch.randn(shape), blocksize)
        weight.codes.view(-1)[:3] = torch.tensor([-128, 127, 0])
        assert torch.equal(kernels.dequantize_int8(weight, dtype), kernels.reference.dequantize_int8(weight, dtype))


@pytest.mark.parametrize("rows", [1, 5, 20])
def test_nan_and_infinity_come_out_where_the_dense_product_has_them(vector_tier: None, rows: int) -> None:
    for dtype in DTYPES:
        weight = kernels.quantize_int8(torch.randn(9, 96), 32)
        weight.absmax[4], weight.absmax[-1] = torch.nan, torch.inf
        x = torch.randn(rows, 96).to(dtype)
        x[0, 5] = torch.inf
        expected = x.double() @ kernels.reference.dequantize_int8(weight, dtype).double().T
        got = kernels.matmul_int8(x, weight).double()
        assert torch.equal(got.isnan(), expected.isnan())
        assert torch.equal(got[expected.isinf()], expected[expected.isinf()])


def test_wrong_arguments_are_named() -> None:
    good = kernels.quantize_int8(torch.randn(4, 6), 6)
    x = torch.randn(2, 6)
    for weight, error, message in [
        (WeightInt8(good.codes.short(), good.absmax, 6), TypeError, "codes are torch.int16"),
        (WeightInt8(good.codes.T, good.absmax, 6), TypeError, r"with strides \(1, 6\)"),
        (WeightInt8(good.codes.view(-1), good.absmax, 6), ValueError, r"codes have shape \(24,\)"),
        (WeightInt8(good.codes, good.absmax, 0), ValueError, "blocksize is 0"),
        (
            WeightInt8(good.codes, good.absmax, 5),
            ValueError,
            r"absmax is torch.float32 \(4,\).*need .* \(5,\)",
        ),
    ]:
        for call in (kernels.dequantize_int8, lambda w: kernels.matmul_int8(x, w)):
            with pytest.raises(error, match=message):
                call(weight)
    with pytest.raises(ValueError, match=r"x has shape \(2, 5\), but a weight of shape \(4, 6\)"):
        kernels.matmul_int8(x[:, :5], good)
    with pytest.raises(TypeError, match=r"x is torch\.int64"):
        kernels.quantize_int8(torch.ones(2, 2, dtype=torch.int64), 2)
    with pytest.raises(ValueError, match=r"x has shape \(3,\)"):
        kernels.quantize_int8(torch.ones(3), 2)
    with pytest.raises(TypeError, match=r"dtype is torch\.int8"):
        kernels.dequantize_int8(good, torch.int8)

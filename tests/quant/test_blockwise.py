"""Block-wise quantization by absmax and by range, against a plain loop and worked examples."""

from fractions import Fraction

import pytest
import torch

from halfbyte.quant import codebook, dequantize_affine, dequantize_coded, quantize_affine, quantize_coded

NAMES = ["nf4", "fp4", "e2m1", "e3m0", "int4", "int8", "dynamic", "dynamic_unsigned"]


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize(("shape", "blocksize"), [((7, 33), 32), ((5,), 64), ((3, 4, 50), 100), ((2, 4096), 4096)])
def test_every_value_gets_the_nearest_code_of_its_block(name: str, shape: tuple[int, ...], blocksize: int) -> None:
    x = torch.randn(shape, generator=torch.Generator().manual_seed(3))
    quantized = quantize_coded(x, name, blocksize)
    values = dequantize_coded(quantized, name, blocksize)
    assert quantized.codes.shape == x.shape and values.shape == x.shape
    table = codebook(name).double()
    for block, absmax, got in zip(
        x.reshape(-1).split(blocksize), quantized.absmax, values.reshape(-1).split(blocksize), strict=True
    ):
        assert absmax == block.abs().max()
        best = (block.double()[:, None] - table * absmax.double()).abs().min(1).values
        # No code would be nearer, up to the rounding of the scaled value.
        assert ((got.double() - block.double()).abs() <= best + 1e-6 * absmax.double()).all()


def test_the_worked_example_of_symmetric_8_bit() -> None:
    x = torch.tensor([1.5, -3, 2, 4.5, -2.5, 1, 3.5, -4])
    quantized = quantize_coded(x, "int8", blocksize=4)
    assert (quantized.codes.int() - 128).tolist() == [42, -85, 56, 127, -79, 32, 111, -127]
    assert quantized.absmax.tolist() == [4.5, 4.0]


def test_the_worked_example_of_affine_8_bit() -> None:
    x = [0.1, -0.2, 0.3, -0.4, 0.5]
    codes = quantize_affine(torch.tensor(x)).codes.tolist()
    # (x - min) / (range / 255) in exact arithmetic. The document that this example comes from prints 141 for the
    # first value, where its own formula gives 0.5 / 0.9 * 255 = 141.67.
    exact = [Fraction(str(value)) - Fraction("-0.4") for value in x]
    assert codes == [round(value / Fraction("0.9") * 255) for value in exact] == [142, 57, 198, 0, 255]
    assert all(abs(a - b) <= 1 for a, b in zip(codes, [141, 57, 198, 0, 255], strict=True))


@pytest.mark.parametrize("blocksize", [None, 32, 50])
def test_affine_error_is_at_most_half_a_step(blocksize: int | None) -> None:
    x = torch.randn(7, 33, generator=torch.Generator().manual_seed(5)) + 3
    quantized = quantize_affine(x, blocksize)
    size = blocksize or x.numel()
    half = quantized.scale.repeat_interleave(size)[: x.numel()].view(x.shape) / 2
    assert ((dequantize_affine(quantized, blocksize) - x).abs() <= half * 1.001).all()


def test_affine_keeps_a_constant_block() -> None:
    x = torch.full((40,), 2.5)
    assert torch.equal(dequantize_affine(quantize_affine(x, 32), 32), x)

"""Codebooks against their definitions: the normal quantiles, the bit patterns, bitsandbytes' own tables."""

import bitsandbytes.functional as bnb
import pytest
import scipy.stats
import torch

from halfbyte.errors import InputError
from halfbyte.quant import codebook, normal_float


def test_nf4_is_made_of_normal_quantiles() -> None:
    # The paper's construction, by another implementation of the quantile function: 8 quantiles above zero, 7 below.
    outermost = (1 - 1 / 32 + 1 - 1 / 30) / 2
    above = scipy.stats.norm.ppf([outermost - i * (outermost - 0.5) / 8 for i in range(8)])
    below = -scipy.stats.norm.ppf([outermost - i * (outermost - 0.5) / 7 for i in range(7)])
    expected = torch.tensor(sorted([*above, *below, 0.0])) / above[0]
    torch.testing.assert_close(codebook("nf4").double(), expected, atol=2e-7, rtol=0)


@pytest.mark.parametrize("bits", range(2, 9))
def test_a_normal_float_of_k_bits_has_its_properties(bits: int) -> None:
    values = normal_float(bits)
    assert len(values) == 2**bits
    assert torch.equal(values, values.sort().values.unique())
    assert values[2 ** (bits - 1) - 1] == 0
    assert values[0] == -1 and values[-1] == 1
    # Above zero each step spans the same probability.
    spread = scipy.stats.norm.ppf((1 - 1 / (2 * 2**bits) + 1 - 1 / (2 * 2**bits - 2)) / 2)
    steps = torch.tensor(scipy.stats.norm.cdf(values[2 ** (bits - 1) - 1 :].double() * spread)).diff()
    torch.testing.assert_close(steps, steps.mean().expand_as(steps), rtol=1e-4, atol=0)


def test_normal_float_4_is_nf4() -> None:
    torch.testing.assert_close(normal_float(4), codebook("nf4"), atol=2e-7, rtol=0)


@pytest.mark.parametrize("bits", [1, 9])
def test_a_normal_float_of_other_widths_is_refused(bits: int) -> None:
    with pytest.raises(InputError, match="2 to 8 bits"):
        normal_float(bits)


@pytest.mark.parametrize("name", ["nf4", "fp4"])
def test_4_bit_tables_are_bitsandbytes(name: str) -> None:
    assert torch.equal(codebook(name).view(torch.int32), bnb.get_4bit_type(name, "cpu").view(torch.int32))


@pytest.mark.parametrize(("name", "signed"), [("dynamic", True), ("dynamic_unsigned", False)])
def test_dynamic_maps_are_bitsandbytes(name: str, signed: bool) -> None:
    assert torch.equal(codebook(name), bnb.create_dynamic_map(signed))


def test_e2m1_and_e3m0_hold_the_values_of_their_bits() -> None:
    # Two exponent bits, one mantissa bit: 0, 0.5 (subnormal), then (1 + m / 2) * 2 ** (e - 1).
    e2m1 = [0, 0.5, 1, 1.5, 2, 3, 4, 6]
    e3m0 = [0, 1, 2, 4, 8, 16, 32, 64]
    for name, positive in (("e2m1", e2m1), ("e3m0", e3m0)):
        expected = torch.tensor([*positive, *(-v for v in positive)], dtype=torch.float64) / positive[-1]
        assert torch.equal(codebook(name), expected.float())


def test_integers_are_evenly_spaced() -> None:
    assert torch.equal(codebook("int4") * 7, torch.arange(-8.0, 8))
    torch.testing.assert_close(codebook("int8") * 127, torch.arange(-128.0, 128))


def test_an_unknown_codebook_is_named_with_its_nearest() -> None:
    with pytest.raises(InputError, match=r"'nf5'.*did you mean 'nf4'"):
        codebook("nf5")

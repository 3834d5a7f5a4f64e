"""The element-wise kernels of each native tier against the same formulas in fp64."""

import pytest
import torch
from torch import Tensor

from halfbyte import kernels
from halfbyte.kernels import native
from halfbyte.kernels.native import runtime


@pytest.fixture(params=native.tiers(), autouse=True)
def tier(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HALFBYTE_ISA", request.param)


def seeded(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def units_off(got: Tensor, expected: Tensor) -> Tensor:
    """How far fp32 values are off, in units of the last place that the (fp64) true value has in fp32."""
    exponent = torch.frexp(expected.abs().clamp(min=2.0**-126)).exponent
    return (got.double() - expected).abs() / torch.ldexp(torch.ones_like(expected), exponent - 24)


@pytest.mark.parametrize(
    "name, bound, low, high", [("exp", 2, -104, 88.7), ("sigmoid", 3, -87, 200), ("tanh", 3, -20, 20)]
)
def test_elementary_functions_are_right_to_the_last_places(name: str, bound: float, low: float, high: float) -> None:
    values = torch.rand(200_000, generator=seeded(0)) * (high - low) + low
    small = torch.randn(100_000, generator=seeded(1)) * torch.tensor([1e-30, 1e-3, 0.5, 1, 3]).repeat(20_000)
    x = torch.cat([values, small, torch.tensor([low, high, 0.0, 0.625, -0.625])])
    off = units_off(native.elementary(name, x), getattr(torch, name)(x.double()))
    assert off.max() <= bound, (off.max(), x[off.argmax()])


@pytest.mark.parametrize("name", ["exp", "sigmoid", "tanh"])
def test_elementary_functions_have_the_right_limits(name: str) -> None:
    x = torch.tensor([-torch.inf, -1e30, -150, -104, 0, -0.0, 88.73, 150, 1e30, torch.inf, torch.nan])
    got, expected = native.elementary(name, x), getattr(torch, name)(x)
    assert torch.equal(got.isnan(), expected.isnan()) and torch.equal(got.isinf(), expected.isinf())
    assert (got - expected).abs()[expected.isfinite()].max() <= 1e-38


def test_a_short_last_step_neither_reads_nor_writes_beyond_the_end() -> None:
    for n in range(40):
        x = torch.randn(n, generator=seeded(n))
        y = torch.full((n + 16,), 7.0)
        runtime.extension.exp(runtime.tier_index(), x.data_ptr(), n, y.data_ptr())
        assert torch.equal(y[:n], native.elementary("exp", torch.cat([x, x.new_zeros(16)]))[:n])
        assert torch.equal(y[n:], torch.full((16,), 7.0))


def test_the_number_of_threads_changes_no_bit() -> None:
    generator, before, results = seeded(0), torch.get_num_threads(), []
    x, dy = (torch.randn(700, 257, generator=generator).bfloat16() for _ in range(2))
    weight, heads = torch.randn(257, generator=generator).bfloat16(), torch.randn(2, 350, 4, 64, generator=generator)
    angles = torch.rand(2, 350, 64, generator=generator)
    for threads in (1, 2, 3):
        torch.set_num_threads(threads)
        h, y, scale = kernels.rms_norm(x, dy, weight, eps=1e-6)
        results.append(
            [
                h,
                y,
                scale,
                kernels.rms_norm_gradient(dy, x, h, weight, scale),
                kernels.rms_norm_weight_gradient(dy, h, scale),
                kernels.gated(x, dy, "gelu_tanh"),
                *kernels.gated_gradient(dy, x, y, "silu"),
                kernels.rotary(heads, angles, angles),
            ]
        )
    torch.set_num_threads(before)
    for again in results[1:]:
        assert all(torch.equal(a, b) for a, b in zip(again, results[0], strict=True))

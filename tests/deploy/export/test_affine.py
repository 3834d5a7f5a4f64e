"""MLX's affine quantization here makes the bits that MLX makes, on every kind of group."""

import numpy as np
import pytest
import torch
from torch import Tensor

from halfbyte.deploy.export import affine

mx = pytest.importorskip("mlx.core", reason="MLX's CPU library is not for this system")
KINDS = {"float32": mx.float32, "float16": mx.float16, "bfloat16": mx.bfloat16}


def to_mlx(x: Tensor) -> "mx.array":
    return mx.array(x.float().numpy()).astype(KINDS[str(x.dtype).removeprefix("torch.")])


def to_torch(x: "mx.array", dtype: torch.dtype) -> Tensor:
    return torch.from_numpy(np.array(x.astype(mx.float32))).to(dtype)


def weights() -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(0)
    plain = torch.randn(37, 256, generator=generator)
    outlier = plain.clone()
    outlier[:, 5] = 100
    halves = (torch.randint(-30, 31, (9, 128), generator=generator) / 2).float()
    return {
        "normal": plain,
        "small": plain * 1e-3,
        "below the smallest scale": plain * 1e-8,
        "large": plain * 1e3,
        "positive": plain.abs() + 1,
        "negative": -plain.abs() - 1,
        "an outlier": outlier,
        "ties": halves,
        "zero": torch.zeros(3, 128),
        "constant": torch.full((3, 128), -0.7),
        "as far on both sides": torch.tensor([-1.0, 1.0]).repeat(3, 64),
        "a row": plain[:1, :128],
    }


@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
@pytest.mark.parametrize("name", weights())
def test_codes_scales_and_biases_are_mlx_s(name: str, dtype: torch.dtype, bits: int) -> None:
    weight = weights()[name].to(dtype)
    for group_size in (32, 64, 128):
        codes, scales, biases = mx.quantize(to_mlx(weight), group_size, bits)
        made = affine.quantize(weight, bits, group_size)
        assert made.scales.dtype == made.biases.dtype == dtype and made.codes.dtype == torch.uint32
        assert np.array_equal(made.codes.numpy(), np.array(codes))
        assert torch.equal(made.scales, to_torch(scales, dtype)) and torch.equal(made.biases, to_torch(biases, dtype))
        back = mx.dequantize(codes, scales.astype(mx.float32), biases.astype(mx.float32), group_size, bits)
        torch.testing.assert_close(affine.dequantize(made, bits, group_size), to_torch(back, torch.float32))


def test_it_is_the_same_in_pieces(monkeypatch: pytest.MonkeyPatch) -> None:
    weight = weights()["normal"]
    whole = affine.quantize(weight)
    monkeypatch.setattr(affine, "AT_ONCE", 300)
    assert all(torch.equal(*both) for both in zip(whole, affine.quantize(weight), strict=True))


def test_what_has_no_groups_is_an_error() -> None:
    with pytest.raises(ValueError, match="no groups of 64"):
        affine.quantize(torch.zeros(4, 96))
    with pytest.raises(ValueError, match="3 bits"):
        affine.quantize(torch.zeros(4, 64), bits=3)

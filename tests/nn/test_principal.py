"""The principal part of a matrix against torch's whole singular value decomposition."""

import pytest
import torch
from torch import Tensor

from halfbyte.nn.principal import principal
from halfbyte.quant import quantize_4bit


def falling(out: int, width: int, power: float) -> Tensor:
    """A matrix whose singular values fall as 1 / i^power."""
    u, _ = torch.linalg.qr(torch.randn(out, min(out, width)))
    v, _ = torch.linalg.qr(torch.randn(width, min(out, width)))
    return u * torch.arange(1, min(out, width) + 1).pow(-power) @ v.T


def residual(out: int, width: int) -> Tensor:
    """What 4 bits take of a random weight: nearly as many directions of one size as there are."""
    weight = torch.randn(out, width)
    return weight - quantize_4bit(weight, "nf4", 64, True).dequantize(torch.float32)


@pytest.mark.parametrize("iterations", [None, 4])
@pytest.mark.parametrize("rank", [1, 8, 33])
@pytest.mark.parametrize(
    "matrix", [falling, residual, pytest.param(lambda o, w, *_: falling(w, o, 0.3).T, id="slowly falling")]
)
def test_the_error_is_near_the_least_that_the_rank_allows(matrix: object, rank: int, iterations: int | None) -> None:
    torch.manual_seed(0)
    m = matrix(301, 190, 1.0) if matrix is falling else matrix(301, 190)  # type: ignore[operator]
    b, a = principal(m, rank, iterations)
    assert (b.shape, a.shape) == ((301, rank), (rank, 190)) and b.is_contiguous() and a.is_contiguous()
    values = torch.linalg.svdvals(m)
    least = values[rank:].square().sum().sqrt()
    assert (m - b @ a).norm() <= least * (1 + (1e-4 if iterations is None else 1e-2))
    # and of what can be taken at all, it takes nearly all
    taken, most = m.norm() ** 2 - (m - b @ a).norm() ** 2, values[:rank].square().sum()
    assert taken >= most * (1 - (1e-3 if iterations is None else 0.05))
    torch.testing.assert_close(b.norm(dim=0), a.norm(dim=1), rtol=1e-3, atol=1e-4)  # halves of every value


def test_the_same_seed_gives_the_same_bits_and_leaves_torchs_numbers_alone() -> None:
    m, before = torch.randn(300, 200), torch.get_rng_state()
    first, again, other = principal(m, 4, 2, 7), principal(m, 4, 2, 7), principal(m, 4, 2, 8)
    assert all(torch.equal(x, y) for x, y in zip(first, again, strict=True)) and not torch.equal(first[0], other[0])
    assert torch.equal(torch.get_rng_state(), before)

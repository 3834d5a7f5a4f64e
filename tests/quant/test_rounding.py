"""Rounding onto a grid that stands: against the nearest of all values, expectations, and least squares in fp64."""

import itertools
import math

import pytest
import torch
from torch import Tensor

from halfbyte.choices import TYPES_4BIT
from halfbyte.kernels import reference
from halfbyte.quant import QuantizedWeight, quantize_4bit
from halfbyte.quant.rounding import DAMPING, Compensation, at_random, compensated, nearest

SHAPES = [(1, 1), (3, 5), (7, 33), (16, 64), (5, 96)]


def normal(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def levels(grid: QuantizedWeight) -> tuple[Tensor, Tensor]:
    """All values that each element may take, ``[out, in, 16]``, ascending, and the codes behind them."""
    absmax = reference.expand_absmax(grid.statistics).repeat_interleave(grid.statistics.blocksize)
    scale = absmax[: math.prod(grid.shape)].view(grid.shape)
    code, order = grid.statistics.code.sort()
    return scale.unsqueeze(-1) * code, order


def codes(weight: QuantizedWeight) -> Tensor:
    packed = weight.packed.view(-1)
    return torch.stack([packed >> 4, packed & 15], 1).view(-1)[: weight.numel()].view(weight.shape)


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    if "grid" in metafunc.fixturenames:
        all_of = itertools.product(TYPES_4BIT, SHAPES, (32, 64), (False, True))
        grids = [quantize_4bit(normal(*shape), kind, size, double) for kind, shape, size, double in all_of]
        metafunc.parametrize("grid", grids, ids=lambda g: f"{g.quant_type}-{tuple(g.shape)}-{g.double_quant}")


def test_what_lies_on_the_grid_keeps_its_codes(grid: QuantizedWeight) -> None:
    values = grid.dequantize(torch.float32)
    again = nearest(values, grid), at_random(values, grid, torch.Generator().manual_seed(0))
    for weight in again:
        assert torch.equal(weight.dequantize(torch.float32), values)
        assert weight.statistics is grid.statistics and weight.packed.shape == grid.packed.shape


def test_nearest_is_the_nearest_of_all_values(grid: QuantizedWeight) -> None:
    target = normal(*grid.shape, seed=1) * 1.5
    all_of, _ = levels(grid)
    least = (all_of - target.unsqueeze(-1)).abs().amin(-1)
    assert torch.allclose((nearest(target, grid).dequantize(torch.float32) - target).abs(), least, atol=1e-6)


def test_at_random_takes_a_neighbour_and_the_mean_is_the_target(grid: QuantizedWeight) -> None:
    target = normal(*grid.shape, seed=1) * 1.5
    all_of, _ = levels(grid)
    low = torch.where(all_of <= target.unsqueeze(-1), all_of, -torch.inf).amax(-1)
    high = torch.where(all_of >= target.unsqueeze(-1), all_of, torch.inf).amin(-1)
    low, high = torch.where(low.isinf(), high, low), torch.where(high.isinf(), low, high)  # outside: the end
    draws = 400
    total = torch.zeros(grid.shape, dtype=torch.float64)
    for seed in range(draws):
        drawn = at_random(target, grid, torch.Generator().manual_seed(seed)).dequantize(torch.float32)
        assert (torch.isclose(drawn, low, atol=1e-6) | torch.isclose(drawn, high, atol=1e-6)).all()
        total += drawn
    wanted = torch.clamp(target, low, high)
    deviation = ((wanted - low) * (high - wanted) / draws).clamp_min(0).sqrt()
    assert ((total / draws - wanted).abs() <= 6 * deviation + 1e-5).all()


def test_the_same_seed_draws_the_same_and_another_one_others() -> None:
    grid, target = quantize_4bit(normal(16, 64)), normal(16, 64, seed=1)
    one, same, other = (at_random(target, grid, torch.Generator().manual_seed(seed)).packed for seed in (3, 3, 4))
    assert torch.equal(one, same) and not torch.equal(one, other)


@pytest.mark.parametrize(("outputs", "inputs"), [(3, 5), (9, 64), (6, 200)])
@pytest.mark.parametrize("apart", [0.0, 0.3])
def test_each_column_is_rounded_and_the_others_solve_for_what_it_left(outputs: int, inputs: int, apart: float) -> None:
    """The same by least squares over the columns that are still free, in fp64."""
    mixing = normal(inputs, inputs, seed=2)
    exact = normal(4 * inputs, inputs, seed=3) @ mixing
    rounded = exact + apart * normal(4 * inputs, inputs, seed=4) @ mixing
    grid, target = (
        quantize_4bit(normal(outputs, inputs)),
        normal(outputs, inputs) + 0.01 * normal(outputs, inputs, seed=5),
    )

    x, y = exact.double(), rounded.double()
    second = y.T @ y
    order = second.diagonal().argsort(descending=True)
    damped = second + DAMPING * second.diagonal().mean() * torch.eye(inputs)
    wanted = torch.linalg.solve(damped, (target.double() @ (x.T @ y + damped - second)).T).T
    all_of, by_value = levels(grid)
    values = torch.zeros(outputs, inputs, dtype=torch.float64)
    found = torch.zeros(outputs, inputs, dtype=torch.int64)
    near_tie = torch.zeros(outputs, dtype=torch.bool)
    for step, column in enumerate(order.tolist()):
        fixed, free = order[:step], order[step:]
        rest = wanted[:, free]
        if step:
            missed = (wanted - values)[:, fixed] @ damped[fixed][:, free]
            rest = rest + torch.linalg.solve(damped[free][:, free], missed.T).T
        distances = (all_of[:, column].double() - rest[:, :1]).abs()
        place = distances.argmin(-1)
        two = distances.topk(2, largest=False).values
        near_tie |= two[:, 1] - two[:, 0] < 1e-4 * all_of[:, column].abs().amax(-1)
        found[:, column] = by_value[place]
        values[:, column] = all_of[:, column].double().gather(-1, place.unsqueeze(-1)).squeeze(-1)
    made = compensated(target, grid, Compensation([exact], [rounded] if apart else None))
    sure = ~near_tie  # a row goes another way from where two values are as near
    assert sure.sum() >= outputs / 3
    assert torch.equal(codes(made)[sure].long(), found[sure])


def test_compensation_keeps_the_outputs_better_than_the_nearest_values() -> None:
    mixing = normal(64, 64, seed=2)
    exact = normal(512, 64, seed=3) @ mixing
    rounded = exact + 0.2 * normal(512, 64, seed=4) @ mixing
    target = normal(32, 64)
    grid = quantize_4bit(target)
    errors = [
        float((exact @ target.T - rounded @ weight.dequantize(torch.float32).T).norm())
        for weight in (
            compensated(target, grid, Compensation([exact[:5], exact[5:]], [rounded[:5], rounded[5:]])),
            compensated(target, grid, Compensation([exact])),
            nearest(target, grid),
        )
    ]
    assert errors[0] < errors[1] < errors[2]


def test_inputs_that_are_never_there_and_blocks_of_zeros_do_no_harm() -> None:
    weight = normal(4, 128)
    weight[1, 64:] = 0
    grid = quantize_4bit(weight, double_quant=False)
    inputs = normal(200, 128, seed=1)
    inputs[:, 5:70] = 0
    for made in (
        compensated(weight, grid, Compensation([inputs])),
        compensated(weight, grid, Compensation([torch.zeros(3, 128)])),
        at_random(weight, grid, torch.Generator().manual_seed(0)),
    ):
        values = made.dequantize(torch.float32)
        assert values.isfinite().all() and (values[1, 64:] == 0).all()

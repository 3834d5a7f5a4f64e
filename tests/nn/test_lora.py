"""LoRA over 4-bit weights in one operation, against the formula in fp64 over the dequantized weights."""

import pytest
import torch
from torch import Tensor

from halfbyte import kernels
from halfbyte.kernels import providers
from halfbyte.nn import LowRank, Projection, lora_linear
from halfbyte.quant import quantize_4bit

# Bounds of the relative error by norm: fp32 sums in any order; factors and results rounded to bf16 or fp16.
BOUNDS = {torch.float32: 1e-5, torch.bfloat16: 1e-2, torch.float16: 2e-3}


@pytest.fixture(params=list(providers()))
def provider(request: pytest.FixtureRequest) -> object:
    with kernels.use_provider(request.param):
        yield request.param


class Case:
    """Projections of one width with random adapters of the given ranks, and what the formula makes of them in fp64."""

    def __init__(self, inputs: int, outputs: list[int], ranks: list[list[int]], dtype: torch.dtype) -> None:
        torch.manual_seed(inputs)
        self.dtype = dtype
        self.projections = []
        for n, of_each in zip(outputs, ranks, strict=True):
            weight = quantize_4bit(torch.randn(n, inputs) * 0.05, "nf4" if n % 2 else "fp4")
            bias = torch.randn(n).requires_grad_() if n % 3 else None
            adapters = [
                LowRank(
                    (torch.randn(r, inputs) * 0.1).requires_grad_(),
                    (torch.randn(n, r) * 0.1).requires_grad_(),
                    0.5 + 0.75 * i,
                )
                for i, r in enumerate(of_each)
            ]
            self.projections.append(Projection(weight, bias, adapters))

    @property
    def parameters(self) -> list[Tensor]:
        return [
            parameter
            for _, bias, adapters in self.projections
            for parameter in ([] if bias is None else [bias]) + [m for adapter in adapters for m in adapter[:2]]
        ]

    def formula(self, x: Tensor, noise: Tensor | None = None) -> list[Tensor]:
        x = x.double()
        dropped = x if noise is None else x * noise.double()
        ys = []
        for weight, bias, adapters in self.projections:
            dense = weight.dequantize()
            y = x @ dense.double().T
            if bias is not None:
                y = y + bias.double()
            for a, b, scaling in adapters:
                y = y + scaling * (dropped @ a.double().T) @ b.double().T
            ys.append(y)
        return ys

    def compare(self, got: list[Tensor], expected: list[Tensor], x: Tensor) -> None:
        """Compare results, and gradients of x and of every parameter, for random gradients of the results."""
        for y, result in zip(got, expected, strict=True):
            assert y.dtype == self.dtype and y.shape == result.shape
            self.near(y, result)
        weights = [torch.randn_like(y) for y in got]
        of = [x, *self.parameters]
        ours = torch.autograd.grad(got, of, weights)
        theirs = torch.autograd.grad(expected, of, [w.double() for w in weights])
        for parameter, gradient, result in zip(of, ours, theirs, strict=True):
            assert gradient.dtype == parameter.dtype
            self.near(gradient, result)

    def near(self, got: Tensor, expected: Tensor) -> None:
        assert got.shape == expected.shape
        assert (got.double() - expected).norm() <= BOUNDS[self.dtype] * expected.double().norm()


@pytest.mark.parametrize("dtype", list(BOUNDS))
@pytest.mark.parametrize(
    "inputs, outputs, ranks",
    [
        (64, [96], [[16]]),
        (33, [7], [[1]]),
        (96, [64, 32, 33], [[3], [3], [3]]),  # query, key, value
        (1100, [70, 65], [[64], [5]]),  # more depth than a panel holds; ranks that differ
        (64, [64, 31], [[8, 2], []]),  # two active adapters, and a projection without any
        (50, [20, 21], [[], []]),
    ],
)
def test_results_and_gradients_are_those_of_the_formula(
    provider: str, inputs: int, outputs: list[int], ranks: list[list[int]], dtype: torch.dtype
) -> None:
    case = Case(inputs, outputs, ranks, dtype)
    for shape in [(37,), (2, 3), (1, 1)]:
        x = torch.randn(*shape, inputs).to(dtype).requires_grad_()
        case.compare(lora_linear(x, case.projections), case.formula(x), x)


@pytest.mark.parametrize("dtype", list(BOUNDS))
def test_dropout_takes_the_same_values_away_forward_and_backward(provider: str, dtype: torch.dtype) -> None:
    case = Case(64, [40, 33], [[4], [6]], dtype)
    # An adapter that shows the mask: rank and width of the input, A and B the identity.
    eye = torch.eye(64)
    show = Projection(quantize_4bit(torch.zeros(64, 64)), None, [LowRank(eye, eye, 1.0)])
    x = (torch.rand(500, 64) + 0.5).to(dtype).requires_grad_()
    torch.manual_seed(5)
    *ys, shown = lora_linear(x, [*case.projections, show], dropout=0.25)
    torch.manual_seed(5)
    for y, again in zip(ys, lora_linear(x, case.projections, dropout=0.25), strict=True):
        case.near(y, again)
    noise = (shown / x).detach()
    kept = noise != 0
    assert abs(kept.float().mean() - 0.75) < 0.02  # four standard deviations of 32000 draws are 0.01
    torch.testing.assert_close(noise[kept].float(), torch.full_like(noise[kept], 4 / 3).float(), rtol=1e-2, atol=0)
    exact = torch.where(kept, torch.tensor(1 / 0.75, dtype=dtype), 0)
    case.compare(ys, case.formula(x, exact), x)
    assert not torch.equal(lora_linear(x, case.projections, dropout=0.25)[0], ys[0])


def test_only_what_is_asked_for_gets_a_gradient() -> None:
    case = Case(64, [40, 33], [[4], [6]], torch.float32)
    x = torch.randn(5, 64)
    for frozen in range(len(case.parameters)):
        for i, parameter in enumerate(case.parameters):
            parameter.requires_grad_(i != frozen).grad = None
        y, _ = lora_linear(x, case.projections)  # the second result is not used
        y.sum().backward()
        for i, (parameter, expected) in enumerate(zip(case.parameters, _of_first(case, x), strict=True)):
            if i == frozen or expected is None:
                assert parameter.grad is None or not parameter.grad.any()
            else:
                case.near(parameter.grad, expected)
    for parameter in case.parameters:
        parameter.requires_grad_(False)
    assert not lora_linear(x, case.projections)[0].requires_grad
    dx = torch.autograd.grad(lora_linear(x.requires_grad_(), case.projections)[0].sum(), x)[0]
    case.near(dx, torch.autograd.grad(case.formula(x)[0].sum(), x)[0])


def _of_first(case: Case, x: Tensor) -> tuple[Tensor | None, ...]:
    for parameter in case.parameters:
        parameter.requires_grad_()
    return torch.autograd.grad(case.formula(x)[0].sum(), case.parameters, allow_unused=True)


def test_gradients_accumulate() -> None:
    case = Case(96, [64, 32], [[8], [8]], torch.float32)
    x, more = torch.randn(9, 96), torch.randn(11, 96)
    for part in (x, more):
        sum(y.square().sum() for y in lora_linear(part, case.projections)).backward()
    both = case.formula(torch.cat([x, more]))
    expected = torch.autograd.grad(sum(y.square().sum() for y in both), case.parameters)
    for parameter, gradient in zip(case.parameters, expected, strict=True):
        case.near(parameter.grad, gradient)


def test_adapters_of_a_lower_precision_get_gradients_of_theirs() -> None:
    case = Case(64, [40], [[4]], torch.bfloat16)
    weight, bias, [(a, b, scaling)] = case.projections[0]
    low = LowRank(*(m.detach().bfloat16().requires_grad_() for m in (a, b)), scaling)
    x = torch.randn(5, 64, dtype=torch.bfloat16)
    lora_linear(x, [Projection(weight, bias, [low])])[0].sum().backward()
    expected = torch.autograd.grad(case.formula(x)[0].sum(), [a, b])
    for parameter, gradient in zip(low[:2], expected, strict=True):
        assert parameter.grad.dtype == torch.bfloat16
        case.near(parameter.grad, gradient)


def test_nothing_dense_is_kept_for_the_backward() -> None:
    case = Case(256, [256, 256], [[4], [4]], torch.bfloat16)
    kept = []
    x = torch.randn(8, 256).bfloat16().requires_grad_()
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t):
        lora_linear(x, case.projections, dropout=0.1)
    new = [t for t in kept if not any(t.data_ptr() == known.data_ptr() for known in [x, *case.parameters])]
    assert sum(t.numel() for t in new) == 8 * (4 + 4)  # u

"""Linear4bit against a dense layer that holds the dequantized weight."""

import copy
import gc
import weakref
from collections.abc import Iterator

import pytest
import torch
from torch import Tensor, nn

from halfbyte.errors import InputError
from halfbyte.kernels import providers, use_provider
from halfbyte.nn import Linear4bit
from halfbyte.quant import quantize_4bit

# Rows that are and are not multiples of the block, odd counts, a single output.
SHAPES = [(64, 64), (160, 33), (65, 7), (576, 192), (3, 1)]
BOUNDS = {torch.float32: 1e-5, torch.bfloat16: 1e-2, torch.float16: 2e-3}


@pytest.fixture(params=list(providers()), autouse=True)
def provider(request: pytest.FixtureRequest) -> Iterator[str]:
    """Every claim of this file holds for every provider."""
    with use_provider(request.param):
        yield request.param


def make(in_features: int, out_features: int, bias: bool = True, **how: object) -> tuple[nn.Linear, Linear4bit]:
    """A 4-bit layer, and the dense fp32 layer that holds its dequantized weight."""
    torch.manual_seed(in_features)
    dense = nn.Linear(in_features, out_features, bias)
    layer = Linear4bit.from_linear(dense, **how)  # type: ignore[arg-type]
    dense.weight = nn.Parameter(layer.quantized_weight.dequantize())
    return dense, layer


def relative(got: Tensor | None, expected: Tensor | None) -> float:
    assert got is not None and expected is not None and got.shape == expected.shape
    return ((got.double() - expected.double()).norm() / expected.double().norm()).item()


@pytest.mark.parametrize("dtype", list(BOUNDS))
@pytest.mark.parametrize(("in_features", "out_features"), SHAPES)
@pytest.mark.parametrize("bias", [True, False])
def test_output_and_gradients_are_those_of_the_dense_layer(
    dtype: torch.dtype, in_features: int, out_features: int, bias: bool
) -> None:
    dense, layer = make(in_features, out_features, bias, compute_dtype=dtype)
    x = torch.randn(2, 5, in_features)
    dy = torch.randn(2, 5, out_features)
    results = []
    for module in (dense, layer):
        input = x.clone().requires_grad_()
        y = module(input)
        y.backward(dy)
        results.append((y, input.grad, module.bias.grad if bias else None))
    for expected, got in zip(*results, strict=True):
        if expected is not None:
            assert relative(got, expected) < BOUNDS[dtype]
    assert layer.weight.grad is None


@pytest.mark.parametrize("quant_type", ["nf4", "fp4", "e2m1", "e3m0", "int4"])
@pytest.mark.parametrize("double_quant", [False, True])
def test_every_format_computes(quant_type: str, double_quant: bool) -> None:
    dense, layer = make(96, 40, quant_type=quant_type, double_quant=double_quant, blocksize=32)
    x = torch.randn(3, 96)
    assert relative(layer(x), dense(x)) < 1e-5


def test_without_a_compute_dtype_the_input_decides() -> None:
    _, layer = make(64, 32)
    for dtype in BOUNDS:
        assert layer(torch.randn(2, 64, dtype=dtype)).dtype == dtype


def test_output_takes_the_dtype_of_the_input() -> None:
    _, layer = make(64, 32, compute_dtype=torch.bfloat16)
    assert layer(torch.randn(2, 64)).dtype == torch.float32


def test_training_evaluation_and_training_again_change_nothing() -> None:
    _, layer = make(160, 96, compute_dtype=torch.bfloat16)
    x = torch.randn(1, 160)
    before = {key: value.clone() for key, value in layer.state_dict().items()}

    def gradient() -> Tensor:
        input = x.clone().requires_grad_()
        layer.train()(input).square().sum().backward()
        assert input.grad is not None
        return input.grad

    first = gradient()
    layer.eval()
    with torch.no_grad():
        layer(x)
        layer(x.to(torch.bfloat16))
    assert torch.equal(gradient(), first)
    after = layer.state_dict()
    assert before.keys() == after.keys()
    assert all(torch.equal(before[key], after[key]) for key in before)


def test_nothing_dense_lives_between_forward_and_backward() -> None:
    _, layer = make(512, 512, compute_dtype=torch.float32)

    def floats() -> int:
        gc.collect()
        return sum(o.numel() for o in gc.get_objects() if issubclass(type(o), Tensor) and o.is_floating_point())

    x = torch.randn(2, 512, requires_grad=True)
    saved: list[Tensor] = []
    before = floats()
    with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t) or t, lambda t: t):  # type: ignore[func-returns-value]
        y = layer(x)
    assert floats() - before <= y.numel()
    assert not any(t.is_floating_point() and t.numel() >= 512 * 512 for t in saved)
    y.sum().backward()


def test_from_linear_leaves_the_source_alone() -> None:
    source = nn.Linear(64, 64)
    weight, bias = source.weight.clone(), source.bias.clone()
    layer = Linear4bit.from_linear(source)
    layer.bias.data.zero_()
    assert torch.equal(source.weight, weight) and torch.equal(source.bias, bias)
    assert isinstance(layer, nn.Linear)


def test_casts_do_not_touch_the_statistics() -> None:
    _, layer = make(160, 96, compute_dtype=torch.float32)
    before = layer.quantized_weight.dequantize()
    for cast in (layer.half, layer.bfloat16, layer.double, layer.float):
        cast()
        assert torch.equal(layer.quantized_weight.dequantize(), before)
    assert not list(layer.buffers())


def test_statistics_follow_the_weight_to_a_device() -> None:
    _, layer = make(64, 64)
    layer.to("meta")
    weight = layer.quantized_weight
    assert weight.statistics.nested is not None
    tensors = [weight.packed, weight.statistics.absmax, weight.statistics.code, weight.statistics.nested.absmax]
    assert {t.device.type for t in tensors} == {"meta"}


def test_the_weight_is_made_once_and_anew_when_the_layer_has_another() -> None:
    _, layer = make(64, 96)
    weight = layer.quantized_weight
    assert layer.quantized_weight is weight
    layer.weight = nn.Parameter(torch.zeros_like(layer.weight), requires_grad=False)
    assert layer.quantized_weight.packed is layer.weight
    layer.set_quantized_weight(quantize_4bit(torch.ones(96, 64), "fp4"))
    assert layer.quantized_weight.quant_type == "fp4" and layer.dequantize().unique().tolist() == [1.0]
    layer.set_quantized_weight(weight)
    assert torch.equal(layer.dequantize(), weight.dequantize())
    layer.weight.data = torch.zeros_like(layer.weight)
    assert torch.equal(layer.quantized_weight.packed, layer.weight)
    twin = copy.deepcopy(layer)
    assert twin.quantized_weight.packed is twin.weight and twin.quantized_weight.statistics is twin.statistics
    before = layer.quantized_weight.statistics
    assert layer.to("meta").quantized_weight.statistics is layer.statistics is not before


def test_a_weight_that_the_layer_has_no_more_is_let_go() -> None:
    _, layer = make(64, 96)
    old = weakref.ref(layer.quantized_weight)
    layer.set_quantized_weight(quantize_4bit(torch.ones(96, 64)))
    assert old() is None
    old = weakref.ref(layer.quantized_weight)
    layer.to("meta")
    assert old() is None


def test_a_deep_copy_is_independent_and_equal() -> None:
    _, layer = make(64, 96)
    twin = copy.deepcopy(layer)
    x = torch.randn(2, 64)
    assert torch.equal(twin(x), layer(x))
    twin.weight.data.zero_()
    assert layer.weight.any()


@pytest.mark.parametrize("assign", [False, True])
@pytest.mark.parametrize("double_quant", [False, True])
def test_state_dict_restores_the_layer(assign: bool, double_quant: bool) -> None:
    _, layer = make(160, 33, double_quant=double_quant)
    model = nn.Sequential(nn.Linear(4, 160), layer)
    other = nn.Sequential(nn.Linear(4, 160), Linear4bit(160, 33))
    assert other.load_state_dict(model.state_dict(), assign=assign) == ([], [])
    x = torch.randn(3, 4)
    assert torch.equal(other(x), model(x))
    first, second = model.state_dict(), other.state_dict()
    assert first.keys() == second.keys() and all(torch.equal(first[key], second[key]) for key in first)


def test_a_state_dict_of_another_shape_or_kind_is_told() -> None:
    _, layer = make(64, 32)
    with pytest.raises(RuntimeError, match=r"\(32, 64\) does not fit a layer of shape \(64, 64\)"):
        Linear4bit(64, 64).load_state_dict(layer.state_dict() | {"bias": torch.zeros(64)})
    with pytest.raises(RuntimeError, match="not a 4-bit weight"):
        Linear4bit(64, 32).load_state_dict(nn.Linear(64, 32).state_dict())
    with pytest.raises(InputError, match=r"\(8, 64\) does not fit"):
        layer.set_quantized_weight(quantize_4bit(torch.randn(8, 64)))


def test_a_layer_without_a_weight_says_so() -> None:
    with pytest.raises(RuntimeError, match="has no weight yet"):
        Linear4bit(64, 32)(torch.randn(1, 64))


def test_an_empty_batch_passes() -> None:
    _, layer = make(64, 32)
    x = torch.randn(0, 64, requires_grad=True)
    layer(x).sum().backward()
    assert x.grad is not None and x.grad.shape == (0, 64)


def test_autocast_does_not_change_the_compute_dtype() -> None:
    dense, layer = make(64, 32, compute_dtype=torch.float32)
    x = torch.randn(2, 64)
    with torch.autocast("cpu", torch.bfloat16):
        y = layer(x)
    assert relative(y, dense(x)) < 1e-5

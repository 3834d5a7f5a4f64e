"""Linear layers over int8 and over dense frozen weights, and LoRA over both, against dense layers and the formula."""

import copy
from collections.abc import Callable, Iterator

import pytest
import torch
from torch import Tensor, nn

from halfbyte.errors import InputError
from halfbyte.kernels import providers, use_provider
from halfbyte.nn import DenseLinear, Linear8bit, LowRank, Projection, lora_linear
from halfbyte.quant import quantize_4bit, quantize_int8

SHAPES = [(64, 64), (160, 33), (65, 7), (576, 192), (3, 1)]
BOUNDS = {torch.float32: 1e-5, torch.bfloat16: 1e-2, torch.float16: 2e-3}


@pytest.fixture(params=list(providers()), autouse=True)
def provider(request: pytest.FixtureRequest) -> Iterator[str]:
    """Every claim of this file holds for every provider."""
    with use_provider(request.param):
        yield request.param


def relative(got: Tensor | None, expected: Tensor | None) -> float:
    assert got is not None and expected is not None and got.shape == expected.shape
    return ((got.double() - expected.double()).norm() / expected.double().norm()).item()


def in_8_bits(dense: nn.Linear, dtype: torch.dtype, blocksize: int | str) -> nn.Linear:
    layer = Linear8bit.from_linear(dense, blocksize, dtype)
    dense.weight = nn.Parameter(layer.dequantize())
    return layer


@pytest.mark.parametrize("dtype", list(BOUNDS))
@pytest.mark.parametrize(("in_features", "out_features"), SHAPES)
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize(
    "made",
    [
        lambda dense, dtype: in_8_bits(dense, dtype, 64),
        lambda dense, dtype: in_8_bits(dense, dtype, "row"),
        lambda dense, dtype: DenseLinear.taking(copy.deepcopy(dense).requires_grad_(False), dtype),
    ],
    ids=["blocks", "rows", "dense"],
)
def test_output_and_gradients_are_those_of_the_dense_layer(
    made: Callable[[nn.Linear, torch.dtype], nn.Linear],
    dtype: torch.dtype,
    in_features: int,
    out_features: int,
    bias: bool,
) -> None:
    torch.manual_seed(in_features)
    dense = nn.Linear(in_features, out_features, bias)
    layer = made(dense, dtype)
    if bias:
        layer.bias.requires_grad_()
    x, dy = torch.randn(2, 5, in_features), torch.randn(2, 5, out_features)
    results = []
    for module in (dense, layer):
        input = x.clone().requires_grad_()
        y = module(input)
        y.backward(dy)
        results.append((y, input.grad, module.bias.grad if bias else None))
        with torch.no_grad():
            assert torch.equal(module(x), y)
    for expected, got in zip(*results, strict=True):
        if expected is not None:
            assert relative(got, expected) < BOUNDS[dtype]
    assert layer.weight.grad is None


@pytest.mark.parametrize("dtype", list(BOUNDS))
def test_lora_over_mixed_weights_is_the_formula(dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    dense = [torch.randn(n, 96) * 0.1 for n in (40, 33, 64, 7)]
    weights = [quantize_int8(dense[0], 64), quantize_int8(dense[1], "row"), dense[2].to(dtype), quantize_4bit(dense[3])]
    values = [w.double() if isinstance(w, Tensor) else w.dequantize(torch.float32).double() for w in weights]
    adapters = [
        LowRank((torch.randn(4, 96) * 0.1).requires_grad_(), (torch.randn(len(w), 4) * 0.1).requires_grad_(), 0.5)
        for w in values
    ]
    x = torch.randn(3, 5, 96).to(dtype).requires_grad_()
    got = lora_linear(x, [Projection(w, None, [a]) for w, a in zip(weights, adapters, strict=True)])
    expected = [
        x.double() @ w.T + a.scaling * (x.double() @ a.a.double().T) @ a.b.double().T
        for w, a in zip(values, adapters, strict=True)
    ]
    for y, result in zip(got, expected, strict=True):
        assert relative(y, result) < BOUNDS[dtype]
    of = [x, *(factor for a in adapters for factor in a[:2])]
    dys = [torch.randn_like(y) for y in got]
    ours = torch.autograd.grad(got, of, dys)
    theirs = torch.autograd.grad(expected, of, [dy.double() for dy in dys])
    for gradient, result in zip(ours, theirs, strict=True):
        assert relative(gradient, result) < BOUNDS[dtype]


def test_state_dicts_go_there_and_back() -> None:
    source = nn.Linear(96, 40)
    for blocksize in (64, "row"):
        layer = Linear8bit.from_linear(source, blocksize)
        other = Linear8bit(96, 40)
        assert not other.load_state_dict(layer.state_dict()).missing_keys
        assert torch.equal(other.dequantize(), layer.dequantize())
        assert other.weight.data_ptr() != layer.weight.data_ptr()


def test_constants_follow_a_device_and_no_cast() -> None:
    layer = Linear8bit.from_linear(nn.Linear(96, 40))
    before = layer.dequantize()
    for cast in (layer.half, layer.bfloat16, layer.double, layer.float):
        cast()
        assert torch.equal(layer.dequantize(), before)
    assert not list(layer.buffers()) and torch.equal(copy.deepcopy(layer).dequantize(), before)
    layer.to("meta")
    assert layer.quantized_weight.absmax.device.type == layer.weight.device.type == "meta"


def test_what_does_not_fit_is_told() -> None:
    layer = Linear8bit(96, 40)
    with pytest.raises(RuntimeError, match="has no weight yet"):
        layer(torch.randn(2, 96))
    with pytest.raises(InputError, match=r"An int8 weight of shape \(4, 96\) does not fit a layer of shape \(40, 96\)"):
        layer.set_quantized_weight(quantize_int8(torch.randn(4, 96)))
    assert "int8, blocksize=row" in repr(Linear8bit.from_linear(nn.Linear(3, 2), "row"))

"""The operations: argument checks, and the 4-bit product with its gradients against a dense layer."""

import dataclasses
import gc
from collections.abc import Callable, Iterator

import pytest
import torch
from torch import Tensor

from halfbyte import kernels
from halfbyte.errors import InputError
from halfbyte.kernels import Nested, Statistics, Weight4bit
from halfbyte.quant import codebook

# Relative distance in the 2-norm. 16 bits: the weight and the result are each rounded once, by at most half of this.
# 32 bits: only the order of the sums differs.
BOUNDS = {torch.float32: 1e-6, torch.bfloat16: 2**-8, torch.float16: 2**-11}
# (N, K): blocks that cross rows, odd counts, a short last block, one row, one column.
SHAPES = [(64, 128), (33, 65), (1, 64), (96, 1), (7, 1000)]


@pytest.fixture(params=list(kernels.providers()), autouse=True)
def provider(request: pytest.FixtureRequest) -> Iterator[None]:
    """Every claim of this file holds for every provider."""
    with kernels.use_provider(request.param):
        yield


def make_weight(shape: tuple[int, int], double_quant: bool) -> tuple[Weight4bit, Tensor]:
    """A 4-bit weight, and the dense fp32 values that it stands for."""
    x = torch.randn(shape, generator=torch.Generator().manual_seed(0))
    packed, absmax = kernels.quantize_4bit(x, codebook("nf4"), 64)
    statistics = Statistics(absmax, codebook("nf4"), 64)
    if double_quant:
        offset = absmax.mean().item()
        codes, second = kernels.quantize_coded(absmax - offset, codebook("dynamic"), 256)
        statistics = Statistics(codes, codebook("nf4"), 64, Nested(second, codebook("dynamic"), 256, offset))
    weight = Weight4bit(packed, statistics, shape)
    return weight, kernels.dequantize_4bit(weight, torch.float32)


def distance(got: Tensor | None, expected: Tensor | None) -> float:
    assert got is not None and expected is not None and got.shape == expected.shape
    return ((got.double() - expected.double()).norm() / expected.double().norm()).item()


@pytest.mark.parametrize("double_quant", [False, True])
@pytest.mark.parametrize("dtype", BOUNDS)
@pytest.mark.parametrize("shape", SHAPES)
def test_the_product_and_its_gradients_are_those_of_the_dense_layer(
    shape: tuple[int, int], dtype: torch.dtype, double_quant: bool
) -> None:
    weight, dense = make_weight(shape, double_quant)
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(2, 5, shape[1], generator=generator).to(dtype).requires_grad_()
    bias = torch.randn(shape[0], generator=generator).to(dtype).requires_grad_()
    dy = torch.randn(2, 5, shape[0], generator=generator).to(dtype)
    y = kernels.matmul_4bit(x, weight, bias)
    y.backward(dy)

    x32, bias32 = (t.detach().float().requires_grad_() for t in (x, bias))
    y32 = torch.nn.functional.linear(x32, dense, bias32)
    y32.backward(dy.float())
    assert y.dtype == dtype and x.grad is not None and x.grad.dtype == dtype
    assert distance(y, y32) < BOUNDS[dtype]
    assert distance(x.grad, x32.grad) < BOUNDS[dtype]
    assert distance(bias.grad, bias32.grad) < BOUNDS[dtype]


def test_a_frozen_input_gets_no_gradient_and_the_bias_still_does() -> None:
    weight, _ = make_weight((8, 16), True)
    x, bias = torch.randn(3, 16), torch.zeros(8, requires_grad=True)
    kernels.matmul_4bit(x, weight, bias).sum().backward()
    assert x.grad is None and bias.grad is not None and bias.grad.tolist() == [3.0] * 8


def test_autocast_does_not_change_the_dtype() -> None:
    weight, dense = make_weight((8, 64), True)
    x = torch.randn(3, 64)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        y = kernels.matmul_4bit(x, weight)
    assert y.dtype == torch.float32 and distance(y, x @ dense.T) < BOUNDS[torch.float32]


def test_nothing_dense_is_kept_for_the_backward() -> None:
    shape = (48, 1000)
    weight = make_weight(shape, True)[0]
    saved: list[Tensor] = []

    def keep(tensor: Tensor) -> Tensor:
        saved.append(tensor)
        return tensor

    x = torch.randn(4, shape[1], requires_grad=True)
    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        y = kernels.matmul_4bit(x, weight)
    assert [tensor.data_ptr() for tensor in saved] == [weight.packed.data_ptr()]
    gc.collect()
    alive = [t for t in gc.get_objects() if isinstance(t, Tensor) and t.numel() == shape[0] * shape[1]]
    assert not alive
    y.sum().backward()


NF4, DYNAMIC = codebook("nf4"), codebook("dynamic")
WEIGHT, _ = make_weight((8, 64), double_quant=False)
PACKED, STATISTICS = WEIGHT.packed, WEIGHT.statistics
NESTED = make_weight((8, 64), double_quant=True)[0].statistics
assert NESTED.nested is not None
SHORT_NESTED = dataclasses.replace(NESTED, nested=dataclasses.replace(NESTED.nested, blocksize=4))
HALF = torch.zeros(8, dtype=torch.bfloat16)


def weight_with(
    packed: Tensor = PACKED, statistics: Statistics = STATISTICS, shape: tuple[int, ...] = (8, 64), **changed: object
) -> Weight4bit:
    """A weight of 8 rows of 64, but for these parts of it and what is ``changed`` in its statistics."""
    return Weight4bit(packed, dataclasses.replace(statistics, **changed), shape)


MISTAKES: dict[str, tuple[type[Exception], str, Callable[[], object]]] = {
    "integers to quantize": (
        TypeError,
        "x is torch.int32.*float32",
        lambda: kernels.quantize_4bit(HALF.int(), NF4, 64),
    ),
    "doubles to quantize": (
        TypeError,
        "x is torch.float64",
        lambda: kernels.quantize_coded(HALF.double(), DYNAMIC, 64),
    ),
    "no block": (ValueError, "blocksize is 0.*1 or more", lambda: kernels.quantize_4bit(HALF, NF4, 0)),
    "a long code": (
        ValueError,
        r"code is torch.float32 \(256,\).*16",
        lambda: kernels.quantize_4bit(HALF, DYNAMIC, 64),
    ),
    "a half code": (ValueError, "code is torch.bfloat16", lambda: kernels.quantize_4bit(HALF, NF4.bfloat16(), 64)),
    "a code of one": (ValueError, r"\(1,\).*2 to 256", lambda: kernels.quantize_coded(HALF, DYNAMIC[:1], 64)),
    "a 2-D code": (ValueError, r"\(16, 16\)", lambda: kernels.quantize_coded(HALF, DYNAMIC.view(16, 16), 64)),
    "signed codes": (
        TypeError,
        "codes is torch.int8.*uint8",
        lambda: kernels.dequantize_coded(torch.zeros(8, dtype=torch.int8), torch.ones(1), DYNAMIC, 64),
    ),
    "strided codes": (
        TypeError,
        r"strides \(2,\).*contiguous",
        lambda: kernels.dequantize_coded(PACKED[::2], torch.ones(2), DYNAMIC, 64),
    ),
    "too few scales": (
        ValueError,
        r"absmax is torch.float32 \(3,\).*256 values in blocks of 64 need torch.float32 \(4,\)",
        lambda: kernels.dequantize_coded(PACKED, torch.ones(3), DYNAMIC, 64),
    ),
    "half scales": (
        ValueError,
        "absmax is torch.float16.*need torch.float32",
        lambda: kernels.dequantize_coded(PACKED, torch.ones(4).half(), DYNAMIC, 64),
    ),
    "too few bytes": (
        ValueError,
        "packed holds 255 bytes; it must hold 256",
        lambda: kernels.dequantize_4bit(weight_with(PACKED[:255]), torch.float32),
    ),
    "an integer result": (
        TypeError,
        "dtype is torch.int8",
        lambda: kernels.dequantize_4bit(WEIGHT, torch.int8),
    ),
    "nested codes without their statistics": (
        ValueError,
        "absmax is torch.uint8.*need torch.float32",
        lambda: kernels.dequantize_4bit(weight_with(statistics=NESTED, nested=None), torch.float32),
    ),
    "plain scales with nested statistics": (
        ValueError,
        "absmax is torch.float32.*need torch.uint8",
        lambda: kernels.matmul_4bit(torch.zeros(1, 64), weight_with(statistics=NESTED, absmax=STATISTICS.absmax)),
    ),
    "a weight that is no matrix": (
        ValueError,
        r"the weight has shape \(8, 8, 8\); it must be a matrix",
        lambda: kernels.matmul_4bit(torch.zeros(1, 8), weight_with(shape=(8, 8, 8))),
    ),
    "a narrow input": (
        ValueError,
        r"x has shape \(2, 63\).*\(8, 64\) needs \[..., 64\]",
        lambda: kernels.matmul_4bit(torch.zeros(2, 63), WEIGHT),
    ),
    "a scalar input": (
        ValueError,
        r"x has shape \(\)",
        lambda: kernels.matmul_4bit(torch.tensor(1.0), WEIGHT),
    ),
    "a long bias": (
        ValueError,
        r"bias is torch.float32 \(9,\).*torch.float32 \(8,\)",
        lambda: kernels.matmul_4bit(torch.zeros(2, 64), WEIGHT, torch.zeros(9)),
    ),
    "a half bias": (
        ValueError,
        r"bias is torch.bfloat16 \(8,\).*torch.float32",
        lambda: kernels.matmul_4bit(torch.zeros(2, 64), WEIGHT, HALF),
    ),
    "a bias elsewhere": (
        ValueError,
        r"bias is torch.float32 \(8,\) on meta.*torch.float32 \(8,\) on cpu",
        lambda: kernels.matmul_4bit(torch.zeros(2, 64), WEIGHT, torch.zeros(8, device="meta")),
    ),
    "packed floats": (
        TypeError,
        "packed is torch.float32.*uint8",
        lambda: kernels.matmul_4bit(torch.zeros(2, 64), weight_with(PACKED.float())),
    ),
    "strided packed codes": (
        TypeError,
        r"packed is torch.uint8 with strides \(2,\).*contiguous",
        lambda: kernels.matmul_4bit(torch.zeros(2, 64), weight_with(PACKED.repeat_interleave(2)[::2])),
    ),
    "a packed buffer that is too short": (
        ValueError,
        "packed holds 200 bytes; it must hold 256",
        lambda: kernels.matmul_4bit(torch.zeros(2, 64), weight_with(PACKED[:200])),
    ),
    "a weight of another shape": (
        ValueError,
        "packed holds 256 bytes; it must hold 288",
        lambda: kernels.matmul_4bit(torch.zeros(2, 64), weight_with(shape=(9, 64))),
    ),
    "an input of doubles": (
        TypeError,
        "x is torch.float64; it must be float32, bfloat16 or float16",
        lambda: kernels.matmul_4bit(torch.zeros(2, 64).double(), WEIGHT),
    ),
    "scales elsewhere": (
        ValueError,
        r"absmax is torch.float32 \(8,\) on meta.*on cpu",
        lambda: kernels.matmul_4bit(
            torch.zeros(2, 64),
            weight_with(absmax=STATISTICS.absmax.to("meta")),
        ),
    ),
    "strided scales": (
        ValueError,
        r"absmax is torch.float32 \(8,\) on cpu with strides \(2,\).*contiguous",
        lambda: kernels.matmul_4bit(torch.zeros(2, 64), weight_with(absmax=torch.ones(16)[::2])),
    ),
    "a table elsewhere": (
        ValueError,
        r"code is torch.float32 \(16,\) on meta.*on cpu",
        lambda: kernels.matmul_4bit(torch.zeros(2, 64), weight_with(code=NF4.to("meta"))),
    ),
    "a block size that is not supported": (
        ValueError,
        "blocksize is -64; it must be 1 or more",
        lambda: kernels.matmul_4bit(torch.zeros(2, 64), weight_with(blocksize=-64)),
    ),
    "another block size than that of the scales": (
        ValueError,
        r"absmax is torch.float32 \(8,\).*512 values in blocks of 32 need torch.float32 \(16,\)",
        lambda: kernels.matmul_4bit(torch.zeros(2, 64), weight_with(blocksize=32)),
    ),
    "too few second-level scales": (
        ValueError,
        r"absmax is torch.float32 \(1,\).*8 values in blocks of 4 need torch.float32 \(2,\)",
        lambda: kernels.matmul_4bit(torch.zeros(2, 64), weight_with(statistics=SHORT_NESTED)),
    ),
    "an input elsewhere": (
        TypeError,
        "x is on meta and the weight on cpu",
        lambda: kernels.matmul_4bit(torch.zeros(2, 64, device="meta"), WEIGHT),
    ),
}


@pytest.mark.parametrize("mistake", MISTAKES)
def test_a_wrong_argument_is_told_with_what_was_given_and_what_is_needed(mistake: str) -> None:
    kind, message, call = MISTAKES[mistake]
    with pytest.raises(kind, match=message):
        call()


def test_an_unknown_provider_is_an_error_that_names_the_known_ones() -> None:
    with (
        pytest.raises(InputError, match=r"no provider 'referense' here \(did you mean 'reference'\?\)"),
        kernels.use_provider("referense"),
    ):
        pass


def test_a_strided_input_is_quantized_as_its_contiguous_copy() -> None:
    x = torch.randn(40, 33).T
    packed, absmax = kernels.quantize_4bit(x, NF4, 64)
    expected_packed, expected_absmax = kernels.quantize_4bit(x.contiguous(), NF4, 64)
    assert torch.equal(packed, expected_packed) and torch.equal(absmax, expected_absmax)
    codes, _ = kernels.quantize_coded(x, DYNAMIC, 64)
    assert codes.shape == x.shape

"""The bitsandbytes provider on a CPU, through bitsandbytes' CPU operations, against the reference and dense torch.

What its CUDA kernels compute is not tested here: there is no GPU.
"""

import contextvars
import dataclasses
import functools
from collections.abc import Iterator

import pytest
import torch
from bitsandbytes import functional
from bitsandbytes.optim import AdamW8bit
from torch import Tensor

from halfbyte import kernels, optim
from halfbyte.kernels import AdamwStep, Nested, Statistics, Weight4bit, bitsandbytes, reference
from halfbyte.nn import Linear4bit
from halfbyte.quant import QuantizedWeight, codebook, quantize_4bit

DTYPES = [torch.float32, torch.bfloat16, torch.float16]
# Whole blocks; rows that are not multiples of a block; an odd count with a short last block; less than a block; one.
SHAPES = [(64, 128), (96, 80), (33, 65), (7, 3), (1, 1)]
# Relative distance in the 2-norm. 16 bits: the weight and the result are each rounded once, by at most half of this.
BOUNDS = {torch.float32: 1e-6, torch.bfloat16: 2**-7, torch.float16: 2**-10}
STEP = {"lr": 1e-2, "betas": (0.9, 0.99), "eps": 1e-8, "weight_decay": 0.1}


@pytest.fixture(autouse=True)
def provider() -> Iterator[None]:
    with kernels.use_provider("bitsandbytes"):
        yield


@pytest.fixture
def operations(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The names of bitsandbytes' operations that are called, in order."""
    called: list[str] = []
    theirs = bitsandbytes._operations()

    class Recorded:
        def __getattr__(self, name: str) -> object:
            called.append(name)
            return getattr(theirs, name)

    monkeypatch.setattr(bitsandbytes, "_operations", Recorded)
    return called


def random(*shape: int, dtype: torch.dtype = torch.float32, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


def distance(got: Tensor, expected: Tensor) -> float:
    assert got.shape == expected.shape
    return ((got.double() - expected.double()).norm() / expected.double().norm()).item()


@functools.cache
def make_weight(shape: tuple[int, int], quant_type: str, double_quant: bool, blocksize: int = 64) -> QuantizedWeight:
    with kernels.use_provider("reference"):
        return quantize_4bit(random(*shape), quant_type, blocksize, double_quant)


@pytest.mark.parametrize("quant_type", ["nf4", "fp4"])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", SHAPES)
def test_4_bit_codes_and_values_are_bitwise_the_references(
    shape: tuple[int, int], dtype: torch.dtype, quant_type: str, operations: list[str]
) -> None:
    x, code = random(*shape, dtype=dtype), codebook(quant_type)
    for blocksize in (32, 64, 256, 1024):
        packed, absmax = kernels.quantize_4bit(x, code, blocksize)
        expected_packed, expected_absmax = reference.quantize_4bit(x, code, blocksize)
        assert torch.equal(packed, expected_packed) and torch.equal(absmax, expected_absmax)
        weight = Weight4bit(packed, Statistics(absmax, code, blocksize), shape)
        assert torch.equal(kernels.dequantize_4bit(weight, dtype), reference.dequantize_4bit(weight, dtype))
    assert operations == ["quantize_4bit", "dequantize_4bit"] * 4


@pytest.mark.parametrize("shape", SHAPES)
def test_double_quantized_statistics_are_read_as_the_reference_reads_them(shape: tuple[int, int]) -> None:
    weight = make_weight(shape, "nf4", True)
    got = kernels.dequantize_4bit(weight, torch.float32)
    assert torch.equal(got, reference.dequantize_4bit(weight, torch.float32))


@pytest.mark.parametrize("count", [1, 100, 256, 4097, 50_000])
@pytest.mark.parametrize("blocksize", [64, 256, 4096])
@pytest.mark.parametrize("dtype", DTYPES)
def test_8_bit_codes_are_the_nearest_or_their_neighbours(count: int, blocksize: int, dtype: torch.dtype) -> None:
    x, code = random(count, dtype=dtype), codebook("dynamic")
    codes, absmax = kernels.quantize_coded(x, code, blocksize)
    expected, expected_absmax = reference.quantize_coded(x, code, blocksize)
    assert torch.equal(absmax, expected_absmax)
    # Its CPU library looks codes up among 65,536 even steps of [-1, 1]: beside a midpoint it may take the other side,
    # and near zero, where codes lie closer than steps, one of several. On 2 in 1000 normal values; 1 % leaves room.
    away = (codes.int() - expected.int()).abs()
    assert (away > 0).sum() <= max(1, 0.01 * count)
    far = (code[codes.long()] - code[expected.long()])[away > 1]
    assert (far.abs() < 2 / 65_536).all()
    got = kernels.dequantize_coded(codes, absmax, code, blocksize, dtype)
    assert torch.equal(got, reference.dequantize_coded(codes, absmax, code, blocksize, dtype))


@pytest.mark.parametrize("quant_type", ["nf4", "fp4"])
@pytest.mark.parametrize("double_quant", [False, True])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", [*SHAPES, (1000, 192)])
@pytest.mark.parametrize("rows", [1, 9])
def test_products_and_gradients_are_those_of_the_dense_weight(
    shape: tuple[int, int], dtype: torch.dtype, double_quant: bool, quant_type: str, rows: int, operations: list[str]
) -> None:
    weight = make_weight(shape, quant_type, double_quant)
    dense = reference.dequantize_4bit(weight, torch.float32)
    x = random(rows, shape[1], dtype=dtype, seed=1).requires_grad_()
    bias, dy = random(shape[0], dtype=dtype, seed=2), random(rows, shape[0], dtype=dtype, seed=3)
    y = kernels.matmul_4bit(x, weight, bias)
    y.backward(dy)
    assert y.dtype == dtype and x.grad is not None
    assert distance(y, torch.nn.functional.linear(x.float(), dense, bias.float())) < BOUNDS[dtype]
    assert distance(x.grad, dy.float() @ dense) < BOUNDS[dtype]
    assert ("gemm_4bit" in operations) == (shape[1] % 64 == 0)


def test_an_empty_batch_has_an_empty_product() -> None:
    weight = make_weight((64, 128), "nf4", True)
    assert kernels.matmul_4bit(torch.zeros(0, 128), weight).shape == (0, 64)


def test_what_bitsandbytes_has_no_kernel_for_goes_to_the_reference(operations: list[str]) -> None:
    x = random(40, 100)
    for quant_type, blocksize in [("e2m1", 64), ("int4", 64), ("nf4", 100), ("nf4", 33), ("nf4", 4096)]:
        code = codebook(quant_type)
        packed, absmax = kernels.quantize_4bit(x, code, blocksize)
        expected_packed, expected_absmax = reference.quantize_4bit(x, code, blocksize)
        assert torch.equal(packed, expected_packed) and torch.equal(absmax, expected_absmax)
        weight = Weight4bit(packed, Statistics(absmax, code, blocksize), (40, 100))
        dense = reference.dequantize_4bit(weight, torch.float32)
        assert torch.equal(kernels.dequantize_4bit(weight, torch.float32), dense)
        flat = dataclasses.replace(weight, shape=(4000,))
        assert torch.equal(kernels.dequantize_4bit(flat, torch.float32), dense.view(4000))
        y = kernels.matmul_4bit(random(2, 100), weight)
        assert distance(y, random(2, 100) @ dense.T) < 1e-6
    for code, blocksize in [(codebook("dynamic"), 32), (codebook("dynamic")[::2], 64), (codebook("dynamic"), 100)]:
        codes, absmax = kernels.quantize_coded(x, code, blocksize)
        assert torch.equal(codes.view(-1), reference.quantize_coded(x, code.contiguous(), blocksize)[0])
        assert torch.equal(
            kernels.dequantize_coded(codes, absmax, code, blocksize).view(-1),
            reference.dequantize_coded(codes, absmax, code, blocksize, torch.float32),
        )
    assert operations == []


def test_double_quantization_in_other_blocks_is_not_given_to_the_fused_product(operations: list[str]) -> None:
    weight = make_weight((64, 128), "nf4", True)
    plain = reference.expand_absmax(weight.statistics)
    offset = plain.mean().item()
    codes, second = reference.quantize_coded(plain - offset, codebook("dynamic"), 64)
    nested = Nested(second, codebook("dynamic"), 64, offset)
    statistics = dataclasses.replace(weight.statistics, absmax=codes, nested=nested)
    other = dataclasses.replace(weight, statistics=statistics)
    dense = reference.dequantize_4bit(other, torch.float32)
    x = random(3, 128)
    assert distance(kernels.matmul_4bit(x, other), x @ dense.T) < 1e-6
    assert "gemm_4bit" not in operations


@pytest.mark.parametrize("quant_type", ["nf4", "fp4"])
@pytest.mark.parametrize("double_quant", [False, True])
def test_the_bytes_are_those_that_bitsandbytes_own_functions_make_and_read(quant_type: str, double_quant: bool) -> None:
    x = random(96, 128)
    ours = quantize_4bit(x, quant_type, 64, double_quant)
    theirs, state = functional.quantize_4bit(x, None, None, 64, double_quant, quant_type)
    assert torch.equal(ours.packed, theirs)
    assert torch.equal(ours.statistics.absmax, state.absmax)
    assert torch.equal(ours.dequantize(), functional.dequantize_4bit(theirs, state))


@pytest.mark.parametrize("dtype", DTYPES)
def test_32_bit_steps_are_torchs_to_a_few_roundings(dtype: torch.dtype) -> None:
    shapes = [(64, 96), (7,), ()]
    params = [random(*shape, dtype=dtype, seed=i) for i, shape in enumerate(shapes)]
    wanted = [torch.nn.Parameter(p.float()) for p in params]
    moments = [[torch.zeros(shape) for shape in shapes] for _ in range(2)]
    oracle = torch.optim.AdamW(wanted, **STEP)
    for step in range(1, 6):
        grads = [random(*shape, dtype=dtype, seed=step) for shape in shapes]
        kernels.adamw_32bit(params, grads, *moments, AdamwStep(step, **STEP))
        for p, g in zip(wanted, grads, strict=True):
            p.grad = g.float()
        oracle.step()
        for p, q in zip(params, wanted, strict=True):
            q.data = q.data.to(dtype).float()
            # An fp32 update differs in the order of its roundings; a half-precision parameter may then round away.
            torch.testing.assert_close(p.float(), q.data, rtol=2 * torch.finfo(dtype).eps, atol=1e-6)
            p.copy_(q.data)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", [(64, 96), (65, 71)])
def test_an_8_bit_step_is_the_references_but_for_neighbouring_codes(shape: tuple[int, ...], dtype: torch.dtype) -> None:
    tables = codebook("dynamic"), codebook("dynamic_unsigned")

    def state(p: Tensor) -> list[tuple[Tensor, Tensor]]:
        # As after a step: what moments of this size are stored as.
        moments = random(*shape, seed=8) * 1e-2, random(*shape, seed=9).square() * 1e-4
        pairs = [reference.quantize_coded(m, table, 256) for m, table in zip(moments, tables, strict=True)]
        return [(codes.view(shape), absmax) for codes, absmax in pairs]

    p, grad = random(*shape, dtype=dtype), random(*shape, dtype=dtype, seed=1) * 1e-2
    q = p.clone()
    ours, theirs = state(p), state(q)
    version = p._version
    kernels.adamw_8bit([p], [grad], [ours[0]], [ours[1]], *tables, 256, AdamwStep(3, **STEP))
    reference.adamw_8bit([q], [grad], [theirs[0]], [theirs[1]], *tables, 256, AdamwStep(3, **STEP))
    assert p._version > version
    # The update comes before the moments are rounded to codes again, so it agrees to rounding.
    torch.testing.assert_close(p, q, rtol=2 * torch.finfo(dtype).eps, atol=1e-6)
    for (codes, absmax), (expected, expected_absmax), share in zip(ours, theirs, (0.01, 0.02), strict=True):
        torch.testing.assert_close(absmax, expected_absmax, rtol=1e-6, atol=0)
        # Beside a midpoint it may take the other side, as in quantize_coded above; the unsigned map's codes lie closer.
        assert (codes != expected).float().mean() < share


def test_8_bit_state_in_other_blocks_goes_to_the_reference(operations: list[str]) -> None:
    tables = codebook("dynamic"), codebook("dynamic_unsigned")
    results = []
    for step in (kernels.adamw_8bit, reference.adamw_8bit):
        p = random(500)
        state = [(torch.full((500,), fill, dtype=torch.uint8), torch.zeros(5)) for fill in (127, 0)]
        step([p], [random(500, seed=1)], [state[0]], [state[1]], *tables, 100, AdamwStep(1, **STEP))
        results.append(p)
    assert torch.equal(*results) and operations == []


def test_an_optimizer_over_it_trains_as_bitsandbytes_own_does() -> None:
    runs = []
    for make in (functools.partial(optim.AdamW, state_bits=8), AdamW8bit):
        p = torch.nn.Parameter(random(80, 96))
        optimizer = make([p], **STEP)
        for step in range(8):
            p.grad = random(80, 96, seed=step)
            optimizer.step()
        runs.append(p.detach())
    assert torch.equal(*runs)


def test_a_layer_over_it_trains_like_the_dense_one() -> None:
    dense = torch.nn.Linear(128, 64)
    layer = Linear4bit.from_linear(dense, compute_dtype=torch.float32)
    dense.weight.data = layer.dequantize()
    x = random(5, 128).requires_grad_()
    (grad,) = torch.autograd.grad(layer(x).square().sum(), x)
    (expected,) = torch.autograd.grad(dense(x).square().sum(), x)
    assert distance(grad, expected) < 1e-6


def test_statistics_follow_the_weight_to_another_device() -> None:
    # The meta device holds no values, so this shows that they go along, not that a GPU reads them.
    layer = Linear4bit.from_linear(torch.nn.Linear(128, 64)).to("meta")
    statistics = layer.statistics
    assert statistics is not None and statistics.nested is not None
    held = [layer.weight, statistics.absmax, statistics.code, statistics.nested.absmax, statistics.nested.code]
    assert {tensor.device.type for tensor in held} == {"meta"}


def test_it_is_the_default_on_cuda_and_nowhere_else() -> None:
    unforced = contextvars.Context()
    chosen = {name: unforced.run(kernels.provider_for, torch.device(name)) for name in ("cuda", "cpu", "meta")}
    assert chosen["cuda"] is bitsandbytes
    assert chosen["cpu"] is not bitsandbytes and chosen["meta"] is reference

"""The pieces of a step for a GPU, on the CPU: torch's way, and Liger's kernels by Triton's interpreter."""

import dataclasses
import subprocess
import sys
from importlib.util import find_spec

import pytest
import torch
from torch import Tensor

from halfbyte.kernels import RunningSoftmax, bitsandbytes, gpu, reference
from halfbyte.kernels.terms import Sum, Term
from halfbyte.quant import quantize_4bit

DTYPES = [torch.float32, torch.bfloat16, torch.float16]
# One rounding of the result, at most; fp32 differs in the order of its operations.
BOUNDS = {torch.float32: 1e-6, torch.bfloat16: 2**-8, torch.float16: 2**-11}
SHAPES = [(1, 1), (3, 7), (5, 64), (2, 33)]


def random(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


def close(got: Tensor, expected: Tensor, bound: float) -> bool:
    assert got.dtype == expected.dtype and got.shape == expected.shape
    return float((got.double() - expected.double()).norm()) <= bound * float(expected.double().norm()) + 1e-30


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", SHAPES)
def test_pieces_are_the_references_and_change_no_argument(shape: tuple[int, int], dtype: torch.dtype) -> None:
    x, dy, up = (random(*shape, seed=seed, dtype=dtype) for seed in range(3))
    weight, bound = random(shape[1], seed=5, dtype=dtype), BOUNDS[dtype]
    given = [tensor.clone() for tensor in (x, dy, up, weight)]
    for offset, rounded in ((0.0, True), (1.0, False)):
        got = gpu.rms_norm(x, up, weight, 1e-6, offset, rounded)
        expected = reference.rms_norm(x, up, weight, 1e-6, offset, rounded)
        assert all(close(a, b, bound) for a, b in zip(got, expected, strict=True))
    for name in ("silu", "gelu_tanh"):
        assert close(gpu.gated(x, up, name), reference.gated(x, up, name), bound)
        mine, theirs = ([torch.empty_like(x) for _ in range(2)] for _ in range(2))
        gpu.gated_gradient(dy, x, up, name, *mine)
        reference.gated_gradient(dy, x, up, name, *theirs)
        assert all(close(a, b, bound) for a, b in zip(mine, theirs, strict=True))
    assert all(torch.equal(a, b) for a, b in zip((x, dy, up, weight), given, strict=True))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("turned", [16, 6])
def test_rotation_of_any_strides_and_its_inverse(dtype: torch.dtype, turned: int) -> None:
    heads = random(2, 5, 3, 16, dtype=dtype).transpose(1, 2).contiguous().transpose(1, 2)
    cos, sin = random(2, 5, turned, seed=1), random(2, 5, turned, seed=2)
    before = heads.clone()
    for inverse in (False, True):
        got = gpu.rotary(heads, cos, sin, inverse)
        assert got.is_contiguous() and close(got, reference.rotary(heads, cos, sin, inverse), BOUNDS[dtype])
    assert torch.equal(heads, before)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("scale", "cap"), [(1.0, None), (-0.5, None), (1.0, 10.0)])
@pytest.mark.parametrize("gradient", [True, False])
def test_the_softmax_in_chunks_is_the_references(
    dtype: torch.dtype, scale: float, cap: float | None, gradient: bool
) -> None:
    logits, labels = random(6, 70, dtype=dtype) * 5, torch.tensor([0, 69, 30, 31, 5, 64])
    mine, theirs = (RunningSoftmax.empty(6, logits.device) for _ in range(2))
    for first in range(0, 70, 31):
        chunks = [logits[:, first : first + 31].clone(memory_format=torch.contiguous_format) for _ in range(2)]
        gpu.fold_softmax(chunks[0], labels, first, mine, scale, cap, gradient)
        reference.fold_softmax(chunks[1], labels, first, theirs, scale, cap, gradient)
        assert close(*chunks, BOUNDS[dtype])
        if not gradient:
            assert torch.equal(*chunks)
    for field in dataclasses.fields(mine):
        torch.testing.assert_close(getattr(mine, field.name), getattr(theirs, field.name), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("rows", [3, bitsandbytes.FEW, bitsandbytes.FEW + 1, 130])
@pytest.mark.parametrize("terms", [1, 2, 4])
def test_sums_are_rounded_once_and_an_adapters_part_by_itself(dtype: torch.dtype, rows: int, terms: int) -> None:
    pytest.importorskip("bitsandbytes")
    weight = quantize_4bit(random(96, 128), "nf4", 64, True)
    x, bias = random(rows, 128, dtype=dtype), random(96, dtype=dtype)
    parts = [Term(x, weight)]
    parts += [Term(random(rows, 8, seed=i, dtype=dtype), random(96, 8, seed=10 + i)) for i in range(1, terms)]
    expected = bias.double().expand(rows, 96).clone()
    narrow = torch.zeros_like(expected)
    for term in parts:
        factor = reference.dequantize_4bit(weight, dtype) if term.factor is weight else term.factor
        product = term.x.double() @ factor.to(dtype).double().T
        expected += product
        narrow += 0 if term.factor is weight else product.abs()
    eps = {torch.float32: 2e-6, torch.bfloat16: 2**-8, torch.float16: 2**-11}[dtype]
    for kind in (dtype, torch.float32):
        out = torch.full((rows, 2 * 96), torch.nan, dtype=kind)[:, 96:]
        bitsandbytes.matmul_sums([Sum(parts, out, bias.to(kind))])
        # fused products of few rows are rounded by themselves too
        rounded = expected.abs() + narrow + (expected.abs() + narrow + bias.abs() if rows <= bitsandbytes.FEW else 0)
        assert ((out.double() - expected).abs() <= 1.01 * eps * (rounded + bias.double().abs()) + 1e-5).all()


INTERPRETED = """
import importlib, numpy as np, torch
from triton import language as tl
from triton.runtime import interpreter
theirs = interpreter._implicit_cvt
def converted(value):  # Triton 3.9's interpreter hands floats to a kernel as they are
    if not isinstance(value, float):
        return theirs(value)
    return tl.tensor(interpreter.TensorHandle(np.array([value], dtype=np.float32), tl.float32), tl.float32)
interpreter._implicit_cvt = converted
# and has no functions of CUDA's library
importlib.import_module("liger_kernel.ops.rms_norm").rsqrt = lambda x: 1 / tl.sqrt(x)
importlib.import_module("liger_kernel.ops.geglu").tanh = lambda x: 2 * tl.sigmoid(2 * x) - 1
from halfbyte.kernels import gpu, reference
gpu._liger = lambda *tensors: gpu._installed()
torch.manual_seed(0)
for dtype, bound in ((torch.float32, 1e-6), (torch.float16, 2e-3)):
    def check(got, expected):
        assert (got.double() - expected.double()).norm() <= bound * expected.double().norm(), (got, expected)
    x, dy, dh, up = (torch.randn(5, 48).to(dtype) for _ in range(4))
    weight = torch.randn(48).to(dtype)
    for offset, rounded in ((0.0, True), (1.0, False), (0.0, False)):
        h, y, scale = gpu.rms_norm(x, up, weight, 1e-6, offset, rounded)
        check(y, reference.rms_norm(x, up, weight, 1e-6, offset, rounded)[1])
        check(gpu.rms_norm_gradient(dy, dh, h, weight, scale, offset),
              reference.rms_norm_gradient(dy, dh, h, weight, scale, offset))
    for name in ("silu", "gelu_tanh"):
        check(gpu.gated(x, up, name), reference.gated(x, up, name))
        mine, theirs_ = ([torch.empty_like(x) for _ in range(2)] for _ in range(2))
        gpu.gated_gradient(dy, x, up, name, *mine)
        reference.gated_gradient(dy, x, up, name, *theirs_)
        for one, other in zip(mine, theirs_):
            check(one, other)
    heads = torch.randn(2, 4, 9, 32).to(dtype).transpose(1, 2)
    for turned in (32, 16):
        half = torch.randn(2, 9, turned // 2)
        cos, sin = (torch.cat([f(half)] * 2, -1).to(dtype) for f in (torch.cos, torch.sin))
        for inverse in (False, True):
            check(gpu.rotary(heads, cos, sin, inverse), reference.rotary(heads, cos, sin, inverse))
print("alike")
"""


@pytest.mark.skipif(not find_spec("liger_kernel") or not find_spec("triton"), reason="needs liger-kernel and triton")
def test_ligers_kernels_are_called_as_they_want_to_be() -> None:
    environment = {"TRITON_INTERPRET": "1", "PYTHONPATH": ":".join(filter(None, sys.path))}
    done = subprocess.run([sys.executable, "-c", INTERPRETED], capture_output=True, text=True, env=environment)
    assert done.stdout.endswith("alike\n"), done.stderr

"""The fused pieces of a decoder layer against transformers' own modules and fp64 torch, with gradients."""

from collections.abc import Iterator

import pytest
import torch
from torch import Tensor
from transformers.activations import ACT2FN
from transformers.models.gemma2.modeling_gemma2 import Gemma2RMSNorm
from transformers.models.llama.modeling_llama import LlamaRMSNorm, apply_rotary_pos_emb
from transformers.models.olmo2.modeling_olmo2 import Olmo2RMSNorm
from transformers.models.phi3.modeling_phi3 import apply_rotary_pos_emb as apply_partial_rotary

from halfbyte import kernels
from halfbyte.kernels import native
from halfbyte.nn import gated, gated_halves, rms_norm, rotary

# Results are rounded to the dtype once, by at most this part of them. The arithmetic before is fp32.
ROUNDING = {torch.float32: 2**-24, torch.bfloat16: 2**-8, torch.float16: 2**-11}
ARITHMETIC = 1e-6
WIDTHS = [1, 7, 16, 64, 100, 576, 1001]
KINDS = {LlamaRMSNorm: (0.0, True), Olmo2RMSNorm: (0.0, False), Gemma2RMSNorm: (1.0, False)}
ACTIVATIONS = {"silu": "silu", "gelu_tanh": "gelu_pytorch_tanh"}


@pytest.fixture(params=[*native.tiers(), "reference"], autouse=True)
def provider(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    if request.param == "reference":
        with kernels.use_provider("reference"):
            yield
    else:
        monkeypatch.setenv("HALFBYTE_ISA", request.param)
        yield


@pytest.fixture(autouse=True)
def poisoned(monkeypatch: pytest.MonkeyPatch) -> None:
    """What the kernels are to fill is full of NaN before."""
    empty = torch.empty
    monkeypatch.setattr(torch, "empty", lambda *size, **options: empty(*size, **options).fill_(torch.nan))


def randn(*shape: int, seed: int, dtype: torch.dtype = torch.float32) -> Tensor:
    """Normal values of ``dtype``, at an address that no vector is aligned to."""
    values = torch.randn(1 + torch.Size(shape).numel(), generator=torch.Generator().manual_seed(seed))
    return values.to(dtype)[1:].view(shape)


def gradients(y: Tensor, dy: Tensor, *inputs: Tensor) -> list[Tensor]:
    return list(torch.autograd.grad(y, inputs, dy.to(y.dtype)))


def assert_close(got: Tensor, expected: Tensor, terms: float = 1.0) -> None:
    """Within the bounds; ``terms`` is the size of what may have cancelled in the arithmetic."""
    expected = expected.double()
    bound = ROUNDING[got.dtype] * expected.abs() + ARITHMETIC * (terms + expected.abs())
    assert got.shape == expected.shape
    assert ((got.double() - expected).abs() <= bound).all(), ((got.double() - expected).abs() / bound).max()


def wide(*tensors: Tensor) -> list[Tensor]:
    """The same values in fp64, to differentiate by."""
    return [t.detach().double().requires_grad_() for t in tensors]


@pytest.mark.parametrize("kind", KINDS, ids=lambda kind: kind.__name__)
@pytest.mark.parametrize("dtype", ROUNDING)
def test_norms_are_the_families_own(kind: type, dtype: torch.dtype) -> None:
    offset, rounded = KINDS[kind]
    for width in WIDTHS:
        module = kind(width, eps=1e-5).to(dtype)
        module.weight.data = randn(width, seed=1, dtype=dtype)
        x = randn(3, 5, width, seed=2, dtype=dtype)
        y = rms_norm(x, module.weight, eps=1e-5, offset=offset, rounded=rounded)[1]
        # Sums of squares that differ in their last place can make either rounding go the other way.
        torch.testing.assert_close(y, module(x), rtol=4.1 * ROUNDING[dtype] + ARITHMETIC, atol=1e-7)


@pytest.mark.parametrize("offset", [0.0, 1.0])
@pytest.mark.parametrize("dtype", ROUNDING)
def test_norm_with_the_residual_and_its_gradients_are_those_of_fp64(dtype: torch.dtype, offset: float) -> None:
    for width in WIDTHS:
        x, residual, dh, dy = (randn(2, 9, width, seed=seed, dtype=dtype) for seed in range(4))
        weight = randn(width, seed=5, dtype=dtype)
        leaves = [t.requires_grad_() for t in (x, residual, weight)]
        h, y = rms_norm(x, weight, residual, eps=1e-5, offset=offset, rounded=False)
        assert torch.equal(h, x + residual)
        got = torch.autograd.grad((h, y), leaves, (dh, dy))

        inner, wide_weight = wide(h, weight)
        expected = inner / (inner.square().mean(-1, keepdim=True) + 1e-5).sqrt() * (offset + wide_weight)
        dinner, dweight = torch.autograd.grad(expected, (inner, wide_weight), dy.double())
        assert_close(y, expected)
        assert torch.equal(got[0], got[1])
        assert_close(got[0], dinner + dh.double(), terms=4.0)
        assert_close(got[2], dweight, terms=20.0)


def test_norm_without_a_residual_hands_its_input_on() -> None:
    x, weight = randn(4, 24, seed=0).requires_grad_(), randn(24, seed=1)
    h, y = rms_norm(x, weight, eps=1e-6)
    assert torch.equal(h, x)
    (both,) = torch.autograd.grad((h, y), (x,), (randn(4, 24, seed=2), randn(4, 24, seed=3)), retain_graph=True)
    (through_y,) = torch.autograd.grad(y, (x,), randn(4, 24, seed=3), retain_graph=True)
    (through_h,) = torch.autograd.grad(h, (x,), randn(4, 24, seed=2))
    assert torch.equal(through_h, randn(4, 24, seed=2))
    torch.testing.assert_close(both, through_y + through_h)


@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize("dtype", ROUNDING)
def test_gated_units_and_their_gradients_are_those_of_fp64(dtype: torch.dtype, activation: str) -> None:
    act = ACT2FN[ACTIVATIONS[activation]]
    for width in WIDTHS:
        both = 3 * randn(5, 3, 2 * width, seed=width, dtype=dtype)
        both[0, 0, 0], both[0, 0, -1] = 60.0, -60.0
        both[1, 1, 0] = -60.0
        both.requires_grad_()
        dy = randn(5, 3, width, seed=1, dtype=dtype)
        y = gated_halves(both, activation)
        gate, up = (t.detach().clone().requires_grad_() for t in both.chunk(2, -1))
        separate = gated(gate, up, activation)
        torch.testing.assert_close(separate, y)
        (dboth,) = gradients(y, dy, both)
        torch.testing.assert_close(torch.cat(gradients(separate, dy, gate, up), dim=-1), dboth)

        (inner,) = wide(both)
        expected = act(inner.chunk(2, -1)[0]) * inner.chunk(2, -1)[1]
        assert_close(y, expected)
        assert_close(dboth, *gradients(expected, dy, inner), terms=9.0)


@pytest.mark.parametrize("fp32_angles", [False, True])
@pytest.mark.parametrize("dtype", ROUNDING)
@pytest.mark.parametrize("size, turned", [(2, 2), (16, 16), (64, 64), (80, 80), (96, 72), (48, 20)])
def test_rotary_and_its_gradient_are_transformers(
    size: int, turned: int, dtype: torch.dtype, fp32_angles: bool
) -> None:
    for batch in (1, 3):
        angles = 10 * randn(batch, 7, turned, seed=0)
        cos, sin = (t.to(torch.float32 if fp32_angles else dtype) for t in (angles.cos(), angles.sin()))
        # Queries and keys as slices of one projection's result.
        joined = randn(3, 7, 3 * size + 5, seed=1, dtype=dtype).requires_grad_()
        query, key = joined[..., : 2 * size].view(3, 7, 2, size), joined[..., 2 * size : 3 * size].view(3, 7, 1, size)
        got = [t.transpose(1, 2) for t in rotary(query, key, cos, sin)]

        (inner,) = wide(joined)
        heads = (inner[..., : 2 * size].view(3, 7, 2, size), inner[..., 2 * size : 3 * size].view(3, 7, 1, size))
        apply = apply_rotary_pos_emb if turned == size else apply_partial_rotary
        expected = apply(*(t.transpose(1, 2) for t in heads), cos.double(), sin.double())
        upstream = [randn(*t.shape, seed=2, dtype=dtype) for t in got]
        (dgot,) = torch.autograd.grad(got, (joined,), upstream)
        (dexpected,) = torch.autograd.grad(expected, (inner,), [t.double() for t in upstream])
        for y, right in zip(got, expected, strict=True):
            assert_close(y, right, terms=2.0)
        assert_close(dgot, dexpected, terms=2.0)


def test_any_strides_do() -> None:
    x = randn(40, 6, seed=0).t().requires_grad_()
    weight, dense = randn(80, seed=1)[::2], x.detach().clone(memory_format=torch.contiguous_format).requires_grad_()
    for of in (lambda t: rms_norm(t, weight, t, eps=1e-6)[1], lambda t: gated(t, t, "silu")):
        torch.testing.assert_close(of(x), of(dense))
        torch.testing.assert_close(*(torch.autograd.grad(of(t).sum(), (t,))[0] for t in (x, dense)))
    empty = randn(0, 6, seed=0)
    assert gated(empty, empty, "silu").shape == rms_norm(empty, weight[:6], eps=1e-6)[1].shape == (0, 6)
    heads = randn(2, 5, 6, 3, seed=2).transpose(2, 3)
    cos, sin = randn(5, 2, 6, seed=3).transpose(0, 1), randn(2, 5, 6, seed=4)
    got = rotary(heads, heads, cos, sin)
    assert torch.equal(got[0], rotary(heads.contiguous(), heads, cos.contiguous(), sin)[0])


def test_wrong_arguments_are_named() -> None:
    x = torch.ones(2, 8)
    with pytest.raises(TypeError, match=r"weight is torch\.bfloat16 on cpu; it must be torch\.float32"):
        rms_norm(x, torch.ones(8, dtype=torch.bfloat16), eps=1e-6)
    with pytest.raises(ValueError, match=r"weight has shape \(7,\); x of shape \(2, 8\)"):
        rms_norm(x, torch.ones(7), eps=1e-6)
    with pytest.raises(ValueError, match=r"residual has shape \(8,\); it must have \(2, 8\), as x"):
        rms_norm(x, torch.ones(8), torch.ones(8), eps=1e-6)
    with pytest.raises(TypeError, match=r"gate is torch\.float64"):
        gated(x.double(), x.double(), "silu")
    with pytest.raises(TypeError, match=r"up is torch\.float16 on cpu; it must be torch\.float32 on cpu, as gate"):
        gated(x, x.half(), "silu")
    with pytest.raises(ValueError, match=r"activation is 'relu'; it must be one of silu, gelu_tanh"):
        gated(x, x, "relu")
    heads, cos = torch.ones(2, 3, 1, 8), torch.ones(2, 3, 8)
    with pytest.raises(TypeError, match=r"cos is torch\.bfloat16 on cpu; x needs torch\.float32"):
        rotary(heads, heads, cos.bfloat16(), cos)
    for wrong in (torch.ones(2, 3, 10), torch.ones(2, 3, 7), torch.ones(2, 4, 8), torch.ones(3, 3, 8), torch.ones(8)):
        with pytest.raises(ValueError, match=r"turned even, at most size"):
            rotary(heads, heads, wrong, wrong)

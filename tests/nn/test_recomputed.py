"""What is computed again rather than kept: the same bits, fewer bytes, and only where the value is the one noted."""

import weakref
from collections.abc import Callable

import pytest
import torch
from torch import Tensor
from torch.autograd.graph import saved_tensors_hooks
from torch.utils.checkpoint import checkpoint

from halfbyte.nn import LowRank, Projection, gated, gated_halves, lora_linear, rms_norm
from halfbyte.nn.recomputed import source_of
from halfbyte.quant import quantize_4bit

WIDTH, ROWS = 48, 70


def norm(x: Tensor) -> Tensor:
    return rms_norm(x, torch.linspace(0.5, 1.5, WIDTH), eps=1e-5)[1]


def after_sum(x: Tensor) -> Tensor:
    return rms_norm(x, torch.linspace(0.5, 1.5, WIDTH), x.detach().flip(0), eps=1e-5, offset=1.0, rounded=False)[1]


def product(x: Tensor) -> Tensor:
    return gated(x, x.flip(0), "silu")


def product_of_halves(x: Tensor) -> Tensor:
    return gated_halves(torch.cat([x, x.flip(0)], dim=-1), "gelu_tanh")


PIECES = pytest.mark.parametrize("piece", [norm, after_sum, product, product_of_halves])


def projections(trained_a: bool = True) -> list[Projection]:
    torch.manual_seed(1)
    found = []
    for outputs in (32, 40):
        weight = quantize_4bit(torch.randn(outputs, WIDTH))
        a, b = torch.randn(4, WIDTH), torch.randn(outputs, 4)
        low_rank = LowRank(a.requires_grad_(trained_a), b.requires_grad_(), 2.0)
        found.append(Projection(weight, None, [low_rank]))
    return found


def argument() -> Tensor:
    torch.manual_seed(0)
    return torch.randn(2, ROWS // 2, WIDTH, requires_grad=True)


def gradients(piece: Callable[[Tensor], Tensor], change: Callable[[Tensor], Tensor]) -> list[Tensor]:
    x, layers = argument(), projections()
    torch.manual_seed(2)
    ys = lora_linear(change(piece(x)), layers, dropout=0.25)
    factors = [factor for layer in layers for adapter in layer.adapters for factor in adapter[:2]]
    return list(torch.autograd.grad(sum(y.square().sum() for y in ys), [x, *factors]))


@PIECES
def test_gradients_have_the_bits_of_those_from_a_kept_value(piece: Callable[[Tensor], Tensor]) -> None:
    assert source_of(piece(argument())) is not None
    assert source_of(piece(argument()).clone()) is None
    for ours, kept in zip(gradients(piece, lambda y: y), gradients(piece, Tensor.clone), strict=True):
        assert torch.equal(ours, kept)


@PIECES
def test_a_value_that_was_changed_in_place_is_not_computed_again(piece: Callable[[Tensor], Tensor]) -> None:
    y = piece(argument())
    with torch.no_grad():
        y.mul_(2)
    assert source_of(y) is None


def keeps(x: Tensor, layers: list[Projection]) -> bool:
    """Whether ``x`` is among what autograd keeps for the backward of projections."""
    kept: list[int] = []

    def pack(tensor: Tensor) -> Tensor:
        kept.append(tensor.untyped_storage().data_ptr())
        return tensor

    with saved_tensors_hooks(pack, lambda tensor: tensor):
        lora_linear(x, layers)
    return x.untyped_storage().data_ptr() in kept


@PIECES
def test_the_value_is_not_kept(piece: Callable[[Tensor], Tensor]) -> None:
    y = piece(argument())
    assert not keeps(y, projections())
    assert keeps(y.clone(), projections())


def test_nothing_is_kept_of_an_input_that_no_gradient_reads() -> None:
    assert not keeps(argument(), projections(trained_a=False))
    assert keeps(argument(), projections())


@PIECES
def test_notes_keep_nothing_in_memory_under_checkpointing(piece: Callable[[Tensor], Tensor]) -> None:
    x, layers = argument(), projections()
    sources: list[weakref.ref[Tensor]] = []

    def run(x: Tensor) -> Tensor:
        y = piece(x)
        source = source_of(y)
        assert source is not None
        sources.extend(weakref.ref(tensor) for tensor in source.tensors)
        return torch.stack([y.sum() for y in lora_linear(y, layers)])

    result = checkpoint(run, x, use_reentrant=False)
    assert sources and not any(source() is not None for source in sources)
    again = torch.autograd.grad(result.sum(), x)[0]
    assert torch.equal(again, torch.autograd.grad(run(x).sum(), x)[0])

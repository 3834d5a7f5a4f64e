"""Experts' products against a loop over rows with dense weights in fp64, and one expert's against ``lora_linear``."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from halfbyte.kernels import pool
from halfbyte.nn import LowRank, Projection, gated_halves, lora_linear
from halfbyte.nn.experts import StackedLowRank, experts_linear, routes_of, sum_rows, take_rows, turned, weigh_rows
from halfbyte.quant import quantize_4bit, quantize_int8

EXPERTS, TOKENS, WIDTH, HALF, RANK = 5, 23, 96, 40, 3


def chosen(kind: str) -> Tensor:
    """Which experts the tokens go to: the last has no token, but for the kinds that say otherwise."""
    generator = torch.Generator().manual_seed(1)
    of_token = [torch.randperm(EXPERTS - 1, generator=generator)[:2] for _ in range(TOKENS)]
    index = torch.stack(of_token)
    if kind == "one expert gets all":
        index = torch.full((TOKENS, 1), 3)
    if kind == "none for some":
        index[::3, 1], index[1::3, 0] = EXPERTS, EXPERTS
    if kind == "all":
        index = torch.arange(EXPERTS).expand(TOKENS, EXPERTS).contiguous()
    return index


@pytest.mark.parametrize("held", ["4 bits", "8 bits", "dense"])
@pytest.mark.parametrize("kind", ["two of them", "one expert gets all", "none for some", "all"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_each_row_meets_its_expert(held: str, kind: str, dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    values = [[torch.randn(HALF, WIDTH) / WIDTH**0.5 for _ in range(2)] for _ in range(EXPERTS)]
    make = {"4 bits": quantize_4bit, "8 bits": lambda w: quantize_int8(w, 64), "dense": lambda w: w.to(dtype)}[held]
    weights = {e: [make(w) for w in pair] for e, pair in enumerate(values)}
    dense = [torch.cat([w if held == "dense" else w.dequantize(torch.float32) for w in weights[e]]) for e in weights]
    biases = {e: torch.randn(2 * HALF) for e in range(EXPERTS)}
    x = torch.randn(TOKENS, WIDTH).to(dtype).requires_grad_()
    shares = torch.rand(TOKENS, (index := chosen(kind)).shape[1], requires_grad=True)
    adapters = [
        StackedLowRank(torch.randn(EXPERTS, r, WIDTH, requires_grad=True), torch.randn(EXPERTS, r, 2 * HALF), s)
        for r, s in ((RANK, 2.0), (1, 1.0))
    ]
    trained = [adapters[0].a, adapters[0].bt.requires_grad_(), adapters[1].a]

    routes = routes_of(index, EXPERTS)
    y = experts_linear(take_rows(x, routes), routes, weights, biases, adapters)
    got = sum_rows(weigh_rows(y, shares.to(dtype), routes), routes)
    assert got.dtype == dtype
    gradient = torch.randn(got.shape)
    found = [got.detach(), *torch.autograd.grad(got, [x, shares, *trained], gradient.to(dtype))]

    exact = {id(one): one.detach().double().requires_grad_() for one in (x, shares, *trained)}
    wide = exact[id(x)]
    rows = []
    for token in range(TOKENS):
        row = torch.zeros(2 * HALF, dtype=torch.float64)
        for place, expert in enumerate(index[token].tolist()):
            if expert < EXPERTS:
                one = dense[expert].double() @ wide[token] + biases[expert].to(dtype).double()
                for adapter in adapters:
                    a, bt = (exact.get(id(f), f.detach().double()) for f in (adapter.a, adapter.bt))
                    one = one + adapter.scaling * bt[expert].T @ (a[expert] @ wide[token])
                row = row + exact[id(shares)][token, place] * one
        rows.append(row)
    wanted = torch.stack(rows)
    wanted_gradients = torch.autograd.grad(wanted, [*exact.values()], gradient.to(dtype).double())
    bound = 1e-6 if dtype == torch.float32 else 1e-2
    for one, other in zip(found, [wanted.detach(), *wanted_gradients], strict=True):
        assert (one.double() - other).norm() <= bound * other.norm()


def test_one_expert_is_a_linear_layer_with_dropout_too() -> None:
    torch.manual_seed(0)
    weight = quantize_4bit(torch.randn(HALF, WIDTH))
    x, a, b = torch.randn(TOKENS, WIDTH), torch.randn(RANK, WIDTH), torch.randn(HALF, RANK)
    found = []
    for way in ("experts", "layer"):
        ins = [one.clone().requires_grad_() for one in (x, a, b)]
        torch.manual_seed(7)
        if way == "experts":
            routes = routes_of(torch.zeros(TOKENS, 1, dtype=torch.int64), 1)
            adapter = StackedLowRank(ins[1][None], ins[2].T[None], 2.0)
            y = experts_linear(take_rows(ins[0], routes), routes, {0: [weight]}, None, [adapter], dropout=0.3)
        else:
            (y,) = lora_linear(ins[0], [Projection(weight, None, [LowRank(ins[1], ins[2], 2.0)])], dropout=0.3)
        found.append([y.detach(), *torch.autograd.grad(y.square().sum(), ins)])
    for one, other in zip(*found, strict=True):
        assert torch.allclose(one, other, rtol=1e-5, atol=1e-4)


def test_the_copies_of_tokens_are_not_kept() -> None:
    x = torch.randn(64, WIDTH, requires_grad=True)
    routes = routes_of(torch.arange(EXPERTS).expand(64, EXPERTS), EXPERTS)
    weights = {e: [quantize_4bit(torch.randn(HALF, WIDTH))] for e in range(EXPERTS)}
    adapter = StackedLowRank(torch.randn(EXPERTS, 2, WIDTH, requires_grad=True), torch.randn(EXPERTS, 2, HALF), 1.0)
    kept: list[Tensor] = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: (kept.append(t), t)[1], lambda t: t):
        experts_linear(take_rows(x, routes), routes, weights, None, [adapter])
    assert not any(t.shape == (64 * EXPERTS, WIDTH) for t in kept)


def test_gradients_are_kept_as_they_come_from_the_pool(monkeypatch: pytest.MonkeyPatch) -> None:
    experts, rank, width, out = 8, 16, 4096, 3072  # both gradients are large enough for the pool
    a = torch.randn(experts * rank, width, requires_grad=True)
    b = torch.randn(out, rank * experts, requires_grad=True)
    routes = routes_of(torch.arange(6).unsqueeze(1), experts)  # the last two experts have no rows
    weights = {e: [torch.randn(out, width)] for e in range(6)}
    given: set[int] = set()

    def told(*arguments: Any, empty: Callable[..., Tensor] = pool.empty) -> Tensor:
        tensor = empty(*arguments)
        given.add(tensor.data_ptr())
        return tensor

    monkeypatch.setattr(pool, "empty", told)
    adapter = StackedLowRank(a.view(experts, rank, width), turned(b, experts), 2.0)
    gradient = torch.randn(6, out)
    experts_linear(take_rows(x := torch.randn(6, width), routes), routes, weights, None, [adapter]).backward(gradient)
    assert a.grad is not None and b.grad is not None and {a.grad.data_ptr(), b.grad.data_ptr()} <= given
    for e in range(experts):
        mine = slice(e, e + 1) if e < 6 else slice(0, 0)
        of_a, of_b = a.detach()[e * rank : (e + 1) * rank], b.detach()[:, e::experts]
        wanted = 2 * of_b.T @ gradient[mine].T @ x[mine], 2 * gradient[mine].T @ (x[mine] @ of_a.T)
        assert torch.allclose(a.grad[e * rank : (e + 1) * rank], wanted[0], rtol=1e-4, atol=1e-2)
        assert torch.allclose(b.grad[:, e::experts], wanted[1], rtol=1e-4, atol=1e-2)


def test_rows_are_sorted_by_expert_and_each_choice_has_one() -> None:
    index = torch.tensor([[2, 0], [3, 2], [1, 2]])
    routes = routes_of(index, 3)
    assert routes.bounds == [(0, 0, 1), (1, 1, 2), (2, 2, 5)]
    assert routes.tokens.tolist() == [0, 2, 0, 1, 2] and routes.places.tolist() == [1, 4, 0, 3, 5]
    assert routes.by_token.tolist() == [2, 0, 3, 1, 4] and routes.firsts.tolist() == [0, 2, 3]


def test_a_token_without_an_expert_gets_zeros() -> None:
    routes = routes_of(torch.tensor([[2], [3], [2]]), 3)
    summed = sum_rows(torch.ones(2, 4), routes)
    assert summed.tolist() == [[1.0] * 4, [0.0] * 4, [1.0] * 4]


def test_a_gated_product_that_is_weighed_is_not_kept() -> None:
    routes = routes_of(torch.tensor([[0, 1]] * 40), 2)
    both, shares = torch.randn(80, 2 * HALF, requires_grad=True), torch.rand(40, 2, requires_grad=True)
    kept: list[Tensor] = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: (kept.append(t), t)[1], lambda t: t):
        y = weigh_rows(gated_halves(both, "silu"), shares, routes)
    assert not any(t.shape == (80, HALF) for t in kept)
    found = torch.autograd.grad(y.square().sum(), [both, shares])
    gate, up = both.chunk(2, 1)
    plain = torch.nn.functional.silu(gate) * up * shares.reshape(-1)[routes.places].unsqueeze(1)
    for one, other in zip(found, torch.autograd.grad(plain.square().sum(), [both, shares]), strict=True):
        assert torch.allclose(one, other, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("wrong", [-1, 5])
def test_an_expert_that_is_not_there_is_told(wrong: int) -> None:
    with pytest.raises(ValueError, match=f"the router chose expert {wrong} of 4"):
        routes_of(torch.tensor([[0, wrong]]), 4)

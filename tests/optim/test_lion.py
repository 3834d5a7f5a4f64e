"""Lion against bitsandbytes' own on a CPU and the paper's formula, and its state kept and paged as AdamW's."""

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from halfbyte.optim import Lion
from halfbyte.quant import codebook

bitsandbytes = pytest.importorskip("bitsandbytes")
SHAPES = [(64, 80), (7,), (129, 33), (1,)]
OPTIONS: dict[str, Any] = {"lr": 3e-3, "betas": (0.9, 0.97), "weight_decay": 0.1}


def parameters(dtype: torch.dtype = torch.float32) -> list[nn.Parameter]:
    generator = torch.Generator().manual_seed(0)
    return [nn.Parameter(torch.randn(shape, generator=generator).to(dtype)) for shape in SHAPES]


def give_gradients(params: list[nn.Parameter], step: int) -> None:
    generator = torch.Generator().manual_seed(step)
    for p in params:
        p.grad = torch.randn(p.shape, generator=generator).to(p.dtype)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_32_bit_steps_are_bitsandbytes(dtype: torch.dtype) -> None:
    ours, theirs = parameters(dtype), parameters(dtype)
    one = Lion(ours, **OPTIONS)
    other = bitsandbytes.optim.Lion(theirs, optim_bits=32, **OPTIONS)
    for step in range(5):
        for params, optimizer in ((ours, one), (theirs, other)):
            give_gradients(params, step)
            optimizer.step()
    for p, q in zip(ours, theirs, strict=True):
        torch.testing.assert_close(p, q, rtol=1e-5 if dtype == torch.float32 else 1e-2, atol=1e-6)
        torch.testing.assert_close(one.state[p]["exp_avg"], other.state[q]["state1"], rtol=1e-5, atol=1e-7)


def test_8_bit_steps_are_bitsandbytes_but_for_the_codes_that_its_cpu_looks_up() -> None:
    """From the same state each step moves the same way, and the moment has bitsandbytes' code or one beside it."""
    ours, theirs = parameters(), parameters()
    one = Lion(ours, state_bits=8, **OPTIONS)
    other = bitsandbytes.optim.Lion8bit(theirs, **OPTIONS)
    code = codebook("dynamic", torch.device("cpu"))
    for step in range(4):
        for params, optimizer in ((ours, one), (theirs, other)):
            give_gradients(params, step)
            optimizer.step()
        for p, q in zip(ours, theirs, strict=True):
            state, expected = one.state[p], other.state[q]
            if p.numel() < 4096:
                assert state["exp_avg"].dtype == torch.float32
            else:
                absmax = state["exp_avg_absmax"]
                torch.testing.assert_close(absmax, expected["absmax1"], rtol=1e-5, atol=0)
                codes = (state["exp_avg"].long(), expected["state1"].long())
                assert (codes[0] == codes[1]).float().mean() > 0.97
                assert (code[codes[0]] - code[codes[1]]).abs().max() < 0.02  # the map's widest step
                torch.testing.assert_close(expected["qmap1"], code)
            # a sign may turn where the direction is next to zero
            assert ((p - q).abs() < 1e-6).float().mean() > 0.999
            with torch.no_grad():
                q.copy_(p)
            if p.numel() >= 4096:
                expected["state1"].copy_(state["exp_avg"])
                expected["absmax1"].copy_(state["exp_avg_absmax"])


def test_8_bit_steps_are_the_papers_formula_over_what_the_codes_stand_for() -> None:
    (p, *_) = parameters()
    optimizer = Lion([p], state_bits=8, **OPTIONS)
    code = codebook("dynamic", torch.device("cpu"))
    lr, (beta1, beta2), decay = OPTIONS["lr"], OPTIONS["betas"], OPTIONS["weight_decay"]
    moment = torch.zeros(p.shape)
    for step in range(4):
        give_gradients([p], step)
        gradient = p.grad
        assert gradient is not None
        expected = p.detach() * (1 - lr * decay) - lr * (beta1 * moment + (1 - beta1) * gradient).sign()
        new = beta2 * moment + (1 - beta2) * gradient
        optimizer.step()
        torch.testing.assert_close(p.detach(), expected, rtol=1e-6, atol=1e-7)
        state = optimizer.state[p]
        absmax = new.view(-1, 256).abs().amax(1)
        torch.testing.assert_close(state["exp_avg_absmax"], absmax)
        values = code[state["exp_avg"].long()].view(-1, 256) * absmax[:, None]
        distances = ((code[None, None] * absmax[:, None, None]) - new.view(-1, 256)[..., None]).abs()
        torch.testing.assert_close((values - new.view(-1, 256)).abs(), distances.amin(2), rtol=1e-4, atol=1e-7)
        moment = values.view(p.shape)


@pytest.mark.parametrize("paged", [False, True])
@pytest.mark.parametrize("bits", [8, 32])
def test_state_is_saved_loaded_and_paged_bit_for_bit(bits: int, paged: bool, tmp_path: Path) -> None:
    params = parameters()
    optimizer = Lion(params, state_bits=bits, paged=paged, page_dir=tmp_path, **OPTIONS)
    for step in range(2):
        give_gradients(params, step)
        optimizer.step()
    others = [nn.Parameter(p.detach().clone()) for p in params]
    loaded = Lion(others, state_bits=bits, paged=not paged, page_dir=tmp_path, **OPTIONS)
    loaded.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    for own, using in ((params, optimizer), (others, loaded)):
        give_gradients(own, 2)
        using.step()
    for p, q in zip(params, others, strict=True):
        assert torch.equal(p, q)
        one, other = optimizer.state[p], loaded.state[q]
        assert one.keys() == other.keys() and "exp_avg_sq" not in one
        assert all(
            torch.equal(x, other[name]) if isinstance(x, Tensor) else x == other[name] for name, x in one.items()
        )


def test_a_gradient_that_is_not_finite_leaves_its_element_alone() -> None:
    (p, *_) = parameters()
    optimizer = Lion([p], state_bits=8, **OPTIONS)
    give_gradients([p], 0)
    assert p.grad is not None
    before = p.detach().clone()
    p.grad[3, 4] = torch.nan
    optimizer.step()
    assert p.isfinite().all() and p[3, 4] == before[3, 4] and (p != before).sum() == p.numel() - 1

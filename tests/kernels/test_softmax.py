"""The softmax in chunks, on each native tier, against the reference and against whole rows in fp64."""

import dataclasses
from collections.abc import Callable, Iterator

import pytest
import torch
from torch import Tensor

from halfbyte import kernels
from halfbyte.kernels import RunningSoftmax, native, reference

# one unit in the last place of the gradients' type, and fp32's own errors in their sums
ROUNDING = {torch.float32: 1e-6, torch.bfloat16: 2**-8, torch.float16: 2**-11}
WIDTHS = [1, 2, 7, 15, 16, 17, 31, 64, 65, 130, 1000]


@pytest.fixture(params=native.tiers(), autouse=True)
def tier(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HALFBYTE_ISA", request.param)


@pytest.fixture
def threads() -> Iterator[Callable[[int], None]]:
    before = torch.get_num_threads()
    yield torch.set_num_threads
    torch.set_num_threads(before)


def some_logits(n: int, width: int, dtype: torch.dtype, seed: int = 0) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed + width)
    logits = torch.randn(n, width, generator=generator) * 6
    return logits.to(dtype), torch.randint(width, (n,), generator=generator)


def close(one: Tensor, other: Tensor, tolerance: float) -> bool:
    return torch.allclose(one.double(), other.double(), rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize("dtype", ROUNDING)
@pytest.mark.parametrize(("scale", "cap"), [(1.0, None), (0.25, None), (-1.5, None), (1.0, 10.0), (2.0, 30.0)])
def test_rows_in_chunks_are_whole_rows_in_fp64(dtype: torch.dtype, scale: float, cap: float | None) -> None:
    for width in WIDTHS:
        logits, labels = some_logits(5, width, dtype)
        z = logits.double() * scale
        slope = torch.full_like(z, scale)
        if cap is not None:
            z, slope = cap * (z / cap).tanh(), scale * (1 - (z / cap).tanh() ** 2)
        softmax = RunningSoftmax.empty(5, logits.device)
        for first in range(0, width, 70):
            chunk = logits[:, first : first + 70].clone(memory_format=torch.contiguous_format)
            kernels.fold_softmax(chunk, labels, first, softmax, scale=scale, cap=cap, gradient=True)
            seen = z[:, : first + 70]
            taken = (z - seen.amax(1, keepdim=True)).exp() * slope
            taken[torch.arange(5), labels] = 0
            assert close(chunk, taken[:, first : first + 70], 2 * ROUNDING[dtype]), width
        logs = z.log_softmax(1)
        assert torch.equal(softmax.top, (logits.double() * scale).argmax(1))
        assert close(softmax.log_prob(), logs[torch.arange(5), labels], 1e-5)
        assert close(softmax.entropy(), -(logs.exp() * logs).sum(1), 1e-5)
        assert close(softmax.log_sum_squares(), (2 * logs).logsumexp(1), 1e-5)
        assert close(softmax.log_sum(), z.logsumexp(1), 1e-5)
        assert close(softmax.total / width, z.mean(1), 1e-5)
        assert close(softmax.slope, slope[torch.arange(5), labels], 1e-5)


def test_the_state_between_chunks_is_the_reference_s() -> None:
    logits, labels = some_logits(9, 96, torch.float32)
    ours, theirs = (RunningSoftmax.empty(9, logits.device) for _ in range(2))
    for first in (0, 32, 64):
        chunk = logits[:, first : first + 32].clone(memory_format=torch.contiguous_format)
        kernels.fold_softmax(chunk.clone(), labels, first, ours, scale=0.5)
        reference.fold_softmax(chunk.clone(), labels, first, theirs, 0.5, None, False)
        for field in dataclasses.fields(ours):
            one, other = getattr(ours, field.name), getattr(theirs, field.name)
            torch.testing.assert_close(one, other, rtol=1e-5, atol=1e-6, equal_nan=True, msg=field.name)


def test_logits_stay_as_they_are_where_no_gradient_is_asked_for() -> None:
    logits, labels = some_logits(4, 50, torch.bfloat16)
    before = logits.clone()
    kernels.fold_softmax(logits, labels, 0, RunningSoftmax.empty(4, logits.device))
    assert torch.equal(logits, before)


def test_a_row_depends_neither_on_other_rows_nor_on_the_threads(threads: Callable[[int], None]) -> None:
    logits, labels = some_logits(40, 1700, torch.bfloat16)
    results = []
    for count, rows in [(1, slice(None)), (3, slice(None)), (1, slice(7, 8))]:
        threads(count)
        part = logits[rows].clone()
        softmax = RunningSoftmax.empty(len(part), part.device)
        kernels.fold_softmax(part, labels[rows], 0, softmax, gradient=True)
        row = 0 if len(part) == 1 else 7
        results.append([part[row], *(getattr(softmax, field.name)[row] for field in dataclasses.fields(softmax))])
    for result in results[1:]:
        assert all(torch.equal(one, other) for one, other in zip(result, results[0], strict=True))


@pytest.mark.parametrize("bad", [torch.nan, torch.inf])
def test_what_is_not_finite_shows_in_its_row_alone(bad: float) -> None:
    logits, labels = some_logits(3, 40, torch.float32)
    logits[1, 20] = bad
    softmax = RunningSoftmax.empty(3, logits.device)
    kernels.fold_softmax(logits, labels, 0, softmax)
    assert softmax.log_prob().isfinite().tolist() == [True, False, True]


def test_large_logits_do_not_overflow() -> None:
    logits = torch.tensor([[3000.0, 2999.0], [-3000.0, -2999.0]])
    softmax = RunningSoftmax.empty(2, logits.device)
    kernels.fold_softmax(logits.clone(), torch.tensor([1, 1]), 0, softmax)
    expected = logits.double().log_softmax(1)[:, 1]
    assert close(softmax.log_prob(), expected, 1e-6)


def test_no_row_is_no_work() -> None:
    softmax = RunningSoftmax.empty(0, torch.device("cpu"))
    kernels.fold_softmax(torch.zeros(0, 5), torch.zeros(0, dtype=torch.int64), 0, softmax)
    assert softmax.log_prob().shape == (0,)


def test_what_does_not_fit_is_named() -> None:
    logits, labels = some_logits(4, 50, torch.float32)
    softmax = RunningSoftmax.empty(4, logits.device)
    with pytest.raises(TypeError, match=r"logits is torch.float64"):
        kernels.fold_softmax(logits.double(), labels, 0, softmax)
    with pytest.raises(ValueError, match=r"logits have shape \(50, 4\) and strides \(1, 50\)"):
        kernels.fold_softmax(logits.T, labels, 0, softmax)
    with pytest.raises(TypeError, match=r"labels are torch.int32"):
        kernels.fold_softmax(logits, labels.int(), 0, softmax)
    with pytest.raises(ValueError, match=r"4 rows of logits, labels \(3,\) and a softmax of 4 rows"):
        kernels.fold_softmax(logits, labels[1:], 0, softmax)
    with pytest.raises(ValueError, match=r"cap is -1.0; it must be above 0"):
        kernels.fold_softmax(logits, labels, 0, softmax, cap=-1.0)
    with pytest.raises(ValueError, match=r"top is torch.int32 \(4,\).*must be torch.int64 \(4,\)"):
        dataclasses.replace(softmax, top=labels.int())

"""Times as sums of products: what grows with what, and what fits measured times."""

import dataclasses

import pytest
from transformers import MixtralConfig

from halfbyte.plan import calibrate
from halfbyte.plan.calibrate import fitted
from halfbyte.plan.machine import stated_rates
from halfbyte.plan.published import everywhere, llama
from halfbyte.plan.ranks import active_adapter
from halfbyte.plan.shape import Shape, shape_of
from halfbyte.plan.times import EXPANDING, Pass, disk_seconds, step_time

RATES = stated_rates(2)
WORK = Pass(tokens=2048, squares=4 * 512**2, trained=2044, longest=512)


def test_base_products_are_their_flop_at_the_rate() -> None:
    shape = llama("1B")
    rates = RATES.model_copy(update={"forward": (1e-12, 0.0), "backward": (1e-12, 0.0)})
    found = step_time(rates, shape, everywhere(shape, 16), WORK)
    # the first projections of the first layer's kind have no gradient of their own only there; a bound is enough
    whole = 4 * 2048 * shape.linear_weights * 1e-12
    assert 0.98 * whole <= found.base <= whole


def test_a_mixture_takes_the_time_of_what_a_token_passes() -> None:
    sizes = {"num_hidden_layers": 2, "num_local_experts": 8, "num_experts_per_tok": 2, "pad_token_id": 0}
    shape = shape_of(MixtralConfig(hidden_size=256, intermediate_size=512, vocab_size=512, **sizes))
    ranks = everywhere(shape, 16)
    assert shape.active_weights < shape.linear_weights / 3
    flop = {"forward": (1e-12, 0.0), "backward": (1e-12, 0.0), "lora_forward": (1e-12, 0.0)}
    found = step_time(RATES.model_copy(update=flop), shape, ranks, WORK, backward=False)
    experts = sum(linear.weights for layer in shape.layers for linear in layer.experts)
    assert found.base == pytest.approx(2 * (2048 * shape.active_weights + EXPANDING[0] * experts) * 1e-12)
    token = Pass(tokens=1, squares=1, trained=0, longest=1)
    one = step_time(RATES.model_copy(update=flop), shape, ranks, token, backward=False)
    assert one.base == pytest.approx(2 * (shape.active_weights + EXPANDING[0] * experts * 2 / 8) * 1e-12)
    assert found.lora == pytest.approx(2 * 2048 * active_adapter(shape, ranks) * 1e-12)


def test_recomputing_all_layers_costs_a_forward_of_them() -> None:
    shape = llama("1B")
    ranks = everywhere(shape, 16)
    kept, again = (step_time(RATES, shape, ranks, WORK, recomputed=count) for count in (0, 16))
    alone = step_time(RATES, shape, ranks, WORK, backward=False)
    forward = alone.seconds - alone.head
    assert kept.recomputed == 0
    assert again.seconds - kept.seconds == pytest.approx(forward, rel=1e-6)


def test_passes_add_up_and_the_optimizer_steps_once() -> None:
    shape = llama("1B")
    ranks = everywhere(shape, 16)
    one, four = (step_time(RATES, shape, ranks, WORK, count, parameters=10**7, tensors=224) for count in (1, 4))
    assert four.optimizer == one.optimizer
    assert four.base == pytest.approx(4 * one.base)
    assert four.attention == pytest.approx(4 * one.attention)


def test_a_window_narrower_than_the_rows_spares_attention() -> None:
    shape = llama("1B")
    work = Pass(8192, 8192**2, 8191, 8192)

    def within(window: int) -> Shape:
        return dataclasses.replace(shape, layers=tuple(dataclasses.replace(x, window=window) for x in shape.layers))

    whole, near = (step_time(RATES, s, everywhere(s, 16), work).attention for s in (shape, within(512)))
    assert near < 0.3 * whole
    wide = within(8192)
    assert step_time(RATES, wide, everywhere(wide, 16), work).attention == whole


def test_a_base_beyond_memory_is_read_twice_but_for_what_stays() -> None:
    assert disk_seconds(40, 10, 3) == 20
    assert disk_seconds(10, 40, 3) == 0


def test_factors_of_two_kinds_of_work_are_found_again() -> None:
    work = [(1e9, 1e6), (4e9, 2e6), (1e10, 1e7)]
    times = [2e-12 * flop + 3e-9 * values for flop, values in work]
    assert fitted(work, times) == pytest.approx((2e-12, 3e-9), rel=1e-6)
    assert min(fitted([(1.0, 1.0), (2.0, 1.0)], [2.0, 1.0])) >= 0


def test_what_was_measured_is_known_again_and_only_in_its_own_circumstances(monkeypatch: pytest.MonkeyPatch) -> None:
    assert not calibrate.known(3).is_measured
    monkeypatch.setattr(calibrate, "_measured", lambda progress: RATES)
    measured = calibrate.calibrate()
    assert measured.is_measured and calibrate.known() == measured
    assert not calibrate.known(measured.threads + 1).is_measured
    assert not calibrate.stated().is_measured

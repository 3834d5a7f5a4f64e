"""Standard errors against formulas from textbooks and against draws with replacement."""

import math

import numpy as np
import pytest

from halfbyte.evaluate.estimates import Rows, difference

RNG = np.random.default_rng(0)


def drawn(value, count, draws=4000, seed=1):
    """The deviation of ``value`` over rows that are drawn anew."""
    rng = np.random.default_rng(seed)
    return float(np.std([value(rng.integers(count, size=count)) for _ in range(draws)]))


def test_the_error_of_a_mean_is_the_deviation_over_the_root_of_the_count() -> None:
    values = RNG.normal(size=50)
    found = Rows(values).estimate()
    assert found.value == pytest.approx(values.mean())
    assert found.stderr == pytest.approx(values.std(ddof=1) / math.sqrt(50))


def test_the_error_of_a_share_is_the_binomial_one() -> None:
    hits = np.array([1.0] * 30 + [0.0] * 70)
    found = Rows(hits).estimate()
    assert found == (pytest.approx(0.3), pytest.approx(math.sqrt(0.3 * 0.7 / 99)))


def test_a_perplexity_is_of_all_tokens_and_its_error_that_of_texts_drawn_anew() -> None:
    tokens = RNG.integers(5, 200, 300).astype(float)
    nats = tokens * RNG.normal(2, 0.3, 300)
    found = Rows(nats, tokens, is_exponent=True).estimate()
    assert found.value == pytest.approx(math.exp(nats.sum() / tokens.sum()))
    wanted = drawn(lambda rows: math.exp(nats[rows].sum() / tokens[rows].sum()), 300)
    assert found.stderr == pytest.approx(wanted, rel=0.06)


def test_a_mean_over_groups_is_of_their_means() -> None:
    groups = ["a"] * 30 + ["b"] * 300
    values = np.concatenate([RNG.normal(0, 1, 30), RNG.normal(5, 1, 300)])
    found = Rows(values, groups=groups).estimate()
    assert found.value == pytest.approx((values[:30].mean() + values[30:].mean()) / 2)
    errors = [values[:30].std(ddof=1) / math.sqrt(30), values[30:].std(ddof=1) / math.sqrt(300)]
    assert found.stderr == pytest.approx(math.hypot(*errors) / 2)


@pytest.mark.parametrize("is_exponent", [False, True])
def test_a_difference_is_paired(is_exponent: bool) -> None:
    counts = RNG.integers(5, 50, 400).astype(float)
    hard = RNG.normal(2, 1, 400)
    one, other = counts * (hard + RNG.normal(0, 0.1, 400)), counts * (hard - 0.2 + RNG.normal(0, 0.1, 400))
    found = difference(Rows(one, counts, is_exponent=is_exponent), Rows(other, counts, is_exponent=is_exponent))

    def apart(rows):
        before, after = (side[rows].sum() / counts[rows].sum() for side in (one, other))
        return math.exp(after) - math.exp(before) if is_exponent else after - before

    assert found.value == pytest.approx(apart(np.arange(400)))
    assert found.stderr == pytest.approx(drawn(apart, 400), rel=0.08)
    alone = [Rows(side, counts, is_exponent=is_exponent).estimate().stderr for side in (one, other)]
    assert found.stderr < math.hypot(*alone) / 2


def test_a_single_row_has_a_value_and_no_error() -> None:
    assert Rows(np.array([0.5])).estimate() == (0.5, None)
    assert Rows(np.array([0.5, 0.7, 0.9]), groups=["a", "b", "b"]).estimate() == (pytest.approx(0.65), None)


def test_some_of_the_rows() -> None:
    rows = Rows(np.array([1.0, 2.0, 3.0]), np.array([1.0, 1.0, 3.0]), groups=["a", "a", "b"])
    kept = rows.only(np.array([True, False, True]))
    assert len(kept) == 2 and kept.estimate().value == pytest.approx((1 + 1) / 2)

"""Sampling against transformers' own processors: the same distribution, drawn by seeds of its own."""

import math
from typing import Any

import numpy
import pytest
import torch
from scipy.stats import chisquare
from transformers import (
    LogitsProcessorList,
    MinPLogitsWarper,
    RepetitionPenaltyLogitsProcessor,
    SequenceBiasLogitsProcessor,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
)

from halfbyte.errors import InputError
from halfbyte.generate import sampling
from halfbyte.generate.sampling import Sampler, Sampling, draw, sample

PROMPT, WRITTEN = [1, 5, 5, 9], [2, 5, 2, 2]
OPTIONS: list[dict[str, Any]] = [
    {"temperature": 1.0},
    {"temperature": 0.3},
    {"temperature": 3.0, "top_k": 7},
    {"temperature": 1.3, "top_p": 0.8},
    {"temperature": 1.3, "top_p": 0.01},
    {"temperature": 0.9, "min_p": 0.15},
    {"temperature": 2.0, "top_k": 9, "top_p": 0.9, "min_p": 0.05},
    {"temperature": 1.0, "repetition_penalty": 1.7},
    {"temperature": 1.0, "frequency_penalty": 0.7, "presence_penalty": -0.9},
    {"temperature": 1.0, "logit_bias": {3: 2.5, 5: -100.0, 39: 4.0}},
    {"temperature": 0.8, "top_p": 0.95, "repetition_penalty": 0.7, "frequency_penalty": 1.5, "logit_bias": {2: 3.0}},
]


def expected(logits: torch.Tensor, options: dict[str, Any]) -> torch.Tensor:
    """Return the distribution that transformers' processors give, and OpenAI's formula between them."""
    ids = torch.tensor([PROMPT + WRITTEN])
    first = LogitsProcessorList()
    if bias := options.get("logit_bias"):
        first.append(SequenceBiasLogitsProcessor({(token,): value for token, value in bias.items()}))
    if penalty := options.get("repetition_penalty"):
        first.append(RepetitionPenaltyLogitsProcessor(penalty))
    scores = first(ids, logits[None].clone())
    for token in set(WRITTEN):
        count = WRITTEN.count(token)
        scores[0, token] -= count * options.get("frequency_penalty", 0) + options.get("presence_penalty", 0)
    last = LogitsProcessorList([TemperatureLogitsWarper(options["temperature"])])
    if top_k := options.get("top_k"):
        last.append(TopKLogitsWarper(top_k))
    if top_p := options.get("top_p"):
        last.append(TopPLogitsWarper(top_p))
    if min_p := options.get("min_p"):
        last.append(MinPLogitsWarper(min_p))
    return last(ids, scores)[0].double().softmax(-1)


def sampler_of(options: dict[str, Any], seed: int = 0) -> Sampler:
    sampler = Sampler(Sampling(**options), PROMPT, seed)
    for token in WRITTEN:
        sampler.add(token)
    return sampler


@pytest.mark.parametrize("options", OPTIONS, ids=str)
def test_tokens_are_drawn_from_the_distribution_of_transformers_processors(options: dict[str, Any]) -> None:
    logits = torch.randn(40, generator=torch.Generator().manual_seed(3)) * 1.5
    shares = expected(logits, options)
    draws, drawn = 1500, torch.zeros(40)
    for seed in range(draws):
        [chosen] = sample(logits[None], [sampler_of(options, seed)], [None])
        assert chosen is not None
        drawn[chosen.token] += 1
    assert drawn[shares == 0].sum() == 0
    rare = shares * draws < 5  # chi-square wants five of each: the rare ones are one class
    seen, due = drawn[~rare].tolist(), (shares[~rare] * draws).tolist()
    if (rest := float(shares[rare].sum()) * draws) > 0:
        seen, due = [*seen, float(drawn[rare].sum())], [*due, rest]
    assert len(seen) == 1 or chisquare(seen, due, sum_check=False).pvalue > 1e-4


@pytest.mark.parametrize("vocab", [1, 511, 513, 1600])
@pytest.mark.parametrize("options", OPTIONS[:7], ids=str)
def test_a_number_draws_the_token_at_its_place_in_the_distribution(options: dict[str, Any], vocab: int) -> None:
    """Tokens are drawn in some order; whatever it is, each is drawn by a stretch of numbers as long as it is likely."""
    logits = torch.randn(vocab, generator=torch.Generator().manual_seed(vocab)) * 2
    shares = expected(logits, options) if vocab > 39 else None
    steps = 1000
    drawn = [draw(logits.numpy(), Sampling(**options), (place + 0.5) / steps) for place in range(steps)]
    found = torch.bincount(torch.tensor(drawn), minlength=vocab) / steps
    assert len(found) == vocab
    if shares is not None:
        assert (found - shares).abs().max() <= 1.01 / steps
    for edge in (0.0, math.nextafter(1, 0)):
        assert 0 <= draw(logits.numpy(), Sampling(**options), edge) < vocab


def test_flat_and_peaked_distributions_of_a_large_vocabulary_keep_the_same_tokens_as_transformers() -> None:
    generator = torch.Generator().manual_seed(0)
    for scale, top_p, top_k in [(0.01, 0.9, None), (1, 0.5, None), (8, 0.999, None), (0.3, 0.9, 300), (0, 0.9, None)]:
        logits = torch.randn(50_000, generator=generator) * scale
        options = {"temperature": 1.0, "top_p": top_p} | ({"top_k": top_k} if top_k else {})
        kept = expected(logits, options) > 0
        shares = logits.softmax(-1).numpy()
        ids = sampling._left(shares, Sampling(**options))
        assert ids is not None
        # fp32 sums decide about the last tokens otherwise than fp64 sums
        assert abs(len(ids) - int(kept.sum())) <= max(1, 3e-4 * len(logits))
        assert float(shares[ids].sum(dtype=numpy.float64)) >= (top_p - 1e-6) * (1 if top_k is None else 0)


def test_the_likeliest_token_is_taken_where_nothing_is_drawn_with_penalties_and_masks() -> None:
    logits = torch.tensor([[1.0, 5.0, 4.0, 3.0], [1.0, 5.0, 4.0, 3.0], [1.0, 5.0, 4.0, 3.0]])
    plain, shifted = Sampler(Sampling(), [], 0), Sampler(Sampling(logit_bias={1: -3.0}), [], 0)
    masked = Sampler(Sampling(logit_bias={0: 100.0}), [], 0)
    mask = numpy.array([False, False, False, True])
    chosen = sample(logits, [plain, shifted, masked], [None, None, mask])
    assert [one and one.token for one in chosen] == [1, 2, 3]
    assert logits[2].tolist() == [1.0, 5.0, 4.0, 3.0]


def test_log_probabilities_are_the_model_s_own() -> None:
    logits = torch.randn(1, 30, generator=torch.Generator().manual_seed(1)) * 3
    options = Sampling(temperature=0.2, top_p=0.5, logit_bias={4: 50.0}, repetition_penalty=1.3, logprobs=3)
    [chosen] = sample(logits, [Sampler(options, [3], 0)], [None])
    own = logits[0].log_softmax(-1)
    assert chosen is not None and chosen.token == 4
    assert chosen.logprob == pytest.approx(float(own[4]))
    best = own.topk(3)
    assert [token for token, _ in chosen.top] == best.indices.tolist()
    assert [value for _, value in chosen.top] == pytest.approx(best.values.tolist())


def test_a_draw_depends_on_seed_and_place_alone() -> None:
    logits = torch.zeros(8, 1000)
    options = Sampling(temperature=1.0)

    alone = [sample(logits[:1], [Sampler(options, [], seed)], [None])[0] for seed in range(8)]
    together = sample(logits, [Sampler(options, [], seed) for seed in range(8)], [None] * 8)
    assert alone == together
    assert len(set(together)) > 5
    sampler, places = Sampler(options, [], 5), []
    for _ in range(20):
        [chosen] = sample(logits[:1], [sampler], [None])
        assert chosen is not None
        sampler.add(chosen.token)
        places.append(chosen.token)
    assert len(set(places)) > 10
    assert Sampler(Sampling(seed=-1), [], 0).uniform() == Sampler(Sampling(seed=2**64 - 1), [], 0).uniform()


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_logits_that_are_not_numbers_choose_nothing(bad: float) -> None:
    logits = torch.randn(2, 10)
    logits[1] = bad if bad < 0 else logits[1]
    logits[1, 4] = bad
    chosen = sample(logits, [Sampler(Sampling(temperature=1.0), [], 0) for _ in range(2)], [None, None])
    assert chosen[0] is not None and chosen[1] is None


@pytest.mark.parametrize(
    ("options", "sentence"),
    [
        ({"temperature": -0.1}, "temperature is -0.1; it takes a number from 0 to 100."),
        ({"temperature": math.nan}, "temperature is nan"),
        ({"top_p": 1.5}, "top_p is 1.5"),
        ({"top_p": True}, "top_p is True"),
        ({"top_k": 0}, "top_k is 0; it takes a whole number of at least 1"),
        ({"min_p": 2}, "min_p is 2"),
        ({"repetition_penalty": 0}, "repetition_penalty is 0"),
        ({"frequency_penalty": math.inf}, "frequency_penalty is inf"),
        ({"presence_penalty": "1"}, "presence_penalty is '1'"),
        ({"logit_bias": {-1: 1.0}}, "A token of logit_bias is -1"),
        ({"logit_bias": {1: math.nan}}, "logit_bias is nan"),
        ({"seed": 2**65}, "seed is 36893488147419103232"),
        ({"max_new_tokens": 0}, "max_new_tokens is 0"),
        ({"stop": ("a", "")}, "stop takes up to 64 texts"),
        ({"stop_ids": (1.5,)}, "A token of stop_ids is 1.5"),
        ({"logprobs": 21}, "logprobs is 21; it takes a whole number from 0 to 20."),
    ],
)  # fmt: skip
def test_options_out_of_range_are_told_by_name(options: dict[str, Any], sentence: str) -> None:
    with pytest.raises(InputError) as told:
        Sampling(**options)
    assert str(told.value).startswith(sentence)


def test_tokens_that_the_model_lacks_are_told() -> None:
    with pytest.raises(InputError, match="stop_ids names token 10, but the model has 10: 0 to 9"):
        Sampling(stop_ids=(10,)).check_vocabulary(10)

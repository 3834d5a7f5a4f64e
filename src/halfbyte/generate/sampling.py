"""Which token comes next: from logits, by the options of each request.

The order is that of transformers' logits processors (5.23): bias, penalties, constraint, temperature, top-k, top-p,
min-p, and a draw from what is left. Frequency and presence penalties are OpenAI's: a token that was written c times
loses c·frequency + [c > 0]·presence. Repetition's is CTRL's (arXiv 1909.05858, section 4.1), over prompt and answer.

A draw is u·(mass that is left) looked up in cumulative sums, where u comes from Philox with the request's seed as
key and the number of tokens written as counter: no state is shared, so what neighbours draw changes nothing.

No vocabulary is sorted where it need not be: the tokens above a floor hold the top-p whenever their mass reaches it,
and the top-k whenever they are so many; only they are sorted, and the floor is lowered until one is true.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from types import MappingProxyType

import numpy
import torch
from numpy.typing import NDArray
from torch import Tensor

from halfbyte.errors import InputError

Numbers = NDArray[numpy.float32]
Ids = NDArray[numpy.int64]
Allowed = NDArray[numpy.bool_]

COLDEST = 1e-5
"""The temperature below which the likeliest token is taken: divided by less, logits become infinite."""

MOST_LOGPROBS = 20
"""Alternatives to a token whose log-probabilities can be had, as OpenAI allows."""

MOST_STOPS = 64
"""Stop strings of a request."""

FLOORS = (1e-2, 1e-3, 1e-4, 1e-6)
"""Shares of the likeliest token's probability: among the tokens above, those of top-k and top-p are looked for."""

BLOCK = 512
"""Tokens whose probabilities are summed before the place of a draw among all of them is looked up."""


@dataclass(frozen=True)
class Sampling:
    """How the tokens of one request are chosen, and where they end.

    Attributes:
        temperature: 0 takes the likeliest token; above, logits are divided by it and a token is drawn.
        top_p: a token is drawn from the likeliest ones that together have this probability.
        top_k: it is one of so many likeliest ones; None: of all.
        min_p: it has at least this share of the likeliest one's probability.
        repetition_penalty: logits of tokens that prompt or answer hold are divided by it if positive, else multiplied.
        frequency_penalty: taken from a token's logit for each time that the answer holds it.
        presence_penalty: taken from a token's logit if the answer holds it.
        logit_bias: added to the logits of tokens, by id.
        seed: one seed gives one answer, whatever is decoded beside it; None: another one each time.
        max_new_tokens: the answer's greatest length in tokens.
        stop: texts that the answer ends before.
        stop_ids: tokens that the answer ends with, beside the model's own.
        logprobs: so many likeliest alternatives are told with each token, and its own log-probability; None: neither.

    Raises:
        InputError: a value is out of its range; told with the field's name.
    """

    temperature: float = 0.0
    top_p: float = 1.0
    top_k: int | None = None
    min_p: float = 0.0
    repetition_penalty: float = 1.0
    frequency_penalty: float = 0.0
    presence_penalty: float = 0.0
    logit_bias: Mapping[int, float] = field(default_factory=lambda: MappingProxyType({}))
    seed: int | None = None
    max_new_tokens: int = 512
    stop: tuple[str, ...] = ()
    stop_ids: tuple[int, ...] = ()
    logprobs: int | None = None

    def __post_init__(self) -> None:
        _number("temperature", self.temperature, 0, 100)
        _number("top_p", self.top_p, 0, 1)
        _number("min_p", self.min_p, 0, 1)
        _number("repetition_penalty", self.repetition_penalty, 0.01, 100)
        _number("frequency_penalty", self.frequency_penalty, -100, 100)
        _number("presence_penalty", self.presence_penalty, -100, 100)
        _whole("max_new_tokens", self.max_new_tokens, 1)
        if self.top_k is not None:
            _whole("top_k", self.top_k, 1)
        if self.seed is not None:
            _whole("seed", self.seed, -(2**63), 2**64 - 1)
        if self.logprobs is not None:
            _whole("logprobs", self.logprobs, 0, MOST_LOGPROBS)
        for token, bias in self.logit_bias.items():
            _whole("A token of logit_bias", token, 0)
            _number("logit_bias", bias, -100, 100)
        for token in self.stop_ids:
            _whole("A token of stop_ids", token, 0)
        if len(self.stop) > MOST_STOPS or not all(isinstance(text, str) and text for text in self.stop):
            raise InputError(f"stop takes up to {MOST_STOPS} texts of at least one character each.")

    @property
    def is_greedy(self) -> bool:
        """Whether nothing is drawn."""
        return self.temperature < COLDEST

    @property
    def is_plain(self) -> bool:
        """Whether logits are taken as they are: no bias and no penalty."""
        penalties = (self.frequency_penalty, self.presence_penalty, self.repetition_penalty - 1)
        return not self.logit_bias and not any(penalties)

    def check_vocabulary(self, size: int) -> None:
        """Check that the tokens that are named exist.

        Raises:
            InputError: one does not.
        """
        for name, ids in (("logit_bias", self.logit_bias), ("stop_ids", self.stop_ids)):
            for token in ids:
                if token >= size:
                    raise InputError(f"{name} names token {token}, but the model has {size}: 0 to {size - 1}.")


def _number(name: str, value: float, low: float, high: float) -> None:
    if isinstance(value, bool) or not isinstance(value, int | float) or not low <= value <= high:
        raise InputError(f"{name} is {value!r}; it takes a number from {low} to {high}.")


def _whole(name: str, value: int, low: int, high: int | None = None) -> None:
    if isinstance(value, bool) or not isinstance(value, int) or value < low or (high is not None and value > high):
        allowed = f"from {low} to {high}" if high is not None else f"of at least {low}"
        raise InputError(f"{name} is {value!r}; it takes a whole number {allowed}.")


@dataclass(frozen=True)
class Chosen:
    """A token that was chosen.

    Attributes:
        token: its id.
        logprob: its log-probability in the model's own distribution, before bias, penalties, constraint and
            temperature; None where it was not asked for.
        top: the likeliest tokens of that distribution with their log-probabilities, the likeliest first.
    """

    token: int
    logprob: float | None = None
    top: tuple[tuple[int, float], ...] = ()


class Sampler:
    """What sampling knows of one request: its options, its seed, and the tokens so far."""

    def __init__(self, sampling: Sampling, prompt: Sequence[int], seed: int) -> None:
        """
        Args:
            sampling: the options.
            prompt: its tokens, for the repetition penalty.
            seed: used where the options name none, from 0 to 2^64 - 1.
        """
        self.sampling = sampling
        self.seed = (seed if sampling.seed is None else sampling.seed) % 2**64
        self.written: list[int] = []
        self._counts: dict[int, int] = {}
        self._seen = set(prompt) if sampling.repetition_penalty != 1 else set()
        self._seen_ids = numpy.array(sorted(self._seen), dtype=numpy.int64)
        self._biased = numpy.array([*sampling.logit_bias], dtype=numpy.int64)
        self._biases = numpy.array([*sampling.logit_bias.values()], dtype=numpy.float32)

    def add(self, token: int) -> None:
        """Take a token for the next one of the answer."""
        self.written.append(token)
        if self.sampling.is_plain:
            return
        self._counts[token] = self._counts.get(token, 0) + 1
        if token not in self._seen:
            self._seen.add(token)
            self._seen_ids = numpy.append(self._seen_ids, token)

    def uniform(self) -> float:
        """Return the number in [0, 1) that decides the next token."""
        philox = numpy.random.Philox(key=self.seed, counter=len(self.written))
        return float(numpy.random.Generator(philox).random())

    def shifted(self, logits: Numbers) -> Numbers:
        """Return logits [vocab] with bias and penalties; a new array."""
        options, logits = self.sampling, logits.copy()
        logits[self._biased] += self._biases
        if options.repetition_penalty != 1:
            found = logits[self._seen_ids]
            penalty = numpy.float32(options.repetition_penalty)
            logits[self._seen_ids] = numpy.where(found < 0, found * penalty, found / penalty)
        if self._counts and (options.frequency_penalty or options.presence_penalty):
            counts = numpy.array([*self._counts.values()], dtype=numpy.float32)
            taken = counts * numpy.float32(options.frequency_penalty) + numpy.float32(options.presence_penalty)
            logits[[*self._counts]] -= taken
        return logits


def sample(logits: Tensor, samplers: Sequence[Sampler], masks: Sequence[Allowed | None]) -> list[Chosen | None]:
    """Choose the next token of each request; what they have written stays as it is (:meth:`Sampler.add`).

    Args:
        logits: fp32 [rows, vocab].
        samplers: one for each row.
        masks: for each row which tokens are allowed, [vocab], at least one of them; None: all are.

    Returns:
        A choice for each row, or None where its logits are not numbers.
    """
    rows = logits.detach().to("cpu", torch.float32).numpy()
    return [_choose(row, sampler, mask) for row, sampler, mask in zip(rows, samplers, masks, strict=True)]


def _choose(logits: Numbers, sampler: Sampler, mask: Allowed | None) -> Chosen | None:
    options = sampler.sampling
    token = int(logits.argmax())  # not a number, if one is none
    if not numpy.isfinite(logits[token]):
        return None
    scores = logits if options.is_plain else sampler.shifted(logits)
    if mask is not None:
        scores = numpy.where(mask, scores, numpy.float32(-numpy.inf))
    if not options.is_greedy:
        token = draw(scores, options, sampler.uniform())
    elif scores is not logits:
        token = int(scores.argmax())
    if options.logprobs is None:
        return Chosen(token)
    logprobs = torch.from_numpy(logits).log_softmax(-1)
    best = logprobs.topk(min(options.logprobs, len(logits)))
    top = tuple(zip(best.indices.tolist(), best.values.tolist(), strict=True))
    return Chosen(token, float(logprobs[token]), top)


def draw(scores: Numbers, options: Sampling, uniform: float) -> int:
    """Return the token that a number in [0, 1) draws by temperature, top-k, top-p and min-p.

    Args:
        scores: [vocab], biased, penalized and masked: numbers or -inf, one number at least.
        options: the request's; a temperature above 0.
        uniform: the number.
    """
    warmed = (scores - scores.max()) * numpy.float32(1 / options.temperature)
    shares: Numbers = torch.from_numpy(warmed).softmax(-1).numpy()
    ids = _left(shares, options)
    if ids is None:
        return _place_among_all(shares, uniform)
    sums = shares[ids].cumsum(dtype=numpy.float64)
    place = int(numpy.searchsorted(sums, uniform * sums[-1], side="right"))
    return int(ids[min(place, len(ids) - 1)])


def _left(shares: Numbers, options: Sampling) -> Ids | None:
    """Return the tokens that are left by top-k, top-p and min-p, or None where none of these is asked for."""
    count, peak = options.top_k or len(shares), float(shares.max())
    is_few, least = count < len(shares), options.min_p * peak
    if not is_few and options.top_p == 1:
        return numpy.flatnonzero(shares >= least) if least else None
    for floor in FLOORS:
        ids = numpy.flatnonzero(shares > floor * peak)
        held = shares[ids]
        if len(ids) >= count if is_few else held.sum(dtype=numpy.float64) >= options.top_p:
            break
    else:
        ids, held = numpy.arange(len(shares)), shares
    if is_few:
        kept = held >= numpy.partition(held, -count)[-count]  # those that equal the last one stay
        ids, held = ids[kept], held[kept]
    order = numpy.argsort(-held, kind="stable")
    ids, held = ids[order], held[order]
    if options.top_p < 1:
        sums = held.cumsum(dtype=numpy.float64)
        needed = options.top_p * (sums[-1] if is_few else 1)
        end = max(1, int(numpy.searchsorted(sums - held, needed, side="left")))
        ids, held = ids[:end], held[:end]
    return ids[held >= least]


def _place_among_all(shares: Numbers, uniform: float) -> int:
    """Return the place of u·(sum of all) in the cumulative sums, without summing up all of them in order."""
    begins = numpy.arange(0, len(shares), BLOCK)
    sums = numpy.add.reduceat(shares, begins).cumsum(dtype=numpy.float64)
    sought = uniform * sums[-1]
    block = min(int(numpy.searchsorted(sums, sought, side="right")), len(sums) - 1)
    held = shares[block * BLOCK : (block + 1) * BLOCK]
    rest = sought - (sums[block - 1] if block else 0)
    place = int(numpy.searchsorted(held.cumsum(dtype=numpy.float64), rest, side="right"))
    if place == len(held):  # rounding has gone past the last one
        place = int(held.nonzero()[0][-1])
    return block * BLOCK + place

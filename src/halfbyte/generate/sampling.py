"""Which token comes next: from logits, by the options of each request.

The order is that of transformers' logits processors (5.23): bias, penalties, constraint, temperature, top-k, top-p,
min-p, and a draw from what is left. Frequency and presence penalties are OpenAI's: a token that was written c times
loses c·frequency + [c > 0]·presence. Repetition's is CTRL's (arXiv 1909.05858, section 4.1), over prompt and answer.

A draw is u·(mass that is left) looked up in cumulative weights, where u comes from Philox with the request's seed as
key and the number of tokens written as counter: no state is shared, so what neighbours draw changes nothing.

No vocabulary is sorted where it need not be: the tokens heavier than a floor hold the top-p whenever their mass does,
so only they are sorted, and the floor is lowered until it does.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from types import MappingProxyType

import numpy
import torch
from torch import Tensor

from halfbyte.errors import InputError

COLDEST = 1e-5
"""The temperature below which the likeliest token is taken: divided by less, logits become infinite."""

MOST_LOGPROBS = 20
"""Alternatives to a token whose log-probabilities can be had, as OpenAI allows."""

MOST_STOPS = 64
"""Stop strings of a request."""

FLOORS = (1e-2, 1e-4, 1e-6)
"""Weights, relative to the likeliest token's, above which the tokens of top-p are looked for one after the other."""

BLOCK = 512
"""Tokens whose weights are summed before the place of a draw among all tokens is looked up."""


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
        self._seen = dict.fromkeys(prompt) if sampling.repetition_penalty != 1 else {}
        self._bias = (torch.tensor([*sampling.logit_bias]), torch.tensor([*sampling.logit_bias.values()]))

    def add(self, token: int) -> None:
        """Take a token for the next one of the answer."""
        self.written.append(token)
        if not self.sampling.is_plain:
            self._counts[token] = self._counts.get(token, 0) + 1
            self._seen[token] = None

    def uniform(self) -> float:
        """Return the number in [0, 1) that decides the next token."""
        philox = numpy.random.Philox(key=self.seed, counter=len(self.written))
        return float(numpy.random.Generator(philox).random())

    def shifted(self, logits: Tensor) -> Tensor:
        """Return logits [vocab] with bias and penalties; a new tensor."""
        options, logits = self.sampling, logits.clone()
        if options.logit_bias:
            logits[self._bias[0]] += self._bias[1].to(logits.dtype)
        if options.repetition_penalty != 1 and self._seen:
            seen = torch.tensor([*self._seen])
            found = logits[seen]
            penalty = options.repetition_penalty
            logits[seen] = torch.where(found < 0, found * penalty, found / penalty)
        if self._counts and (options.frequency_penalty or options.presence_penalty):
            counts = torch.tensor([*self._counts.values()], dtype=logits.dtype)
            logits[torch.tensor([*self._counts])] -= counts * options.frequency_penalty + options.presence_penalty
        return logits


def sample(logits: Tensor, samplers: Sequence[Sampler], masks: Sequence[Tensor | None]) -> list[Chosen | None]:
    """Choose the next token of each request; what they have written stays as it is (:meth:`Sampler.add`).

    Args:
        logits: fp32 [rows, vocab].
        samplers: one for each row.
        masks: bool [vocab] for each row, true where a token is allowed, at least one of them; None: all are.

    Returns:
        A choice for each row, or None where its logits are not numbers.
    """
    logits = logits.detach().to("cpu", torch.float32)
    likeliest, tokens = logits.max(-1)  # not a number, if one in the row is none
    are_numbers = likeliest.isfinite().tolist()
    return [
        _choose(row, sampler, mask, token) if is_number else None
        for row, sampler, mask, token, is_number in zip(
            logits, samplers, masks, tokens.tolist(), are_numbers, strict=True
        )
    ]


def _choose(logits: Tensor, sampler: Sampler, mask: Tensor | None, likeliest: int) -> Chosen:
    options, token = sampler.sampling, likeliest
    scores = logits if options.is_plain else sampler.shifted(logits)
    if mask is not None:
        scores = scores.masked_fill(~mask, -math.inf)
    if not options.is_greedy:
        token = draw(scores, options, sampler.uniform())
    elif scores is not logits:
        token = int(scores.argmax())
    if options.logprobs is None:
        return Chosen(token)
    logprobs = logits.log_softmax(-1)
    best = logprobs.topk(min(options.logprobs, len(logits)))
    top = tuple(zip(best.indices.tolist(), best.values.tolist(), strict=True))
    return Chosen(token, float(logprobs[token]), top)


def draw(scores: Tensor, options: Sampling, uniform: float) -> int:
    """Return the token that a number in [0, 1) draws by temperature, top-k, top-p and min-p.

    Args:
        scores: fp32 [vocab], biased, penalized and masked; one of them is finite, none is infinite or not a number
            otherwise than -inf.
        options: the request's; a temperature above 0.
        uniform: the number.
    """
    weights = ((scores - scores.max()) / options.temperature).exp_()  # the likeliest token's is 1
    ids, kept = _filtered(weights, options)
    if ids is None:
        return _place_among_all(kept, uniform)
    sums = kept.double().cumsum(0)
    place = int(torch.searchsorted(sums, uniform * sums[-1], right=True))
    return int(ids[min(place, len(ids) - 1)])


def _filtered(weights: Tensor, options: Sampling) -> tuple[Tensor | None, Tensor]:
    """Return the tokens that are left and their weights; None for the tokens: all are."""
    ids: Tensor | None = None
    if options.top_k is not None and options.top_k < len(weights):
        least = weights.topk(options.top_k, sorted=False).values.min()
        ids, weights = _above(None, weights, weights >= least)
    if options.top_p < 1:
        ids, weights = _nucleus(ids, weights, options.top_p)
    if options.min_p > 0:
        ids, weights = _above(ids, weights, weights >= options.min_p * weights.max())
    return ids, weights


def _above(ids: Tensor | None, weights: Tensor, kept: Tensor) -> tuple[Tensor, Tensor]:
    places = kept.nonzero()[:, 0]
    return places if ids is None else ids[places], weights[places]


def _nucleus(ids: Tensor | None, weights: Tensor, top_p: float) -> tuple[Tensor, Tensor]:
    """Return the likeliest tokens that together have a share of ``top_p``, one at least, and their weights."""
    needed = top_p * float(weights.sum(dtype=torch.float64))
    for floor in FLOORS:
        heavy_ids, heavy = _above(ids, weights, weights > floor)
        if float(heavy.sum(dtype=torch.float64)) >= needed:
            break
    else:
        heavy_ids, heavy = (torch.arange(len(weights)) if ids is None else ids), weights
    heavy, order = heavy.sort(descending=True, stable=True)
    before = heavy.double().cumsum(0) - heavy
    count = max(1, int((before < needed).sum()))
    return heavy_ids[order[:count]], heavy[:count]


def _place_among_all(weights: Tensor, uniform: float) -> int:
    """Return the place of u·(sum of all weights) in their cumulative sums, without summing up all of them in order."""
    blocks = torch.nn.functional.pad(weights, (0, -len(weights) % BLOCK)).view(-1, BLOCK)
    sums = blocks.sum(-1, dtype=torch.float64).cumsum(0)
    sought = uniform * sums[-1]
    block = min(int(torch.searchsorted(sums, sought, right=True)), len(sums) - 1)
    within = blocks[block].double().cumsum(0)
    rest = sought - (sums[block - 1] if block else 0)
    place = int(torch.searchsorted(within, rest, right=True))
    if place < BLOCK and block * BLOCK + place < len(weights) and weights[block * BLOCK + place] > 0:
        return block * BLOCK + place
    return block * BLOCK + int(blocks[block].nonzero()[-1])  # rounding has gone past the block's last weight

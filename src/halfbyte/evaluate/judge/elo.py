"""Elo ratings from judged pairs, averaged over many orders of the same games (QLoRA's paper, section 5.2).

    E = 1 / (1 + 10^((R_b − R_a) / 400))       what a is expected to score against b
    R_a ← R_a + K (S − E), R_b ← R_b − K (S − E)     S: 1 a win, ½ a tie, 0 a loss

Everybody begins with 1000, K is 32. A rating depends on the order in which the games are played, so they are played in
10,000 random orders, and ratings are means. Two intervals of 95 % say two things:

    order     ± 1.96 s/√10,000: how far the mean itself is from that over all orders; the paper's
    low, high the percentiles 2.5 and 97.5 of ratings where before each order the questions are drawn anew with
              replacement (a bootstrap), as other questions could have been asked. All games of a question go together.

All orders are played at once, game by game: arrays ``[orders, players]``.
"""

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

START, K, ORDERS = 1000.0, 32.0, 10_000
SPREAD = 400.0
AT_ONCE = 1 << 23
"""Games that are held in memory in their orders."""

Ints = NDArray[np.int64]
Floats = NDArray[np.float64]


class Game(NamedTuple):
    """Two players by their numbers, what the first scored (1, ½, 0), and the number of the question."""

    first: int
    second: int
    score: float
    question: int = 0


class Rating(NamedTuple):
    """A player's rating; see the head of this file."""

    mean: float
    order: float
    low: float
    high: float


def elo(games: Sequence[Game], players: int, *, orders: int = ORDERS, seed: int = 0) -> list[Rating]:
    """Return the ratings of players ``0 … players - 1``.

    Args:
        games: at least one; nobody plays against themselves.
        players: how many there are.
        orders: in which they are played.
        seed: of the orders and of the questions that are drawn.
    """
    rng = np.random.default_rng(seed)
    played = ratings(games, players, orders=orders, rng=rng)
    drawn = ratings(games, players, orders=orders, rng=rng, draws_questions=True)
    low, high = np.percentile(drawn, [2.5, 97.5], axis=0)
    mean, spread = played.mean(0), played.std(0, ddof=1) if orders > 1 else np.zeros(players)
    return [
        Rating(float(mean[i]), float(1.96 * spread[i] / np.sqrt(orders)), float(low[i]), float(high[i]))
        for i in range(players)
    ]


def ratings(
    games: Sequence[Game], players: int, *, orders: int, rng: np.random.Generator, draws_questions: bool = False
) -> Floats:
    """Return the ratings after all games, for each of so many random orders [orders, players].

    Args:
        games: as in :func:`elo`.
        players: how many there are.
        orders: rows of the result.
        rng: draws them.
        draws_questions: draw the questions too, with replacement.
    """
    table = _by_question(games) if draws_questions else np.arange(len(games))[None]
    at_once = max(1, AT_ONCE // table.size)
    parts = []
    for start in range(0, orders, at_once):
        count = min(at_once, orders - start)
        if draws_questions:
            order = table[rng.integers(len(table), size=(count, len(table)))].reshape(count, -1)
        else:
            order = np.broadcast_to(table[0], (count, len(games)))
        parts.append(play(games, players, rng.permuted(order, axis=1)))
    return np.concatenate(parts)


def play(games: Sequence[Game], players: int, order: Ints) -> Floats:
    """Return the ratings after the games of each row of ``order`` [orders, games]; -1 stands for no game."""
    first, second = np.array([game.first for game in games]), np.array([game.second for game in games])
    score = np.array([game.score for game in games], float)
    rating = np.full((len(order), players), START)
    rows = np.arange(len(order))
    for step in order.T:
        one, other = first[step], second[step]
        before, their = rating[rows, one], rating[rows, other]
        change = K * (score[step] - 1 / (1 + 10 ** ((their - before) / SPREAD)))
        change[step < 0] = 0
        rating[rows, one] = before + change
        rating[rows, other] = their - change
    return rating


def _by_question(games: Sequence[Game]) -> Ints:
    """Return the games of each question [questions, most games], filled up with -1."""
    numbers: dict[int, list[int]] = {}
    for number, game in enumerate(games):
        numbers.setdefault(game.question, []).append(number)
    most = max(map(len, numbers.values()))
    return np.array([own + [-1] * (most - len(own)) for own in numbers.values()])

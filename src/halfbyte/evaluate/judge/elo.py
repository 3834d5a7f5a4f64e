"""Elo ratings from judged pairs, averaged over many orders of the same games (QLoRA's paper, section 5.2).

    E = 1 / (1 + 10^((R_b − R_a) / 400))       what a is expected to score against b
    R_a ← R_a + K (S − E), R_b ← R_b − K (S − E)     S: 1 a win, ½ a tie, 0 a loss

Everybody begins with 1000, K is 32. A rating depends on the order in which the games are played, so they are played in
10,000 random orders, and ratings are means. Two intervals of 95 % say two things:

    order      ± 1.96 s/√10,000: how far the mean is from that over all orders; the paper's
    low, high  mean ± 1.96 SE: how far it could be with other questions. The questions are drawn anew, with replacement
               and with all of their games, 200 times (a bootstrap), and each draw is played in 50 orders:
               SE² = Q/(Q−1) (the variance of the draws' means − that within a draw / 50), Q the number of questions

All orders are played at once, game by game: arrays ``[orders, players]``.
"""

from collections.abc import Callable, Sequence
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

START, K, ORDERS = 1000.0, 32.0, 10_000
SPREAD = 400.0
DRAWS = 200
"""How often the questions are drawn anew."""
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
    """A player's rating; see the head of this file. A single question tells nothing of others."""

    mean: float
    order: float
    low: float | None
    high: float | None


def elo(games: Sequence[Game], players: int, *, orders: int = ORDERS, seed: int = 0) -> list[Rating]:
    """Return the ratings of players ``0 … players - 1``.

    Args:
        games: at least one; nobody plays against themselves.
        players: how many there are.
        orders: in which they are played, two at least.
        seed: of the orders and of the questions that are drawn.
    """
    rng = np.random.default_rng(seed)
    every = np.arange(len(games))
    played = ratings(games, players, lambda start, end: np.broadcast_to(every, (end - start, len(every))), orders, rng)
    mean, order = played.mean(0), 1.96 * played.std(0, ddof=1) / np.sqrt(orders)
    table = _by_question(games)
    if len(table) == 1:
        return [Rating(float(mean[i]), float(order[i]), None, None) for i in range(players)]
    half = 1.96 * _question_errors(games, players, table, max(2, orders // DRAWS), rng)
    return [
        Rating(float(mean[i]), float(order[i]), float(mean[i] - half[i]), float(mean[i] + half[i]))
        for i in range(players)
    ]


def _question_errors(games: Sequence[Game], players: int, table: Ints, each: int, rng: np.random.Generator) -> Floats:
    """Return the standard errors of the mean ratings when the questions are drawn anew [players].

    Args:
        games: all.
        players: how many there are.
        table: the games of each question.
        each: orders in which each draw is played.
        rng: draws.
    """
    count = len(table)
    draws = rng.integers(count, size=(DRAWS, count))

    def rows(start: int, end: int) -> Ints:
        own: Ints = table[draws[np.arange(start, end) // each]].reshape(end - start, -1)
        return own

    played = ratings(games, players, rows, DRAWS * each, rng).reshape(DRAWS, each, players)
    variance = played.mean(1).var(0, ddof=1) - played.var(1, ddof=1).mean(0) / each
    errors: Floats = np.sqrt(np.maximum(variance, 0) * count / (count - 1))
    return errors


def ratings(
    games: Sequence[Game],
    players: int,
    rows: Callable[[int, int], Ints],
    count: int,
    rng: np.random.Generator,
) -> Floats:
    """Return the ratings after rows of games, each in a random order [count, players].

    Args:
        games: as in :func:`elo`.
        players: how many there are.
        rows: returns the rows from one number to another, numbers of games or -1 for none.
        count: of rows.
        rng: draws the orders.
    """
    at_once = max(1, AT_ONCE // rows(0, 1).size)
    parts = [(start, min(start + at_once, count)) for start in range(0, count, at_once)]
    return np.concatenate([play(games, players, rng.permuted(rows(*part), axis=1)) for part in parts])


def play(games: Sequence[Game], players: int, order: Ints) -> Floats:
    """Return the ratings after the games of each row of ``order`` [rows, games]; -1 stands for no game."""
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

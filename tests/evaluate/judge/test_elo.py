"""Elo ratings against closed forms, a plain loop, and the mean over every order."""

import itertools
import math

import numpy as np
import pytest

from halfbyte.evaluate.judge.elo import Game, elo, play

K = 32


def by_hand(games, order, players):
    """The rules, a game at a time."""
    rating = [1000.0] * players
    for number in order:
        game = games[number]
        expected = 1 / (1 + 10 ** ((rating[game.second] - rating[game.first]) / 400))
        change = K * (game.score - expected)
        rating[game.first] += change
        rating[game.second] -= change
    return rating


def test_one_game_between_equals_moves_sixteen_points_and_a_tie_none() -> None:
    [one, other] = elo([Game(0, 1, 1.0)], 2, orders=10)
    assert (one.mean, other.mean) == (1016, 984) and one.order == 0 and one.low is None  # of other questions: nothing
    assert [rating.mean for rating in elo([Game(0, 1, 0.5)], 2, orders=10)] == [1000, 1000]


@pytest.mark.parametrize("wins", [1, 2, 5, 40])
def test_two_players_of_whom_one_always_wins(wins: int) -> None:
    """The difference d grows by 2 K / (1 + 10^(d/400)), whatever the order."""
    apart = 0.0
    for _ in range(wins):
        apart += 2 * K / (1 + 10 ** (apart / 400))
    [one, other] = elo([Game(0, 1, 1.0)] * wins, 2, orders=5)
    assert one.mean == pytest.approx(1000 + apart / 2) and other.mean == pytest.approx(1000 - apart / 2)


def test_ratings_settle_where_scores_are_as_expected() -> None:
    """Who scores three of four is expected to at 400 log10(3) points more."""
    games = [Game(0, 1, 1.0)] * 3000 + [Game(0, 1, 0.0)] * 1000
    [one, other] = elo(games, 2, orders=300)
    assert one.mean - other.mean == pytest.approx(400 * math.log10(3), abs=8)


def test_each_order_is_played_by_the_rules() -> None:
    rng = np.random.default_rng(3)
    games = [
        Game(*map(int, rng.choice(4, 2, replace=False)), float(rng.choice([0, 0.5, 1])), int(rng.integers(5)))
        for _ in range(30)
    ]
    order = rng.permuted(np.tile(np.arange(30), (20, 1)), axis=1)
    found = play(games, 4, order)
    for row, numbers in zip(found, order, strict=True):
        assert row == pytest.approx(by_hand(games, numbers, 4))
    assert found.sum(1) == pytest.approx(np.full(20, 4000))


def test_the_mean_is_that_over_every_order() -> None:
    games = [Game(0, 1, 1.0), Game(1, 2, 1.0), Game(2, 0, 0.5), Game(0, 2, 1.0), Game(1, 0, 1.0)]
    every = np.array([by_hand(games, order, 3) for order in itertools.permutations(range(5))])
    found = elo(games, 3, orders=10_000)
    for player, rating in enumerate(found):
        assert abs(rating.mean - every[:, player].mean()) < 1.5 * rating.order + 1e-9
        assert rating.order == pytest.approx(1.96 * every[:, player].std() / 100, rel=0.05)


def test_an_interval_is_the_deviation_of_means_over_sets_of_questions() -> None:
    """As if somebody had really asked other questions: 300 sets of 60, each with its own mean over orders."""

    def asked(seed: int) -> list[Game]:
        rng = np.random.default_rng(seed)
        games = []
        for question in range(60):
            score = float(rng.random() < 0.7)  # the same in both orders, so a question's games go together
            games += [Game(0, 1, score, question), Game(1, 0, 1 - score, question)]
        return games

    means = [elo(asked(seed), 2, orders=200)[0].mean for seed in range(100)]
    halves = []
    for seed in range(8):
        rating = elo(asked(1000 + seed), 2, orders=4000)[0]
        assert rating.low is not None and rating.high is not None and rating.low < rating.mean < rating.high
        halves.append((rating.high - rating.low) / 2)
    assert np.mean(halves) == pytest.approx(1.96 * np.std(means, ddof=1), rel=0.25)
    assert np.mean(halves) > 5 * elo(asked(0), 2, orders=4000)[0].order


def test_questions_on_which_all_agree_leave_no_doubt() -> None:
    sure = elo([Game(0, 1, 1.0, question) for question in range(30)], 2, orders=200)[0]
    assert sure.low is not None and sure.high is not None and sure.high - sure.low < 1e-6


def test_a_question_with_fewer_games_is_filled_up_with_none() -> None:
    games = [Game(0, 1, 1.0, 0), Game(1, 0, 0.0, 0), Game(0, 1, 0.0, 1)]
    padded = play(games, 2, np.array([[0, 1, 2, -1], [2, -1, 2, -1]]))
    assert padded[0] == pytest.approx(by_hand(games, [0, 1, 2], 2))
    assert padded[1] == pytest.approx(by_hand(games, [2, 2], 2))


def test_a_seed_gives_the_same_again_and_another_nearly_the_same() -> None:
    games = [Game(0, 1, float(i % 3 == 0), i) for i in range(40)]
    first, again, other = (elo(games, 2, orders=4000, seed=seed) for seed in (0, 0, 1))
    assert first == again and first != other
    assert first[0].mean == pytest.approx(other[0].mean, abs=3 * first[0].order)

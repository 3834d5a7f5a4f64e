"""What came of judgements, counted by hand."""

import pytest

from halfbyte.evaluate.judge.elo import elo
from halfbyte.evaluate.judge.summary import games_of, summary_of


def line(question: str, first: str, second: str, verdict, scale: str = "classes") -> dict:
    return {"question": question, "first": first, "second": second, "verdict": verdict, "scale": scale, "judge": "j"}


LINES = [
    line("1", "a", "b", 1), line("1", "b", "a", 2),  # a both times
    line("2", "a", "b", 1), line("2", "b", "a", 1),  # whoever stands first
    line("3", "a", "b", 3), line("3", "b", "a", None),
    line("1", "a", "c", 2), line("1", "c", "a", 1),
]  # fmt: skip


def test_pairs_are_counted_and_what_is_unreadable_counts_for_nobody() -> None:
    found = summary_of(LINES, "classes", orders=50, seed=0)
    assert (found.judge, found.judgements, found.unreadable) == ("j", 8, 1)
    pair, other = found.pairs
    assert (pair.one, pair.other, pair.wins, pair.ties, pair.losses, pair.unreadable) == ("a", "b", 3, 1, 1, 1)
    assert (pair.both_orders, pair.agreed) == (2, 1)
    assert (other.other, other.losses, other.agreed, other.both_orders) == ("c", 2, 1, 1)
    assert found.first == pytest.approx(4 / 6)
    assert "1 of 8 replies hold no verdict" in found.notes[0] and "66.7%" in found.notes[1]


def test_ratings_are_those_of_the_games_and_the_best_comes_first() -> None:
    found = summary_of(LINES, "classes", orders=50, seed=4)
    games = games_of(LINES, ["a", "b", "c"])
    assert [game.score for game in games] == [1, 0, 1, 1, 0.5, 0, 1]
    wanted = {name: rating.mean for name, rating in zip("abc", elo(games, 3, orders=50, seed=4), strict=True)}
    assert {one.name: one.rating for one in found.ratings} == wanted
    assert [one.rating for one in found.ratings] == sorted(wanted.values(), reverse=True)


def test_scores_are_relative_to_the_baseline() -> None:
    lines = [
        line("1", "a", "b", [8, 4], "scores"), line("1", "b", "a", [6, 10], "scores"),
        line("2", "a", "b", [5, 5], "scores"), line("2", "b", "a", None, "scores"),
    ]  # fmt: skip
    found = summary_of(lines, "scores", baseline="a", orders=2, seed=0)
    one, other = found.scores
    assert (one.name, one.mean, one.judgements, one.relative) == ("a", pytest.approx(23 / 3), 3, None)
    assert (other.name, other.mean, other.relative) == ("b", 5.0, pytest.approx(15 / 23))
    assert not found.ratings and found.first is None


def test_a_judge_that_says_nothing_has_no_ratings() -> None:
    found = summary_of([line("1", "a", "b", None)], "classes", orders=2, seed=0)
    assert found.unreadable == 1 and not found.ratings and "hold no verdict" in found.notes[0]
    assert found.tables() == []

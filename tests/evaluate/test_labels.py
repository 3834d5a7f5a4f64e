"""Figures of classes and texts against their definitions, written another way."""

import itertools

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from halfbyte.evaluate.labels import label_scores
from halfbyte.evaluate.references import exact_match, reference_scores, rouge_l

PAIRS = st.lists(st.tuples(st.integers(0, 3), st.integers(0, 3)), min_size=1, max_size=40)


@given(PAIRS)
def test_accuracy_f1_and_matthews_are_those_of_their_definitions(pairs: list[tuple[int, int]]) -> None:
    right, named = map(np.array, zip(*pairs, strict=True))
    found = label_scores(right.tolist(), named.tolist())
    assert found["accuracy"] == pytest.approx(np.mean(right == named))
    scores = []
    for kind in {*right, *named}:
        hits = np.sum((right == kind) & (named == kind))
        precision, recall = hits / max(np.sum(named == kind), 1), hits / max(np.sum(right == kind), 1)
        scores.append(0.0 if not hits else 2 * precision * recall / (precision + recall))
    assert found["f1"] == pytest.approx(np.mean(scores))
    # Gorodkin: the correlation of the indicator matrices
    x, y = (np.eye(4)[labels] - np.eye(4)[labels].mean(0) for labels in (right, named))
    spread = np.sqrt((x * x).sum() * (y * y).sum())
    assert found["matthews"] == pytest.approx((x * y).sum() / spread if spread > 1e-9 else 0.0, abs=1e-9)


def test_matthews_of_two_classes_is_their_correlation() -> None:
    right, named = [0, 0, 1, 1, 1, 0, 1], [0, 1, 1, 1, 0, 0, 1]
    assert label_scores(right, named)["matthews"] == pytest.approx(np.corrcoef(right, named)[0, 1])


@given(st.lists(st.sampled_from("abc"), max_size=7), st.lists(st.sampled_from("abc"), max_size=7))
def test_rouge_l_is_that_of_the_longest_common_subsequence_found_by_trying_all(one: list[str], two: list[str]) -> None:
    subsequences = [
        {words for size in range(len(text) + 1) for words in itertools.combinations(text, size)} for text in (one, two)
    ]
    longest = max(len(words) for words in subsequences[0] & subsequences[1])
    wanted = 2 * longest / (len(one) + len(two)) if one and two else 0.0
    assert rouge_l(" ".join(one), " ".join(two)) == pytest.approx(wanted)


def test_texts_are_compared_without_case_punctuation_and_blanks() -> None:
    assert exact_match(" The  cat.", "the cat") and not exact_match("the cat", "a cat")
    assert rouge_l("The cat-flap, shut!", "the CAT flap shut") == 1.0
    assert reference_scores(["a b", "c"], ["a b.", "d"]) == {"rouge_l": 0.5, "exact_match": 0.5}

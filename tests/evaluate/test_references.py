"""Words of any script; ROUGE-L, F1 and exact match against rouge-score and against their definitions."""

import re
import string
from collections import Counter
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from halfbyte.data.examples import BadRow
from halfbyte.data.prompts import Asked, asked_of
from halfbyte.evaluate.references import best_scores, exact_match, f1, references_of, rouge_l
from halfbyte.evaluate.words import plain, words_of

ASCII = st.text(st.characters(min_codepoint=32, max_codepoint=126), max_size=60)
SOME = ["the", "The", "cat's", "cat", "sat;", "on", "mat.", "mat!", "42", "a-b"]
ENGLISH = st.lists(st.sampled_from(SOME), max_size=12).map(" ".join)


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("The cat-flap, SHUT!", ["the", "cat", "flap", "shut"]),
        ("北京是中国的首都。", list("北京是中国的首都")),
        ("GPT-4用了3个月", ["gpt", "4", "用", "了", "3", "个", "月"]),
        ("ＡＢＣ、１２", ["abc", "12"]),
        ("東京タワーへ行く", ["東", "京", "タ", "ワ", "ー", "へ", "行", "く"]),
        ("서울은 수도다", ["서울은", "수도다"]),
        ("กินข้าว", ["กิ", "น", "ข้", "า", "ว"]),
        ("नमस्ते दुनिया", ["नमस्ते", "दुनिया"]),
        ("Größe Ça Привет", ["größe", "ça", "привет"]),
        ("cafe\u0301 = caf\u00e9", ["café", "café"]),
        ("👍 …", []),
        ("", []),
    ],
)
def test_words_are_runs_of_letters_or_characters_of_scripts_without_blanks(text: str, words: list[str]) -> None:
    assert words_of(text) == words


@given(ASCII)
def test_words_of_ascii_are_those_of_rouge_score(text: str) -> None:
    tokenize = pytest.importorskip("rouge_score.tokenize").tokenize
    assert words_of(text) == tokenize(text, None)


@given(ENGLISH, ENGLISH)
def test_rouge_l_of_english_is_that_of_rouge_score(answer: str, reference: str) -> None:
    scorer = pytest.importorskip("rouge_score.rouge_scorer").RougeScorer(["rougeL"])
    assert rouge_l(answer, reference) == pytest.approx(scorer.score(reference, answer)["rougeL"].fmeasure)


def test_chinese_has_a_rouge_l_where_rouge_score_finds_nothing() -> None:
    answer, reference = "北京是首都。", "北京是中国的首都"
    assert rouge_l(answer, reference) == pytest.approx(2 * 5 / (5 + 8))
    assert f1("首都是北京", reference) == pytest.approx(2 * 5 / (5 + 8))
    assert exact_match("北京。", "北京") and not exact_match("北京", "南京")


@given(ENGLISH, ENGLISH)
def test_f1_counts_shared_words(answer: str, reference: str) -> None:
    one, other = Counter(words_of(answer)), Counter(words_of(reference))
    shared = sum(min(one[word], other[word]) for word in one)
    precision, recall = shared / max(1, one.total()), shared / max(1, other.total())
    assert f1(answer, reference) == pytest.approx(2 * precision * recall / (precision + recall) if shared else 0)


@given(ASCII)
def test_texts_are_compared_as_super_naturalinstructions_does(text: str) -> None:
    theirs = "".join(character for character in text.lower() if character not in set(string.punctuation))
    assert plain(text) == re.sub(r"\s+", " ", theirs).strip()


def test_the_best_of_several_references_counts_for_each_metric_by_itself() -> None:
    found = best_scores("a b c", ["c b a", "a b x y", "a b c!"])
    assert found == {"rouge_l": 1.0, "f1": 1.0, "exact_match": 1.0}
    found = best_scores("a b c", ["c b a", "a b x y"])
    assert found == {"rouge_l": pytest.approx(4 / 7), "f1": 1.0, "exact_match": 0.0}


def asked(row: Any) -> Asked:
    [found] = asked_of([("rows.jsonl, row 1", row)])
    assert isinstance(found, Asked), found
    return found


@pytest.mark.parametrize(
    ("row", "references"),
    [
        ({"prompt": "p", "completion": "one"}, ["one"]),
        ({"prompt": "p", "references": ["one", "two"]}, ["one", "two"]),
        ({"prompt": "p", "references": "one"}, ["one"]),
        ({"question": "q", "answer": "a", "references": ["b", 3]}, ["b", "3"]),
        ({"question": "q", "answers": {"text": ["a", "b"], "answer_start": [0, 1]}}, ["a", "b"]),
        ({"question": "q", "answers": ["a", "b"]}, ["a", "b"]),
        ({"messages": [{"role": "user", "content": "q"}, {"role": "assistant", "content": "a"}]}, ["a"]),
    ],
)
def test_a_row_says_one_reference_or_several(row: Any, references: list[str]) -> None:
    assert references_of(asked(row)) == references


@pytest.mark.parametrize(
    ("row", "told"),
    [
        ({"prompt": "p"}, "says no answer that should come"),
        ({"prompt": "p", "references": []}, "says no answer that should come"),
        ({"prompt": "p", "references": [["a"]]}, "has references that is no list of texts"),
        ({"prompt": "p", "completion": "👍"}, "find no letter and no digit of any script"),
    ],
)
def test_a_row_without_something_to_compare_is_told(row: Any, told: str) -> None:
    with pytest.raises(BadRow, match=rf"rows.jsonl, row 1 .*{told}"):
        references_of(asked(row))

"""Overlaps against sets of all n-grams, and what GPT-3's rule says of short texts and of phrases."""

import itertools

import pytest
from hypothesis import given
from hypothesis import strategies as st

from halfbyte.evaluate.contamination import COMMON, Training, overlaps
from halfbyte.evaluate.words import words_of

WORDS = st.lists(st.sampled_from("abcd"), max_size=12).map(" ".join)


def placed(texts: list[str]) -> Training:
    return lambda: ((f"row {number}", text) for number, text in enumerate(texts, start=1))


def said(*pairs: tuple[str, str]) -> Training:
    return lambda: pairs


def all_grams(text: str, length: int) -> set[tuple[str, ...]]:
    words = words_of(text)
    return {tuple(words[place : place + length]) for place in range(len(words) - length + 1)}


@given(st.lists(WORDS, max_size=6), st.lists(WORDS, max_size=8), st.integers(1, 4))
def test_a_text_overlaps_if_one_of_its_n_grams_is_trained(texts: list[str], training: list[str], n: int) -> None:
    found = overlaps(texts, placed(training), n)
    for text, hit in zip(texts, found, strict=True):
        length = min(n, len(words_of(text)))
        holds = [row for row in training if length and all_grams(text, length) & all_grams(row, length)]
        assert (hit is not None) == bool(holds)
        if hit:
            assert tuple(hit.gram.split()) in all_grams(text, length)
            row = training[int(hit.where.split()[1]) - 1]
            assert tuple(hit.gram.split()) in all_grams(row, length)
            words = words_of(text)
            shared = all_grams(text, length) & set(itertools.chain(*(all_grams(row, length) for row in training)))
            inside = [
                any(
                    tuple(words[at : at + length]) in shared
                    for at in range(max(0, place - length + 1), min(place + 1, len(words) - length + 1))
                )
                for place in range(len(words))
            ]
            assert hit.covered == pytest.approx(sum(inside) / len(words))


def test_thirteen_words_in_a_row_and_no_fewer() -> None:
    text = " ".join(f"w{i}" for i in range(20))
    rows = [("a", " ".join(f"w{i}" for i in range(3, 15))), ("b", " ".join(f"W{i}," for i in range(3, 16)))]
    [hit] = overlaps([text], said(*rows[:1]))
    assert hit is None
    [hit] = overlaps([text], said(*rows))
    assert hit and hit.where == "b" and hit.gram.split()[0] == "w3" and hit.covered == pytest.approx(13 / 20)


def test_a_shorter_text_overlaps_as_a_whole() -> None:
    training = said(("a", "Tell me who wrote Emma."), ("b", "Who, pray, wrote it?"))
    found = overlaps(["Who wrote Emma?", "Who wrote"], training)
    assert [hit is not None for hit in found] == [True, True]
    assert overlaps(["Who wrote Emma?"], said(("b", "Who wrote Persuasion?"))) == [None]


def test_chinese_is_compared_by_its_characters() -> None:
    question = "请问中华人民共和国的首都是哪一座城市呢"
    [hit] = overlaps([question], said(("a", "答：" + question[2:16] + "？")))
    assert hit and hit.where == "a"
    assert overlaps([question], said(("a", "首都是北京"))) == [None]


def test_what_many_rows_say_is_a_phrase_and_a_row_that_is_trained_often_is_none() -> None:
    question = (
        "Below is an instruction that describes a task. Write a response that completes the request. Name a tree."
    )
    template = [
        f"Below is an instruction that describes a task. Write a response that completes the request. {i}"
        for i in range(COMMON + 1)
    ]
    assert overlaps([question], placed(template)) == [None]
    [hit] = overlaps([question], placed(template[:COMMON]))
    assert hit is not None
    [hit] = overlaps([question], placed([question] * 30))
    assert hit is not None and hit.covered == 1.0


def test_words_of_a_template_are_none_of_a_texts_own() -> None:
    """An instruction of ten words and three of anybody's are no overlap, nor is a shorter text's template."""
    asked = "Is this snippet of a movie review positive or negative? Answer with one word. {}"
    rows = [asked.format(f"It's a film number{i} about {word}") for i, word in enumerate("abcdefghijklmnopq")]
    plain = "It's a film that nobody in the whole town has ever seen or will want to see"
    assert overlaps([asked.format(plain)], placed(rows)) == [None]
    [hit] = overlaps([asked.format(plain)], placed([*rows, f"Say: {plain}"]))
    assert hit and hit.where == "row 18" and hit.gram.startswith("that nobody in") and hit.covered == 1.0
    [short, other] = overlaps([asked.format("Dull stuff"), asked.format("Dull")], placed([*rows, "dull stuff!"]))
    assert short and short.gram == "dull stuff" and other and other.gram == "dull"
    assert overlaps([asked.format("")], placed(rows)) == [None]


def test_a_text_without_words_overlaps_with_nothing() -> None:
    assert overlaps(["", "…"], placed(["", "a"])) == [None, None]
    assert overlaps([], placed(["a"])) == []

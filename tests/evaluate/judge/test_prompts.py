"""What a judge is asked, and that a verdict is read where it belongs or not at all."""

import pytest

from halfbyte.evaluate.judge.prompts import KINDS, ask, class_of, scores_of


@pytest.mark.parametrize("scale", ["classes", "scores"])
@pytest.mark.parametrize("category", [*KINDS, "roleplay"])
def test_a_prompt_has_question_and_answers_in_their_order(scale: str, category: str) -> None:
    text = ask(scale, "What {is} 2+2?", "It is {4}.", "Five.", category)
    assert text.index("What {is} 2+2?") < text.index("It is {4}.") < text.index("Five.")
    assert "order" in text and ("3 if" in text if scale == "classes" else "from 1 to 10" in text)
    assert (text == ask(scale, "What {is} 2+2?", "It is {4}.", "Five.")) == (category in ("general", "roleplay"))


@pytest.mark.parametrize(
    ("reply", "verdict"),
    [
        ("The first is better.\n1", 1),
        ("2", 2),
        ("Both are fine.\n\n**3**\n\n", 3),
        ("reasons\n`2`.", 2),
        ("<think>1\n</think>The second.\n2", 2),
        ("<think>\n1", None),
        ("Assistant 1 is better.", None),
        ("Answer: 1", None),
        ("1\nThe first is better.", None),
        ("4", None),
        ("12", None),
        ("1 2", None),
        ("", None),
        ("banana " * 50, None),
    ],
)
def test_a_class_is_the_number_on_the_last_line(reply: str, verdict: int | None) -> None:
    assert class_of(reply) == verdict


@pytest.mark.parametrize(
    ("reply", "scores"),
    [
        ("8 7\nThe first ...", (8, 7)),
        ("8.5, 10", (8.5, 10)),
        ("\n**1 10**\nreasons", (1, 10)),
        ("8\n7", None),
        ("Scores: 8 7", None),
        ("0 5", None),
        ("11 5", None),
        ("8/10 7/10", None),
        ("8 7 6", None),
        ("The scores are below.\n8 7", None),
        ("", None),
    ],
)
def test_scores_are_the_two_numbers_on_the_first_line(reply: str, scores: tuple[float, float] | None) -> None:
    assert scores_of(reply) == scores

"""Thoughts and answers are parted wherever the pieces of a text end."""

import random

import pytest

from halfbyte.generate.thoughts import Thoughts, opened_by

CASES = {
    "a thought and an answer": (
        None,
        "<think>\nwell, 1 < 2\n</think>\n\nYes <think> no",
        ("well, 1 < 2\n", "Yes <think> no"),
    ),
    "behind blanks": (None, " \n<thought>hm</thought>ok", ("hm", "ok")),
    "no thought": (None, "<thinly> no", ("", "<thinly> no")),
    "blanks of an answer stay": (None, "\n  x = 1", ("", "\n  x = 1")),
    "opened by the prompt": ("think", "so </thin it </think>\n\nthen", ("so </thin it ", "then")),
    "a thought that is cut": (None, "<think>so </thi", ("so </thi", "")),
    "another tag closes nothing": ("reasoning", "a</think>b</reasoning>c", ("a</think>b", "c")),
    "what only begins like a tag": (None, "<thi", ("", "<thi")),
    "nothing": (None, "", ("", "")),
}


@pytest.mark.parametrize("name", CASES)
def test_a_text_is_parted_alike_however_it_comes(name: str) -> None:
    tag, text, expected = CASES[name]
    draw = random.Random(0)
    for _ in range(30):
        cuts = sorted(draw.randint(0, len(text)) for _ in range(draw.randint(0, len(text))))
        parts = Thoughts(tag)
        shown = [parts.add(text[a:b]) for a, b in zip([0, *cuts], [*cuts, len(text)], strict=True)] + [parts.end()]
        assert (parts.thought, parts.answer) == expected
        for is_thought, whole in zip((True, False), expected, strict=True):
            assert "".join(piece for some in shown for kind, piece in some if kind is is_thought) == whole


@pytest.mark.parametrize(
    ("prompt", "tag"),
    [("<|assistant|>\n<think>\n", "think"), ("<think>\n\n</think>\n\n", None), ("say <think> now", None)],
)
def test_a_prompt_that_opens_a_thought_is_known(prompt: str, tag: str | None) -> None:
    assert opened_by(prompt) == tag

"""What is talked about is shown as it was written, and goes to the model as it was written."""

from types import SimpleNamespace

import pytest

pytest.importorskip("gradio")
from halfbyte.deploy.ui import chat
from halfbyte.deploy.ui.chat import Chat, plain, shown, text_of


def test_what_is_said_while_an_answer_grows_stays() -> None:
    opened = SimpleNamespace(names=["adapter", "base"])
    grown = [["a", ""], ["ab", "c"], ["ab", "cd"]]
    talk = SimpleNamespace(now=opened, side_by_side=lambda asked, options: iter(grown))
    station = Chat.__new__(Chat)  # its handlers, without the components of a page
    station.ui = SimpleNamespace(talk=talk)
    skipped = chat.gr.skip()
    seen = list(station._send("en", "Well?", [], [], "", 0.0, 1.0, 8, ""))
    assert [(one[0], one[3]) for one in seen] == [("", ""), *[(skipped, skipped)] * 2]
    assert [text_of(side[-1]) for side in seen[-1][1:3]] == ["ab", "cd"]


@pytest.mark.parametrize(
    "text",
    [
        "<table><tr><td>1</td></tr></table>",
        "A tag: <think>so</think>, and `code`",
        "````\nfour\n```` and <b>bold</b> and ```````",
        "<!-- nothing -->",
        "a </div> that ends",
        "a`b<c",
    ],
)
def test_a_text_with_tags_is_a_block_of_code_and_itself_again(text: str) -> None:
    fence, _, rest = shown(text).partition("text\n")
    assert set(fence) == {"`"} and fence not in text and rest == f"{text}\n{fence}"
    for content in (shown(text), [{"type": "text", "text": shown(text)}]):
        assert text_of({"role": "user", "content": content}) == text
        assert plain([{"role": "user", "content": content}], "Be kind")[1]["content"] == text


@pytest.mark.parametrize(
    "text",
    [
        "1 < 2 and 3 <4",
        "**bold**",
        "`<b>` is bold",
        "```html\n<b>bold</b>\n```",
        "```html\n<b>still written",
        "",
    ],
)
def test_other_texts_are_markdown(text: str) -> None:
    assert shown(text) == text == text_of({"role": "assistant", "content": text})

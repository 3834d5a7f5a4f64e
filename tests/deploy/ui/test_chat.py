"""What is talked about is shown as it was written, and goes to the model as it was written."""

import pytest

pytest.importorskip("gradio")
from halfbyte.deploy.ui.chat import plain, shown, text_of


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

"""What the chat template is told and what it writes; ``test_tokens`` has the claims about answers and stops."""

from pathlib import Path
from typing import Any

import pytest
from transformers import AutoTokenizer

from halfbyte.data import Chat, Completion, Text
from halfbyte.data.template import Draft, Writer
from halfbyte.errors import InputError

NAMED = (
    "{% for m in messages %}<|im_start|>{{ m.role }}{{ ' ' + m.name if m.name else '' }}\n{{ m.content }}<|im_end|>\n"
    "{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


@pytest.fixture
def tokenizer(tiny_model_folder: Path) -> Any:
    return AutoTokenizer.from_pretrained(tiny_model_folder)


def trained(draft: Draft) -> list[str]:
    return [draft.text[start:end] for start, end in draft.spans]


def test_the_spans_of_a_draft_are_its_answers_with_their_stops(tokenizer: Any) -> None:
    write = Writer(tokenizer)
    turns = [{"role": role, "content": text} for role, text in [("user", "a"), ("assistant", "b")] * 2]
    [chat] = write(Chat("row 1", turns))
    assert trained(chat) == ["b<|im_end|>"] * 2
    [completion] = write(Completion("row 1", "a", "b"))
    assert completion == write(Chat("row 1", turns[:2]))[0]
    [text] = write(Text("row 1", "a text"))
    assert trained(text) == ["a text<|im_end|>"] == [text.text]


def test_what_else_a_message_has_is_there_for_the_template(tokenizer: Any) -> None:
    tokenizer.chat_template = NAMED
    turns = [{"role": "user", "content": "a", "name": "Ann"}, {"role": "assistant", "content": "b"}]
    [draft] = Writer(tokenizer)(Chat("row 1", turns))
    assert draft.text == "<|im_start|>user Ann\na<|im_end|>\n<|im_start|>assistant\nb<|im_end|>"


@pytest.mark.parametrize(("name", "told"), [("\ud800", "lone surrogate"), ([], "brackets within brackets")])
def test_what_else_a_message_has_may_be_bad_too(tokenizer: Any, name: Any, told: str) -> None:
    tokenizer.chat_template = NAMED
    if isinstance(name, list):
        for _ in range(900):  # as deep as JSON's parser takes it
            name = [name]
    turns = [{"role": "user", "content": "a", "name": name}, {"role": "assistant", "content": "b"}]
    with pytest.raises(InputError, match=f"row 7: .*{told}"):
        Writer(tokenizer)(Chat("row 7", turns))

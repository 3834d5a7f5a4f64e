"""Both languages say the same things, with the same values in the same places."""

import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from halfbyte.deploy import ui
from halfbyte.deploy.ui.texts import LANGUAGES, entry, language_of, properties, say, texts_of


def leaves(texts: Any, path: tuple[str, ...] = ()) -> Iterator[tuple[str, str]]:
    if isinstance(texts, dict):
        for key, value in texts.items():
            yield from leaves(value, (*path, str(key)))
    else:
        yield ".".join(path), texts


def test_all_languages_have_the_same_keys_and_values() -> None:
    english = dict(leaves(texts_of("en")))
    for language in LANGUAGES:
        own = dict(leaves(texts_of(language)))
        assert own.keys() == english.keys()
        for key, text in own.items():
            assert isinstance(text, str) and text.strip(), key
            if key.startswith(("say.", "plan.", "data.", "run.")):
                assert set(re.findall(r"{(\w+)}", text)) == set(re.findall(r"{(\w+)}", english[key])), key


def test_chinese_is_chinese() -> None:
    """But for names, and what is written alike."""
    alike = {
        "page.title",
        "chat.top_p.label",
        "train.path.placeholder",
        "train.yaml.placeholder",
        "train.name.placeholder",
    }
    for key, text in leaves(texts_of("zh")):
        assert key in alike or re.search(r"[\u4e00-\u9fff]", text), key


def test_every_text_is_used_and_every_text_that_is_used_is_there() -> None:
    source = "".join(file.read_text() for file in Path(ui.__file__).parent.glob("*.py"))
    used = set(re.findall(r'(?:make\(gr\.\w+, |say\((?:language|ui\.texts\.language), )f?"([\w.{}-]+)"', source))
    for key in used:
        if "{" not in key:
            assert entry("en", key)
    for name in texts_of("en")["say"]:
        assert f"say.{name}" in source or f'"{name}"' in source, name


@pytest.mark.parametrize(
    ("accepted", "language"),
    [
        ("zh-CN,zh;q=0.9,en;q=0.8", "zh"), ("en-GB,en;q=0.9", "en"), ("de,fr;q=0.8", "en"), ("de;q=0.9,zh;q=0.5", "zh"),
        ("en;q=0.3,zh-TW;q=0.7", "zh"), ("", "en"), ("zh;q=nonsense,en", "en"),
    ],
)  # fmt: skip
def test_a_browser_gets_the_language_that_it_asks_for(accepted: str, language: str) -> None:
    assert language_of(accepted) == language


def test_a_component_has_its_texts() -> None:
    assert properties("en", "train.name") == {"label": "Name of the run", "placeholder": "my-first-run"}
    assert ("To answer as the data do", "sft") in properties("en", "train.method")["choices"]
    assert properties("zh", "train.start") == {"value": "开始训练"}
    assert say("en", "say.exists", name="a{b}") == "a{b} is there already; give another name."

"""The library's sentences in the page's languages: none is unknown to the source, and none that a page shows lacks."""

import ast
import re
from collections.abc import Iterator
from pathlib import Path

import pytest

import halfbyte
from halfbyte.deploy.ui import library
from halfbyte.deploy.ui.texts import LANGUAGES
from halfbyte.deploy.ui.train import UNCLEAR

SOURCE = Path(halfbyte.__file__).parent
SHOWN = (
    "data", "plan", "evaluate", "example", "errors.py", "files.py", "hf/layers/activations.py", "hf/models", "train",
    "runs/config", "deploy/merge.py", "deploy/audit.py", "deploy/export", "deploy/folders.py", "deploy/ui",
)  # fmt: skip
"""What runs behind a page."""
NOT_SHOWN = (
    "plan/doctor", "plan/gpus.py", "train/qlora", "train/ray", "evaluate/tasks", "evaluate/judge", "evaluate/parts.py",
    "evaluate/mmlu.py", "evaluate/perplexity.py", "evaluate/references.py",
)  # fmt: skip
WORDS = re.compile(r"[A-Za-z]{3,}.*[A-Za-z]{3,}", re.DOTALL)


def form(node: ast.expr) -> str | None:
    """Return a string of the source with ``{}`` for each value in it."""
    if isinstance(node, ast.Constant):
        return node.value if isinstance(node.value, str) else None
    if isinstance(node, ast.JoinedStr):
        return "".join(str(part.value) if isinstance(part, ast.Constant) else "{}" for part in node.values)
    if isinstance(node, ast.BinOp) and isinstance(node.op, ast.Add):
        sides = form(node.left), form(node.right)
        return None if sides == (None, None) else "".join(side or "{}" for side in sides)
    return None


def strings() -> Iterator[str]:
    for file in SOURCE.rglob("*.py"):
        for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
            if isinstance(node, ast.expr) and (text := form(node)) is not None:
                yield text


def errors() -> Iterator[str]:
    """Yield the sentences of the errors that a page may show."""
    for file in sorted(SOURCE.rglob("*.py")):
        path = file.relative_to(SOURCE).as_posix()
        if not path.startswith(SHOWN) or path.startswith(NOT_SHOWN):
            continue
        for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id == "InputError":
                text = form(node.args[0]) if node.args else None
                if text and WORDS.search(text.replace("{}", "")):
                    yield text


OTHERS = [language for language in LANGUAGES if language != "en"]


@pytest.mark.parametrize("language", OTHERS)
def test_every_form_is_one_of_the_source(language: str) -> None:
    assert set(library.sentences_of(language)) <= set(strings())


@pytest.mark.parametrize("language", OTHERS)
def test_every_error_that_a_page_may_show_has_a_form(language: str) -> None:
    assert sorted(set(errors()) - set(library.sentences_of(language))) == []


@pytest.mark.parametrize(
    ("english", "chinese"),
    [
        ("rows.jsonl holds no rows.", "rows.jsonl 里没有任何行。"),
        ("/a b/run is a file; name a folder.", "/a b/run 是文件；请指定文件夹。"),
        (
            "There is nothing to evaluate on; name more data, or another eval_share.",
            "没有可用于评估的行；请提供更多数据，或换一个 eval_share。",
        ),
        ("There is nothing to train on:\nx: y", "没有可用于训练的行：\nx: y"),
        ("Evaluation: perplexity", "评估：困惑度"),
        ("mean of 5 steps", "5 步平均"),
        (
            "Before training the model answers 'What is it\\'s name? a. b' with 'x' again and again. A base model that "
            "never saw this template may do so; a chat model should not.",
            "训练之前模型对 'What is it\\'s name? a. b' 的回答有问题：with 'x' again and again。"
            "从未见过这个模板的基础模型可能会这样；聊天模型不应如此。",
        ),
        ("1 row", "1 行"),
        ("1,234 examples", "1,234 个示例"),
        ("0 of 1,018 rows", "1,018 行中有 0 行"),
        ("2 rows, 1 prompt", "2 行和 1 个提示词"),
        ("Latin 98%, Han 2% of the rows", "Latin 98%, Han 2%（占行数）"),
        ("Nobody has ever said this.", "Nobody has ever said this."),
        ("unknown option --foo (did you mean 'food'?).", "未知的选项 --foo（是不是 'food'？）。"),
        ("Columns not used: a, b (is a its b?).", "未使用的列：a, b（a 是不是它的 b？）。"),
        (
            "A step needs 3 GiB of memory even with every activation recomputed, but 2 GiB may be used: lower "
            "max_length, or raise memory by 1 GiB.",
            "即使所有激活值都重新计算，一步也需要 3 GiB 内存，但只能使用 2 GiB："
            "请降低 max_length，或把 memory 增加 1 GiB。",
        ),
        (
            "Nobody has ever said this. a is a file; name a folder.",
            "Nobody has ever said this. a 是文件；请指定文件夹。",
        ),
        ("还没有可用的模型。", "还没有可用的模型。"),
        ("", ""),
    ],
)
def test_a_sentence_is_recognised_by_its_form(english: str, chinese: str) -> None:
    assert library.said("zh", english) == chinese
    assert library.said("en", english) == english


def test_what_the_page_recognises_is_what_the_library_says() -> None:
    assert any(UNCLEAR in text for text in strings())


def test_a_text_of_many_sentences_takes_no_time_that_somebody_notices(monkeypatch: pytest.MonkeyPatch) -> None:
    """Counted, not timed: how often a form is tried as a whole."""
    tried = []
    whole = library._whole
    monkeypatch.setattr(library, "_whole", lambda forms, text: tried.append(text) or whole(forms, text))
    for count in (50, 100):
        tried.clear()
        library._piecewise(library.forms_of("zh"), "Nobody says this. " * count)
        assert len(tried) <= library.SPAN * (count + 1)


@pytest.mark.parametrize("language", OTHERS)
def test_every_value_has_its_place(language: str) -> None:
    for english, text in library.sentences_of(language).items():
        places = {int(number) for number in re.findall(r"\{(\d+)\}", text)}
        assert places == set(range(english.count("{}"))), english

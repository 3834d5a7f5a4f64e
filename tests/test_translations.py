"""The Chinese pages are those of the English: each says which version of the English it translates."""

import ast
import hashlib
import re
from pathlib import Path
from typing import Any

import jupytext
import pytest

ROOT = Path(__file__).parents[1]
DOCS = ROOT / "docs"
CHINESE = DOCS / "zh"
PAGES = sorted(
    [
        ROOT / "README.md",
        DOCS / "tutorial" / "README.md",
        *(page for page in DOCS.glob("*.md") if page.name not in ("help.md", "reference.md")),
    ]
)
"""All but what ``--help`` and docstrings say, which is English on every machine."""
LESSONS = sorted((DOCS / "tutorial").glob("[0-9]*.py"))
FENCE = re.compile(r"^```", re.MULTILINE)
HEADING = re.compile(r"^#+ ", re.MULTILINE)
ROW = re.compile(r"^\|", re.MULTILINE)
LINK = re.compile(r"\]\(")
HAN = re.compile(r"[\u4e00-\u9fff]")


def blob(page: Path) -> str:
    """Return what ``git hash-object`` says of a file."""
    text = page.read_bytes()
    return hashlib.sha1(b"blob %d\0" % len(text) + text).hexdigest()


def chinese(page: Path) -> Path:
    """Return where a page's translation lies."""
    return CHINESE / (page.relative_to(DOCS) if page.is_relative_to(DOCS) else page.name)


def check(page: Path, english: str, translation: str) -> None:
    """Hold a translation, with its first line, to the English text of a page as it is now."""
    first, _, text = translation.partition("\n")
    assert first == f"<!-- English: {blob(page)} -->", f"{chinese(page)} is behind: {page.name} has changed"
    for kind in (FENCE, HEADING, ROW, LINK):
        assert len(kind.findall(text)) == len(kind.findall(english)), kind.pattern


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.relative_to(ROOT).as_posix())
def test_a_chinese_page_is_of_the_english_as_it_is_now(page: Path) -> None:
    check(page, page.read_text(encoding="utf-8"), chinese(page).read_text(encoding="utf-8"))


@pytest.mark.parametrize("lesson", LESSONS, ids=lambda lesson: lesson.stem)
def test_a_chinese_lesson_is_the_english_one_in_other_words(lesson: Path) -> None:
    english, translation = (jupytext.read(path).cells for path in (lesson, chinese(lesson)))
    assert [cell.cell_type for cell in translation] == [cell.cell_type for cell in english]
    words = [
        "\n\n".join(cell.source for cell in cells if cell.cell_type == "markdown") for cells in (english, translation)
    ]
    check(lesson, *words)
    for ours, theirs in zip(translation, english, strict=True):
        if ours.cell_type == "markdown":
            assert HAN.search(ours.source)
        else:
            assert code(ours) == code(theirs)


def code(cell: Any) -> str:
    """Return what a cell does: without its comments, and without what docstrings say."""
    source: str = cell.source
    if source.startswith("%%"):
        return source
    tree = ast.parse(source)
    for node in ast.walk(tree):
        if isinstance(node, ast.FunctionDef | ast.ClassDef) and ast.get_docstring(node):
            node.body[0] = ast.Pass()
    return ast.dump(tree)


def test_every_chinese_page_has_an_english_one() -> None:
    found = {path for ending in ("*.md", "*.py") for path in CHINESE.rglob(ending)}
    assert found == {chinese(page) for page in (*PAGES, *LESSONS)}

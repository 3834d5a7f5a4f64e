"""The Chinese pages are those of the English: each says which version of the English it translates."""

import hashlib
import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
DOCS = ROOT / "docs"
PAGES = sorted(
    [ROOT / "README.md", *(page for page in DOCS.glob("*.md") if page.name not in ("help.md", "reference.md"))]
)
"""All but what ``--help`` and docstrings say, which is English on every machine."""
FENCE = re.compile(r"^```", re.MULTILINE)
HEADING = re.compile(r"^#+ ", re.MULTILINE)
ROW = re.compile(r"^\|", re.MULTILINE)
LINK = re.compile(r"\]\(")


def blob(page: Path) -> str:
    """Return what ``git hash-object`` says of a file."""
    text = page.read_bytes()
    return hashlib.sha1(b"blob %d\0" % len(text) + text).hexdigest()


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_a_chinese_page_is_of_the_english_as_it_is_now(page: Path) -> None:
    first, _, chinese = (DOCS / "zh" / page.name).read_text(encoding="utf-8").partition("\n")
    assert first == f"<!-- English: {blob(page)} -->", f"docs/zh/{page.name} is behind: {page.name} has changed"
    english = page.read_text(encoding="utf-8")
    for kind in (FENCE, HEADING, ROW, LINK):
        assert len(kind.findall(chinese)) == len(kind.findall(english)), kind.pattern


def test_every_chinese_page_has_an_english_one() -> None:
    assert {page.name for page in (DOCS / "zh").glob("*.md")} == {page.name for page in PAGES}

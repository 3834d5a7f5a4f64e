"""The words of a text in any script, as ROUGE-L, F1 and the search for overlaps count them.

A word is a run of letters, marks and digits, in lower case and in Unicode's form NFKC. Scripts that put no blanks
between words (Han, kana, Thai, Lao, Khmer, Burmese, Tibetan) have a word for each character, with the marks upon it,
as sacrebleu's and CMRC's tokenizers do with Chinese. On ASCII without underscores these are the words of rouge-score,
which has no others.
"""

import unicodedata

import regex

_ALONE = r"\p{Han}\p{Hiragana}\p{Katakana}\p{Thai}\p{Lao}\p{Khmer}\p{Myanmar}\p{Tibetan}"
_WORD = regex.compile(
    rf"(?V1)[[{_ALONE}]&&[\p{{L}}\p{{N}}]]\p{{M}}*|[[\p{{L}}\p{{N}}]--[{_ALONE}]][[\p{{L}}\p{{M}}\p{{N}}]--[{_ALONE}]]*"
)
_BETWEEN = regex.compile(r"[\p{P}$+<=>^`|~]+")
"""Punctuation of every script, and what else :data:`string.punctuation` has."""


def words_of(text: str) -> list[str]:
    """Return the words of a text, in order."""
    words: list[str] = _WORD.findall(unicodedata.normalize("NFKC", text).lower())
    return words


def plain(text: str) -> str:
    """Return a text without case and punctuation, with one blank where there were some."""
    return " ".join(_BETWEEN.sub("", unicodedata.normalize("NFKC", text).lower()).split())

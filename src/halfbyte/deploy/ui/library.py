"""What the library says, in the page's language.

The library's own sentences are English. ``texts/library.LANGUAGE.yaml`` has them by their form in the source, ``{}``
where a value stands, each with the sentence of that language, ``{0}``, ``{1}`` … where the values stand in it. What is
said is looked up by its form, the values in it too; a text of several sentences piece by piece. What no form fits stays
as it is.
"""

import functools
import re
from collections.abc import Iterator
from typing import NamedTuple

import yaml

from halfbyte.deploy.ui.texts import FOLDER, say, texts_of

END = re.compile(r"(?<=[.!?:;)])\s+|\n+|(?=; )|(?= \()|(?<=\))(?=[:,] )")
"""Between two sentences, or before a clause that has a form of its own."""
VALUE = r"""('(?:[^'\\]|\\.)*'|"(?:[^"\\]|\\.)*"|.*?)"""
"""A value: a text in quotation marks as a whole, where it is one."""
NUMBER = r"([\d,]+)"
SPAN = 4
"""Pieces that one form may take together."""


class Form(NamedTuple):
    """A sentence with places for values.

    Attributes:
        words: the longest of it that is no value, which is looked for first.
        pattern: all of it.
        text: in the other language.
    """

    words: str
    pattern: re.Pattern[str]
    text: str


@functools.lru_cache(maxsize=1024)
def said(language: str, text: str) -> str:
    """Return what the library says in a language.

    Args:
        language: of the page.
        text: English, one sentence or several.
    """
    forms = forms_of(language)
    if not forms or not text.strip():
        return text
    whole = _whole(forms, text)
    return _piecewise(forms, text) if whole is None else whole


@functools.cache
def sentences_of(language: str) -> dict[str, str]:
    """Return the sentences of a language by their English forms; none of English."""
    file = FOLDER / f"library.{language}.yaml"
    if not file.is_file():
        return {}
    found: dict[str, str] = yaml.safe_load(file.read_text(encoding="utf-8"))
    return found


@functools.cache
def forms_of(language: str) -> list[Form]:
    """Return the forms of a language, those with the most words of their own first, then those of counts."""
    if not sentences_of(language):
        return []
    found = sorted(sentences_of(language).items(), key=lambda pair: -len(pair[0].replace("{}", "")))
    parts = [(form.split("{}"), text) for form, text in found]
    return [
        *(
            Form(max(words, key=len), re.compile(VALUE.join(map(re.escape, words)), re.DOTALL), text)
            for words, text in parts
        ),
        *_counts(language),
    ]


def _counts(language: str) -> Iterator[Form]:
    """Yield how things are counted (:func:`halfbyte.errors.counted`): so many, so many of so many, of two kinds."""
    things = texts_of(language)["things"]
    for thing, name in things.items():
        yield Form(thing, re.compile(rf"{NUMBER} {thing}s?"), f"{{0}} {name}")
        part = say(language, "counted.part", first="{0}", second="{1}", thing=name)
        yield Form(thing, re.compile(rf"{NUMBER} of {NUMBER} {thing}s?"), part)
        for other, its_name in things.items():
            both = say(language, "counted.both", first="{0}", second="{1}", thing=name, other=its_name)
            yield Form(thing, re.compile(rf"{NUMBER} {thing}s?, {NUMBER} {other}s?"), both)


def _whole(forms: list[Form], text: str) -> str | None:
    """Return a text that one form fits as a whole, or None."""
    for form in forms:
        if form.words in text and (match := form.pattern.fullmatch(text)):
            return _put(forms, form, match)
    return None


def _piecewise(forms: list[Form], text: str) -> str:
    """Return a text whose sentences each have a form, as far as they do."""
    made, place = "", 0
    ends = [match.start() for match in END.finditer(text)] + [len(text)]
    while place < len(text):
        begins = [end for end in ends if end > place][:SPAN]
        found = next(
            ((end, told) for end in reversed(begins) if (told := _whole(forms, text[place:end])) is not None), None
        )
        end, told = found or (begins[0], text[place : begins[0]])
        gap = END.match(text, end)
        place = gap.end() if gap else end
        made += told + text[end:place]
    return made


def _put(forms: list[Form], form: Form, match: re.Match[str]) -> str:
    """Return a form's text with the values that ``match`` found, which may hold sentences themselves."""
    values = []
    for value in match.groups():
        whole = _whole(forms, value)
        values.append(whole if whole is not None else _piecewise(forms, value) if END.search(value) else value)
    return form.text.format(*values)

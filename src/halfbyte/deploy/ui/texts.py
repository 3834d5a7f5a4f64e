"""What the page says, by language: one YAML file each, of the same keys and the same places for values.

A key leads to a text (``say.saved``), or to what a component has of texts: ``label``, ``info``, ``value``,
``placeholder``, ``choices``. :class:`Translated` remembers which component has which, so that a change of the language
changes all of them.
"""

import functools
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import yaml

FOLDER = Path(__file__).parent / "texts"
LANGUAGES = {"en": "English", "zh": "中文"}
PROPERTIES = ("label", "info", "value", "placeholder", "choices")


@functools.cache
def texts_of(language: str) -> dict[str, Any]:
    """Return the texts of a language, as its file has them."""
    found: dict[str, Any] = yaml.safe_load((FOLDER / f"{language}.yaml").read_text(encoding="utf-8"))
    return found


def entry(language: str, key: str) -> Any:
    """Return what a key leads to."""
    found: Any = texts_of(language)
    for part in key.split("."):
        found = found[part]
    return found


def say(language: str, key: str, /, **values: Any) -> str:
    """Return a text with its values in their places."""
    return str(entry(language, key)).format(**values)


def language_of(accepted: str) -> str:
    """Return the language for a browser that sends this ``Accept-Language``."""
    wanted = []
    for part in accepted.split(","):
        name, _, weight = part.strip().partition(";q=")
        try:
            wanted.append((float(weight or 1), name.lower()))
        except ValueError:
            continue
    for _, name in sorted(wanted, key=lambda one: -one[0]):
        for language in LANGUAGES:
            if name.partition("-")[0] == language:
                return language
    return "en"


class Translated:
    """The components of a page whose texts follow the language.

    Args:
        language: in which the page is made.
    """

    def __init__(self, language: str) -> None:
        self.language = language
        self._kept: list[tuple[Any, str]] = []

    def make(self, kind: Any, key: str, **options: Any) -> Any:
        """Return a component with the texts of ``key``."""
        component = kind(**properties(self.language, key), **options)
        self._kept.append((component, key))
        return component

    @property
    def components(self) -> Sequence[Any]:
        """All of them."""
        return [component for component, _ in self._kept]

    def updates(self, language: str) -> list[dict[str, Any]]:
        """Return what each of them becomes in another language."""
        import gradio

        return [gradio.update(**properties(language, key)) for _, key in self._kept]


def properties(language: str, key: str) -> dict[str, Any]:
    """Return what a component has of texts."""
    found = entry(language, key)
    if not isinstance(found, dict):
        return {"value": found}
    given = {name: found[name] for name in PROPERTIES if name in found}
    if isinstance(given.get("choices"), dict):
        given["choices"] = [(text, value) for value, text in given["choices"].items()]
    return given

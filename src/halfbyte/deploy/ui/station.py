"""What all stations share: the page's places and processes, and handlers whose errors are sentences in the page."""

import functools
import inspect
import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import gradio as gr

from halfbyte.deploy.ui import pictures
from halfbyte.deploy.ui.asked import REFUSED
from halfbyte.deploy.ui.chatting import Talk
from halfbyte.deploy.ui.library import said
from halfbyte.deploy.ui.options import UiOptions
from halfbyte.deploy.ui.places import Outside, Places
from halfbyte.deploy.ui.texts import Translated, entry, say
from halfbyte.deploy.ui.worker import Worker
from halfbyte.errors import InputError
from halfbyte.files import disk_full
from halfbyte.runs.config import TrainConfig

FLAG = re.compile(r"\s?[(（]--([a-z-]+)[)）]")
"""How sentences of the library name an option of the command line."""


@dataclass
class Ui:
    """A page's places and processes.

    Attributes:
        options: of the command.
        places: folders.
        texts: components with their texts.
        worker: of previews and plans; another one measures nothing but answers what must not wait.
        talk: the model that is open.
    """

    options: UiOptions
    places: Places
    texts: Translated
    worker: Worker = field(default_factory=Worker)
    planner: Worker = field(default_factory=Worker)
    talk: Talk = field(default_factory=Talk)

    def close(self) -> None:
        """End what would outlive the page for no reason; jobs go on."""
        self.worker.close()
        self.planner.close()
        self.talk.close()


def reason(language: str, error: Exception) -> str:
    """Return what went wrong, in the page's language."""
    if isinstance(error, Outside):
        return say(language, "say.outside")
    if disk_full(error):
        return say(language, "say.disk_full", error=error)
    if isinstance(error, OSError):
        key = "say.denied" if isinstance(error, PermissionError) else "say.unreadable"
        return say(language, key, name=Path(str(error.filename or "")).name, error=error.strerror or error)
    if not isinstance(error, InputError):
        return ""
    return say(language, "say.error", error=_in_the_page(language, said(language, str(error))))


def _in_the_page(language: str, text: str) -> str:
    """Return what the library says with its flags as places of the page."""
    more = say(language, "say.in_more", label=entry(language, "train.more")["label"])

    def placed(found: re.Match[str]) -> str:
        name = found[1].replace("-", "_")
        return more if name in TrainConfig.model_fields and name not in REFUSED else found[0]

    return FLAG.sub(placed, text)


def told_errors(outputs: int) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
    """Return a decorator for methods whose first input is the language, and whose first output has a sentence.

    What is wrong is said there, and all other outputs stay as they are. Errors that are nobody's but ours go on.

    Args:
        outputs: how many there are.
    """

    def wrapped(handler: Callable[..., Any]) -> Callable[..., Any]:
        def failed(station: Any, language: str, error: Exception) -> Any:
            text = reason(language, error)
            if not text:
                raise error
            told = pictures.told(station.ui.places.told(text), "bad")
            return told if outputs == 1 else [told, *[gr.skip()] * (outputs - 1)]

        if inspect.isgeneratorfunction(handler):

            @functools.wraps(handler)
            def stream(station: Any, language: str, *inputs: Any) -> Iterator[Any]:
                try:
                    yield from handler(station, language, *inputs)
                except (InputError, OSError) as error:
                    yield failed(station, language, error)

            return stream

        @functools.wraps(handler)
        def answer(station: Any, language: str, *inputs: Any) -> Any:
            try:
                return handler(station, language, *inputs)
            except (InputError, OSError) as error:
                return failed(station, language, error)

        return answer

    return wrapped


def status() -> Any:
    """Return a place for a sentence, which screen readers read out."""
    return gr.HTML("", elem_classes="hb-status", padding=False)


def named(path: Path, roots: list[Path]) -> str:
    """Return what a run is called in the page: its folder from a root, if that leads to no other one."""
    for root in roots:
        if path.is_relative_to(root):
            name = path.relative_to(root)
            return str(name) if next((one for one in roots if (one / name).exists()), root) == root else str(path)
    return str(path)

"""The station where a model is talked to: with its adapter and without it, side by side; judgements become data."""

import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import gradio as gr

from halfbyte.deploy.ui import found, pictures
from halfbyte.deploy.ui.asked import model_of
from halfbyte.deploy.ui.chatting import keep_judged, keep_pair
from halfbyte.deploy.ui.library import said
from halfbyte.deploy.ui.station import Ui, named, status, told_errors
from halfbyte.deploy.ui.texts import entry, say
from halfbyte.errors import InputError
from halfbyte.runs.folder import RunFolder
from halfbyte.runs.history import is_run

Messages = list[dict[str, Any]]
TAG = re.compile(r"<[a-zA-Z/!?]")
CODE = re.compile(r"(`{3,}).*?(?:\1|\Z)|(`+)[^`].*?\2", re.DOTALL)
LONG = 7
"""Backticks of a block in which a text is shown; few answers have as many."""
BLOCK = re.compile(r"(`{7,})text\n(.*)\n\1", re.DOTALL)


class Chat:
    """The station."""

    def __init__(self, ui: Ui) -> None:
        self.ui = ui
        make = ui.texts.make
        with gr.Row(equal_height=True):
            self.model = make(
                gr.Dropdown, "chat.model", choices=[], allow_custom_value=True, elem_id="hb-talk", scale=4
            )
            self.open = make(gr.Button, "chat.open", variant="primary", elem_id="hb-open")
            self.close = make(gr.Button, "chat.close", elem_id="hb-close")
        self.status = status()
        self.system = make(gr.Textbox, "chat.system", lines=1, elem_id="hb-system")
        with make(gr.Accordion, "chat.options", open=False), gr.Row():
            self.temperature = make(gr.Slider, "chat.temperature", value=0, minimum=0, maximum=2, step=0.05)
            self.top_p = make(gr.Slider, "chat.top_p", value=1, minimum=0.01, maximum=1, step=0.01)
            self.most = make(gr.Number, "chat.most", value=256, precision=0, minimum=1)
            self.seed = make(gr.Textbox, "chat.seed", max_length=12)
        look = {"height": 420, "allow_tags": False, "buttons": ["copy"], "render_markdown": True, "sanitize_html": True}
        with gr.Row():
            self.left = make(gr.Chatbot, "chat.left", elem_id="hb-left", **look)
            self.right = make(gr.Chatbot, "chat.right", elem_id="hb-right", **look)
        with gr.Row():
            self.left_better = make(gr.Button, "chat.left_better", size="sm", elem_id="hb-left-better")
            self.right_better = make(gr.Button, "chat.right_better", size="sm", elem_id="hb-right-better")
        self.message = make(gr.Textbox, "chat.message", lines=1, max_lines=8, elem_id="hb-message", autofocus=False)
        with gr.Row():
            self.send = make(gr.Button, "chat.send", variant="primary", elem_id="hb-send")
            self.end = make(gr.Button, "chat.end")
            self.again = make(gr.Button, "chat.again", elem_id="hb-again")
            self.clear = make(gr.Button, "chat.clear")

    def wire(self, language: Any) -> None:
        """Say what buttons do."""
        private: dict[str, Any] = {"api_visibility": "private"}
        self.open.click(self._open, [language, self.model], [self.status, self.left, self.right], **private)
        self.close.click(self._close, [language], [self.status], **private)
        sampling = [self.system, self.temperature, self.top_p, self.most, self.seed]
        sides = [self.left, self.right]
        asked = [language, self.message, *sides, *sampling]
        told = [self.status, *sides, self.message]
        sent = gr.on([self.send.click, self.message.submit], self._send, asked, told, concurrency_limit=4, **private)
        again = self.again.click(self._again, asked, told, concurrency_limit=4, **private)
        self.end.click(None, None, None, cancels=[sent, again], **private)
        self.clear.click(lambda: ([], []), None, sides, **private)
        for side, which in ((self.left, 0), (self.right, 1)):
            side.like(self._judged, [language, gr.State(which), side, self.system], [self.status], **private)
        for button, better in ((self.left_better, 0), (self.right_better, 1)):
            button.click(self._better, [language, gr.State(better), *sides, self.system], [self.status], **private)

    def choices(self) -> list[str]:
        """Return what can be talked to: finished runs, then models."""
        places = self.ui.places
        runs = [named(run.path, places.roots) for run in found.runs(places) if RunFolder(run.path).adapter.exists()]
        return runs + [model.name for model in found.models(places) if model.writes]

    @told_errors(3)
    def _open(self, language: str, name: str) -> Iterator[Any]:
        path = self._path(language, name)
        if any(model.path == path and not model.writes for model in found.models(self.ui.places)):
            raise InputError(say(language, "say.cannot_chat", name=name, error=say(language, "say.no_chat")))
        yield pictures.told(say(language, "say.opening", name=name)), [], []
        try:
            self.ui.talk.open(path)
        except InputError as error:
            raise InputError(say(language, "say.cannot_chat", name=name, error=said(language, str(error)))) from None
        yield pictures.told(say(language, "say.opened", name=name), "good"), *self.labels(language)

    def labels(self, language: str) -> list[dict[str, Any]]:
        """Return what the two sides are called: the models that are open, or what they are for."""
        opened = self.ui.talk.now
        if opened is None:
            return [
                gr.update(visible=True, label=entry(language, f"chat.{side}")["label"]) for side in ("left", "right")
            ]
        return [
            gr.update(label=opened.names[0]),
            gr.update(label=opened.names[-1], visible=len(opened.names) > 1),
        ]  # fmt: skip

    def _path(self, language: str, name: str) -> str:
        if (name or "").strip():
            try:
                inside = self.ui.places.inside(name)
            except InputError:
                inside = None
            if inside is not None and is_run(inside):
                return str(inside)
        return model_of(self.ui.places, language, name)

    @told_errors(1)
    def _close(self, language: str) -> Any:
        self.ui.talk.close()
        return pictures.told(say(language, "say.closed"))

    @told_errors(4)
    def _send(self, language: str, message: str, left: Messages, right: Messages, *sampling: Any) -> Iterator[Any]:
        if not (message or "").strip():
            raise InputError(say(language, "say.nothing"))
        turn = {"role": "user", "content": shown(message)}
        yield from self._answers(language, [*left, turn], [*right, turn], sampling)

    @told_errors(4)
    def _again(self, language: str, _: str, left: Messages, right: Messages, *sampling: Any) -> Iterator[Any]:
        left, right = (_until_asked(side) for side in (left, right))
        if not left:
            raise InputError(say(language, "say.nothing"))
        yield from self._answers(language, left, right, sampling)

    def _answers(self, language: str, left: Messages, right: Messages, sampling: Any) -> Iterator[Any]:
        """Yield both sides as they grow."""
        opened = self.ui.talk.now
        if opened is None:
            raise InputError(say(language, "say.not_open"))
        system, temperature, top_p, most, seed = sampling
        options = {"temperature": temperature, "top_p": top_p, "max_tokens": int(most or 256)}
        if str(seed or "").strip():
            if not re.fullmatch(r"[0-9]+", str(seed).strip()):
                raise InputError(say(language, "say.no_seed", seed=seed))
            options["seed"] = int(str(seed).strip())
        names = opened.names[:2]
        sides = [left, right][: len(names)]
        asked = [(name, plain(side, system)) for name, side in zip(names, sides, strict=True)]
        cleared: Any = ""  # once: what is said of a judgement meanwhile stays
        for texts in self.ui.talk.side_by_side(asked, options):
            answers = [{"role": "assistant", "content": shown(text)} for text in texts]
            grown = [[*side, answer] for side, answer in zip(sides, answers, strict=True)]
            yield cleared, grown[0], grown[1] if len(grown) > 1 else [], cleared
            cleared = gr.skip()

    @told_errors(1)
    def _judged(self, language: str, which: int, side: Messages, system: str, data: gr.LikeData) -> Any:
        at = data.index if isinstance(data.index, int) else data.index[0]
        name, before = self._names(language)[which], plain(side[:at], system)
        file = keep_judged(self.ui.places.roots[0], name, before, text_of(side[at]), bool(data.liked))
        key = "say.kept_good" if data.liked else "say.kept_bad"
        return pictures.told(say(language, key, file=self.ui.places.shown(file)), "good")

    @told_errors(1)
    def _better(self, language: str, better: int, left: Messages, right: Messages, system: str) -> Any:
        name, sides = self._names(language)[0], [left, right]
        if not (left and right and left[-1]["role"] == right[-1]["role"] == "assistant"):
            raise InputError(say(language, "say.no_pair"))
        chosen, rejected = sides[better], sides[1 - better]
        before = plain(chosen[:-1], system)
        file = keep_pair(self.ui.places.roots[0], name, before, text_of(chosen[-1]), text_of(rejected[-1]))
        return pictures.told(say(language, "say.kept_pair", file=self.ui.places.shown(file)), "good")

    def _names(self, language: str) -> list[str]:
        opened = self.ui.talk.now
        if opened is None:
            raise InputError(say(language, "say.not_open"))
        names = [Path(name).name for name in opened.names]
        return [*names, names[-1]]


def plain(side: Messages, system: str | None) -> list[dict[str, str]]:
    """Return a conversation as a model gets it."""
    first = [{"role": "system", "content": system.strip()}] if system and system.strip() else []
    return first + [{"role": one["role"], "content": text_of(one)} for one in side]


def shown(text: str) -> str:
    """Return a text as it is shown: one with tags of HTML, which would be left out, as a block of code."""
    if not TAG.search(CODE.sub("", text)):
        return text
    fence = "`" * max(LONG, 1 + max((len(run) for run in re.findall("`+", text)), default=0))
    return f"{fence}text\n{text}\n{fence}"


def text_of(message: dict[str, Any]) -> str:
    """Return the text of a message, as gradio hands it: a text, or parts; without what :func:`shown` put around it."""
    content = message["content"]
    if isinstance(content, list):
        content = "".join(part if isinstance(part, str) else part.get("text", "") for part in content)
    block = BLOCK.fullmatch(str(content))
    return block[2] if block else str(content)


def _until_asked(side: Messages) -> Messages:
    """Return a conversation up to its last question."""
    at = next((at for at in range(len(side) - 1, -1, -1) if side[at]["role"] == "user"), None)
    return [] if at is None else side[: at + 1]

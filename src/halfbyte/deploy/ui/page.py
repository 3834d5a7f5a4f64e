"""The page: a path of stations, their texts in the language that is chosen, and what of it lies in its address."""

from pathlib import Path
from typing import Any

import gradio as gr

from halfbyte.deploy.ui.chat import Chat
from halfbyte.deploy.ui.running import Runs
from halfbyte.deploy.ui.ship import Ship
from halfbyte.deploy.ui.start import Start
from halfbyte.deploy.ui.station import Ui
from halfbyte.deploy.ui.texts import LANGUAGES, language_of
from halfbyte.deploy.ui.train import Train

STYLE = Path(__file__).parent / "style.css"
STATIONS = ("start", "train", "chat", "runs", "ship")
FONTS = ["system-ui", "Noto Sans", "Noto Sans CJK SC", "PingFang SC", "Microsoft YaHei", "sans-serif"]
MONO = ["ui-monospace", "DejaVu Sans Mono", "monospace"]
SPEAK = """(language) => {
  document.documentElement.lang = language === 'zh' ? 'zh-CN' : 'en';
  for (const later of [100, 1000]) setTimeout(() => window.dispatchEvent(new Event('resize')), later);
  return language;
}"""
"""Tells the browser the language; tabs look anew how many of them have room."""


def theme() -> Any:
    """Return how the page looks; no font is loaded from elsewhere."""
    contrast = {
        "block_info_text_color": "*neutral_600", "input_placeholder_color": "*neutral_500",
        "body_text_color_subdued": "*neutral_500", "color_accent": "*primary_600",
        "button_primary_background_fill": "*primary_600", "button_primary_background_fill_hover": "*primary_700",
        "button_cancel_background_fill": "#dc2626", "button_cancel_background_fill_hover": "#b91c1c",
    }  # fmt: skip
    dark = {"block_info_text_color_dark": "*neutral_300", "input_placeholder_color_dark": "*neutral_400"}
    return gr.themes.Default(primary_hue="blue", neutral_hue="slate", font=FONTS, font_mono=MONO).set(
        **contrast, **dark
    )


def make_page(ui: Ui) -> Any:
    """Return the page."""
    make = ui.texts.make
    with gr.Blocks(title="halfbyte", analytics_enabled=False, delete_cache=(3600, 86_400), fill_width=False) as page:
        with gr.Row(elem_id="hb-head", equal_height=True):
            gr.HTML("<h1>halfbyte</h1>", elem_id="hb-title", padding=False)
            language = make(
                gr.Radio, "page.language", choices=[(text, name) for name, text in LANGUAGES.items()],
                value=ui.texts.language, elem_id="hb-language", container=False, scale=0, min_width=230,
            )  # fmt: skip
        make(gr.Markdown, "page.intro")
        kept = gr.BrowserState("", storage_key="halfbyte-language")
        with gr.Tabs(selected="start", elem_id="hb-stations") as tabs:
            stations: dict[str, Any] = {}
            for name, kind in zip(STATIONS, (Start, Train, Chat, Runs, Ship), strict=True):
                with make(gr.Tab, f"tab.{name}", id=name, elem_id=f"hb-tab-{name}"):
                    stations[name] = kind(ui)
        start, train, chat, runs, ship = (stations[name] for name in STATIONS)
        start.wire(language)
        train.wire(language)
        chat.wire(language)
        runs.wire(language, train, tabs)
        ship.wire(language)
        translated = ui.texts.components

        def speak(wanted: str) -> Any:
            return [*ui.texts.updates(wanted), gr.update(choices=Ship.choices(wanted)), wanted]

        private: dict[str, Any] = {"api_visibility": "private", "show_progress": "hidden"}
        shown = [start.show, [language], [start.machine]]
        foretold = [train.foretell, [language, *train.fields, train.name], [train.plan, train.config, train.command]]
        spoken = language.input(speak, [language], [*translated, ship.way, kept], js=SPEAK, **private)

        def begin(remembered: str, request: gr.Request) -> Any:
            wanted = remembered if remembered in LANGUAGES else _first(ui, request)
            chosen = dict(request.query_params).get("run", "")
            models = train.known_models()
            return [
                wanted, gr.update(choices=models), gr.update(choices=chat.choices()), gr.update(choices=ship.runs()),
                chosen or None, gr.update(selected="runs") if chosen else gr.skip(), *ui.texts.updates(wanted),
                gr.update(choices=Ship.choices(wanted)),
            ]  # fmt: skip

        opened = [language, train.model, chat.model, ship.run, runs.run, tabs, *translated, ship.way]
        loaded = page.load(begin, [kept], opened, **private)
        loaded.then(None, [language], None, js=SPEAK, **private)
        for event in (spoken, loaded):
            event.then(*foretold, **private)
            event.then(*shown, **private)
            event.then(chat.labels, [language], [chat.left, chat.right], **private)
        said = [start.status, train.status, chat.status, runs.status, ship.status]  # in the language before
        spoken.then(lambda: [""] * len(said), None, said, **private)
        spoken.then(train.look_again, [language, train.shown, *train.fields], train.looked, **private)
        lists = [train.model, chat.model, ship.run]

        def choices() -> Any:
            return [gr.update(choices=x) for x in (train.known_models(), chat.choices(), ship.runs())]

        tabs.change(choices, None, lists, **private)
    return page


def _first(ui: Ui, request: gr.Request) -> str:
    """Return the language of somebody who has not chosen one."""
    if ui.options.language != "auto":
        return ui.options.language
    return language_of(request.headers.get("accept-language", ""))

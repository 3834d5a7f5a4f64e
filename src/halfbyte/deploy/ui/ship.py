"""The last station: what each way of merging keeps, one of them made with a card of one's own, and downloaded."""

import json
from pathlib import Path
from typing import Any

import gradio as gr

from halfbyte.deploy.ui import found, jobs, pictures
from halfbyte.deploy.ui.places import safe_name
from halfbyte.deploy.ui.station import Ui, named, status, told_errors
from halfbyte.deploy.ui.texts import entry, say
from halfbyte.errors import InputError
from halfbyte.runs.folder import RunFolder
from halfbyte.runs.history import is_run

MADE = "models"
AUDIT = Path("audit", "audit.json")
MEASURED = ("bf16", "nf4-outputs", "nf4-again", "gguf-q8_0", "gguf-q4_0")
"""Ways that the page measures; all of them take long."""
WAYS: dict[str, tuple[str, tuple[str, ...]]] = {
    "hf-bf16": ("bf16", ("export", "--format", "hf")),
    "bnb-4bit": ("nf4-outputs", ("export", "--format", "bnb-4bit")),
    "gguf-q8_0": ("gguf-q8_0", ("export", "--format", "gguf", "--to", "q8_0")),
    "gguf-q4_0": ("gguf-q4_0", ("export", "--format", "gguf", "--to", "q4_0")),
    "lora-gguf": ("adapter", ("export", "--format", "lora-gguf")),
    "mlx-4bit": ("mlx-4bit", ("export", "--format", "mlx", "--to", "4bit")),
}
"""What can be made: its name in an audit, and the command."""
RECOMMENDED = "hf-bf16"


class Ship:
    """The station."""

    def __init__(self, ui: Ui) -> None:
        self.ui = ui
        make = ui.texts.make
        with gr.Row(equal_height=True):
            self.run = make(gr.Dropdown, "ship.run", choices=[], allow_custom_value=True, elem_id="hb-ship", scale=3)
            self.measure = make(gr.Button, "ship.measure", elem_id="hb-measure")
        self.audit = gr.HTML("", elem_id="hb-audit", padding=False)
        self.way = make(
            gr.Radio, "ship.way", choices=self.choices(ui.texts.language), value=RECOMMENDED, elem_id="hb-way"
        )
        self.name = make(gr.Textbox, "ship.name", elem_id="hb-made")
        self.card = make(gr.Textbox, "ship.card", lines=8, max_lines=20, elem_id="hb-card")
        self.make = make(gr.Button, "ship.make", variant="primary", elem_id="hb-make")
        self.status = status()
        self.progress = gr.HTML("", elem_id="hb-progress", padding=False)
        self.timer = gr.Timer(2.0)

    def wire(self, language: Any) -> None:
        """Say what buttons do."""
        private: dict[str, Any] = {"api_visibility": "private"}
        quiet = private | {"show_progress": "hidden"}
        chosen = [self.audit, self.way, self.name, self.card, self.status]
        self.run.change(self._chosen, [language, self.run], chosen, **quiet)
        self.measure.click(self._measure, [language, self.run], [self.status], **private)
        self.make.click(
            self._make, [language, self.run, self.way, self.name, self.card], [self.status], **private
        )  # fmt: skip
        self.timer.tick(
            self.show, [language, self.run], [self.audit, self.progress], trigger_mode="once", **quiet
        )  # fmt: skip

    @staticmethod
    def choices(language: str) -> list[tuple[str, str]]:
        """Return what can be made, in words."""
        return [(entry(language, "way")[way]["label"], way) for way in WAYS]

    def runs(self) -> list[str]:
        """Return the runs that have left an adapter."""
        places = self.ui.places
        return [named(run.path, places.roots) for run in found.runs(places) if RunFolder(run.path).adapter.exists()]

    def show(self, language: str, name: str | None) -> Any:
        """Return the audit's table, and the jobs that make something."""
        html = ""
        for job in jobs.all_jobs(self.ui.places.jobs)[::-1]:
            if job.kind not in ("export", "audit"):
                continue
            html += pictures.job(language, job)
            if job.kind == "export" and job.state == "done":
                link = f"download/{job.folder.name}"
                html += f'<p><a class="hb-download" href="{link}" download>{say(language, "ship.download")}</a></p>'
            if html.count("<header") >= 3:
                break
        return self._table(language, name), html

    def _path(self, language: str, name: str | None) -> Path:
        path = self.ui.places.inside(name) if name and name.strip() else None
        if path is None or not is_run(path) or not RunFolder(path).adapter.exists():
            raise InputError(say(language, "say.choose_run"))
        return path

    def _table(self, language: str, name: str | None) -> str:
        try:
            file = self._path(language, name) / AUDIT
            report = json.loads(file.read_text(encoding="utf-8"))
            ways = [
                way for way in report["ways"] if way["name"] not in ("base", "adapter") and way.get("kept") is not None
            ]
            rows = [
                {"name": way["name"], "bits": way["bits"], "kept": way["kept"], "agreement": way["agreement"]}
                for way in ways
            ]
            best = WAYS[RECOMMENDED][0]
            return pictures.audit(language, rows, best)
        except (InputError, OSError, ValueError, KeyError, TypeError):
            return pictures.told(say(language, "say.no_measure"))

    @told_errors(5)
    def _chosen(self, language: str, name: str) -> Any:
        path = self._path(language, name)
        return self._table(language, name), RECOMMENDED, f"{path.name}-model", self._card_of(path), ""

    def _card_of(self, path: Path) -> str:
        from halfbyte.deploy.ui.questions import card

        return str(self.ui.planner.ask(card, str(path)))

    @told_errors(1)
    def _measure(self, language: str, name: str) -> Any:
        path = self._path(language, name)
        words = [word for way in MEASURED for word in ("--way", way)]
        before = jobs.unended(self.ui.places.jobs)
        jobs.begin(self.ui.places.jobs, "audit", path.name, ["audit", str(path), *words], path / "audit")
        key = "say.queued" if before else "say.measuring"
        return pictures.told(say(language, key, name=path.name, before=before), "good")

    @told_errors(1)
    def _make(self, language: str, name: str, way: str, called: str, card: str) -> Any:
        path = self._path(language, name)
        if way not in WAYS:
            raise InputError(say(language, "say.choose_run"))
        output = self.ui.places.roots[0] / MADE / safe_name(called or "")
        if output.exists():
            raise InputError(say(language, "say.exists", name=output.name))
        command = [WAYS[way][1][0], str(path), str(output), *WAYS[way][1][1:]]
        files = {jobs.CARD: card.strip() + "\n"} if (card or "").strip() else {}
        before = jobs.unended(self.ui.places.jobs)
        jobs.begin(self.ui.places.jobs, "export", output.name, command, output, files=files)
        key = "say.queued" if before else "say.making"
        return pictures.told(say(language, key, name=output.name, before=before), "good")

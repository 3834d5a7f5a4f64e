"""The first station: what is on this machine, and an example in one click."""

from typing import Any

import gradio as gr

from halfbyte.deploy.ui import found, jobs, pictures, questions
from halfbyte.deploy.ui.station import Ui, named, status, told_errors
from halfbyte.deploy.ui.texts import say
from halfbyte.errors import InputError
from halfbyte.runs.folder import RunFolder

EXAMPLE = "example"
LATEST = 5
"""Runs that are shown."""


class Start:
    """The station."""

    def __init__(self, ui: Ui) -> None:
        self.ui = ui
        make = ui.texts.make
        make(gr.Markdown, "start.heading")
        self.status = status()
        self.machine = gr.HTML("", padding=False)
        with gr.Row():
            self.look = make(gr.Button, "start.look", size="sm")
            self.measure = make(gr.Button, "start.measure", size="sm")
        make(gr.Markdown, "start.example_heading")
        make(gr.Markdown, "start.example_about")
        self.example = make(gr.Button, "start.example", variant="primary")

    def wire(self, language: Any) -> None:
        """Say what buttons do."""
        private = {"api_visibility": "private"}
        self.look.click(self.show, [language], [self.machine], show_progress="hidden", **private)
        self.measure.click(self._measure, [language], [self.status, self.machine], **private)
        self.example.click(self._example, [language], [self.status], **private)

    def show(self, language: str) -> str:
        """Return what is here."""
        models = found.models(self.ui.places)
        about = self.ui.planner.ask(questions.machine)
        try:
            hour = self.ui.planner.ask(questions.rows_an_hour, [model.path for model in models])
        except InputError:
            hour = {}
        latest = [(named(run.path, self.ui.places.roots), run) for run in found.runs(self.ui.places)[:LATEST]]
        return pictures.machine(language, about, models, hour, latest)

    @told_errors(2)
    def _measure(self, language: str) -> Any:
        self.ui.worker.ask(questions.measure)
        return pictures.told(say(language, "say.measured"), "good"), self.show(language)

    @told_errors(1)
    def _example(self, language: str) -> Any:
        output = self.ui.places.runs / EXAMPLE
        if RunFolder(output).begun:
            raise InputError(say(language, "say.exists", name=EXAMPLE))
        before = jobs.unended(self.ui.places.jobs)
        jobs.begin(self.ui.places.jobs, "example", EXAMPLE, ["example", str(output)], output)
        key = "say.queued" if before else "say.example"
        return pictures.told(say(language, key, name=EXAMPLE, before=before), "good")

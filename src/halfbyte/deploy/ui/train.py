"""The second station: a model, data, a goal, and what that takes; the rest is folded away."""

from typing import Any

import gradio as gr
import yaml

from halfbyte.deploy.ui import asked, found, jobs, pictures, questions
from halfbyte.deploy.ui.station import Ui, reason, status, told_errors
from halfbyte.deploy.ui.texts import entry, say
from halfbyte.errors import InputError
from halfbyte.runs.config import TrainConfig
from halfbyte.runs.folder import RunFolder

FIELDS = (
    "model", "files", "paste", "path", "prompt", "completion", "rejected", "label", "skip", "method", "task", "preset",
    *asked.NUMBERS, "memory", "yaml",
)  # fmt: skip
UNCLEAR = "which is which (--columns"
"""What is said of columns that nobody knows has this in it."""
NONE_HELD_OUT = "There is nothing to evaluate on; "
"""So begins what is said of too few rows to hold one out."""
COLUMNS = ("prompt", "completion", "rejected", "label")


class Train:
    """The station."""

    def __init__(self, ui: Ui) -> None:
        self.ui = ui
        make, start = ui.texts.make, asked.numbers_of("quick")
        make(gr.Markdown, "train.model_heading")
        self.model = make(gr.Dropdown, "train.model", choices=[], allow_custom_value=True, elem_id="hb-model")
        make(gr.Markdown, "train.data_heading")
        with gr.Row():
            self.files = make(
                gr.File, "train.files", file_count="multiple", type="filepath", elem_id="hb-files", height=180
            )
            self.paste = make(gr.Textbox, "train.paste", lines=4, max_lines=8, elem_id="hb-paste")
        self.path = make(gr.Textbox, "train.path", elem_id="hb-path")
        with make(gr.Accordion, "train.columns", open=False) as self.mapping, gr.Row():
            self.prompt, self.completion, self.rejected, self.label = (
                make(gr.Dropdown, f"train.{name}", choices=[], allow_custom_value=False, elem_id=f"hb-{name}")
                for name in COLUMNS
            )
        self.look = make(gr.Button, "train.look", elem_id="hb-look")
        self.data_status = status()
        self.shown = gr.HTML("", elem_id="hb-preview", padding=False)
        self.skip = make(gr.Checkbox, "train.skip", value=False, elem_id="hb-skip")
        make(gr.Markdown, "train.goal_heading")
        self.method = make(gr.Radio, "train.method", value="sft")
        with gr.Row():
            self.preset = make(gr.Radio, "train.preset", value="quick")
            self.epochs = make(gr.Number, "train.epochs", value=start["epochs"], minimum=0.01)
            self.max_length = make(gr.Number, "train.max_length", value=start["max_length"], precision=0, minimum=2)
        with make(gr.Accordion, "train.more", open=False):
            self.task = make(gr.Radio, "train.task", value="lm")
            with gr.Row():
                self.rank = make(gr.Number, "train.rank", value=start["rank"], precision=0, minimum=1)
                self.learning_rate = make(gr.Number, "train.learning_rate", value=start["learning_rate"], minimum=0)
                self.batch_size = make(gr.Number, "train.batch_size", value=start["batch_size"], precision=0, minimum=1)
            with gr.Row():
                self.eval_share = make(gr.Number, "train.eval_share", value=start["eval_share"], minimum=0, maximum=0.9)
                self.memory = make(gr.Textbox, "train.memory")
            self.yaml = make(gr.Textbox, "train.yaml", lines=3, elem_id="hb-yaml")
        make(gr.Markdown, "train.plan_heading")
        self.plan = gr.HTML(pictures.told(say(ui.texts.language, "plan.later")), elem_id="hb-plan", padding=False)
        with make(gr.Accordion, "train.exact", open=False):
            self.config = make(gr.Code, "train.config", language="yaml", interactive=False)
            self.command = make(gr.Code, "train.command", language="shell", interactive=False)
        with gr.Row(equal_height=True):
            self.name = make(gr.Textbox, "train.name", elem_id="hb-name")
            self.start = make(gr.Button, "train.start", variant="primary", elem_id="hb-start")
        self.status = status()

    @property
    def fields(self) -> list[Any]:
        """The components that a run's options are made of, in the order of :data:`FIELDS`."""
        return [getattr(self, name) for name in FIELDS]

    @property
    def looked(self) -> list[Any]:
        """The components that say what the data are."""
        return [self.data_status, self.shown, self.mapping, *(getattr(self, name) for name in COLUMNS)]

    def wire(self, language: Any) -> None:
        """Say what buttons do, and what follows from a change."""
        private: dict[str, Any] = {"api_visibility": "private"}
        quiet = private | {"show_progress": "hidden"}
        self.preset.input(
            lambda preset: list(asked.numbers_of(preset).values()),
            [self.preset], [getattr(self, name) for name in asked.NUMBERS], **quiet,
        )  # fmt: skip
        columns = [getattr(self, name) for name in COLUMNS]
        for event in (self.look.click, self.files.upload, self.path.submit):
            event(self._look, [language, *self.fields], self.looked, **private)
        live = [
            self.model, self.files, self.path, self.skip, self.method, self.task, self.preset, self.epochs, self.shown,
            self.max_length, self.rank, self.batch_size, self.eval_share, self.memory, self.yaml, self.learning_rate,
            *columns,
        ]  # fmt: skip
        gr.on(
            [component.change for component in live], self.foretell, [language, *self.fields, self.name],
            [self.plan, self.config, self.command], trigger_mode="always_last", **quiet,
        )  # fmt: skip
        self.start.click(self._start, [language, self.name, *self.fields], [self.status], **private)

    def known_models(self) -> list[tuple[str, str]]:
        """Return what the page offers: names and paths."""
        return [(model.name, model.name) for model in found.models(self.ui.places)]

    def options(self, language: str, values: Any) -> dict[str, Any]:
        """Return the options of a run, by what stands in the page."""
        return asked.options_of(self.ui.places, language, dict(zip(FIELDS, values, strict=True)))

    @told_errors(3 + len(COLUMNS))
    def _look(self, language: str, *values: Any) -> Any:
        given = dict(zip(FIELDS, values, strict=True))
        data = asked.data_of(self.ui.places, language, given)
        columns = self.ui.worker.ask(questions.columns, data)
        choices = ["", *map(pictures.sendable, columns.names)]
        mapping = [gr.update(choices=choices, value=given[name] if given[name] in choices else "") for name in COLUMNS]
        try:
            seen = self.ui.worker.ask(questions.preview, self.options(language, values) | {"output": "runs/preview"})
        except InputError as error:
            text = _plainly(language, error)
            told = pictures.told(self.ui.places.told(text), "bad")
            return [told, pictures.columns(language, columns), gr.update(open=True), *mapping]
        return ["", self.ui.places.told(pictures.preview(language, seen)), gr.skip(), *mapping]

    def look_again(self, language: str, shown: str, *values: Any) -> Any:
        """Say in another language what the data are, if it was said."""
        if not shown:
            return ["", *[gr.skip()] * (len(COLUMNS) + 2)]
        return self._look(language, *values)

    def foretell(self, language: str, *given: Any) -> Any:
        """Return what a run takes, its configuration, and its command."""
        *values, name = given
        try:
            options = self.options(language, values)
            output = self.ui.places.runs / (name.strip() or "my-run")
            config = yaml.safe_dump(options, sort_keys=False, allow_unicode=True)
            command = asked.command_of(options, output)
        except (InputError, OSError) as error:
            given_ = dict(zip(FIELDS, values, strict=True))
            is_begun = given_["model"] and any(given_[name] for name in ("files", "paste", "path"))
            text = reason(language, error) if is_begun else say(language, "plan.later")
            return pictures.told(self.ui.places.told(text), "bad" if is_begun else ""), "", ""
        try:
            told = self.ui.planner.ask(questions.plan, options | {"output": str(output)}, True)
        except InputError as error:
            text = say(language, "plan.later") if UNCLEAR in str(error) else _plainly(language, error)
            return pictures.told(self.ui.places.told(text), "bad"), config, command
        return pictures.plan(language, told), config, command

    @told_errors(1)
    def _start(self, language: str, name: str, *values: Any) -> Any:
        if not (name or "").strip():
            raise InputError(say(language, "say.no_name"))
        output = self.ui.places.new_run(name)
        options = self.options(language, values) | {"output": str(output)}
        config = TrainConfig.from_yaml(None, options)
        if RunFolder(output).begun or output.exists():
            raise InputError(say(language, "say.exists", name=output.name))
        before = jobs.unended(self.ui.places.jobs)
        jobs.begin(
            self.ui.places.jobs, "train", output.name, ["train", "--config", "{folder}/config.yaml"],
            config.output, files={"config.yaml": yaml.safe_dump(options, sort_keys=False, allow_unicode=True)},
        )  # fmt: skip
        key = "say.queued" if before else "say.started"
        return pictures.told(say(language, key, name=output.name, before=before), "good")


def _plainly(language: str, error: InputError) -> str:
    """Return what is wrong with data, with what to do about it in the page."""
    if UNCLEAR in str(error):
        return say(language, "say.which_columns", label=entry(language, "train.columns")["label"])
    if NONE_HELD_OUT in str(error):
        share, more = (entry(language, f"train.{name}")["label"] for name in ("eval_share", "more"))
        return say(language, "say.none_held_out", label=share, more=more)
    return reason(language, error)

"""The station of runs: a table, one of them as it goes on, several beside each other."""

import contextlib
import hashlib
import os
import shutil
import signal
import time
from pathlib import Path
from typing import Any

import gradio as gr

from halfbyte.deploy.ui import found, jobs, pictures
from halfbyte.deploy.ui.station import Ui, named, status, told_errors
from halfbyte.deploy.ui.texts import entry, say
from halfbyte.errors import InputError
from halfbyte.locks import is_locked
from halfbyte.runs.folder import RunFolder
from halfbyte.runs.history import Run, is_run, read_run

TRAINING = ("train", "example")
"""The kinds of jobs that become runs."""
COPIED = ("method", "task", "preset", "epochs", "max_length", "rank", "learning_rate", "batch_size", "eval_share")
"""Options with a field of their own, beside model and data, which a duplicate gets."""
EVERY = 2.0
"""Seconds between two looks."""
ENDING = 20.0
"""Seconds that the process of a run may take to end after the run has."""
IN_URL = """(name) => {
  const at = new URL(location);
  if (name) at.searchParams.set('run', name); else at.searchParams.delete('run');
  history.replaceState(null, '', at);
}"""
"""Keeps the name of the run that is shown in the page's address."""


class Runs:
    """The station."""

    def __init__(self, ui: Ui) -> None:
        self.ui = ui
        make = ui.texts.make
        self.timer = gr.Timer(EVERY)
        self.filter = make(gr.Textbox, "runs.filter", elem_id="hb-filter")
        self.table = gr.HTML("", elem_id="hb-runs", padding=False)
        with gr.Row():
            self.run = make(gr.Dropdown, "runs.run", choices=[], allow_custom_value=True, elem_id="hb-run")
            self.compare = make(gr.Dropdown, "runs.compare", choices=[], multiselect=True)
        with gr.Row():
            self.stop = make(gr.Button, "runs.stop", size="sm", elem_id="hb-stop")
            self.resume = make(gr.Button, "runs.resume", size="sm", elem_id="hb-resume")
            self.copy = make(gr.Button, "runs.copy", size="sm", elem_id="hb-copy")
            self.delete = make(gr.Button, "runs.delete", size="sm", variant="stop", elem_id="hb-delete")
        with gr.Row(visible=False) as self.question:
            self.really = make(gr.Button, "runs.really", size="sm", variant="stop", elem_id="hb-really")
            self.keep = make(gr.Button, "runs.keep", size="sm")
        self.status = status()
        self.shown = gr.HTML("", elem_id="hb-shown", padding=False)
        self.seen, self.doomed = gr.State(""), gr.State("")

    def wire(self, language: Any, train: Any, tabs: Any) -> None:
        """Say what buttons do, and look now and then."""
        private: dict[str, Any] = {"api_visibility": "private"}
        quiet = private | {"show_progress": "hidden"}
        inputs = [language, self.filter, self.run, self.compare, self.seen]
        outputs = [self.table, self.run, self.compare, self.shown, self.seen]
        self.timer.tick(self.show, inputs, outputs, trigger_mode="once", **quiet)
        gr.on(
            [self.filter.change, self.run.change, self.compare.change], self.show, inputs, outputs,
            trigger_mode="always_last", **quiet,
        )  # fmt: skip
        self.run.change(None, [self.run], None, js=IN_URL)
        self.stop.click(self._stop, [language, self.run], [self.status], **private)
        self.resume.click(self._resume, [language, self.run], [self.status], **private)
        self.copy.click(
            self._copy,
            [language, self.run],
            [self.status, tabs, train.files, train.yaml, *self._copied(train)],
            **private,
        )
        asked = [self.status, self.question, self.doomed]
        self.delete.click(self._ask, [language, self.run], asked, **quiet)
        gr.on([self.keep.click, self.run.input], lambda: ("", gr.update(visible=False), ""), None, asked, **quiet)
        self.really.click(self._delete, [language, self.doomed], [self.status, self.question, self.run], **private)

    def show(self, language: str, word: str, chosen: str | None, beside: list[str] | None, seen: str) -> Any:
        """Return the table, the choices, and what is chosen; what is shown already is left alone."""
        places = self.ui.places
        runs = [(named(run.path, places.roots), run) for run in found.runs(places)]
        waiting = [
            (named(job.output, places.roots), job) for job in jobs.all_jobs(places.jobs)
            if job.kind in TRAINING and job.state in ("waiting", "running")
        ]  # fmt: skip
        names = list(dict.fromkeys(name for name, _ in (*runs, *waiting)))
        words, states = (word or "").strip().lower(), entry(language, "state")
        matching = [
            (name, run) for name, run in runs
            if words in f"{name} {run.options.get('model', '')} {states[run.state]}".lower()
        ]  # fmt: skip
        alone = [(name, job) for name, job in waiting if name not in dict(runs) and words in name.lower()]
        table = pictures.runs(language, matching, alone, {name for name, job in waiting if job.state == "waiting"})
        view = self.view(language, chosen or "", beside or [])
        digest = hashlib.sha256(repr((language, table, view, names)).encode()).hexdigest()
        if digest == seen:
            return [gr.skip()] * 5
        return table, gr.update(choices=names), gr.update(choices=[name for name, _ in runs]), view, digest

    def view(self, language: str, chosen: str, beside: list[str]) -> str:
        """Return a run, or several beside each other."""
        if len(beside) > 1:
            several = []
            for name in beside:
                with contextlib.suppress(InputError):
                    several.append((name, read_run(self.ui.places.inside(name))))
            return pictures.compared(language, several)
        if not chosen:
            return pictures.told(say(language, "run.choose"))
        try:
            path = self.ui.places.inside(chosen)
        except InputError:
            return pictures.told(say(language, "run.none"), "bad")
        job = jobs.job_of(self.ui.places.jobs, path)
        if not is_run(path):
            return pictures.job(language, job) if job else pictures.told(say(language, "run.none"), "bad")
        return pictures.run(language, chosen, read_run(path), job, job.log if job else "")

    def path_of(self, language: str, name: str | None) -> Path:
        """Return the folder of a run.

        Raises:
            InputError: there is none of that name.
        """
        path = self.ui.places.inside(name or " ") if (name or "").strip() else None
        job = path and jobs.job_of(self.ui.places.jobs, path)
        if path is None or not (is_run(path) or (job and job.kind in TRAINING)):
            raise InputError(say(language, "run.none" if path else "run.choose"))
        return path

    @told_errors(1)
    def _stop(self, language: str, name: str) -> Any:
        path = self.path_of(language, name)
        job = jobs.job_of(self.ui.places.jobs, path)
        if job and job.state in ("waiting", "running"):
            job.stop()
        elif not _interrupt(path):
            raise InputError(say(language, "say.not_running", name=name))
        return pictures.told(say(language, "say.stopping", name=name), "good")

    @told_errors(1)
    def _resume(self, language: str, name: str) -> Any:
        path = self.path_of(language, name)
        if is_run(path) and read_run(path, short=True).state == "running":
            raise InputError(say(language, "say.is_running", name=name))
        if is_run(path) and read_run(path, short=True).state == "finished":
            raise InputError(say(language, "say.is_finished", name=name))
        job = jobs.job_of(self.ui.places.jobs, path)
        ends = time.monotonic() + ENDING
        while job and job.state == "running" and time.monotonic() < ends:
            time.sleep(0.1)
        before = jobs.unended(self.ui.places.jobs)
        jobs.begin(self.ui.places.jobs, "train", path.name, ["resume", str(path)], path)
        key = "say.queued" if before else "say.going_on"
        return pictures.told(say(language, key, name=name, before=before), "good")

    @staticmethod
    def _copied(train: Any) -> list[Any]:
        return [train.model, train.path, *(getattr(train, name) for name in COPIED)]

    @told_errors(15)
    def _copy(self, language: str, name: str) -> Any:
        run = read_run(self.path_of(language, name))
        return [pictures.told(say(language, "say.copied"), "good"), gr.update(selected="train"), None, *_fields_of(run)]

    @told_errors(3)
    def _ask(self, language: str, name: str) -> Any:
        self.path_of(language, name)
        return pictures.told(say(language, "say.really", name=name)), gr.update(visible=True), name

    @told_errors(3)
    def _delete(self, language: str, name: str) -> Any:
        path = self.path_of(language, name)
        found_ = [job for job in jobs.all_jobs(self.ui.places.jobs) if job.output == path]
        is_going = any(job.state in ("waiting", "running") for job in found_)
        if is_going or (is_run(path) and read_run(path, short=True).state == "running"):
            raise InputError(say(language, "say.is_running", name=name))
        if is_run(path):
            _remove(path)
        for job in found_:
            shutil.rmtree(job.folder, ignore_errors=True)
        return pictures.told(say(language, "say.deleted", name=name), "good"), gr.update(visible=False), None


def _interrupt(path: Path) -> bool:
    """Ask the process of a run that nobody here began to stop; tell whether there is one."""
    lock = RunFolder(path).lock
    if not is_locked(lock):
        return False
    try:
        os.kill(int(lock.read_text()), signal.SIGINT)
    except (OSError, ValueError):
        return False
    return True


def _remove(path: Path) -> None:
    """Remove a run: first what makes it one, so that half a run is none."""
    grave = path.with_name(f".{path.name}.deleted")
    shutil.rmtree(grave, ignore_errors=True)
    path.rename(grave)
    shutil.rmtree(grave, ignore_errors=True)


def _fields_of(run: Run) -> list[Any]:
    """Return what a run's options put into the page: further options as text, then the fields of ``_copied``."""
    import yaml

    from halfbyte.deploy.ui.asked import NUMBERS, REFUSED
    from halfbyte.runs.config import TrainConfig
    from halfbyte.runs.differences import given

    options, defaults = run.options, TrainConfig.model_fields
    own = {"method", "task", "preset", *NUMBERS}
    others = {name: value for name, value in given(options).items() if name not in own | REFUSED}
    data = options.get("data")
    words = data if isinstance(data, list) else [data]
    paths = "\n".join(str(word.get("path", "") if isinstance(word, dict) else word) for word in words if word)
    values = [options.get(name, defaults[name].default) for name in COPIED]
    text = yaml.safe_dump(others, sort_keys=False, allow_unicode=True) if others else ""
    preset = values[2] if values[2] in ("quick", "paper") else "paper"
    return [text, options.get("model", ""), paths, values[0], values[1], preset, *values[3:]]

"""A run, or several beside each other, as one page to send: nothing is loaded from elsewhere, every text is escaped.

Without its script the page says the same; the script only tells the values under the pointer. Should something slip
through, the page's own policy (Content-Security-Policy) lets a browser run nothing but that script and take no style
but its own, each named by its hash.
"""

import base64
import datetime
import functools
import hashlib
import shlex
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import yaml

from halfbyte import __version__
from halfbyte.choices import Task
from halfbyte.errors import counted, size_text
from halfbyte.runs.differences import differing, given
from halfbyte.runs.events import Sample
from halfbyte.runs.history import Run
from halfbyte.runs.report import curves, words
from halfbyte.runs.report.axes import number

if TYPE_CHECKING:
    import jinja2

HERE = Path(__file__).parent
OPEN_PROMPTS = 6
"""Prompts whose answers are seen at once; those of others are folded away."""


def report_page(run: Run) -> str:
    """Return the page of one run."""
    options = given(run.options)
    return _render(
        "report.html",
        title=run.path.name,
        run=run,
        state=words.STATES[run.state],
        about=_about(run),
        look=[*_state(run), *run.troubles, *run.problems],
        cards=words.cards(run),
        changes=words.changes(run),
        heads=words.change_heads(run),
        samples=[(prompt, answers[0], _left(run, answers)) for prompt, answers in run.samples.items()],
        open_prompts=OPEN_PROMPTS,
        drawings=curves.drawings(run) if run.steps else [],
        data=_data(run),
        given=[(name, words.value(value)) for name, value in options.items()],
        everything=[(name, words.value(value)) for name, value in run.options.items()],
        circumstances=_circumstances(run.circumstances),
        reproduce=_reproduce(run, options) if run.options else "",
        command=_command("train", "--config", str(run.path / "config.yaml"), "--output", f"runs/{run.path.name}-again"),
        checkpoints=run.checkpoints,
        following=_following(run),
        made=words.moment(datetime.datetime.now().astimezone()),
    )


def compare_page(runs: Sequence[tuple[str, Run]]) -> str:
    """Return the page of several runs, under their names."""
    return _render(
        "compare.html",
        title="Runs beside each other",
        names=[name for name, _ in runs],
        keys=[curves.STYLES[at % len(curves.STYLES)] for at in range(len(runs))],
        figures=compared_figures(runs),
        differences=compared_options(runs),
        circumstances=compared_circumstances(runs),
        drawings=curves.compared(runs),
        problems=[f"{name}: {problem}" for name, run in runs for problem in run.problems],
        made=words.moment(datetime.datetime.now().astimezone()),
    )


def compared_figures(runs: Sequence[tuple[str, Run]]) -> list[tuple[str, list[str]]]:
    """Return what the runs came to: a name, and a text for each run."""
    rows: list[tuple[str, list[str]]] = [("state", [words.STATES[run.state] for _, run in runs])]
    columns = [{name: text for name, text, _ in words.cards(run)} for _, run in runs]
    rows += [
        (name, [column.get(name, "") for column in columns])
        for name in dict.fromkeys(name for column in columns for name in column)
    ]
    last = [run.kept.figures if run.kept else {} for _, run in runs]
    for name in dict.fromkeys(name for figures in last for name in figures if name != "loss"):
        texts = [number(figures[name]) if name in figures else "" for figures in last]
        rows.append((f"evaluation {words.figure(name)}", texts))
    return rows


def compared_options(runs: Sequence[tuple[str, Run]]) -> list[tuple[str, list[str]]]:
    """Return the options in which the runs differ, a text for each run."""
    differences = differing([run.options for _, run in runs])
    return [(name, [words.value(value) for value in values]) for name, values in differences.items()]


def compared_circumstances(runs: Sequence[tuple[str, Run]]) -> list[tuple[str, list[str]]]:
    """Return the circumstances in which the runs differ, a text for each run."""
    differences = differing([dict(_circumstances(run.circumstances)) for _, run in runs])
    return [(name, [str(value or "") for value in values]) for name, values in differences.items()]


@functools.cache
def _environment() -> "jinja2.Environment":
    import jinja2

    from halfbyte.data.samples import one_line, visible

    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(HERE),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        finalize=lambda value: one_line(value) if type(value) is str else value,
    )
    environment.filters |= {"number": number, "lines": _Text, "visible": lambda text: _Text(visible(text))}
    return environment


class _Text(str):
    """A text that is shown as it is, several lines long; what is to be escaped in it still is."""


def _render(template: str, **values: Any) -> str:
    from markupsafe import Markup

    style, script = ((HERE / name).read_text(encoding="utf-8") for name in ("report.css", "hover.js"))
    values["drawings"] = [
        (drawing, Markup(drawing.svg), Markup(drawing.legend)) for drawing in values.get("drawings", ())
    ]
    policy = (
        f"default-src 'none'; style-src '{_digest(style)}'; script-src '{_digest(script)}'; base-uri 'none'; "
        "form-action 'none'"
    )
    return (
        _environment()
        .get_template(template)
        .render(style=Markup(style), script=Markup(script), policy=policy, version=__version__, **values)
    )


def _digest(text: str) -> str:
    return "sha256-" + base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()


def _command(*arguments: str) -> str:
    return shlex.join(["halfbyte", *arguments])


def _left(run: Run, answers: Sequence[Sample]) -> Sample:
    """Return the answer of the adapter that the run has left, or else the last one."""
    return next((answer for answer in answers if answer.step == run.adapter_step), answers[-1])


def _about(run: Run) -> list[tuple[str, str]]:
    found = [("model", words.model_name(run))]
    task: Task | str = run.options.get("task", "lm")
    found.append(("method", str(run.options.get("method", "")) + (f", {task}" if task != "lm" else "")))
    found.append(("base held in", str(run.options.get("quant_type", ""))))
    found.append(("begun", words.moment(run.begun)))
    return [(name, text) for name, text in found if text]


def _state(run: Run) -> list[str]:
    match run.state:
        case "running":
            return [
                "The run is going on; this page shows it so far and is rewritten at each evaluation and checkpoint."
            ]
        case "interrupted":
            return [f"The run was interrupted after step {run.step:,}; what to do next stands at the end of this page."]
        case "failed":
            return [f"The run failed after step {run.step:,}{f': {run.error}' if run.error else '.'}"]
        case "finished" if run.total_steps and run.step < run.total_steps:
            return [note for note in run.notes if note.startswith("Stopped early")]
        case "killed":
            return [f"The run broke off after step {run.step:,}: its process ended without a word."]
    return []


def _data(run: Run) -> list[tuple[str, str]]:
    data = run.data
    if data is None:
        return []
    share = f" ({data.trained_tokens / data.tokens:.0%})" if data.tokens else ""
    what = "labels" if run.options.get("task") == "classify" else "trained tokens"
    rows = [
        ("examples", f"{data.examples:,}" + (f", {data.rows:,} rows" if data.rows != data.examples else "")),
        ("tokens", f"{data.tokens:,}"),
        (what, f"{data.trained_tokens:,}{share}"),
        ("longest row", counted(data.longest, "token")),
        ("cut to max_length", counted(data.truncated, "example") if data.truncated else "none"),
        ("equal to an earlier row", _repeated(data.repeated)),
        ("nearly equal to one", _near(data.near, data.near_of, data.rows - (data.repeated or 0))),
        ("examples for evaluation", f"{data.evaluation:,}" if data.evaluation else "none"),
        ("left out", "; ".join(f"{kind}: {counted(n, 'row')}" for kind, n in data.left_out.items()) or "none"),
    ]
    return rows + [("noticed", f"in {counted(n, 'example')}: {note}") for note, n in data.notes.items()]


def _repeated(rows: int | None) -> str:
    if rows is None:
        return "not counted here; halfbyte data does"
    return counted(rows, "row") if rows else "none"


def _near(rows: int | None, of: int, different: int) -> str:
    """Return how many are nearly equal to an earlier row, and among how many they were sought if not among all."""
    sample = f" of {of:,} that were looked at" if of < different else ""
    return _repeated(rows) + (sample if rows is not None else "")


def _circumstances(told: Mapping[str, Any]) -> list[tuple[str, str]]:
    versions = told.get("versions")
    rows = [(name, str(version)) for name, version in versions.items()] if isinstance(versions, dict) else []
    for name in ("kernels", "threads", "processes", "machine", "cores"):
        if name in told:
            rows.append((name, str(told[name])))
    if isinstance(told.get("memory_bytes"), int):
        rows.append(("memory of the machine", size_text(told["memory_bytes"])))
    if "base_model" in told:
        rows.append(("digest of the base model", str(told["base_model"])))
    return rows


def _reproduce(run: Run, options: Mapping[str, Any]) -> str:
    """Return a configuration that makes the same run."""
    versions = run.circumstances.get("versions")
    used = ", ".join(f"{n} {v}" for n, v in versions.items()) if isinstance(versions, dict) else ""
    values = dict(options) | {"output": f"runs/{run.path.name}"}
    written = yaml.safe_dump(values, sort_keys=False, allow_unicode=True, width=100)
    if not written.replace("\n", "").isprintable():  # such as marks of writing direction
        written = yaml.safe_dump(values, sort_keys=False, width=100)
    return (f"# {used if used.isprintable() else 'versions unknown'}\n" if used else "") + written


def _following(run: Run) -> list[tuple[str, str]]:
    """Return what to do next: a sentence, and a command."""
    path = str(run.path)
    if run.state == "finished":
        match run.options.get("task", "lm"):
            case "classify":
                return [("Name the classes of texts:", _command("classify", path, "--text", "your text"))]
            case "lm":
                talk = [("Talk to it:", _command("chat", path))]
            case _:
                talk = []
        return [*talk, ("Answer one prompt:", _command("generate", path, "--prompt", "your question"))]
    if run.state == "running":
        return []
    resume = _command("resume", path)
    if run.checkpoints:
        return [(f"Go on from step {run.checkpoints[-1].step:,}, bit for bit as if nothing had happened:", resume)]
    return [("Begin again, since there is no checkpoint yet:", resume)]

"""Pages of runs: what they say, that no text of a run gets loose in them, and when they are written."""

import base64
import dataclasses
import datetime
import hashlib
import json
import re
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest
import yaml

from halfbyte.runs.config import TrainConfig
from halfbyte.runs.events import (
    Begin,
    Checkpoint,
    DataSummary,
    End,
    Evaluation,
    Event,
    Header,
    Note,
    Sample,
    StepMetrics,
    to_line,
)
from halfbyte.runs.folder import VERSION, RunFolder
from halfbyte.runs.history import Run, read_run
from halfbyte.runs.report import words, writer
from halfbyte.runs.report.curves import drawings
from halfbyte.runs.report.page import compare_page, compared_figures, report_page
from halfbyte.runs.report.writer import ReportFile

NASTY = (
    "</pre></td></style></script><script>alert(1)</script><img src=x onerror=alert(2)>&lt;b&gt; \"'` {{ 7*7 }} "
    "\u202e\x1b[31m"
)
BEGUN = datetime.datetime(2026, 1, 2, 3, 4, tzinfo=datetime.UTC)
KNOWN = {
    "html", "head", "meta", "title", "style", "body", "header", "h1", "h2", "p", "bdi", "ul", "li", "table", "thead",
    "tbody", "tr", "th", "td", "pre", "span", "div", "dl", "dt", "dd", "section", "figure", "figcaption", "details",
    "summary", "code", "footer", "script", "svg", "line", "text", "path", "g", "circle",
}  # fmt: skip


def step(number: int, **figures: float) -> StepMetrics:
    return StepMetrics(
        step=number, epoch=number / 4, loss=2 / number, learning_rate=1e-3, grad_norm=0.1, trained_tokens=10 * number,
        tokens_per_second=20.5, elapsed=number / 2, memory_bytes=2**30 + number, figures=figures,
    )  # fmt: skip


def made(**changes: Any) -> Run:
    events: list[Event] = [
        Note(text="Training 5 parameters"),
        DataSummary(examples=9, rows=9, tokens=100, trained_tokens=25, truncated=2, longest=20, repeated=1, near=2,
                    near_of=5, evaluation=3, left_out={"no answer": 4}, notes={"a turn was empty": 1}),
        Begin(step=0, total_steps=40),
        Evaluation(step=0, figures={"loss": 2.5, "accuracy": 0.5}),
        Sample(step=0, prompt="Who?", answer="Nobody"),
        *(step(number) for number in range(1, 41)),
        Note(text="Something is wrong.", step=7, trouble=True),
        Note(text="Something is wrong.", step=7, trouble=True),  # told again after a kill
        Evaluation(step=40, figures={"loss": 0.25, "accuracy": 0.75}),
        Sample(step=40, prompt="Who?", answer="Everybody"),
    ]  # fmt: skip
    config = TrainConfig(model="/models/some-model", data="-", output="/runs/a", preset="quick", max_steps=40, rank=8)
    run = Run(
        path=Path("/runs/a"), state="finished", options=config.model_dump(mode="json"), begun=BEGUN, events=events,
        circumstances={"versions": {"halfbyte": "0.2.0", "torch": "2.13.0"}, "threads": 2, "kernels": "native (avx2)"},
    )  # fmt: skip
    return dataclasses.replace(run, **changes)


class Page(HTMLParser):
    """What a browser would find: tags with their attributes, and all text but that of style and script."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.text = ""
        self.raw: dict[str, str] = {}
        self._open = ""
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))
        self._open = tag
        if tag in ("td", "th", "tr", "p", "pre", "dd", "dt", "li", "h1", "h2", "summary", "figcaption", "text"):
            self.text += "\n"

    def handle_endtag(self, tag: str) -> None:
        self._open = ""

    def handle_data(self, data: str) -> None:
        if self._open in ("style", "script"):
            self.raw[self._open] = self.raw.get(self._open, "") + data
        else:
            self.text += data


def told(run: Run) -> str:
    return re.sub(r"\n\s*", "\n", Page(report_page(run)).text)


def test_a_page_says_what_the_run_came_to() -> None:
    text = told(made())
    for part in (
        "A training run of halfbyte\na finished",
        "model some-model",
        "evaluation loss\n2.5 → 0.25\nafter step 40",
        "steps\n40 of 40\n10 passes over the data",
        "loss\n2.5\n0.25\naccuracy\n0.5\n0.75",
        "Who?\nbefore training\nNobody\nafter step 40\nEverybody",
        "trained tokens\n25 (25%)",
        "cut to max_length\n2 examples",
        "equal to an earlier row\n1 row",
        "nearly equal to one\n2 rows of 5 that were looked at",
        "After step 7: Something is wrong.",
        "left out\nno answer: 4 rows",
        "noticed\nin 1 example: a turn was empty",
        "kernels\nnative (avx2)",
        "halfbyte train --config /runs/a/config.yaml --output runs/a-again",
        "Talk to it:\nhalfbyte chat /runs/a",
    ):
        assert part in text, part
    for heading in ("Loss", "Evaluation: accuracy", "Learning rate", "Gradient norm before clipping", "Speed",
                    "Memory of the process"):  # fmt: skip
        assert f"\n{heading}\n" in text
    begun = text.index("Other than the preset"), text.index("Every option"), text.index("Circumstances")
    first, folded = text[begun[0] : begun[1]], text[begun[1] : begun[2]]
    assert "rank\n8\n" in first and "lora_alpha" not in first and "lora_alpha\n32.0" in folded


def test_a_run_that_stopped_early_shows_the_adapter_that_it_has_left() -> None:
    events = [*made().events]
    events[-4:-4] = [Evaluation(step=20, figures={"loss": 0.125}), Sample(step=20, prompt="Who?", answer="Somebody")]
    events.append(Note(text="Stopped early after step 40 of 90: no better"))
    events[2] = Begin(step=0, total_steps=90)
    run = made(events=events, summary={"adapter_step": 20, "loss": 0.5})
    text = told(run)
    for part in (
        "Stopped early after step 40 of 90",
        "evaluation loss\n2.5 → 0.125\nafter step 20",
        "adapter\nthat of step 20\nthe best evaluation",
        "before\nafter step 20, whose adapter is kept\nloss\n2.5\n0.125",
        "Somebody",
    ):
        assert part in text, part
    assert "Everybody" not in text
    assert dict(compared_figures([("one", run), ("two", made())]))["evaluation loss"] == ["2.5 → 0.125", "2.5 → 0.25"]


def test_an_evaluation_that_was_no_number_is_a_cross_at_its_step() -> None:
    events: list[Event] = [step(1), step(2), Evaluation(step=0, figures={"loss": 2.0}),
                           Evaluation(step=2, figures={}, not_finite=["loss"])]  # fmt: skip
    [loss] = [drawing.svg for drawing in drawings(made(events=events)) if drawing.heading == "Loss"]
    assert loss.count("evaluation: not a number at 2") == 2  # wide and narrow
    assert "not a number" not in "".join(one.svg for one in drawings(made(events=events[:3])))


def test_the_memory_of_a_gpu_has_a_chart_and_a_card_where_there_is_one() -> None:
    events = [one.model_copy(update={"gpu_memory_bytes": 3 * 2**30}) for one in map(step, (1, 2))]
    assert "Memory of the GPU" in {drawing.heading for drawing in drawings(made(events=events))}
    assert "peak GPU memory\n3.00 GiB" in told(made(events=events))
    assert "GPU" not in told(made())


def test_the_figures_after_training_are_those_of_the_adapter_that_was_kept() -> None:
    events = [Evaluation(step=at, figures={"loss": loss, "accuracy": 1 - loss}) for at, loss in
              ((0, 0.9), (20, 0.25), (40, 0.5))]  # fmt: skip
    run = made(events=[*(step(number) for number in range(1, 41)), *events], summary={"adapter_step": 20})
    kept = "after step 20, whose adapter is kept"
    text = told(run)
    assert f"evaluation loss\n0.9 → 0.25\n{kept}\n" in text
    assert f"before\n{kept}\nloss\n0.9\n0.25\naccuracy\n0.1\n0.75" in text
    rows = dict(compared_figures([("a", run), ("b", dataclasses.replace(run, summary={"adapter_step": 40}))]))
    assert rows["evaluation loss"] == ["0.9 → 0.25", "0.9 → 0.5"] and rows["evaluation accuracy"] == ["0.75", "0.5"]


def test_a_figure_of_steps_and_of_evaluations_has_one_chart_and_one_of_evaluations_alone_says_so() -> None:
    events: list[Event] = [
        step(1, margin=0.1),
        step(2, margin=0.3),
        Evaluation(step=2, figures={"margin": 0.2, "f1": 0.9}),
    ]
    charts = {drawing.heading: drawing.svg for drawing in drawings(made(events=events))}
    assert {"Margin", "Evaluation: F1"} <= set(charts) and "Evaluation: margin" not in charts
    for heading, curves in (("Margin", ["each step", "evaluation"]), ("Evaluation: F1", ["evaluation"])):
        assert re.findall(r'class="curve [^"]*" data-name="([^"]+)"', charts[heading]) == curves


@pytest.mark.parametrize(
    ("method", "task", "unit"),
    [
        ("sft", "lm", "loss (nats per trained token)"),
        ("sft", "classify", "loss (nats per label)"),
        ("dpo", "lm", "loss"),
    ],
)
def test_the_loss_has_the_unit_of_its_method(method: str, task: str, unit: str) -> None:
    first = drawings(made(options={"method": method, "task": task}))[0]
    assert f">{unit}</text>" in first.svg


def test_the_configuration_in_the_page_makes_the_run_again() -> None:
    text = Page(report_page(made())).text
    config = yaml.safe_load(text[text.index("# halfbyte 0.2.0") : text.index("What next")])
    again, before = TrainConfig(**config), made().options
    assert {name: value for name, value in again.model_dump(mode="json").items() if value != before[name]} == {
        "output": str(Path.cwd() / "runs/a")
    }


@pytest.mark.parametrize(
    ("state", "sentence"),
    [
        ("running", "The run is going on; this page shows it so far"),
        ("interrupted", "was interrupted after step 40"),
        ("failed", "failed after step 40: It diverged."),
        ("killed", "broke off after step 40: its process ended without a word"),
    ],
)
def test_a_run_that_did_not_finish_says_so_and_how_to_go_on(state: Any, sentence: str, tmp_path: Path) -> None:
    folder = tmp_path / "checkpoints/step-000020"
    folder.mkdir(parents=True)
    events = [*made().events, Checkpoint(step=20, folder="checkpoints/step-000020")]
    events.append(End(step=40, reason="failed", error="It diverged."))
    text = told(made(state=state, events=events, path=tmp_path))
    assert sentence in text and "Talk to it" not in text
    assert ("Go on from step 20, bit for bit" in text) == (state != "running")
    assert ("halfbyte resume " in text) == (state != "running")


def test_a_run_without_a_step_has_a_page() -> None:
    text = told(made(events=[], options={}, circumstances={}, begun=None, state="killed"))
    assert "There is no step yet." in text and "Configuration" not in text


def hostile() -> Run:
    figures = {NASTY: 1.0}
    events: list[Event] = [
        Note(text=NASTY), Begin(step=0, total_steps=2), Sample(step=0, prompt=NASTY, answer=NASTY),
        DataSummary(examples=1, rows=1, tokens=1, trained_tokens=1, left_out={NASTY: 1}, notes={NASTY: 1}),
        Evaluation(step=0, figures=figures), step(1, **figures), step(2, **figures),
        Evaluation(step=2, figures=figures),
        Checkpoint(step=2, folder=NASTY), End(step=2, reason="failed", error=NASTY),
    ]  # fmt: skip
    return Run(
        path=Path("/runs") / NASTY.replace("/", ""), state="failed",
        options={NASTY: NASTY, "model": NASTY, "method": NASTY},
        circumstances={"versions": {NASTY: NASTY}, "machine": NASTY}, begun=BEGUN, events=events, problems=[NASTY],
        summary={f"{NASTY}_before": 1, f"{NASTY}_after": 2},
    )  # fmt: skip


@pytest.mark.parametrize("page", [report_page(hostile()), compare_page([(NASTY, hostile()), ("b", made())])])
def test_no_text_of_a_run_gets_loose(page: str) -> None:
    found = Page(page)
    assert {tag for tag, _ in found.tags} <= KNOWN
    assert [tag for tag, _ in found.tags].count("script") == 1
    for _, attributes in found.tags:
        assert not [name for name in attributes if name.startswith("on") or name in ("style", "src", "href")]
    assert not set(page) & set("\u202e\x1b")
    assert "<script>alert(1)</script><img src=x onerror=alert(2)>&lt;b&gt; \"'` {{ 7*7 }}" in found.text
    assert "\\u202e\\x1b[31m" in found.text


@pytest.mark.parametrize("page", [report_page(made()), compare_page([("a", made()), ("b", made())])])
def test_a_page_needs_nothing_from_elsewhere_and_allows_its_own_style_and_script_alone(page: str) -> None:
    found = Page(page)
    [policy] = [str(tag["content"]) for _, tag in found.tags if tag.get("http-equiv") == "Content-Security-Policy"]
    digests = {
        name: base64.b64encode(hashlib.sha256(text.encode()).digest()).decode() for name, text in found.raw.items()
    }
    rules = dict(rule.strip().split(" ", 1) for rule in policy.split(";"))
    assert rules == {
        "default-src": "'none'", "style-src": f"'sha256-{digests['style']}'",
        "script-src": f"'sha256-{digests['script']}'", "base-uri": "'none'", "form-action": "'none'",
    }  # fmt: skip
    assert "url(" not in found.raw["style"] and "@import" not in found.raw["style"]
    for medium in ("prefers-color-scheme: dark", "@media print", "max-width"):
        assert medium in found.raw["style"]
    assert "http" not in re.sub(r"http://www.w3.org/2000/svg|http-equiv", "", page)


def test_runs_beside_each_other_show_what_differs_and_a_curve_each() -> None:
    other = made(circumstances={"versions": {"halfbyte": "0.2.0", "torch": "2.14.0"}, "threads": 2})
    other = dataclasses.replace(other, options=other.options | {"rank": 64})
    page = compare_page([("one", made()), ("two", other)])
    text = re.sub(r"\n\s*", "\n", Page(page).text)
    assert "rank\n8\n64\n" in text and "seed" not in text
    assert "torch\n2.13.0\n2.14.0\n" in text and "threads" not in text
    loss = page[page.index("Training loss, moving mean") :]
    assert re.findall(r'class="curve (\w)" data-name="(\w+)"', loss[: loss.index("</svg>")]) == [
        ("a", "one"),
        ("b", "two"),
    ]


@pytest.fixture
def folder(tmp_path: Path) -> RunFolder:
    folder = RunFolder(tmp_path / "run")
    folder.path.mkdir()
    TrainConfig(model="user/m", data="-", output=folder.path).save(folder.config)
    folder.about.write_text(json.dumps({"version": VERSION}))
    folder.metrics.write_text("".join(to_line(event) + "\n" for event in (Header(), Begin(step=0, total_steps=9))))
    return folder


def test_the_page_is_written_at_evaluations_checkpoints_and_the_end(
    folder: RunFolder, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(writer, "SHARE", 1e9)
    file = ReportFile(folder, pytest.fail)
    written: list[str] = []
    for event in (
        Begin(step=0, total_steps=9), step(1), Evaluation(step=1, figures={"loss": 1.5}), step(2),
        Checkpoint(step=2, folder="checkpoints/step-000002"), step(3), End(step=3, reason="failed", error="It broke."),
    ):  # fmt: skip
        file(event)
        if folder.report.exists():
            written.append(re.sub(r"\n\s*", "\n", Page(folder.report.read_text()).text))
            folder.report.unlink()
    assert [re.findall(r"steps\n(\d) of 9", text) for text in written] == [["1"], ["2"], ["3"]]
    assert "evaluation loss\n1.5" in written[0] and "failed after step 3: It broke." in written[2]
    file.finish({"loss": 0.125})
    assert "training loss\n0.125" in re.sub(r"\n\s*", "\n", Page(folder.report.read_text()).text)


def test_pages_take_little_of_the_time(folder: RunFolder, monkeypatch: pytest.MonkeyPatch) -> None:
    now = [100.0]
    made_pages: list[float] = []

    def page(_: Run) -> str:
        made_pages.append(now[0])
        now[0] += 1.0
        return ""

    monkeypatch.setattr(writer.time, "monotonic", lambda: now[0])
    monkeypatch.setattr(writer, "report_page", page)
    file = ReportFile(folder, pytest.fail)
    file(Begin(step=0, total_steps=9))
    for number in range(1, 200):
        now[0] += 1.0
        file(Evaluation(step=number, figures={}))
    assert len(made_pages) > 5 and len(made_pages) <= 0.06 * (now[0] - 100)


def test_a_page_that_cannot_be_made_is_said_once_and_ends_no_run(
    folder: RunFolder, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(writer, "report_page", lambda _: {}["x"])
    said: list[str] = []
    file = ReportFile(folder, said.append)
    file(Begin(step=0, total_steps=9))
    file(Evaluation(step=1, figures={}))
    file.finish({})
    assert said == ["report.html could not be written (KeyError: 'x'); the run goes on"]


def test_a_run_that_goes_on_shows_the_steps_from_before(folder: RunFolder) -> None:
    with folder.metrics.open("a") as stream:
        stream.write("".join(to_line(event) + "\n" for event in (step(1), step(2), Begin(step=2, total_steps=9))))
    file = ReportFile(folder, pytest.fail)
    file(Begin(step=2, total_steps=9))
    file(step(3))
    file.finish({})
    text = re.sub(r"\n\s*", "\n", Page(folder.report.read_text()).text)
    assert "steps\n3 of 9" in text
    [loss] = re.findall(r'data-name="each step" d="([^"]+)"', folder.report.read_text().split('class="narrow"')[0])
    assert len(re.findall("[ML]", loss)) == 3
    assert read_run(folder.path).step == 2  # the page writes no metrics


@pytest.mark.parametrize(
    ("seconds", "written"),
    [(0.04, "0.0 s"), (59.94, "59.9 s"), (59.96, "1 min 00 s"), (67, "1 min 07 s"), (3599.6, "1 h 00 min"),
     (7530, "2 h 06 min"), (360_000, "100 h 00 min"), (float("nan"), "unknown")],
)  # fmt: skip
def test_times_are_written_as_a_person_says_them(seconds: float, written: str) -> None:
    assert words.duration(seconds) == written

"""What the page draws holds every text, and none of it as HTML."""

import fcntl
import re
from html.parser import HTMLParser
from pathlib import Path

import pytest

from halfbyte.deploy.ui import pictures
from halfbyte.deploy.ui.found import FoundModel
from halfbyte.deploy.ui.jobs import Job
from halfbyte.deploy.ui.questions import Columns, Foretold, Preview
from halfbyte.runs.events import Begin, Evaluation, Note, Sample, StepMetrics
from halfbyte.runs.history import Run

EVIL = """<script>alert(1)</script><img src=x onerror="alert('1')">"'&"""
HARMLESS = {
    "p", "dl", "div", "dt", "dd", "h2", "h3", "table", "thead", "tbody", "tr", "th", "td", "bdi", "section",
    "pre", "span", "br", "small", "details", "summary", "ul", "li", "svg", "rect", "title", "strong", "a",
    "header", "progress", "figure", "figcaption", "line", "text", "path", "g", "circle", "polyline",
}  # fmt: skip


class Seen(HTMLParser):
    def __init__(self, html: str) -> None:
        super().__init__()
        self.text = ""
        self.feed(html)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        assert tag in HARMLESS, tag
        for name, value in attrs:
            assert not name.startswith("on") and name not in ("src", "srcdoc"), name
            assert name != "href" or (value or "").startswith(("?run=", "report?run=")), value
            self.text += value or ""

    def handle_data(self, data: str) -> None:
        self.text += data


def a_run() -> Run:
    numbers = {"epoch": 1, "learning_rate": 1e-3, "grad_norm": 1, "tokens_per_second": 9}
    steps = [StepMetrics(step=i, loss=1 / i, trained_tokens=i, elapsed=i, **numbers) for i in range(1, 9)]
    events = [
        Begin(step=0, total_steps=16),
        *steps,
        Evaluation(step=4, figures={"loss": 0.5, EVIL: 1.0}),
        Sample(step=4, prompt=EVIL, answer=EVIL),
        Note(text=EVIL),
        Note(text=f"trouble {EVIL}", trouble=True),
    ]
    return Run(Path("/runs") / EVIL.replace("/", ""), "running", {"model": EVIL, "method": EVIL}, events=events)


@pytest.mark.parametrize("language", ["en", "zh"])
def test_no_text_of_a_file_is_html(language: str) -> None:
    run, job = a_run(), Job(Path("/jobs/x"), "train", EVIL, (), Path("/x"), 0.0, {})
    preview = Preview(
        [(EVIL, EVIL)], [EVIL], [(EVIL, 2, EVIL)], [(EVIL, [("chosen", [("trained", EVIL), ("", EVIL)])])], 5
    )
    machine = {"processor": EVIL, "cores": 2, "memory": 2**30, "free": 2**29, "kernels": EVIL, "measured": False}
    drawn = [
        pictures.told(EVIL),
        pictures.machine(language, machine, [FoundModel(EVIL, "/m", EVIL, 5)], {"/m": 7.0}, [(EVIL, run)]),
        pictures.columns(language, Columns([EVIL], [[EVIL]], [EVIL])),
        pictures.preview(language, preview),
        pictures.plan(language, Foretold(refusal=EVIL)),
        pictures.runs(language, [(EVIL, run)], [(EVIL, job)]),
        pictures.run(language, EVIL, run, job, EVIL),
        pictures.compared(language, [(EVIL, run), ("b", run)]),
        pictures.audit(language, [{"name": EVIL, "bits": 4, "kept": 0.5, "agreement": 0.9}], EVIL),
    ]
    for html in drawn:
        assert "alert(1)" in Seen(html).text and "<script" not in html and "<img" not in html


def test_half_a_character_is_a_question_mark() -> None:
    run = a_run()
    run.options["model"] = "half \ud83d"
    for html in (pictures.told("\udcff"), pictures.columns("zh", Columns(["\ud800"], [["\udcff"]], [""]))):
        assert "?" in html and html.encode()
    assert "half ?" in pictures.runs("en", [("r", run)], ()).encode().decode()
    assert pictures.run("en", "r", run, None, "\udc80").encode()


def test_a_run_tells_how_far_it_is_and_when_it_ends() -> None:
    text = Seen(pictures.run("en", "r", a_run(), None, "")).text
    assert "Step 8 of 16" in text and "8.0 s left" in text and "9 trained tokens/s" in text
    assert "第 8 步，共 16 步" in Seen(pictures.run("zh", "r", a_run(), None, "")).text


def test_memory_is_a_bar_of_its_parts() -> None:
    found = Foretold(
        {"base": 2**29, "kept": 2**28}, 3 * 2**28, 2**28, 2**30, 1.5, 10, 15.0, True, "", [("--rank 8", 1.25)]
    )
    html = pictures.plan("en", found)
    assert html.count("<rect") == 2 and 'width="40.000%"' in html and 'width="20.000%"' in html
    text = Seen(html).text
    assert "768 MiB of 1.00 GiB" in text and "base model: 512 MiB" in text
    assert "10 steps take 15.0 s" in text and "--rank 8 (1.25 times)" in text and "stated" not in text


def test_a_job_tells_how_far_it_is_as_long_as_it_runs(tmp_path: Path) -> None:
    said = "Merging: 10 of 1,272, 8.2 s left\nMerging: 120 of 1,272, 7.1 s left\n"
    (tmp_path / "log.txt").write_text(said)
    job = Job(tmp_path, "export", "my-model", ("halfbyte",), tmp_path, 0.0, {})
    with (tmp_path / "lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        html = pictures.job("en", job)
        assert '<progress max="1272" value="120" aria-label="Merging: 120 of 1,272, 7.1 s left">' in html
    assert "<progress" not in pictures.job("en", job)


def test_charts_speak_the_language_but_runs_keep_their_names() -> None:
    run = a_run()
    run.events[-1:] = [Evaluation(step=8, figures={"loss": 0.4, "token_accuracy": 0.5, "perplexity": 1.5})]
    compared = pictures.compared("zh", [("evaluation", run), ("loss", run)])
    assert ">evaluation<" in compared and ">loss<" in compared and "评估：词元准确率" in compared
    run.evaluations[0].figures.pop(EVIL)
    charts = pictures.charts("zh", pictures.curves.drawings(run))
    words = {word for text in re.findall(r'>([^<>]+)<|aria-label="([^"]+)"', charts) for word in text if word}
    assert {word for word in words if re.search("[a-z]{3}", word)} == set()

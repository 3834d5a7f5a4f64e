"""``runs``, ``runs compare`` and ``report`` as their users see them, and the run's own lines in the terminal."""

import fcntl
import io
import os
import pty
import re
import shlex
import struct
import subprocess
import sys
import termios
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

from halfbyte import cli
from halfbyte.cli.console import TerminalDisplay
from halfbyte.cli.live import StepView, flow
from halfbyte.locks import lock
from halfbyte.runs.config import TrainConfig
from halfbyte.runs.events import Begin, End, Evaluation, Event, Header, Note, Sample, Stage, StepMetrics, to_line
from halfbyte.runs.folder import VERSION, RunFolder
from halfbyte.runs.history import read_run
from halfbyte.runs.report import words

Run = Callable[..., tuple[int, str, str]]


@pytest.fixture
def run(monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]) -> Run:
    """Run the command line in this process; returns exit code, standard output and standard error."""

    def run(*arguments: Any) -> tuple[int, str, str]:
        monkeypatch.setattr(sys, "argv", ["halfbyte", *map(str, arguments)])
        with pytest.raises(SystemExit) as exit:
            cli.main()
        return exit.value.code or 0, *capfd.readouterr()  # type: ignore[return-value]

    return run


def step(number: int, loss: float = 1.0) -> StepMetrics:
    return StepMetrics(
        step=number, epoch=number / 4, loss=loss, learning_rate=4.2e-4, grad_norm=1.314, trained_tokens=10 * number,
        tokens_per_second=1234.5, elapsed=number / 2, memory_bytes=3 * 2**30,
    )  # fmt: skip


def write(path: Path, *events: Event, version: int = VERSION, **options: Any) -> RunFolder:
    folder = RunFolder(path)
    path.mkdir(parents=True)
    TrainConfig(**({"model": "user/some-model", "data": "-", "output": path} | options)).save(folder.config)
    folder.about.write_text(f'{{"version": {version}, "begun": "2026-01-0{len(events) % 9 + 1}T03:04:05+00:00"}}')
    folder.metrics.write_text("".join(to_line(event) + "\n" for event in (Header(), *events)))
    return folder


@pytest.fixture
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Four runs: one finished, one that goes on, one broken off, one of a newer halfbyte; and one damaged."""
    monkeypatch.chdir(tmp_path)
    begin = Begin(step=0, total_steps=8)
    first = [begin, *(step(number, 8 / number) for number in range(1, 9)), Evaluation(step=8, figures={"loss": 0.75})]
    write(tmp_path / "runs/one", *first, End(step=8, reason="finished"), rank=8).summary.write_text('{"loss": 0.5}')
    write(tmp_path / "runs/two", begin, *(step(number, 4 / number) for number in range(1, 6)), method="dpo")
    write(tmp_path / "runs/group/three", begin, step(1, 3.0), End(step=1, reason="failed"))
    write(tmp_path / "runs/newer", version=VERSION + 1)
    damaged = write(tmp_path / "runs/damaged", begin, step(1, 2.5))
    damaged.metrics.write_text(damaged.metrics.read_text() + "not JSON\n")
    damaged.about.write_text("{")
    return tmp_path / "runs"


def test_runs_lists_each_with_its_state_and_figures_and_says_what_is_wrong_with_others(run: Run, home: Path) -> None:
    with lock(home / "two/.lock"):
        code, out, err = run("runs")
    assert code == 0
    head, *rows = [re.split(r"  +", line.strip()) for line in out.splitlines()]
    assert head == ["name", "state", "step", "loss", "evaluation", "method", "model", "begun", "time"]
    told = {row[0]: row[1:] for row in rows}
    assert told["one"][:6] == ["finished", "8/8", "0.5", "0.75", "sft", "user/some-model"]
    assert told["one"][-1] == "4.0 s"
    assert told["two"][:5] == ["running", "5/8", "1.827", "dpo", "user/some-model"]
    assert told["group/three"][:3] == ["failed", "1/8", "3"]
    assert told["damaged"][:3] == ["broken off", "1/8", "2.5"]
    assert err.splitlines() == [
        "runs/damaged: run.json cannot be read (it is damaged) and is left out.",
        f"{home}/newer holds a run of a newer halfbyte (layout {VERSION + 1}); look at it with that one.",
    ]
    assert run("runs", home) == (0, out.replace("running   ", "broken off"), err)
    assert run("runs", "runs/one")[1].splitlines()[1].startswith("one ")


def test_where_the_terminal_is_too_narrow_for_a_line_nothing_is_cut_off(home: Path) -> None:
    script = "import sys; sys.argv = ['halfbyte', 'runs', 'runs/one']; from halfbyte.cli import main; main()"
    text = re.sub(r"\x1b\[[0-9;?]*[A-Za-z]", "", in_terminal(script, [44])).replace("\r", "")
    assert max(map(len, text.splitlines())) <= 44
    name, *lines = text.splitlines()
    assert name == "one" and " ".join(" ".join(lines).split()) == (
        "finished step 8/8 loss 0.5 evaluation 0.75 sft user/some-model begun "
        + words.moment(read_run(home / "one").begun) + " 4.0 s"
    )  # fmt: skip
    wide = re.sub(r"\x1b\[[0-9;?]*[A-Za-z]", "", in_terminal(script, [150]))
    assert len(wide.splitlines()) == 2 and "user/some-model" in wide


def test_the_listed_evaluation_is_that_of_the_adapter_that_was_kept(run: Run, tmp_path: Path) -> None:
    losses = [Evaluation(step=at, figures={"loss": loss}) for at, loss in ((0, 4.0), (4, 0.75), (8, 2.5))]
    folder = write(tmp_path / "best", *(step(number) for number in range(1, 9)), *losses)
    folder.summary.write_text('{"adapter_step": 4}')
    assert re.split(r"  +", run("runs", tmp_path)[1].splitlines()[1])[4] == "0.75"


def test_runs_stand_in_the_order_in_which_they_began(run: Run, tmp_path: Path) -> None:
    for name, events in (("a", 5), ("b", 1), ("c", 3)):
        write(tmp_path / name, *[step(number) for number in range(events)])
    assert [line[0] for line in run("runs", tmp_path)[1].splitlines()[1:]] == ["b", "c", "a"]


def test_compare_shows_what_differs_and_writes_a_page(run: Run, home: Path) -> None:
    code, out, err = run("runs", "compare", home / "one", home / "two", "--html", "both.html")
    assert (code, err) == (0, "The page is both.html\n")
    lines = {line.split("  ")[0].strip(): re.split(r"  +", line.strip())[1:] for line in out.splitlines() if line}
    assert lines["state"] == ["finished", "broken off"] and lines["steps"] == ["8 of 8", "5 of 8"]
    assert lines["method"] == ["sft", "dpo"] and lines["rank"] == ["8", "64"]
    assert "seed" not in out and "Circumstances that differ: none" in out
    one, two = lines["loss, moving mean"]
    assert one[0] == "█" and one[-1] == "▁" and len(one) > len(two) > 8  # on the same scale of steps
    assert (home.parent / "both.html").read_text().count('data-name="two"') >= 4


def test_runs_of_one_name_are_told_apart_by_their_folders(run: Run, tmp_path: Path) -> None:
    for name in ("a/run", "b/run"):
        write(tmp_path / name, step(1))
    out = run("runs", "compare", tmp_path / "a/run", tmp_path / "b/run")[1]
    assert out.splitlines()[0].split() == ["a/run", "b/run"]


def test_report_makes_the_page_again(run: Run, home: Path) -> None:
    code, out, err = run("report", home / "one")
    assert (code, out, err) == (0, "runs/one/report.html\n", "")
    assert "<svg" in (home / "one/report.html").read_text()
    assert run("report", home / "one", "--html", "a.html")[:2] == (0, "a.html\n")
    with lock(home / "two/.lock"):
        assert run("report", home / "two")[2] == "The run is going on: the page shows its first 5 steps.\n"
    code, _, err = run("report", home / "damaged")
    assert code == 0 and err.splitlines() == [
        "run.json cannot be read (it is damaged) and is left out.",
        "metrics.jsonl is damaged: 1 line of 4 cannot be read.",
    ]


def test_no_torch_is_needed_to_look_at_runs(home: Path) -> None:
    for arguments in (
        ["runs"],
        ["runs", "compare", "runs/one", "runs/two", "--html", "c.html"],
        ["report", "runs/one"],
    ):
        script = (
            "import sys; from halfbyte import cli\n"
            "try: cli.main()\n"
            "except SystemExit as end: print(end.code, {'torch', 'transformers'} & set(sys.modules))"
        )
        told = subprocess.run([sys.executable, "-c", script, *arguments], capture_output=True, text=True, check=True)
        assert told.stdout.endswith("0 set()\n"), told.stderr


BAD = {
    "folder that is not there": (["runs", "{tmp}/no"], r"no is not there; name a folder that holds runs"),
    "folder without runs": (["runs", "{tmp}/empty"], r"There is no run in \S+empty; halfbyte train makes one"),
    "file to list": (["runs", "{tmp}/file.txt"], r"is a file"),
    "command that is none": (["runs", "compair", "a", "b"], r"no folder and no command 'compair' .did you mean 'comp"),
    "one run to compare": (["runs", "compare", "{tmp}/runs/one"], r"two runs or more"),
    "a run twice": (["runs", "compare", "{tmp}/runs/one", "{tmp}/runs/one"], r"named twice"),
    "no run to compare": (["runs", "compare", "{tmp}/runs/one", "{tmp}/empty"], r"empty is no run folder"),
    "a newer run to compare": (["runs", "compare", "{tmp}/runs/one", "{tmp}/runs/newer"], r"of a newer halfbyte"),
    "a page that is no page": (["report", "{tmp}/runs/one", "--html", "{tmp}/file.txt"], r"a page is a file in .html"),
    "a page that is a folder": (["report", "{tmp}/runs/one", "--html", "{tmp}"], r"is a folder; name a file"),
    "a page that cannot be": (["report", "{tmp}/runs/one", "--html", "{tmp}/file.txt/a.html"], r"is a file, so"),
    "folder of runs to report": (["report", "{tmp}/runs"], r"it holds 5 runs: name one, such as \S+runs/damaged"),
    "no run to report": (["report", "{tmp}/no"], r"no is not there; name the folder of a run"),
    "a newer run to report": (["report", "{tmp}/runs/newer"], r"of a newer halfbyte"),
    "no name": (["report"], r"run"),
}


@pytest.mark.parametrize(("arguments", "sentence"), BAD.values(), ids=BAD.keys())
def test_bad_input_gets_one_sentence_and_nothing_is_written(
    run: Run, home: Path, tmp_path: Path, arguments: list[str], sentence: str
) -> None:
    (tmp_path / "empty").mkdir()
    (tmp_path / "file.txt").write_text("mine")
    before = sorted(tmp_path.rglob("*"))
    code, out, err = run(*(argument.replace("{tmp}", str(tmp_path)) for argument in arguments))
    assert (code, out) == (2, "")
    assert re.fullmatch(rf"Error: .*{sentence}.*\n", err, re.IGNORECASE), err
    assert sorted(tmp_path.rglob("*")) == before and (tmp_path / "file.txt").read_text() == "mine"


def test_names_do_nothing_to_a_terminal(run: Run, tmp_path: Path) -> None:
    write(tmp_path / "a\x1b[31m\u202e[bold]", step(1), model="user/m\x1b]0;x\x07")
    _, out, _ = run("runs", tmp_path)
    assert "\x1b" not in out and "\u202e" not in out and "\\x1b[31m\\u202e[bold]" in out


def view(width: int, **changes: Any) -> list[str]:
    shown = StepView(400, 10)
    for number in range(11, 31):
        shown.step(step(number, loss=number / 100).model_copy(update=changes))
    shown.evaluated(Evaluation(step=20, figures={"loss": 0.152, "accuracy": 0.9}))
    return shown.lines(width)


PIECES = [
    "step 30/400", "loss 0.300 (mean 0.255)", "learning rate 4.2e-4", "gradient norm 1.31", "1,234 trained tokens/s",
    "3.00 GiB", "evaluation 0.152 (step 20)",
]  # fmt: skip


@pytest.mark.parametrize("width", [18, 24, 40, 60, 80, 120, 300])
def test_every_figure_is_there_at_every_width(width: int) -> None:
    lines = view(width)
    assert all(len(line) <= width for line in lines)
    words = " ".join(lines).split()
    for piece in PIECES:
        parts = piece.split()
        assert any(words[at : at + len(parts)] == parts for at in range(len(words))), piece
    assert words[words.index("left") - 1] == "s" or words[words.index("left") - 2] == "min"


def test_a_word_longer_than_the_width_still_is_there() -> None:
    assert flow(["a", "incomprehensibilities of it", "b"], 10) == ["a", "incomprehensibilities", "of it  b"]


def test_the_figures_of_a_method_are_told_with_the_loss() -> None:
    text = " ".join(view(300, figures={"rewards/accuracies": 0.75, "other": 1.0}))
    assert "loss 0.300 (mean 0.255)  accuracy 0.75  learning rate" in text and "other" not in text


def test_the_time_left_is_that_of_the_last_steps(monkeypatch: pytest.MonkeyPatch) -> None:
    now = [0.0]
    monkeypatch.setattr("halfbyte.cli.live.time.monotonic", lambda: now[0])
    shown = StepView(100)
    assert shown.left() is None
    for number in range(1, 51):
        now[0] += 10.0 if number <= 10 else 2.0  # slow at first
        shown.step(step(number).model_copy(update={"elapsed": now[0]}))
    assert shown.left() == pytest.approx(50 * 2.0)
    assert shown.elapsed() == pytest.approx(100 + 80)


def test_the_time_left_counts_nothing_that_came_before_the_first_step(monkeypatch: pytest.MonkeyPatch) -> None:
    now = [0.0]
    monkeypatch.setattr("halfbyte.cli.live.time.monotonic", lambda: now[0])
    stream = io.StringIO()
    display = TerminalDisplay(Console(file=stream, width=300))
    before = [Evaluation(step=0, figures={"loss": 1.0}), Sample(step=0, prompt="why?", answer="so")]
    for event in (Begin(step=0, total_steps=11), *before):
        now[0] += 100.0
        display(event)
    now[0] += 3.0
    display(step(1).model_copy(update={"elapsed": 203.0}))
    assert "3 min 23 s, 30.0 s left" in stream.getvalue()


def test_without_a_terminal_each_step_is_one_line_whatever_its_length() -> None:
    stream = io.StringIO()
    display = TerminalDisplay(Console(file=stream, width=30))
    display(Note(text="word " * 40))
    display(Begin(step=0, total_steps=3))
    for number in (1, 2, 3):
        display(step(number))
    display(Evaluation(step=3, figures={"loss": 0.5, "rouge_l": 0.25}))
    note, *lines = stream.getvalue().splitlines()
    assert note.split() == ["word"] * 40
    last = "evaluation after step 3: loss 0.5, ROUGE-L 0.25"
    assert [line.split("  ")[0] for line in lines] == ["step 1/3", "step 2/3", "step 3/3", last]
    assert all("gradient norm 1.31  1,234 trained tokens/s  3.00 GiB" in line for line in lines[:3])


def in_terminal(script: str, widths: list[int]) -> str:
    """What a program writes into a terminal whose width changes while it runs."""
    leader, follower = pty.openpty()

    def resize(width: int) -> None:
        fcntl.ioctl(leader, termios.TIOCSWINSZ, struct.pack("HHHH", 24, width, 0, 0))

    resize(widths[0])
    environment = {name: value for name, value in os.environ.items() if name not in ("COLUMNS", "LINES", "NO_COLOR")}
    process = subprocess.Popen(
        [sys.executable, "-c", script], stdin=follower, stdout=follower, stderr=follower,
        env=environment | {"TERM": "xterm-256color"},
    )  # fmt: skip
    os.close(follower)
    written = b""
    waiting = widths[1:]
    begun = time.monotonic()
    while True:
        try:
            part = os.read(leader, 65536)
        except OSError:  # the program has ended
            break
        if not part:
            break
        written += part
        if waiting and b"resize" in part:
            resize(waiting.pop(0))
        assert time.monotonic() - begun < 60
    os.close(leader)
    assert process.wait() == 0, written.decode()
    return written.decode()


def test_nothing_is_lost_in_a_terminal_whose_width_changes() -> None:
    script = (
        "import time\n"
        "from halfbyte.cli.console import TerminalDisplay\n"
        "from halfbyte.runs.events import Begin, End, Note, StepMetrics\n"
        "display = TerminalDisplay()\n"
        "display(Begin(step=0, total_steps=9))\n"
        "for n in range(1, 10):\n"
        "    display(StepMetrics(step=n, epoch=1, loss=n / 8, learning_rate=4.2e-4, grad_norm=1.314,\n"
        "        trained_tokens=n, tokens_per_second=1234.5, elapsed=n, memory_bytes=3 * 2**30))\n"
        "    display(Note(text=f'note {n}' + ' resize' * (n % 3 == 0)))\n"
        "    time.sleep(0.35)\n"
        "display(End(step=9, reason='finished'))\n"
    )
    text = in_terminal(script, [100, 40, 24, 70])
    plain = re.sub(r"\x1b\[[0-9;?]*[A-Za-z]", "", text)
    for number in range(1, 10):
        assert f"note {number}" in plain
    frames = plain.split("step ")[1:]
    for figure in ("gradient norm 1.31", "1,234 trained tokens/s", "3.00 GiB", "learning rate 4.2e-4"):
        assert figure in re.sub(r"\s+", " ", frames[-1])
    assert re.match(r"9/9 ━+ ", frames[-1]) and "loss 1.125 (mean 0.625)" in frames[-1]
    drawn = [line for frame in frames for line in frame.splitlines() if "trained tokens/s" in line]
    assert len({len(line) for line in drawn}) > 2  # at several widths
    assert max(len(line) for line in plain.splitlines()) < 100


def test_a_terminal_that_can_move_no_cursor_gets_lines(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TERM", "dumb")
    stream = io.StringIO()
    display = TerminalDisplay(Console(file=stream, force_terminal=True, width=80))
    for event in (Stage(name="data", text="Reading"), Begin(step=0, total_steps=1), step(1)):
        display(event)
    assert stream.getvalue().startswith("step 1/1  loss 1.000  learning rate 4.2e-4")
    assert "\x1b" not in stream.getvalue()


def test_a_run_names_its_page_and_the_commands_of_the_page_work(
    run: Run, tiny_model_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    data = tmp_path / "data.jsonl"
    data.write_text("".join(f'{{"prompt": "say {n}", "completion": "it is {n}"}}\n' for n in "abcdefaa"))
    flags = ["--data", data, "--eval-data", data, "--max-steps", 2, "--batch-size", 2, "--rank", 2]
    code, out, _ = run("train", "--model", tiny_model_folder, *flags, "--output", tmp_path / "a run")
    assert code == 0 and f"a page about the run in {tmp_path}/a run/report.html" in out
    page = (tmp_path / "a run/report.html").read_text()
    said = dict(re.findall(r'<th scope="row">([^<]+)</th><td><bdi>([^<]+)</bdi>', page))
    assert (said["examples"], said["equal to an earlier row"], said["examples for evaluation"]) == ("8", "2 rows", "8")
    assert "finished</span>" in page and "evaluation loss" in page
    commands = re.findall(r'<pre class="command">(halfbyte [^<]+)</pre>', page)
    chat, again = (next(c for c in commands if f"halfbyte {word} " in c) for word in ("chat", "train"))
    monkeypatch.chdir(tmp_path)
    again = shlex.split(again.replace("&#39;", "'"))[1:]
    assert run(*again)[0] == 0
    one, other = (
        (folder / "adapter_model.safetensors").read_bytes()
        for folder in (tmp_path / "a run", tmp_path / "runs/a run-again")
    )
    assert one == other
    assert "a run" in shlex.split(chat.replace("&#39;", "'"))[2]

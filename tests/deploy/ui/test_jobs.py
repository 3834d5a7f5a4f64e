"""Jobs run one after the other, outlive whoever asked for them, and end as they are told to."""

import json
import os
import signal
import sys
import time
from pathlib import Path
from typing import Any

import pytest

from halfbyte.deploy.ui import jobs
from halfbyte.deploy.ui.jobs import Job, all_jobs, begin, job_of, read_job
from halfbyte.errors import InputError

PYTHON = sys.executable


def wait(job: Job, *states: str, seconds: float = 60) -> None:
    ends = time.monotonic() + seconds
    while job.state not in states:
        assert time.monotonic() < ends, f"{job.state}: {job.log}"
        time.sleep(0.02)


@pytest.fixture
def home(tmp_path: Path) -> Path:
    return tmp_path / "jobs"


def run(home: Path, program: str, name: str, monkeypatch: pytest.MonkeyPatch, **options: Any) -> Job:
    """Ask for a job that runs a Python program in the place of halfbyte."""
    python = home.parent / "python"
    if not python.exists():  # a script that a shell reads must not be written anew
        words = f'[ "$2" = halfbyte ] && exec {PYTHON} -c "$3"', f'exec {PYTHON} "$@"'
        python.write_text("#!/bin/sh\n" + "\n".join(words) + "\n")
        python.chmod(0o755)
    monkeypatch.setattr(jobs.sys, "executable", str(python))
    return begin(home, "train", name, [program], home.parent / name, **options)


def test_a_command_is_run_and_what_it_says_is_kept(home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    job = run(
        home, "print('half a byte'); open('{folder}/seen', 'w')", "a", monkeypatch, files={"config.yaml": "x: 1\n"}
    )
    wait(job, "done")
    assert "half a byte" in job.log and (job.folder / "seen").exists()
    assert (job.folder / "config.yaml").read_text() == "x: 1\n"
    assert read_job(job.folder) == job and job_of(home, home.parent / "a") == job


def test_jobs_wait_for_those_before_them(home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    lines = home.parent / "lines"
    note = (
        f"import time; f = open('{lines}', 'a'); print('begin NAME', file=f, flush=True); time.sleep(0.5); "
        "print('end NAME', file=f)"
    )
    made = [run(home, note.replace("NAME", name), name, monkeypatch) for name in "abc"]
    assert made[2].state == "waiting"
    wait(made[2], "done")
    assert lines.read_text().split("\n")[:6] == ["begin a", "end a", "begin b", "end b", "begin c", "end c"]
    assert all_jobs(home) == made


def test_a_job_outlives_the_process_that_asked_for_it(home: Path, tmp_path: Path) -> None:
    program = (
        "import sys; sys.argv; from pathlib import Path; from halfbyte.deploy.ui.jobs import begin; "
        f"begin(Path({str(home)!r}), 'train', 'x', ['--version'], Path({str(tmp_path / 'x')!r}))"
    )
    assert os.spawnl(os.P_WAIT, sys.executable, sys.executable, "-c", program) == 0
    [job] = all_jobs(home)
    wait(job, "done")
    assert job.log.startswith("halfbyte ")


def test_a_job_that_is_stopped_gets_the_signal_and_one_that_waits_never_begins(
    home: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    slow = (
        "import signal, sys, time; signal.signal(15, lambda *_: (print('saved'), sys.exit(130))); print('here'); "
        "time.sleep(60)"
    )
    first, second = run(home, slow, "a", monkeypatch), run(home, "print('never')", "b", monkeypatch)
    while "here" not in first.log:
        time.sleep(0.02)
    second.stop()
    wait(second, "stopped")
    first.stop()
    wait(first, "stopped")
    assert "saved" in first.log and second.log == ""


def test_how_a_job_ended_is_told(home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    failed = run(home, "import sys; sys.exit(2)", "a", monkeypatch)
    wait(failed, "failed")
    killed = run(home, "import time; time.sleep(60)", "b", monkeypatch)
    wait(killed, "running")
    os.kill(int((killed.folder / "lock").read_text()), signal.SIGKILL)
    wait(killed, "broken off")
    after = run(home, "print(1)", "c", monkeypatch)
    wait(after, "done")  # nobody waits for the dead


def test_two_jobs_never_write_to_one_folder(home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    job = run(home, "import time; time.sleep(60)", "a", monkeypatch)
    with pytest.raises(InputError, match="a is being written by another job"):
        run(home, "print(1)", "a", monkeypatch)
    assert len(all_jobs(home)) == 1
    job.stop()
    wait(job, "stopped")  # by a signal of which it knows nothing


def test_a_damaged_folder_is_no_job(home: Path) -> None:
    for name, text in (("a", "{"), ("b", "[]"), ("c", json.dumps({"kind": "train"}))):
        (home / name).mkdir(parents=True)
        (home / name / "job.json").write_text(text)
    assert all_jobs(home) == [] and all_jobs(home / "none") == []


def test_the_card_that_was_edited_is_put_in_place_and_how_to_run_it_stays(
    home: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    output = home.parent / "made"
    program = (
        f"import pathlib; p = pathlib.Path({str(output)!r}); p.mkdir(); "
        "(p / 'README.md').write_text('# Old\\n\\n## Use\\n\\ncode\\n')"
    )
    job = run(home, program, "made", monkeypatch, files={"README.md": "# Mine"})
    wait(job, "done", "failed")
    assert (output / "README.md").read_text() == "# Mine\n\n## Use\n\ncode\n"

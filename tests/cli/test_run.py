"""``halfbyte run``: a script as python runs it, its exit codes, arguments and tracebacks unchanged."""

import subprocess
import sys
from pathlib import Path

import pytest

from halfbyte.cli import run

SCRIPT = """\
import pathlib, sys
import helper
print(sys.argv, __name__, sys.path[0] == str(pathlib.Path(__file__).parent), __file__ == str(pathlib.Path(__file__)))

def fail():
    raise ValueError("mine")

if sys.argv[1] == "exit":
    sys.exit(7)
if sys.argv[1] == "words":
    sys.exit("a sentence")
if sys.argv[1] == "interrupt":
    raise KeyboardInterrupt
if sys.argv[1] == "fail":
    fail()
"""


def outcome(arguments: list[str], folder: Path) -> tuple[int, str, str]:
    done = subprocess.run(
        [sys.executable, *arguments], cwd=folder, capture_output=True, text=True, timeout=300, check=False
    )
    lines = done.stderr.splitlines(keepends=True)
    # bitsandbytes, which peft imports, says that it lacks a package
    return done.returncode, done.stdout, "".join(line for line in lines if "gemm_4bit_forward" not in line)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    (tmp_path / "script.py").write_text(SCRIPT)
    (tmp_path / "helper.py").write_text("")
    return tmp_path


@pytest.mark.slow
def test_it_is_as_python_itself(folder: Path) -> None:
    assert outcome(["-m", "halfbyte", "run", "script.py", "fail", "--flag"], folder) == outcome(
        ["script.py", "fail", "--flag"], folder
    )


@pytest.mark.slow
@pytest.mark.parametrize("words", [["exit"], ["words", "--no-cuda"], ["interrupt"], ["nothing", "-m", "--help"]])
def test_every_end_is_as_python_s(folder: Path, words: list[str]) -> None:
    assert outcome(["-m", "halfbyte", "run", "script.py", *words], folder) == outcome(["script.py", *words], folder)


@pytest.mark.slow
@pytest.mark.parametrize("words", [["exit"], ["nothing", "-m", "--help"]])
def test_modules_too(folder: Path, words: list[str]) -> None:
    assert outcome(["-m", "halfbyte", "run", "-m", "script", *words], folder) == outcome(
        ["-m", "script", *words], folder
    )


@pytest.mark.slow
def test_a_syntax_error_is_as_python_s(folder: Path) -> None:
    (folder / "bad.py").write_text("def (:\n")
    assert outcome(["-m", "halfbyte", "run", "bad.py"], folder) == outcome(["bad.py"], folder)


@pytest.mark.parametrize(
    ("words", "sentence"),
    [
        (["nowhere.py"], "There is no script nowhere.py."),
        (["pytest"], "There is no script pytest; for a module, halfbyte run -m pytest."),
    ],
)
def test_a_script_that_is_not_there_is_told_in_a_sentence(words: list[str], sentence: str) -> None:
    with pytest.raises(ValueError, match=sentence.replace(".", r"\.")):
        run.run(words)

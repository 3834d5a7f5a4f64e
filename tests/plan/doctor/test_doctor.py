"""The whole report against what the process can see for itself, and that a look writes nothing."""

import ast
import importlib.metadata
import os
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import typer

from halfbyte.cli import app
from halfbyte.errors import InputError
from halfbyte.kernels import native, use_provider
from halfbyte.plan import doctor
from halfbyte.plan.doctor import kind_of
from halfbyte.plan.doctor.finding import Finding, looked, worst


@pytest.fixture(scope="module")
def report() -> dict[str, doctor.Finding]:
    return {finding.what: finding for finding in doctor.report()}


@pytest.mark.parametrize("library", ["torch", "transformers", "peft", "trl", "halfbyte"])
def test_it_names_the_version_of_each_library(library, report):
    assert report[library].value == importlib.metadata.version(library)


def test_it_names_what_is_in_force_here(report):
    assert report["kernels"].value == ("native" if native.available() else "reference")
    assert report["self-test"].level == "ok"
    assert report["import"].level == "ok"
    if native.available():
        assert report["instruction set"].value.startswith(native.tier())
        assert all(tier in report["instruction set"].value for tier in native.tiers())
        assert f"({native.tier()})" in doctor.line()


def test_the_line_names_the_provider():
    with use_provider("reference"):
        assert "reference kernels" in doctor.line()
        assert "\n" not in doctor.line()


def test_every_finding_that_is_not_well_says_why_and_what_to_do(report):
    for finding in report.values():
        assert finding.value and finding.level in doctor.LEVELS
        if finding.level in ("warning", "fault"):
            assert finding.why and finding.fix, finding


def strings(file: Path) -> Iterator[str]:
    """Yield the strings of a file, those with values in them as one."""
    tree = ast.parse(file.read_text())
    joined = [node for node in ast.walk(tree) if isinstance(node, ast.JoinedStr)]
    inner = {id(part) for node in joined for part in ast.walk(node)}
    for node in ast.walk(tree):
        if isinstance(node, ast.JoinedStr):
            yield "".join(str(part.value) if isinstance(part, ast.Constant) else "X" for part in node.values)
        elif isinstance(node, ast.Constant) and isinstance(node.value, str) and id(node) not in inner:
            yield node.value


def test_every_command_and_flag_that_it_says_to_paste_is_there():
    commands: dict[str, Any] = typer.main.get_command(app).commands  # type: ignore[attr-defined]
    options = {
        word: {name for one in command.params for name in [*one.opts, *one.secondary_opts]}
        for word, command in commands.items()
    }
    seen = 0
    for text in (text for file in Path(doctor.__file__).parent.glob("*.py") for text in strings(file)):
        if others := re.search(r"\b(pip|hf|sudo|find|du|torchrun) ", text):
            text = text[: others.start()]
        words = re.findall(r"\bhalfbyte ([a-z-]+)(?= [A-Z-]| \.\.\.|;|$)", text)
        for word in words:
            assert word in commands, text
        for flag in re.findall(r"(?<![\w-])--[a-z][a-z-]+", text):
            seen += 1
            assert flag in options[words[0] if words else "train"], text
    assert seen > 20


def test_nothing_of_it_needs_a_library_to_be_imported_before_that_was_tried():
    """A broken torch is what the doctor is asked about, so it must not be needed to ask."""
    needed = "sorted(sys.modules.keys() & {'torch', 'transformers', 'numpy', 'psutil', 'rich', 'pydantic', 'yaml'})"
    script = f"import sys, halfbyte.plan.doctor; print({needed})"
    told = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    assert told.stdout == "[]\n"


def test_a_torch_that_breaks_python_is_told_and_the_rest_of_the_report_is_there(tmp_path: Path):
    (tmp_path / "torch").mkdir()
    (tmp_path / "torch" / "__init__.py").write_text("import os, signal; os.kill(os.getpid(), signal.SIGSEGV)\n")
    script = "from halfbyte.plan import doctor; print(*doctor.report(), sep='\\n')"
    environment = os.environ | {"PYTHONPATH": str(tmp_path), "HF_HUB_OFFLINE": "1"}
    told = subprocess.run([sys.executable, "-c", script], env=environment, capture_output=True, text=True, check=True)
    [crash] = [line for line in told.stdout.splitlines() if "crashes Python (SIGSEGV)" in line]
    assert "import torch" in crash and "level='fault'" in crash
    [shadow] = [line for line in told.stdout.splitlines() if "what='shadowed'" in line]
    assert str(tmp_path / "torch") in shadow
    assert "what='memory'" in told.stdout


def test_the_command_says_what_is_broken_where_it_cannot_even_start(tmp_path: Path):
    (tmp_path / "rich").mkdir()
    (tmp_path / "rich" / "__init__.py").write_text("raise ImportError('no half of it')\n")
    environment = os.environ | {"PYTHONPATH": str(tmp_path)}
    command = [sys.executable, "-m", "halfbyte", "doctor"]
    told = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert (told.returncode, told.stdout) == (2, "")
    assert told.stderr.startswith("Error: halfbyte cannot start: no half of it.\n")
    assert "Traceback" not in told.stderr


def test_a_look_that_fails_is_a_finding_and_what_was_seen_before_is_kept():
    def broken():
        yield Finding("one", "seen")
        raise RuntimeError("disk\non fire")

    assert looked("x", broken) == [
        Finding("one", "seen"),
        Finding("x", "could not be looked at: RuntimeError: disk on fire", level="warning"),
    ]

    def refused():
        raise InputError("A sentence.")
        yield

    assert looked("x", refused) == [Finding("x", "A sentence.", level="fault")]
    assert worst([]) == "ok"
    assert worst([Finding("a", "", level="fault"), Finding("b", "", level="note")]) == "fault"


def test_what_is_asked_about_is_told_apart(tmp_path: Path, tiny_model_folder: Path):
    (tmp_path / "a.py").write_text("")
    assert kind_of(str(tmp_path / "a.py")) == "script"
    assert kind_of(str(tiny_model_folder)) == "model"
    assert kind_of("nobody/no-such-model") == "model"
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "run.json").write_text("{}")
    assert kind_of(str(tmp_path / "run")) == "run"
    (tmp_path / "notes.txt").write_text("")
    (tmp_path / "weights").mkdir()
    (tmp_path / "weights" / "model.safetensors").write_bytes(b"")
    for name, said in (
        ("b.py", "There is no script"),
        ("notes.txt", "is neither a script"),
        ("weights", "holds weights, but neither config.json nor"),
        (".", "holds 1 run"),
    ):
        with pytest.raises(InputError, match=re.escape(said)):
            kind_of(str(tmp_path / name))

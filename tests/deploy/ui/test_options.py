"""What ``halfbyte ui`` takes, and refuses in a sentence."""

from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from halfbyte.cli import app
from halfbyte.deploy.ui import server
from halfbyte.deploy.ui.options import UiOptions
from halfbyte.errors import InputError


def options(**given: Any) -> UiOptions:
    return UiOptions.from_yaml(None, given)


@pytest.mark.parametrize("host", ["0.0.0.0", "::", "192.168.0.1", "example.org"])
def test_a_host_that_others_reach_demands_a_password(host: str) -> None:
    with pytest.raises(InputError, match="so a password is needed"):
        options(host=host)
    assert options(host=host, password="x").users() == {"halfbyte": "x"}
    assert options(host="127.0.0.1").users() == options(host="::1").users() == {}


def test_users_are_read_from_a_file(tmp_path: Path) -> None:
    file = tmp_path / "users"
    file.write_text("anna:a:b\n\nzoë:ü\n")
    assert options(auth_file=file).users() == {"anna": "a:b", "zoë": "ü"}
    for text, said in (("", "names no user"), ("anna\n", "line 1: write NAME:PASSWORD"), ("a:b\n:c\n", "line 2")):
        file.write_text(text)
        with pytest.raises(InputError, match=said):
            options(auth_file=file).users()
    with pytest.raises(InputError, match="cannot be read"):
        options(auth_file=tmp_path / "none").users()
    with pytest.raises(InputError, match="give one of them"):
        options(auth_file=file, password="x")
    with pytest.raises(InputError, match="is empty"):
        options(password="").users()


def test_flags_win_over_the_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("gradio")
    file, seen = tmp_path / "ui.yaml", []
    file.write_text("port: 1234\nlanguage: zh\n")
    monkeypatch.setattr(server, "serve", lambda wanted, ready: seen.append(wanted))
    done = CliRunner().invoke(app, ["ui", "--config", str(file), "--port", "0", "--root", str(tmp_path)])
    assert done.exit_code == 0, done.output
    assert [(one.port, one.language, one.root) for one in seen] == [(0, "zh", [str(tmp_path)])]

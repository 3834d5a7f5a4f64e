"""Write docs/help.md from the command line's own --help; with --check, fail if it is out of date.

python docs/update_help.py [--check]
"""

import sys
from pathlib import Path
from typing import Any

import typer
from typer.testing import CliRunner

from halfbyte.cli import app

PAGE = Path(__file__).with_name("help.md")


def page() -> str:
    """Return the page: one section a command, as the terminal shows it."""
    sections = ["# Commands\n\nMade from `--help` by `make docs`.\n"]
    for command in _commands(typer.main.get_command(app)):
        arguments = [*command.split(), "--help"]
        result = CliRunner().invoke(app, arguments, prog_name="halfbyte", catch_exceptions=False)
        sections.append(f"## halfbyte {command}".rstrip() + f"\n\n```\n{result.stdout.strip()}\n```\n")
    return "\n".join(sections)


def _commands(command: Any, name: str = "") -> list[str]:
    """Return the names of a command and of all below it, ``""`` for the program itself."""
    below = sorted(getattr(command, "commands", {}).items())
    return [name, *(deeper for word, child in below for deeper in _commands(child, f"{name} {word}".strip()))]


if __name__ == "__main__":
    text = page()
    if "--check" not in sys.argv:
        PAGE.write_text(text, encoding="utf-8")
    elif PAGE.read_text(encoding="utf-8") != text:
        sys.exit("docs/help.md is out of date: run make docs.")

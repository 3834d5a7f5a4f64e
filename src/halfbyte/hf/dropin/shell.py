"""``!pip install`` and ``%pip install`` of notebooks: what is installed stays as it is.

Tutorials begin with ``!pip install -U transformers==4.31 bitsandbytes ...``, for a machine that has nothing. Here that
would replace, under a running Python, the very versions that halfbyte serves. So of a plain command the names that are
installed, or that halfbyte answers for, are left out; what is missing is installed, with everything that is there held
to its version. Nothing is ever uninstalled. Said once for each command. Commands with other shell syntax (``&&``,
``|``, ``;``) run as they stand, and so do ``%%bash`` and what a script starts by ``subprocess``.
"""

import importlib.metadata
import importlib.util
import re
import shlex
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

from packaging.requirements import InvalidRequirement, Requirement

from halfbyte.hf.dropin.said import say

STANDS_IN = frozenset({"bitsandbytes", "flash-attn", "xformers", "triton"})
"""What halfbyte answers for, or what serves a GPU alone."""
SERVICES = frozenset({"wandb"})
"""Of which a module may stand in (:mod:`halfbyte.hf.dropin.services`) that has to go once the real one is there."""
WITH_VALUE = frozenset({"--index-url", "-i", "--extra-index-url", "--find-links", "-f", "--trusted-host", "--proxy"})
OWN_CHOICE = frozenset({"-U", "--upgrade", "--force-reinstall", "-I", "--ignore-installed", "--no-deps", "--user"})
SYNTAX = re.compile(r"[;|&`$()\n]|^\{(?!sys\.executable\}$)")


CHECKED = "__import__('halfbyte.hf.dropin.shell', fromlist=['checked']).checked"
_COMMAND = re.compile(r"get_ipython\(\)\.system\((?P<command>['\"].*\bpip.*)\)(?P<end>\s*)$")
_MAGIC = re.compile(r"get_ipython\(\)\.run_line_magic\('pip', (?P<command>.*)\)(?P<end>\s*)$")


def guard(shell: Any) -> Callable[[], None]:
    """Let the IPython ``shell`` run pip's commands as the head of this file says; return what undoes it.

    It is a transformer of a cell's lines, after IPython's own: those have made calls of ``!`` and ``%``.
    """
    shell.input_transformers_post.append(_guarded)

    def undo() -> None:
        if _guarded in shell.input_transformers_post:
            shell.input_transformers_post.remove(_guarded)

    return undo


def _guarded(lines: list[str]) -> list[str]:
    def line_of(line: str) -> str:
        line = _COMMAND.sub(lambda found: f"get_ipython().system({CHECKED}({found['command']})){found['end']}", line)
        return _MAGIC.sub(
            lambda found: f"get_ipython().system({CHECKED}('pip ' + {found['command']})){found['end']}", line
        )

    return [line_of(line) for line in lines]


def checked(command: str) -> str:
    """Return what is run in place of a shell's ``command``."""
    words = _words(command)
    action, rest = _pip(words)
    if action == "uninstall":
        say(f"{_short(command)}: nothing is uninstalled, since halfbyte serves what is there.")
        return "true"
    if action != "install":
        return command
    wanted: list[str] = []
    options: list[str] = []
    left: list[str] = []
    position = 0
    while position < len(rest):
        word = rest[position]
        position += 1
        if word in WITH_VALUE or word in ("-r", "-c", "-e", "--requirement", "--constraint", "--editable"):
            value = rest[position : position + 1]
            position += 1
            (options if word in WITH_VALUE else wanted).extend([word, *value])
        elif word.startswith("-"):
            if word not in OWN_CHOICE and not re.fullmatch(r"-[qU]+", word):
                options.append(word)
        elif (name := name_of(word)) and (name in STANDS_IN or _is_installed(name)):
            left.append(name)
        else:
            wanted.append(word)
    if not left:
        return _install(wanted, options) if wanted else command
    say(
        f"pip install {' '.join(left)}: what is installed stays as it is, since halfbyte serves these versions"
        f"{', and ' + ' '.join(wanted) + ' is added' if wanted else ''}."
    )
    return _install(wanted, options) if wanted else "true"


def name_of(word: str) -> str:
    """Return the name of the package that a word of pip's asks for, as pip normalizes it; empty if it is not told."""
    try:
        name = Requirement(word).name
    except InvalidRequirement:
        found = re.search(r"(?:#egg=([\w.-]+)|/([\w.-]+?)(?:\.git)?(?:@[\w./-]+)?$)", word)
        if not word.startswith(("git+", "http")) or not found or word.endswith((".whl", ".zip", ".tar.gz")):
            return ""
        name = found[1] or found[2]
    return re.sub(r"[-_.]+", "-", name).lower()


def _is_installed(name: str) -> bool:
    try:
        importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return False
    return True


def _words(command: str) -> list[str]:
    try:
        return shlex.split(command, comments=True)
    except ValueError:
        return []


def _pip(words: list[str]) -> tuple[str, list[str]]:
    """Return what pip is to do and its arguments, of a plain command that runs pip."""
    if any(SYNTAX.search(word) for word in words) or not words:
        return "", []
    if words[0] == "uv":
        words = words[1:]
    elif (words[0] == "{sys.executable}" or Path(words[0]).name.startswith("python")) and words[1:2] == ["-m"]:
        words = words[2:]
    if len(words) < 2 or not re.fullmatch(r"pip[\d.]*", Path(words[0]).name):
        return "", []
    words = [word for word in words[1:] if word not in ("-q", "--quiet", "-qqq", "-qq")]
    return words[0], words[1:]


def _install(wanted: list[str], options: list[str]) -> str:
    held = {dist.metadata["Name"]: dist.version for dist in importlib.metadata.distributions() if dist.metadata["Name"]}
    with tempfile.NamedTemporaryFile("w", suffix=".txt", prefix="halfbyte-", delete=False) as file:
        file.writelines(f"{name}=={version}\n" for name, version in sorted(held.items()))
    for service in SERVICES.intersection(map(name_of, wanted)):
        sys.modules.pop(service, None)
    command = [sys.executable, "-m", "pip", "install", "-q", *options, "-c", file.name, *wanted]
    return shlex.join(command)


def _short(command: str) -> str:
    return command if len(command) < 80 else f"{command[:77]}..."

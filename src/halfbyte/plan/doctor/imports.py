"""Whether the libraries can be imported, tried in a process of its own: one that crashes takes nobody with it.

The same process tells which OpenMP runtimes all of them have loaded. Nothing is written: no ``.pyc`` either.
"""

import json
import os
import re
import signal
import subprocess
import sys
import threading
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from halfbyte.errors import named
from halfbyte.plan.doctor.finding import Finding

SELF_TEST = "halfbyte.plan.doctor.kernels"
"""Has ``found()``, which looks at the kernels in that process too: an instruction that is not there ends it."""
MODULES = (
    "numpy", "torch", "halfbyte.kernels", "safetensors.torch", "tokenizers", "transformers", "accelerate", "datasets",
    "peft", "halfbyte.hf",
)  # fmt: skip
PATIENCE = 120.0
"""Seconds that imports may take, on a slow disk."""
RUNTIMES = ("libgomp", "libiomp", "libomp", "libkmp")
"""How the files of OpenMP runtimes begin."""

PROGRAM = """
import importlib, json, sys
def tried(name, use):
    print(json.dumps([name]), flush=True)
    error, found = None, []
    try:
        found = use(importlib.import_module(name))
    except BaseException as raised:
        error = f"{type(raised).__name__}: {' '.join(str(raised).split())}"[:300]
    print(json.dumps([name, error, found]), flush=True)
*modules, last = sys.argv[1:]
for name in modules:
    tried(name, lambda module: [])
try:
    maps = open("/proc/self/maps").read().splitlines()
except OSError:
    maps = []
print(json.dumps(["", sorted({line.split()[-1] for line in maps if "/" in line})]), flush=True)
if last:
    tried(last, lambda module: module.found())
"""


@dataclass
class Imported:
    """What came of the imports.

    Attributes:
        errors: of each module that failed, what it said.
        files: that the process had mapped.
        findings: of the kernels.
    """

    errors: dict[str, str] = field(default_factory=dict)
    files: list[str] = field(default_factory=list)
    findings: list[Finding] = field(default_factory=list)


class Trial:
    """Imports that are under way in another process, so that other things can be looked at meanwhile.

    Args:
        modules: what is imported, in this order.
        path: folders in which Python looks first.
        self_test: the module that looks at the kernels; empty: none.
    """

    def __init__(self, modules: Sequence[str] = MODULES, path: Sequence[str] = (), self_test: str = SELF_TEST) -> None:
        environment = os.environ | {"PYTHONWARNINGS": "ignore", "PYTHONDONTWRITEBYTECODE": "1"}
        if path:
            environment["PYTHONPATH"] = os.pathsep.join([*path, environment.get("PYTHONPATH", "")])
        self._process = subprocess.Popen(
            [sys.executable, "-P", "-c", PROGRAM, *modules, self_test],
            stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True, env=environment,
        )  # fmt: skip
        self._lines: list[str] = []
        self._reader = threading.Thread(target=self._read, daemon=True)
        self._reader.start()

    def _read(self) -> None:
        assert self._process.stdout is not None
        with self._process.stdout as out:
            self._lines.extend(out)

    def result(self, patience: float = PATIENCE) -> Imported:
        """Wait for it."""
        try:
            code = self._process.wait(patience)
        except subprocess.TimeoutExpired:
            self._process.kill()
            code = self._process.wait()
        self._reader.join(1.0)
        imported, under_way = Imported(), ""
        for line in self._lines:
            try:
                name, *rest = json.loads(line)
            except (ValueError, TypeError):  # a library that prints
                continue
            if not rest:
                under_way = name
            elif name:
                under_way = ""
                if rest[0]:
                    imported.errors[name] = rest[0]
                imported.findings += [Finding(**one) for one in rest[1]]
            else:
                imported.files = rest[0]
        if under_way:
            imported.errors[under_way] = _ended(code, patience)
        return imported


def _ended(code: int, patience: float) -> str:
    if code == -signal.SIGKILL:
        return f"it was killed, or did not come back within {patience:.0f} s"
    if code < 0:
        return f"it crashes Python ({signal.Signals(-code).name})"
    return f"it ends Python (code {code})"


def check(imported: Imported) -> Iterator[Finding]:
    """Yield what cannot be imported, and runtimes that are in each other's way."""
    for error in dict.fromkeys(imported.errors.values()):  # what stands on a broken one fails with the same words
        name = next(name for name, said in imported.errors.items() if said == error)
        if name == SELF_TEST:
            yield Finding(
                "self-test",
                f"the self-test of the kernels fails: {error}",
                "Training ends so too: the kernels use instructions that this machine does not have, or are damaged.",
                "export HALFBYTE_ISA=scalar  # for now; then: pip install --force-reinstall --no-deps .",
                "fault",
            )
            continue
        library = name.partition(".")[0]
        lacking = re.search(r"No module named '(\w+)", error)
        yield Finding(
            "import",
            f"import {name} fails: {error}",
            "Whatever uses it ends with this error."
            if library != "halfbyte"
            else "No command but this one works; the cause is often a library that is told above.",
            f"pip install --force-reinstall {lacking[1] if lacking else library}"
            if lacking or library != "halfbyte"
            else "pip install --force-reinstall --no-deps .  # in the folder of halfbyte's sources",
            "fault",
        )
    if not imported.errors:
        yield Finding("import", f"{named(MODULES)} can be imported")
    yield from runtimes(imported.files)


def runtimes(files: Sequence[str]) -> Iterator[Finding]:
    """Yield OpenMP runtimes beside torch's own, among the files that a process has mapped."""
    found = sorted({str(Path(file).resolve()) for file in files if Path(file).name.startswith(RUNTIMES)})
    if len(found) < 2:
        if found:
            yield Finding("OpenMP", found[0])
        return
    kinds = {next(kind for kind in RUNTIMES if Path(file).name.startswith(kind)) for file in found}
    yield Finding(
        "OpenMP",
        f"{len(found)} runtimes are loaded: {', '.join(found)}",
        "Each has threads of its own for the same cores, which wait by spinning: steps of training now and then take "
        "many times as long."
        if len(kinds) > 1
        else "Each has threads of its own for the same cores; halfbyte's kernels run on those of torch's.",
        "export OMP_WAIT_POLICY=passive  # or remove the library that brings the second one" if len(kinds) > 1 else "",
        "warning" if len(kinds) > 1 else "note",
    )

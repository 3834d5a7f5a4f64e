"""Write src/halfbyte/_native.pyi from the built extension; with --check, fail if it is out of date.

python docs/update_stub.py [--check]

The stub's names, types and docstrings are those of csrc/bindings.cpp. Without the extension, that is where there was no
compiler, nothing is written or checked.
"""

import importlib.util
import subprocess
import sys
import tempfile
from pathlib import Path

STUB = Path(__file__).parents[1] / "src" / "halfbyte" / "_native.pyi"


def stub() -> str:
    """Return the stub: what nanobind writes, formatted as the rest of the code is."""
    with tempfile.TemporaryDirectory() as folder:
        made = Path(folder, STUB.name)
        generate = [sys.executable, "-m", "nanobind.stubgen", "-q", "-m", "halfbyte._native", "-o", str(made)]
        subprocess.run(generate, check=True)
        text = made.read_text(encoding="utf-8")
    formatter = [sys.executable, "-m", "ruff", "format", "--stdin-filename", str(STUB), "-"]
    return subprocess.run(formatter, input=text, stdout=subprocess.PIPE, text=True, encoding="utf-8", check=True).stdout


if __name__ == "__main__":
    if importlib.util.find_spec("halfbyte._native") is None:
        print("No native kernels in this installation: src/halfbyte/_native.pyi is left as it is.")
    elif "--check" not in sys.argv:
        STUB.write_text(stub(), encoding="utf-8")
    elif STUB.read_text(encoding="utf-8") != stub():
        sys.exit("src/halfbyte/_native.pyi is out of date: run make docs.")

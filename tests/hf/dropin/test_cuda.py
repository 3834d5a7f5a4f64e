"""What a script written for one GPU is told where there is none, in a process of its own (gpu_script.py)."""

import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from packaging.specifiers import SpecifierSet

import halfbyte
from halfbyte.hf.dropin import callers, cuda
from halfbyte.hf.dropin.cuda_answers import ANSWERS

LIBRARY = """
import torch

def sees():
    return {
        "available": torch.cuda.is_available(),
        "count": torch.cuda.device_count(),
        "bf16": torch.cuda.is_bf16_supported(),
    }

def fails():
    errors = []
    for wish in (
        lambda: torch.zeros(2, device="cuda"),
        lambda: torch.ones(2, device="cuda:0"),
        lambda: torch.empty_like(torch.ones(2), device="cuda"),
    ):
        def of_mine(wish=wish):
            return wish()
        try:
            of_mine()
        except Exception as error:
            errors.append(type(error).__name__)
    for wish in ("to", "tensor"):
        try:
            torch.ones(2).to("cuda") if wish == "to" else torch.tensor([1], device="cuda")
        except (AssertionError, RuntimeError):
            continue
        errors.append(f"{wish} did not fail")
    return errors

class Batch:
    def __init__(self, x):
        self.x = x

    def to(self, device):
        return {name: value.to(device) for name, value in {"x": self.x}.items()}["x"]

def hands_on(x):
    return Batch(x)
"""


@pytest.fixture
def script(tmp_path: Path) -> Path:
    """The script, a file beside it, and a library in a folder of installed packages."""
    shutil.copy(Path(__file__).parent / "gpu_script.py", tmp_path)
    (tmp_path / "beside.py").write_text(
        "import torch\n\ndef seen_by_a_file_beside_the_script():\n    return torch.cuda.is_available()\n"
    )
    folder = tmp_path / "site-packages" / "library"
    folder.mkdir(parents=True)
    (folder / "__init__.py").write_text(LIBRARY)
    return tmp_path / "gpu_script.py"


def test_a_script_for_one_gpu_runs_and_libraries_see_none(script: Path, tiny_model_folder: Path) -> None:
    packages = script.parent / "site-packages"
    done = subprocess.run(
        [sys.executable, "-c", f"import sys, runpy; sys.path[:0] = [{str(packages)!r}, {str(script.parent)!r}]\n"
         f"sys.argv = [{str(script)!r}, {str(tiny_model_folder)!r}, {str(script.parent)!r}]\n"
         f"runpy.run_path({str(script)!r}, run_name='__main__')"],
        capture_output=True, text=True, timeout=300, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert done.stdout.endswith("done\n")
    told = [line for line in done.stderr.splitlines() if line.startswith("halfbyte: ")]
    assert len(told) == len(set(told)) >= 25
    for sentence in (
        "halfbyte: torch.cuda.is_available: there is no GPU; the script is told that there is one, and what it sends "
        "there stays on the CPU.",
        'halfbyte: .to("cuda"): there is no GPU, so it stays on the CPU.',
        "halfbyte: device_map='auto': there is no GPU, so the model is loaded on the CPU.",
        "halfbyte: pipeline(device=0): there is no GPU, so it runs on the CPU.",
    ):
        assert sentence in told


def test_each_row_names_what_there_is() -> None:
    for row in cuda.rows():
        holder, key, is_item = row._place()
        assert not is_item and hasattr(holder, key), row.where
        assert row.cuda and row.why
    assert SpecifierSet(">=2.7").contains(torch.__version__)
    assert all(hasattr(getattr(torch, module[6:]), name) for module, names in ANSWERS.items() for name in names)


def test_who_is_the_user() -> None:
    import inspect
    import json

    import transformers

    def frame_of(file: str, name: str = "m", own_file: str | None = None):
        space = {"__name__": name, "__file__": own_file or file, "inspect": inspect}
        exec(compile("frame = inspect.currentframe()", file, "exec"), space)
        return space["frame"]

    assert callers.is_users(frame_of("/home/me/train.py")) and callers.is_users(frame_of("<stdin>", "__main__", "x.py"))
    assert callers.is_users(frame_of("/x/site-packages/trl/scripts/sft.py", "__main__"))
    assert not callers.is_users(frame_of("/x/site-packages/trl/trainer.py"))
    torch_folder = str(Path(torch.__file__).parent)
    assert not callers.is_users(frame_of(f"{torch_folder}/distributed/run.py", "__main__"))
    assert callers.is_users(frame_of(f"{torch_folder}tune/recipes/lora.py", "__main__"))
    assert callers.is_users(frame_of(f"{Path(halfbyte.__file__).parent}_demo/train.py"))
    assert not callers.is_users(frame_of("<string>", "m", transformers.__file__))  # a dataclass's own __init__
    assert not callers.is_users(frame_of(json.__file__)) and not callers.is_users(frame_of(callers.__file__))

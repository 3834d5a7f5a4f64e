"""``halfbyte run notebook.ipynb`` and ``%load_ext halfbyte`` in a kernel, with what tutorials have in their cells."""

import json
import shlex
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from halfbyte.errors import InputError
from halfbyte.hf.dropin import said
from halfbyte.hf.dropin.shell import checked, name_of

TRAINING = """
from datasets import Dataset
from peft import LoraConfig
from transformers import AutoModelForCausalLM, AutoTokenizer, BitsAndBytesConfig
from trl import SFTConfig, SFTTrainer

model = AutoModelForCausalLM.from_pretrained(
    PATH, quantization_config=BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4"), device_map="auto"
)
trainer = SFTTrainer(
    model,
    SFTConfig("out", max_steps=2, per_device_train_batch_size=2, logging_steps=1, report_to="none", disable_tqdm=True),
    train_dataset=Dataset.from_list([{"text": f"Red apples and {i} pears."} for i in range(4)]),
    processing_class=AutoTokenizer.from_pretrained(PATH),
    peft_config=LoraConfig(r=4, target_modules="all-linear", task_type="CAUSAL_LM"),
)
result = trainer.train()
print("trained", type(model.model.layers[0].mlp.up_proj.base_layer).__module__)
"""
CELLS = [
    "!pip install -q -U transformers==4.31.0 \\\n    git+https://github.com/huggingface/peft.git 'trl>=0.4'",
    "%%capture\n%pip install -U bitsandbytes accelerate\nprint('captured')",
    "!nvidia-smi",
    "%matplotlib inline\nimport matplotlib.pyplot as plt\nfigure = plt.plot([1, 2])\nplt.show()",
    "import os\nos.environ['HF_TOKEN'] = 'hf_abc'\nnames = !echo one two\nnames[0]",
    "from google.colab import drive\ndrive.mount('/content/drive')",
    TRAINING,
    "%%time\nprint(sorted(os.listdir()), __name__)",
]


def notebook(file: Path, *cells: str, **tags: list[str]) -> Path:
    made = [
        {"cell_type": "code", "metadata": {"tags": tags.get(f"c{number}", [])}, "source": cell.splitlines(True),
         "outputs": [], "execution_count": None, "id": f"c{number}"}
        for number, cell in enumerate(cells)
    ]  # fmt: skip
    text = {"cell_type": "markdown", "metadata": {}, "source": "# Title", "id": "title"}
    about = {"kernelspec": {"name": "python3", "language": "python", "display_name": "Python 3"}}
    file.write_text(json.dumps({"cells": [text, *made], "metadata": about, "nbformat": 4, "nbformat_minor": 5}))
    return file


def outcome(file: str, folder: Path) -> tuple[int, str, str]:
    done = subprocess.run(
        [sys.executable, "-m", "halfbyte", "run", file],
        cwd=folder, capture_output=True, text=True, timeout=300, check=False,
    )  # fmt: skip
    return done.returncode, done.stdout, done.stderr


@pytest.mark.slow
def test_a_notebook_is_run_as_jupyter_runs_it(tiny_model_folder: Path, tmp_path: Path) -> None:
    pytest.importorskip("IPython", reason="make setup installs it")
    (tmp_path / "inner").mkdir()
    notebook(tmp_path / "inner" / "a.ipynb", f"PATH = {str(tiny_model_folder)!r}", *CELLS)
    code, out, err = outcome("inner/a.ipynb", tmp_path)
    assert code == 0, err
    assert "trained halfbyte.nn" in out and "'one two'" in out and "captured" not in out
    assert "['a.ipynb', 'out'] __main__" in out and "nvidia-smi" in out
    assert "halfbyte: pip install transformers peft trl: what is installed stays as it is" in err
    assert "nothing is mounted" in err and "there is no GPU, so the model is loaded on the CPU" in err


@pytest.mark.slow
def test_the_first_cell_that_fails_ends_it(tmp_path: Path) -> None:
    pytest.importorskip("IPython", reason="make setup installs it")
    file = notebook(
        tmp_path / "a.ipynb", "1 / 0", "raise KeyError('skipped')", "print('before')",
        "def f():\n    raise ValueError('mine')\nf()", "print('after')",
        c0=["raises-exception"], c1=["skip-execution"],
    )  # fmt: skip
    code, out, err = outcome(file.name, tmp_path)
    assert code == 1 and "before" in out and "after" not in out and "skipped" not in err
    assert "ZeroDivisionError" in err and "ValueError: mine" in err and "Error" not in out
    assert err.strip().endswith("halfbyte: cell 5 of a.ipynb has failed; those after it were not run.")
    code, out, err = outcome(notebook(tmp_path / "b.ipynb", "import sys\nsys.exit(7)", "print('x')").name, tmp_path)
    assert (code, out) == (7, "")


@pytest.mark.slow
def test_the_extension_serves_a_real_kernel(tiny_model_folder: Path, tmp_path: Path) -> None:
    nbclient = pytest.importorskip("nbclient", reason="make setup installs it")
    pytest.importorskip("ipykernel", reason="make setup installs it")
    import nbformat

    kernel = tmp_path / "kernels" / "here"
    kernel.mkdir(parents=True)
    start = [sys.executable, "-m", "ipykernel_launcher", "-f", "{connection_file}"]
    (kernel / "kernel.json").write_text(json.dumps({"argv": start, "display_name": "here", "language": "python"}))
    file = notebook(
        tmp_path / "a.ipynb", "%load_ext halfbyte", f"PATH = {str(tiny_model_folder)!r}", *CELLS,
        "%unload_ext halfbyte",
        "import importlib\nprint(importlib.util.find_spec('wandb'))",
    )  # fmt: skip
    read = nbformat.read(file, as_version=4)
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("JUPYTER_PATH", str(tmp_path))
        nbclient.NotebookClient(
            read, kernel_name="here", timeout=300, resources={"metadata": {"path": tmp_path}}
        ).execute()
    text = "".join(out.get("text", "") for cell in read.cells for out in cell.get("outputs", ()))
    assert "trained halfbyte.nn" in text and "what is installed stays as it is" in text
    assert text.rstrip().endswith("None")


@pytest.mark.parametrize(
    ("content", "words"),
    [
        ("not json", "is not a notebook"),
        ('{"cells": 3}', "is not a notebook"),
        ('{"cells": [], "metadata": {"kernelspec": {"language": "R"}}}', "is a notebook in R"),
    ],
)
def test_what_is_no_notebook_is_told_in_a_sentence(content: str, words: str, tmp_path: Path) -> None:
    from halfbyte.cli.notebook import check

    (tmp_path / "a.ipynb").write_text(content)
    with pytest.raises(InputError, match=words) as refusal:
        check(tmp_path / "a.ipynb")
    assert "\n" not in str(refusal.value)


@pytest.fixture
def sentences(caplog: pytest.LogCaptureFixture) -> Any:
    said.forget()
    yield lambda: [record.getMessage() for record in caplog.records if record.name == "halfbyte"]
    said.forget()


@pytest.mark.parametrize(
    "command",
    [
        "pip install -q -U bitsandbytes",
        "pip install transformers==4.31 trl[quantization]>=0.4",
        "pip3 install -qU git+https://github.com/huggingface/peft.git@v0.4.0 accelerate",
        "{sys.executable} -m pip install 'datasets<3'",
        f"{sys.executable} -m pip install --upgrade torch --index-url https://download.pytorch.org/whl/cu121",
        "uv pip install flash-attn --no-build-isolation",
        "pip uninstall -y transformers",
    ],
)
def test_what_is_installed_or_answered_for_is_left(command: str, sentences: Any) -> None:
    assert checked(command) == "true"
    assert len(sentences()) == 1


def test_what_is_missing_is_installed_and_holds_the_rest(sentences: Any) -> None:
    words = shlex.split(checked("pip install -q -U transformers==4.30 no-such-package-1 einops==0.6 -r more.txt"))
    assert words[:4] == [sys.executable, "-m", "pip", "install"]
    assert words[-2:] == ["-r", "more.txt"] and {"no-such-package-1", "-c"} <= set(words) and "-U" not in words
    assert not any("transformers" in word for word in words)
    held = Path(words[words.index("-c") + 1]).read_text().splitlines()
    import transformers

    assert f"transformers=={transformers.__version__}" in held
    assert "and no-such-package-1" in sentences()[0]


@pytest.mark.parametrize(
    "command",
    ["ls -l", "pip list", "pip install a && ls", "pip install $NAME", "echo pip install x", "git clone x", "pip"],
)
def test_other_commands_are_left_alone(command: str, sentences: Any) -> None:
    assert checked(command) == command and sentences() == []


def test_names_of_packages() -> None:
    assert name_of("flash_attn==2.0") == "flash-attn" and name_of("peft[test]>=1") == "peft"
    assert name_of("git+https://github.com/huggingface/transformers") == "transformers"
    assert name_of("https://x.org/a-1.0-py3-none-any.whl") == "" and name_of("./here") == ""

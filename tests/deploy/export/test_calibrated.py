"""GPTQ and AWQ by auto-round: calibrated on the run's own rows, opened by others, near the merged model."""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer

import halfbyte
from halfbyte import data
from halfbyte.deploy.export import calibrated
from halfbyte.deploy.export.exporting import export
from halfbyte.errors import InputError
from halfbyte.hf import HalfbyteConfig
from halfbyte.hf.models.dense import dense_model
from halfbyte.runs.config import TrainConfig
from halfbyte.train import fine_tune

auto_round = pytest.mark.skipif(
    subprocess.run(
        [sys.executable, "-c", "import importlib.util as u; u.find_spec('auto_round') or exit(1)"]
    ).returncode
    != 0,
    reason="auto-round is not installed",
)
OPENS = """
import sys, numpy as np, torch
from transformers import AutoModelForCausalLM, AutoRoundConfig
model = AutoModelForCausalLM.from_pretrained(
    sys.argv[1], quantization_config=AutoRoundConfig(), dtype=torch.bfloat16, device_map="cpu"
)
with torch.no_grad():
    np.save(sys.argv[3], model(torch.from_numpy(np.load(sys.argv[2]))).logits.float().numpy())
"""


def by_auto_round(folder: Path, ids: Any) -> Any:
    """The logits of transformers with auto-round, in a process of its own."""
    files = [str(folder.parent / name) for name in ("ids.npy", "out.npy")]
    np.save(files[0], ids.numpy())
    told = subprocess.run(
        [sys.executable, "-c", OPENS, str(folder), *files], capture_output=True, text=True, cwd=folder.parent
    )
    assert told.returncode == 0, told.stderr
    return torch.from_numpy(np.load(files[1]))


def by_halfbyte(folder: Path, ids: Any) -> Any:
    """The logits of transformers alone, over the dense weights that halfbyte reads of the folder."""
    export(folder, folder.parent / "dense", format="hf", to="fp32", overwrite=True)
    model = AutoModelForCausalLM.from_pretrained(folder.parent / "dense", dtype=torch.float32).eval()
    with torch.no_grad():
        return model(ids).logits


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory, wide_model_folder: Path) -> Path:
    """A run of some steps over the wide tiny model, some of whose rows were held out."""
    folder = tmp_path_factory.mktemp("runs")
    rows = [json.dumps({"prompt": f"say {n} {n * 7}", "completion": f"it is {n * 11}"}) for n in range(40)]
    (folder / "rows.jsonl").write_text("\n".join(rows) + "\n")
    options = {
        "model": str(wide_model_folder), "data": [str(folder / "rows.jsonl")], "preset": "quick", "eval_share": 0.2,
        "output": str(folder / "run"), "max_steps": 3, "rank": 4,
    }  # fmt: skip
    return fine_tune(TrainConfig.from_yaml(None, options)).output


def test_blocks_are_of_rows_that_the_run_was_trained_on(run: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    config = TrainConfig.from_yaml(run / "config.yaml", {})
    prepared = data.prepare(config, halfbyte.load_tokenizer(config.model))
    monkeypatch.setattr(calibrated, "LENGTH", 16)
    monkeypatch.setattr(calibrated, "COUNT", 1000)
    text = calibrated._blocks(dense_model(run), None, False).ravel().tolist()
    trained, held = (list(rows.rows["input_ids"]) for rows in (prepared.train, prepared.evaluation))
    runs = [text[at : at + 12] for at in range(len(text))]
    assert sum(row[:12] in runs for row in trained) >= len(trained) - 1 and 20 < len(trained) < 40
    assert sum(map(len, trained)) - len(text) < 16 and not any(row in [text[at : at + len(row)]
        for at in range(len(text))] for row in held if row not in trained)  # fmt: skip


def test_blocks_lose_no_token_but_those_at_the_end() -> None:
    rows = [list(range(start, start + 7)) for start in range(0, 70, 7)]
    assert calibrated.blocks(rows, 16, 3).tolist() == np.arange(48).reshape(3, 16).tolist()
    assert calibrated.blocks(rows, 16, 9).tolist() == np.arange(64).reshape(4, 16).tolist()
    assert calibrated.blocks(rows, 100, 9).tolist() == [list(range(70))]
    assert calibrated.blocks([], 100, 9).size == 0


@auto_round
@pytest.mark.slow
@pytest.mark.parametrize("form", ["gptq", "awq"])
def test_it_opens_in_transformers_and_here_and_leaves_nothing_else(
    form: Any, run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(calibrated, "COUNT", 4)
    modules, environment, told = set(sys.modules), dict(os.environ), []
    export(run, tmp_path / "out", format=form, rounds=2, report=lambda *done: told.append(done))
    assert not {name for name in set(sys.modules) - modules if name.startswith("auto_round")}
    assert dict(os.environ) == environment and sorted(os.listdir(tmp_path)) == ["out"]
    assert {what for what, *_ in told} >= {"Merging", "Quantizing"} and ("Quantizing", 2, 2) in told
    names = {file.name for file in (tmp_path / "out").iterdir()}
    assert {"config.json", "model.safetensors", "README.md", "tokenizer.json", "generation_config.json"} <= names
    assert not names & {"work", "adapter_config.json", "summary.json"}
    about = json.loads((tmp_path / "out" / "config.json").read_text())["quantization_config"]
    assert about["quant_method"] == form and about["bits"] == 4 and about["group_size"] == 64
    text = (
        "".join(file.read_text() for file in (tmp_path / "out").glob("*.json"))
        + (tmp_path / "out" / "README.md").read_text()
    )
    assert str(tmp_path) not in text and str(run.parent) not in text and "rows that the run was trained on" in text
    held = load_file(tmp_path / "out" / "model.safetensors")
    assert sum(name.endswith(".qweight") for name in held) == 14

    ids = torch.randint(5, 250, (2, 30), generator=torch.Generator().manual_seed(1))
    merged = export(run, tmp_path / "merged", format="hf", to="fp32").folder
    with torch.no_grad():
        exact = AutoModelForCausalLM.from_pretrained(merged, dtype=torch.float32)(ids).logits
    ours, theirs = by_halfbyte(tmp_path / "out", ids), by_auto_round(tmp_path / "out", ids)
    apart = (ours - exact).norm() / exact.norm()
    assert 0.01 < apart < 0.75  # of random weights calibration can keep little; in a wrong order it is 1.4
    torch.testing.assert_close(theirs, ours, rtol=0.05, atol=0.05 * float(ours.abs().max()))
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "out")
    assert tokenizer.chat_template == AutoTokenizer.from_pretrained(run).chat_template
    halfbyte.load(tmp_path / "out", quantization_config=HalfbyteConfig())


@auto_round
def test_what_cannot_be_calibrated_is_told_and_nothing_is_left(
    run: Path, wide_model_folder: Path, tiny_model_folder: Path, adapted: Any, tmp_path: Path
) -> None:
    few = tmp_path / "few.jsonl"
    few.write_text(json.dumps({"prompt": "a", "completion": "b"}) + "\n")
    for model, options, message in (
        (wide_model_folder, {}, "its data are not known; name rows to calibrate on"),
        (adapted(wide_model_folder), {}, "its data are not known; name some"),
        (run, {"data": [str(few)]}, "tokens, too few to calibrate on"),
        (run, {"data": [str(tmp_path / "nowhere.jsonl")]}, "nowhere.jsonl"),
        (tiny_model_folder, {"data": [str(few)]}, "has 80 inputs, which is no multiple of 32"),
    ):
        with pytest.raises(InputError, match=message):
            export(model, tmp_path / "out", format="gptq", **options)
        assert not (tmp_path / "out").exists() and not list(tmp_path.glob(".out*"))


@auto_round
@pytest.mark.slow
def test_where_auto_round_fails_its_last_words_are_told(run: Path, tmp_path: Path, monkeypatch: Any) -> None:
    monkeypatch.setattr(calibrated, "COUNT", 1)
    real = calibrated.Order.write

    def spoil(self: Any, file: Path) -> None:
        real(self, file)
        Path(self.blocks).write_bytes(b"nothing")

    monkeypatch.setattr(calibrated.Order, "write", spoil)
    with pytest.raises(InputError, match=r"(?s)auto-round could not quantize the model \(exit code 1\).*Error"):
        export(run, tmp_path / "out", format="gptq", rounds=0)
    assert not (tmp_path / "out").exists() and not list(tmp_path.glob(".out*"))


@auto_round
@pytest.mark.slow
def test_who_was_interrupted_goes_on_behind_the_merge(
    run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(calibrated, "COUNT", 1)

    def stop(what: str, *_: int) -> None:
        if what == "Quantizing":
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        export(run, tmp_path / "out", format="gptq", rounds=0, report=stop)
    assert not (tmp_path / "out").exists()
    told: list[str] = []
    export(run, tmp_path / "out", format="gptq", rounds=0, report=lambda what, *_: told.append(what))
    assert "Merging" not in told and "Quantizing" in told and (tmp_path / "out" / "config.json").is_file()
    assert not list(tmp_path.glob(".out*"))

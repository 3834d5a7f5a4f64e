"""Runs leave the fingerprint of their base beside each adapter, and go on over that base alone."""

import json
import os
import shutil
import signal
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, LlamaConfig

import halfbyte
from halfbyte.errors import InputError
from halfbyte.hf import quantize_checkpoint
from halfbyte.hf.models.fingerprint import FILE, Fingerprint
from halfbyte.runs.events import Event, Note, StepMetrics
from halfbyte.train import Interrupted, TrainConfig, fine_tune

WEIGHTS = "model.safetensors"
WORDS = ["yes", "no", "perhaps on Sunday", "ask again"]


@pytest.fixture
def base(tiny_model_folder: Path, tmp_path: Path) -> Path:
    shutil.copytree(tiny_model_folder, tmp_path / "base")
    return tmp_path / "base"


@pytest.fixture
def options(base: Path, tmp_path: Path) -> dict[str, Any]:
    file = tmp_path / "rows.jsonl"
    rows = [{"instruction": f"{'really ' * (i % 4)}{i}?", "output": WORDS[i % 4]} for i in range(13)]
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return {
        "model": str(base), "data": str(file), "output": tmp_path / "run", "preset": "quick", "sample_prompts": [],
        "eval_samples": 0, "rank": 4, "max_steps": 4, "save_steps": 2, "keep": 2, "memory": "64GiB",
    }  # fmt: skip


def interrupted(options: dict[str, Any]) -> Path:
    def listen(event: Event) -> None:
        if isinstance(event, StepMetrics) and event.step == 1:
            os.kill(os.getpid(), signal.SIGINT)

    with pytest.raises(Interrupted) as stop:
        fine_tune(TrainConfig(**options), listen)
    return stop.value.output


def resumed(run: Path) -> list[str]:
    notes: list[str] = []
    config = TrainConfig.from_yaml(run / "config.yaml", {"output": run, "resume": True})
    fine_tune(config, lambda event: notes.append(event.text) if isinstance(event, Note) else None)
    return notes


def change(base: Path, name: str = "model.layers.1.mlp.up_proj.weight", at: int = 700) -> None:
    tensors = load_file(base / WEIGHTS)
    tensors[name].view(-1)[at] += 1
    save_file(tensors, base / WEIGHTS, {"format": "pt"})


def reseed(base: Path) -> Path:
    torch.manual_seed(5)
    AutoModelForCausalLM.from_config(LlamaConfig.from_pretrained(base)).to(torch.bfloat16).save_pretrained(base)
    return base


@pytest.mark.parametrize("how", ["16 bits", "4 bits", "int8", "none"])
def test_each_adapter_of_a_run_knows_its_base(how: str, options: dict[str, Any], base: Path, tmp_path: Path) -> None:
    if how == "4 bits":
        quantize_checkpoint(base, tmp_path / "four")
        options["model"] = str(tmp_path / "four")
    elif how != "16 bits":
        options["quant_type"] = how
    run = fine_tune(TrainConfig(**options)).output
    folders = [run, *sorted((run / "checkpoints").iterdir())]
    assert len(folders) == 3
    texts = {(folder / FILE).read_text() for folder in folders}
    assert len(texts) == 1
    found = Fingerprint.of_adapter(run)
    assert found and found.model == Path(options["model"]).name and "dense" in found.digests and not found.files
    assert str(tmp_path) not in texts.pop()
    listed = json.loads((folders[1] / "checksums.json").read_text())["files"]
    assert FILE in listed and ("base_format.json" in listed) == (how in ("int8", "none"))
    quantize_checkpoint(base, tmp_path / "copy", overwrite=True)
    about = json.loads((run / "adapter_config.json").read_text())
    for model in (tmp_path / "copy", reseed(base)):
        (run / "adapter_config.json").write_text(json.dumps(about | {"base_model_name_or_path": str(model)}))
        (run / "base_format.json").unlink(missing_ok=True)
        if model == base:
            with pytest.raises(InputError, match="base model"):
                halfbyte.load(run)
        else:
            halfbyte.load(run)


def test_a_run_is_resumed_over_the_weights_that_it_was_begun_with(options: dict[str, Any], base: Path) -> None:
    run = interrupted(options)
    first = (base / WEIGHTS).read_bytes()
    before = {path: path.read_bytes() for path in run.rglob("*") if path.is_file()}
    change(base)
    with pytest.raises(
        InputError, match=r"the base model's files are others \(of 20 tensors model.layers.1.mlp.up_proj.weight holds"
    ):
        resumed(run)
    assert {path: path.read_bytes() for path in run.rglob("*") if path.is_file()} == before
    (base / WEIGHTS).write_bytes(first)  # of another time, which needs no word, since all of it was compared
    assert not any("written since" in note for note in resumed(run))


def test_a_run_is_resumed_over_the_same_weights_in_other_files_bit_for_bit(
    options: dict[str, Any], base: Path, tmp_path: Path
) -> None:
    whole = fine_tune(TrainConfig(**options | {"output": tmp_path / "whole"})).output
    run = interrupted(options)
    model = AutoModelForCausalLM.from_pretrained(base)
    config = (base / "config.json").read_bytes()
    (base / WEIGHTS).unlink()
    model.save_pretrained(base, max_shard_size="20KB")
    assert len(list(base.glob("*.safetensors"))) > 1
    (base / "config.json").write_bytes(config.replace(b'"rms_norm_eps": 1e-06', b'"rms_norm_eps": 1e-05'))
    with pytest.raises(InputError, match="the base model's files are others"):  # its configuration is
        resumed(run)
    (base / "config.json").write_bytes(config)
    resumed(run)
    name = "adapter_model.safetensors"
    assert (run / name).read_bytes() == (whole / name).read_bytes()


def test_training_on_is_over_the_same_base_in_any_form(options: dict[str, Any], base: Path, tmp_path: Path) -> None:
    first = fine_tune(TrainConfig(**options)).output
    more = {key: value for key, value in options.items() if key != "rank"} | {"adapter": first, "max_steps": 1}
    quantize_checkpoint(base, tmp_path / "four")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        fine_tune(TrainConfig(**more | {"model": str(tmp_path / "four"), "output": tmp_path / "over four"}))
    reseed(base)
    with pytest.raises(
        InputError, match=r"is not what it was when the adapter .*run was trained on it: .*put its files"
    ):
        fine_tune(TrainConfig(**more | {"output": tmp_path / "no"}))
    assert not (tmp_path / "no").exists()


def test_a_classifier_knows_its_base_too(
    task_folder: Callable[[str], Path], options: dict[str, Any], tmp_path: Path
) -> None:
    base = tmp_path / "bert"
    shutil.copytree(task_folder("bert"), base)
    rows = [{"sentence": f"{'very ' * (i % 3)}{i}", "label": ("owl", "dog")[i % 2]} for i in range(12)]
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    options |= {"model": str(base), "task": "classify"}
    del options["sample_prompts"], options["eval_samples"]
    run = fine_tune(TrainConfig(**options)).output
    halfbyte.load(run)
    change(base, "bert.encoder.layer.0.output.dense.weight")
    with pytest.raises(
        InputError, match=r"of \d+ tensors bert.encoder.layer.0.output.dense.weight holds other values;"
    ):
        halfbyte.load(run)


def test_a_run_that_replaces_another_leaves_nothing_of_its_base(options: dict[str, Any], base: Path) -> None:
    run = fine_tune(TrainConfig(**options | {"quant_type": "int8"})).output
    assert (run / "base_format.json").is_file()
    reseed(base)
    fine_tune(TrainConfig(**options | {"overwrite": True}))
    assert not (run / "base_format.json").exists()
    halfbyte.load(run)

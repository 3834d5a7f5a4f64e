"""Exports are the model that was asked for, with a card; what makes no sense is a sentence, and nothing is left."""

import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

import halfbyte
from halfbyte import cli
from halfbyte.deploy.export.exporting import export
from halfbyte.deploy.merge import merge
from halfbyte.errors import InputError
from halfbyte.hf import quantize_checkpoint
from halfbyte.hf.models.fingerprint import FILE

Invoke = Callable[..., tuple[int, str, str]]


@pytest.fixture
def invoke(monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]) -> Invoke:
    def invoke(*arguments: Any) -> tuple[int, str, str]:
        capfd.readouterr()
        monkeypatch.setattr("sys.argv", ["halfbyte", *map(str, arguments)])
        with pytest.raises(SystemExit) as end:
            cli.main()
        return int(end.value.code or 0), *capfd.readouterr()

    return invoke


def test_hf_is_what_merge_makes(invoke: Invoke, adapted: Any, tiny_model_folder: Path, tmp_path: Path) -> None:
    adapter = adapted(tiny_model_folder)
    merge(adapter, tmp_path / "merged", onto="original", to="fp16")
    code, out, _ = invoke("export", adapter, tmp_path / "hf", "--format", "hf", "--to", "fp16", "--onto", "original")
    assert code == 0 and "for hf in fp16" in out and "halfbyte chat" in out
    ours, theirs = (sorted((tmp_path / name).iterdir()) for name in ("hf", "merged"))
    assert [file.name for file in ours] == [file.name for file in theirs]
    for one, other in zip(ours, theirs, strict=True):
        assert one.name == "README.md" or one.read_bytes() == other.read_bytes()


def test_a_model_without_an_adapter_becomes_what_its_weights_stand_for(tiny_model_folder: Path, tmp_path: Path) -> None:
    quantize_checkpoint(tiny_model_folder, tmp_path / "four")
    export(tmp_path / "four", tmp_path / "hf", format="hf", to="fp32")
    opened = AutoModelForCausalLM.from_pretrained(tmp_path / "hf", dtype=torch.float32)
    dense = halfbyte.load(tmp_path / "four").dequantize(torch.float32)
    held = dict(dense.named_parameters())
    for name, x in opened.named_parameters():
        torch.testing.assert_close(x, held[name].float(), rtol=0, atol=0)
    _, head, body = (tmp_path / "hf" / "README.md").read_text().split("---\n", 2)
    assert yaml.safe_load(head)["tags"] == ["halfbyte"] and "four, as dense weights, in fp32" in body


def test_bnb_4bit_is_what_merge_makes_or_quantize_where_nothing_was_learnt(
    adapted: Any, tiny_model_folder: Path, tmp_path: Path
) -> None:
    adapter = adapted(tiny_model_folder)
    merge(adapter, tmp_path / "merged", to="nf4", rounding="original")
    export(adapter, tmp_path / "out", format="bnb-4bit", rounding="original")
    quantize_checkpoint(tiny_model_folder, tmp_path / "quantized")
    export(tiny_model_folder, tmp_path / "plain", format="bnb-4bit")
    for one, other in (("out", "merged"), ("plain", "quantized")):
        for file in (tmp_path / other).iterdir():
            mine, theirs = ((tmp_path / folder / file.name).read_bytes() for folder in (one, other))
            if file.name == FILE:  # with the times of the files that it is of
                mine, theirs = (json.dumps(json.loads(text) | {"files": {}}).encode() for text in (mine, theirs))
            assert file.name == "README.md" or mine == theirs
        assert "With `pip install bitsandbytes`:" in (tmp_path / one / "README.md").read_text()
    with pytest.raises(InputError, match="has no adapter, so there is nothing to calibrate"):
        export(tiny_model_folder, tmp_path / "more", format="bnb-4bit", rounding="random")


def test_the_card_says_how_to_run_this_format_and_what_it_costs(
    adapted: Any, wide_model_folder: Path, tmp_path: Path
) -> None:
    export(adapted(wide_model_folder), tmp_path / "out", format="mlx")
    _, head, body = (tmp_path / "out" / "README.md").read_text().split("---\n", 2)
    about = yaml.safe_load(head)
    assert about["library_name"] == "mlx" and "mlx" in about["tags"] and "base_model" not in about
    use = body.partition("## Use")[2]
    assert "from mlx_lm import generate, load" in use and 'load("out")' in use and "transformers" not in use
    weights, base = (
        load_file(tmp_path / "out" / "model.safetensors"),
        merge(tmp_path / "adapter", tmp_path / "merged").folder,
    )
    from halfbyte.deploy.export.affine import Affine, dequantize

    apart = size = 0.0
    for name, x in load_file(base / "model.safetensors").items():
        stem = name.removesuffix("weight")
        if f"{stem}scales" in weights:
            made = dequantize(Affine(weights[name], weights[f"{stem}scales"], weights[f"{stem}biases"]))
            apart += float((made - x.float()).square().sum())
            size += float(x.float().square().sum())
    assert f"is {(apart / size) ** 0.5:.1%}" in body and "not measured" in body
    assert str(tmp_path) not in body + (tmp_path / "out" / "config.json").read_text()


def test_options_that_do_not_go_together_are_told_with_what_would(
    invoke: Invoke, adapted: Any, tiny_model_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    adapter, out = adapted(tiny_model_folder), tmp_path / "out"
    for arguments, message in (
        (["hf", "--to", "4bit"], "--format hf has no --to 4bit; 4bit is for --format mlx or gptq or awq."),
        (["mlx", "--to", "4bits"], "--format mlx has no --to 4bits (did you mean '4bit'?)"),
        (["gptq", "--to", "bf16"], "bf16 is for --format hf or gguf or lora-gguf or mlx"),
        (["mlx", "--data", "rows.jsonl"], "--data belongs to --format bnb-4bit, gptq and awq, not to mlx"),
        (["hf", "--rounds", "3"], "--rounds belongs to --format gptq and awq, not to hf"),
        (["gptq", "--rounding", "random"], "--rounding belongs to --format bnb-4bit, not to gptq"),
        (["gtpq"], "did you mean 'gptq'?"),
    ):
        code, _, error = invoke("export", adapter, out, "--format", *arguments)
        assert code == 2 and message in error and error.count("\n") == 1
    assert "--format" in invoke("export", adapter, out)[2]
    with monkeypatch.context() as patched:
        patched.setitem(sys.modules, "auto_round", None)
        code, _, error = invoke("export", adapter, out, "--format", "gptq")
    assert code == 2 and "pip install 'halfbyte[autoround]'" in error and not out.exists()


@pytest.mark.parametrize("format", ["hf", "mlx"])
def test_bad_input_is_a_sentence_and_leaves_nothing(
    format: Any, adapted: Any, wide_model_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    adapter, out = adapted(wide_model_folder), tmp_path / "out"
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "notes").write_text("mine")
    (tmp_path / "file").write_text("mine")
    for output, overwrite, message in (
        ("full", False, "is there already"), ("full", True, "holds no model that could be overwritten"),
        ("file", True, "is a file"),
    ):  # fmt: skip
        with pytest.raises(InputError, match=message):
            export(adapter, tmp_path / output, format=format, overwrite=overwrite)
    with pytest.raises(InputError, match="holds the adapter or the base itself"):
        export(adapter, wide_model_folder, format=format, overwrite=True)
    with monkeypatch.context() as patched:
        patched.setattr("shutil.disk_usage", lambda _: type("Usage", (), {"free": 1000})())
        with pytest.raises(InputError, match=r"takes .*, and .* are free in"):
            export(adapter, out, format=format)
    with pytest.raises(InputError, match="leave --base out"):
        export(wide_model_folder, out, format=format, base=wide_model_folder)
    file = adapter / "adapter_model.safetensors"
    weights = load_file(file)
    first = next(name for name in weights if "lora_B" in name)
    save_file(weights | {first: torch.full_like(weights[first], float("nan"))}, file)
    with pytest.raises(InputError, match="holds nan"):
        export(adapter, out, format=format)
    save_file(weights, file)
    config = json.loads((adapter / "adapter_config.json").read_text())
    (adapter / "adapter_config.json").write_text(json.dumps(config | {"base_model_name_or_path": "/nowhere"}))
    with pytest.raises(InputError, match="names /nowhere as its base model, but it is not there"):
        export(adapter, out, format=format)
    assert not out.exists() and not list(tmp_path.glob(".out*"))
    export(adapter, out, format=format, base=wide_model_folder)
    export(adapter, out, format=format, base=wide_model_folder, overwrite=True)


def test_a_folder_that_another_process_writes_is_told(adapted: Any, wide_model_folder: Path, tmp_path: Path) -> None:
    adapter, told = adapted(wide_model_folder), []

    def report(*_: Any) -> None:
        if not told:
            told.append("")
            with pytest.raises(InputError, match="is being written by another process") as refused:
                export(adapter, tmp_path / "out", format="mlx")
            told.append(str(refused.value))

    export(adapter, tmp_path / "out", format="mlx", report=report)
    assert len(told) == 2 and (tmp_path / "out" / "config.json").is_file()

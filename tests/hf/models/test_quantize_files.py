"""A copy that is interrupted goes on, to the bytes of one that was not."""

import json
import shutil
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from halfbyte.errors import InputError
from halfbyte.hf import HalfbyteConfig, quantize_checkpoint
from halfbyte.hf.models import quantize_files, shards
from halfbyte.hf.models.fingerprint import FILE, Fingerprint


@pytest.fixture
def small_files(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(shards, "SHARD_BYTES", 8192)


@pytest.fixture
def made(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The tensors that were made, in their order."""
    names: list[str] = []
    make = quantize_files._Made.make

    def counted(self: Any, name: str) -> Any:
        names.append(name)
        return make(self, name)

    monkeypatch.setattr(quantize_files._Made, "make", counted)
    return names


def stopping(after: int) -> Any:
    def progress(done: int, total: int) -> None:
        if done == after:
            raise KeyboardInterrupt

    return progress


def contents(folder: Path) -> dict[str, Any]:
    """What a folder holds, times of its files left out."""
    held: dict[str, Any] = {file.name: file.read_bytes() for file in folder.iterdir()}
    fingerprint = Fingerprint.from_json(held.pop(FILE).decode())
    return held | {"rows": fingerprint.rows, "sizes": {name: size for name, (size, _) in fingerprint.files.items()}}


@pytest.mark.parametrize("quant_type", ["nf4", "int8"])
def test_who_was_interrupted_goes_on_from_the_last_whole_file(
    quant_type: Any, tiny_model_folder: Path, tmp_path: Path, small_files: None, made: list[str]
) -> None:
    config = HalfbyteConfig(quant_type=quant_type)
    whole = quantize_checkpoint(tiny_model_folder, tmp_path / "whole", config)
    count = len(made)
    for after in (1, 5, count - 1, count):
        made.clear()
        with pytest.raises(KeyboardInterrupt):
            quantize_checkpoint(tiny_model_folder, tmp_path / "copy", config, progress=stopping(after))
        assert not (tmp_path / "copy").exists() and len(made) == after
        first = list(made)
        made.clear()
        assert quantize_checkpoint(tiny_model_folder, tmp_path / "copy", config) == whole
        again = [name for name in made if name in first]
        assert len(made) - len(again) == count - after and (after < 5 or len(again) < after)
        assert contents(tmp_path / "copy") == contents(tmp_path / "whole")
        assert sorted(file.name for file in tmp_path.iterdir()) == ["copy", "whole"]
        shutil.rmtree(tmp_path / "copy")


def test_what_was_begun_with_another_source_or_format_is_not_gone_on_with(
    tiny_model_folder: Path, tmp_path: Path, small_files: None, made: list[str]
) -> None:
    source = shutil.copytree(tiny_model_folder, tmp_path / "source")
    with pytest.raises(KeyboardInterrupt):
        quantize_checkpoint(source, tmp_path / "copy", progress=stopping(10))
    tensors = load_file(source / "model.safetensors")
    save_file({name: -x for name, x in tensors.items()}, source / "model.safetensors", metadata={"format": "pt"})
    made.clear()
    quantize_checkpoint(source, tmp_path / "copy")
    assert len(made) == len(set(made)) >= len(tensors) - 1  # a tied head is written once
    with pytest.raises(KeyboardInterrupt):
        quantize_checkpoint(source, tmp_path / "other", progress=stopping(10))
    quantize_checkpoint(source, tmp_path / "other", HalfbyteConfig(quant_type="fp4"))
    about = json.loads((tmp_path / "other" / "config.json").read_text())
    assert about["quantization_config"]["bnb_4bit_quant_type"] == "fp4"
    assert sorted(file.name for file in tmp_path.iterdir()) == ["copy", "other", "source"]


def test_an_error_leaves_nothing_and_an_interrupted_copy_is_told_from_one_that_is_being_made(
    tiny_model_folder: Path, tmp_path: Path, small_files: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.raises(InputError, match=r"copy is being written by another process; wait for it, or choose another"):
        quantize_checkpoint(
            tiny_model_folder, tmp_path / "copy",
            progress=lambda *_: quantize_checkpoint(tiny_model_folder, tmp_path / "copy") and None,
        )  # fmt: skip
    source = shutil.copytree(tiny_model_folder, tmp_path / "source")
    tensors = load_file(source / "model.safetensors")
    tensors["model.layers.1.mlp.up_proj.weight"][3, 3] = torch.nan
    save_file(tensors, source / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(InputError, match=r"model\.layers\.1\.mlp\.up_proj\.weight"):
        quantize_checkpoint(source, tmp_path / "copy")
    monkeypatch.setattr(shutil, "disk_usage", lambda _: SimpleNamespace(free=1000))
    with pytest.raises(InputError, match=r"The copy takes [\d.]+ KiB, and 0.98 KiB are free in .*; free some space"):
        quantize_checkpoint(tiny_model_folder, tmp_path / "copy")
    assert sorted(file.name for file in tmp_path.iterdir()) == ["source"]

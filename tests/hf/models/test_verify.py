"""What is damaged is named: any byte of a 4-bit folder, and every kind of fault that a folder of others can have."""

import json
import re
import shutil
import struct
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from peft import LoraConfig, get_peft_model
from safetensors.torch import load_file, save_file
from typer.testing import CliRunner

import halfbyte
from halfbyte.cli import app
from halfbyte.errors import InputError
from halfbyte.hf import HalfbyteConfig, quantize_checkpoint
from halfbyte.hf.models import shards
from halfbyte.hf.models.check import part_of
from halfbyte.hf.models.verify import Verified, verify


@pytest.fixture(scope="module")
def four(tiny_model_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("whole") / "four"
    quantize_checkpoint(tiny_model_folder, folder)
    return folder


@pytest.fixture
def copy(four: Path, tmp_path: Path) -> Path:
    return shutil.copytree(four, tmp_path / "copy")


def faults(found: Verified) -> dict[str, str]:
    return {finding.place: finding.what for finding in found.findings if finding.is_fault}


def edited(file: Path, **tensors: Any) -> None:
    """Save tensors anew: by name (dots as two underscores), what becomes of each; None: it goes."""
    held = load_file(file)
    for name, change in tensors.items():
        name = name.replace("__", ".")
        if change is None:
            del held[name]
        else:
            held[name] = change(held[name].clone())
    save_file(held, file, metadata={"format": "pt"})


def header_of(file: Path) -> tuple[dict[str, Any], int]:
    """The tensors of a safetensors file by the format's description, and where their bytes begin."""
    data = file.read_bytes()
    (length,) = struct.unpack("<Q", data[:8])
    header = json.loads(data[8 : 8 + length])
    header.pop("__metadata__", None)
    return header, 8 + length


@pytest.mark.parametrize("quant_type", ["nf4", "int8", "e2m1"])
def test_a_whole_folder_has_no_fault_and_is_left_as_it_is(
    quant_type: Any, tiny_model_folder: Path, tmp_path: Path
) -> None:
    quantize_checkpoint(tiny_model_folder, tmp_path / "q", HalfbyteConfig(quant_type=quant_type))
    for folder in (tiny_model_folder, tmp_path / "q"):
        before = {file.name: file.read_bytes() for file in folder.iterdir()}
        seen: list[tuple[int, int]] = []
        found = verify(folder, progress=lambda *at, seen=seen: seen.append(at))
        assert faults(found) == {} and found.tensors == 20 == seen[-1][0] == seen[-1][1]
        assert {file.name: file.read_bytes() for file in folder.iterdir()} == before
    assert found.compared == 20 and found.nbytes == (tmp_path / "q" / "model.safetensors").stat().st_size


def test_any_byte_that_is_changed_is_found_in_its_tensor(copy: Path) -> None:
    file = copy / "model.safetensors"
    header, begin = header_of(file)
    whole = file.read_bytes()
    packed = dict.fromkeys(name.partition(".absmax")[0] for name in header if name.endswith(".absmax"))
    random = np.random.default_rng(0)
    places = [about["data_offsets"] for about in header.values()]
    for name, (first, last) in zip(header, places, strict=True):
        at = begin + int(random.integers(first, last))
        file.write_bytes(whole[:at] + bytes([whole[at] ^ (1 << int(random.integers(8)))]) + whole[at + 1 :])
        named = {part_of(place, packed) or place for place in faults(verify(copy))}
        assert named == {part_of(name, packed) or name}
    file.write_bytes(whole)
    assert not faults(verify(copy))


def test_a_file_that_ends_too_soon_is_told_by_its_tensors(copy: Path) -> None:
    file = copy / "model.safetensors"
    header, begin = header_of(file)
    whole = file.read_bytes()
    for keep in (0, 5, 8, begin - 3):
        file.write_bytes(whole[:keep])
        assert list(faults(verify(copy))) == [str(file)]
    for share in (0.2, 0.9):
        room = int(share * (len(whole) - begin))
        file.write_bytes(whole[: begin + room])
        lost = {name for name, about in header.items() if about["data_offsets"][1] > room}
        assert faults(verify(copy)).keys() == lost and lost
    file.write_bytes(whole + b"more")
    assert faults(verify(copy)) == {str(file): "has 4 bytes behind its last tensor."}
    file.write_bytes(whole[:8] + b"[" + whole[9:])
    assert "has no header that could be read" in faults(verify(copy))[str(file)]


UP, QUERY = "model__layers__0__mlp__up_proj__weight", "model__layers__0__self_attn__q_proj__weight"


@pytest.mark.parametrize(
    ("name", "change", "place", "said"),
    [
        ("model__norm__weight", lambda x: x.index_fill_(0, torch.tensor(3), torch.nan), "norm.weight", r"nan at \[3\]"),
        (f"{QUERY}__absmax", lambda x: -x, "q_proj.weight.absmax", "where sizes are not negative"),
        (f"{UP}__absmax", lambda x: x * torch.inf, "up_proj.weight", "inf at"),
        (f"{UP}__absmax", lambda x: x[1:].clone(), "up_proj.weight", "block constants"),
        (f"{UP}__quant_map", lambda x: x.flip(0), "up_proj.weight.quant_map", "not the table of nf4"),
        (UP, lambda x: x[1:].clone(), "up_proj.weight", "packed bytes"),
        ("model__norm__weight", None, "config.json", r"1 tensor is missing \(model\.norm\.weight\)"),
        ("model__norm__weight", lambda x: x[1:].clone(), "config.json", r"\[31\], in the model \[32\]"),
    ],
)
def test_each_kind_of_fault_is_named(
    name: str, change: Any, place: str, said: str, tiny_model_folder: Path, tmp_path: Path
) -> None:
    """Without digests, as in folders of others, whose block constants may be in fp32."""
    quantize_checkpoint(tiny_model_folder, tmp_path / "q", HalfbyteConfig(double_quant=False))
    (tmp_path / "q" / "base_fingerprint.json").unlink()
    edited(tmp_path / "q" / "model.safetensors", **{name: change})
    [(named, what)] = faults(verify(tmp_path / "q")).items()
    assert named.endswith(place) and re.search(said, what) and not what.startswith(f"{named} ")


def test_an_index_is_held_against_the_files(
    tiny_model_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(shards, "SHARD_BYTES", 8192)
    folder = tmp_path / "q"
    quantize_checkpoint(tiny_model_folder, folder)
    files = sorted(folder.glob("*.safetensors"))
    assert len(files) > 2 and not faults(verify(folder))
    index = folder / "model.safetensors.index.json"
    about = json.loads(index.read_text())
    moved, gone = "model.layers.0.input_layernorm.weight", "model.norm.weight"
    wrong = {moved: files[0].name, "lm_head.extra": files[1].name}
    home = about["weight_map"][moved]
    changed = {name: home for name, home in (about["weight_map"] | wrong).items() if name != gone}
    index.write_text(json.dumps(about | {"weight_map": changed}))
    found = faults(verify(folder))
    assert found.pop("lm_head.extra") == f"is not in {files[1].name}, where {index.name} has it."
    assert "does not name it" in found.pop(gone)
    assert found == ({moved: f"is in {home}, but {index.name} says {files[0].name}."} if home != files[0].name else {})
    index.write_text(json.dumps(about))
    files[1].rename(folder / "elsewhere")
    assert faults(verify(folder))[str(files[1])] == "is missing, though the index names it."


def test_an_adapter_is_read_too(tiny_model_folder: Path, tmp_path: Path) -> None:
    model = get_peft_model(halfbyte.load(tiny_model_folder), LoraConfig(r=2, target_modules="all-linear"))
    model.save_pretrained(tmp_path / "adapter")
    assert not faults(verify(tmp_path / "adapter"))
    name = next(iter(load_file(tmp_path / "adapter" / "adapter_model.safetensors")))
    edited(tmp_path / "adapter" / "adapter_model.safetensors", **{name.replace(".", "__"): lambda x: x * torch.nan})
    assert list(faults(verify(tmp_path / "adapter"))) == [name]


def test_the_command_names_faults_and_says_them_by_its_exit_code(copy: Path) -> None:
    def halfbyte_says(*words: object) -> Any:
        return CliRunner().invoke(app, [*map(str, words)])

    done = halfbyte_says("verify", copy)
    assert done.exit_code == 0 and "20 tensors in 1 file of" in done.stdout and "no fault." in done.stdout
    assert "20 of them held against the digests in the folder" in done.stdout
    assert "Note: model.layers.0.self_attn.q_proj.weight has rows of 32 values" in done.stdout
    edited(copy / "model.safetensors", model__norm__weight=lambda x: x + 1)
    done = halfbyte_says("verify", copy)
    assert done.exit_code == 1 and "model.norm.weight holds other values" in done.stdout and "1 fault." in done.stdout
    told = json.loads(halfbyte_says("verify", copy, "--json").stdout)
    assert told["faults"] == 1 and [f["place"] for f in told["findings"] if f["is_fault"]] == ["model.norm.weight"]
    with pytest.raises(InputError, match="no folder"):
        CliRunner().invoke(app, ["verify", str(copy / "nothing")], catch_exceptions=False)

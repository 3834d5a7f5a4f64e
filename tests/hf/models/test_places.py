"""Where models are found: folders, near misses, no network; other kinds of weights; code of a model's own."""

import json
import os
import pickle
import shutil
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers as t
from huggingface_hub import HfApi
from huggingface_hub.utils import httpx
from safetensors.torch import load_file

import halfbyte
from halfbyte.errors import InputError
from halfbyte.hf import quantize_checkpoint
from halfbyte.hf.models import hub
from halfbyte.hub import PATIENCE

OPENINGS: list[Callable[[Any], Any]] = [
    halfbyte.load,
    halfbyte.load_tokenizer,
    lambda path: quantize_checkpoint(path, "quantized"),
]


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    (tmp_path / "home").mkdir()
    return tmp_path


@pytest.fixture
def asked(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The ids that the hub was asked for; nobody can reach it."""
    ids: list[str] = []

    def model_info(self: Any, repository: str, **kwargs: Any) -> None:
        ids.append(repository)
        raise httpx.ConnectError("[Errno -2] Name or service not known")

    monkeypatch.setattr(HfApi, "model_info", model_info)
    monkeypatch.setattr(hub, "is_offline_mode", lambda: False)
    return ids


@pytest.mark.parametrize("opening", OPENINGS)
def test_a_path_that_is_not_there_is_told_at_once(here: Path, asked: list[str], opening: Callable[[Any], Any]) -> None:
    (here / "runs" / "quickstart").mkdir(parents=True)
    for path, near in [
        ("./runs/quikstart", "runs/quickstart"),
        (str(here / "runs" / "quikstart"), str(here / "runs" / "quickstart")),
        ("../nowhere", None),
        ("~/nowhere", None),
        ("runs/quickstart/checkpoints/step-1", "quickstart"),
        ("run/quickstart/x", "runs"),
    ]:
        with pytest.raises(InputError, match=r"^There is no folder .*; give the folder") as told:
            opening(path)
        assert near is None or near in str(told.value)
    assert not asked


@pytest.mark.parametrize("opening", OPENINGS)
def test_what_may_be_an_id_is_asked_for_once(here: Path, asked: list[str], opening: Callable[[Any], Any]) -> None:
    (here / "runs" / "quickstart").mkdir(parents=True)
    with pytest.raises(
        InputError, match=r"^There is no folder runs/quikstart \(did you mean 'runs/quickstart'\?\), and the hub cannot"
    ):
        opening("runs/quikstart")
    assert asked == ["runs/quikstart"]


def test_a_hub_that_does_not_answer_is_not_waited_for(here: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As where names are not resolved, which heeds no time limit."""
    until = threading.Event()
    monkeypatch.setattr(HfApi, "model_info", lambda *_, **__: until.wait())
    monkeypatch.setattr(hub, "is_offline_mode", lambda: False)
    monkeypatch.setattr("halfbyte.hub.PATIENCE", 0.0)
    with pytest.raises(InputError, match=r"the hub cannot be reached \(no answer within"):
        halfbyte.load("runs/quikstart")
    until.set()
    assert PATIENCE + 0.5 < 3  # seconds


def test_offline_mode_is_said(here: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(hub, "is_offline_mode", lambda: True)
    with pytest.raises(InputError, match="HF_HUB_OFFLINE is set"):
        halfbyte.load("somebody/model")


def test_home_is_meant_by_a_tilde(here: Path, tiny_model_folder: Path) -> None:
    shutil.copytree(tiny_model_folder, here / "home" / "m")
    halfbyte.load("~/m")
    halfbyte.load_tokenizer("~/m")
    quantize_checkpoint("~/m", "~/q")
    assert (here / "home" / "q" / "config.json").is_file() and not (here / "~").exists()


def test_an_adapter_whose_base_is_gone_is_told(here: Path, asked: list[str]) -> None:
    (here / "run").mkdir()
    file = here / "run" / "adapter_config.json"
    for text, message in [
        ('{"base_model_name_or_path": "/gone/m"}', "names /gone/m as its base model, but it is not there. There is no"),
        ('{"base_model_name_or_path": null}', r"does not name a base model \(base_model_name_or_path\)"),
        ("{", "adapter_config.json cannot be read"),
    ]:
        file.write_text(text)
        with pytest.raises(InputError, match=message):
            halfbyte.load("run")


def without_weights(source: Path, folder: Path) -> dict[str, torch.Tensor]:
    shutil.copytree(source, folder, ignore=shutil.ignore_patterns("*.safetensors"))
    return load_file(source / "model.safetensors")


def test_weights_of_torch_are_read_in_one_file_or_several(tiny_model_folder: Path, here: Path) -> None:
    ids = torch.arange(6)[None]
    wanted = halfbyte.load(tiny_model_folder)(input_ids=ids).logits
    for shards in (1, 2):
        folder = here / f"bin{shards}"
        tensors = without_weights(tiny_model_folder, folder)
        tensors["lm_head.weight"] = tensors["model.embed_tokens.weight"]  # as torch.save keeps tied weights
        if shards == 1:
            torch.save(tensors, folder / "pytorch_model.bin")
        else:
            names = sorted(tensors)
            parts = {"pytorch_model-00001-of-00002.bin": names[::2], "pytorch_model-00002-of-00002.bin": names[1::2]}
            for file, part in parts.items():
                torch.save({name: tensors[name].clone() for name in part}, folder / file)
            index = {"metadata": {}, "weight_map": {name: file for file, part in parts.items() for name in part}}
            (folder / "pytorch_model.bin.index.json").write_text(json.dumps(index))
        quantize_checkpoint(folder, here / f"q{shards}")
        quantize_checkpoint(tiny_model_folder, here / f"wanted{shards}")
        got, same = (load_file(here / f"{name}{shards}" / "model.safetensors") for name in ("q", "wanted"))
        assert got.keys() == same.keys() and all(torch.equal(got[name], same[name]) for name in got)
        for path in (folder, here / f"q{shards}"):
            assert torch.equal(halfbyte.load(path)(input_ids=ids).logits, wanted)


class Mischief:
    def __reduce__(self) -> Any:
        return os.mkdir, ("mischief",)


@pytest.mark.parametrize("opening", [OPENINGS[0], OPENINGS[2]])
def test_weights_that_cannot_be_read_are_told_by_their_file(
    tiny_model_folder: Path, here: Path, opening: Callable[[Any], Any]
) -> None:
    tensors = without_weights(tiny_model_folder, here / "m")
    file = here / "m" / "pytorch_model.bin"
    torch.save(tensors, file)
    whole = file.read_bytes()
    for content, message in [
        (whole[: len(whole) // 2], r"m/pytorch_model\.bin cannot be read .*: the file is damaged or incomplete"),
        (b"", r"m/pytorch_model\.bin cannot be read"),
        (pickle.dumps({"model": Mischief()}), r"m/pytorch_model\.bin is damaged, or holds more than tensors"),
    ]:
        file.write_bytes(content)
        with pytest.raises(InputError, match=message) as told:
            opening("m")
        assert "\n" not in str(told.value)
    assert not (here / "mischief").exists()
    torch.save({"state_dict": tensors}, file)
    with pytest.raises(InputError, match=r"is not a dictionary of tensors; the weights may be its entry 'state_dict'"):
        opening("m")
    file.unlink()
    for name, message in [
        ("m.gguf", r"m\.gguf is GGUF; give that file itself as the model"),
        ("model-00001-of-00002.safetensors", r"is there, but model\.safetensors\.index\.json is not"),
        ("weights.safetensors", r"weights\.safetensors is there, but transformers reads model\.safetensors"),
        ("tf_model.h5", "is of TensorFlow"),
    ]:
        (here / "m" / name).write_bytes(b"x")
        with pytest.raises(InputError, match=message):
            opening("m")
        (here / "m" / name).unlink()
    (here / "m" / "config.json").unlink()
    (here / "m" / "a.gguf").write_bytes(b"x")
    with pytest.raises(InputError, match=r"m/a\.gguf cannot be read as GGUF"):
        opening("m")


def test_code_of_a_model_s_own_runs_only_if_allowed(
    own_code: Callable[[Path], Path], tiny_model_folder: Path, here: Path
) -> None:
    own_code(here / "m")
    for attempt in (lambda: halfbyte.load("m"), lambda: quantize_checkpoint("m", "q")):
        with pytest.raises(InputError, match=r"comes with code of its own; .* \(--trust-remote-code\)"):
            attempt()
    ids = torch.arange(6)[None]
    quantize_checkpoint("m", "q", trust_remote_code=True)
    logits = []
    for path in ("m", "q"):
        model = halfbyte.load(path, trust_remote_code=True)
        assert type(model).__name__ == "MyLM"
        logits.append(model(input_ids=ids).logits)
    assert torch.equal(*logits)
    assert torch.equal(logits[0], halfbyte.load(tiny_model_folder)(input_ids=ids).logits)


@pytest.mark.parametrize("architectures", [None, [], ["SomebodysLM"]])
def test_without_a_known_architecture_a_language_model_is_meant(
    tiny_model_folder: Path, here: Path, architectures: list[str] | None
) -> None:
    shutil.copytree(tiny_model_folder, here / "m")
    config = json.loads((here / "m" / "config.json").read_text())
    (here / "m" / "config.json").write_text(json.dumps(config | {"architectures": architectures}))
    quantize_checkpoint("m", "q")
    assert all(type(halfbyte.load(path)) is t.LlamaForCausalLM for path in ("m", "q"))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"model_type": None}, "config.json has no model_type"),
        ({"model_type": "lamma"}, "config.json cannot be used: .*`lamma`"),
        ({"hidden_size": "wide"}, "config.json cannot be used: .*'hidden_size'.*int, got str"),
        ({"hidden_act": "siluu"}, r"config.json has hidden_act 'siluu' \(did you mean 'silu'\?\)"),
        ({"rope_parameters": {"rope_type": "yran", "rope_theta": 1e4}}, "config.json has rope_type 'yran'"),
        ({"rope_parameters": {"rope_type": "yarn"}}, "config.json cannot be used: Missing required keys .*factor"),
        ({"dtype": "float17"}, "config.json cannot be used: .*float17"),
        ({"num_hidden_layers": 3}, r"model\.safetensors and config\.json do not fit each other"),
    ],
)
def test_a_value_of_the_configuration_that_cannot_be_is_told(
    tiny_model_folder: Path, here: Path, change: dict[str, Any], message: str
) -> None:
    shutil.copytree(tiny_model_folder, here / "m")
    config = json.loads((here / "m" / "config.json").read_text())
    (here / "m" / "config.json").write_text(json.dumps(config | change))
    for attempt in (OPENINGS[0], OPENINGS[2]):
        with pytest.raises(InputError, match=message):
            attempt("m")

"""Models that are really damaged or do not fit themselves: a copy of a whole one, one thing broken, one finding."""

import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from torch.cuda import is_available as on_gpu
from transformers import AutoModelForCausalLM

from halfbyte.errors import InputError
from halfbyte.hf import quantize_checkpoint
from halfbyte.plan.doctor.finding import Finding
from halfbyte.plan.doctor.hub_model import told_of
from halfbyte.plan.doctor.model import examine
from halfbyte.plan.doctor.weights import Weights

Q = "model.layers.0.self_attn.q_proj.weight"
K = "model.layers.1.self_attn.q_proj.weight"


@pytest.fixture
def folder(tiny_model_folder: Path, tmp_path: Path) -> Path:
    """The tiny model, whose stop token has a row as others have; transformers begins that of the padding with zeros."""
    folder = Path(shutil.copytree(tiny_model_folder, tmp_path / "model"))
    return with_tensors(folder, lambda tensors: tensors["model.embed_tokens.weight"][256].fill_(0.1))


def found(folder: Path | str) -> list[Finding]:
    return [finding for finding in examine(str(folder)) if finding.level in ("warning", "fault")]


def edit(file: Path, **values: Any) -> None:
    """Change a file of settings; None takes one out."""
    about = json.loads(file.read_text()) | values
    file.write_text(json.dumps({name: value for name, value in about.items() if value is not None}))


def with_tensors(folder: Path, change: Callable[[dict[str, Tensor]], None]) -> Path:
    file = folder / "model.safetensors"
    tensors = load_file(file)
    change(tensors)
    save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, file, {"format": "pt"})
    return folder


def test_a_whole_model_is_well_and_nothing_is_written(folder: Path):
    def listing() -> list[tuple[Path, int, int]]:
        places = [folder.parent, Path(os.environ["HALFBYTE_CACHE"])]
        files = [file for place in places for file in place.rglob("*")]
        return sorted((one, one.stat().st_mtime_ns, one.stat().st_size) for one in files)

    before = listing()
    findings = examine(str(folder))
    assert [finding for finding in findings if finding.level in ("warning", "fault")] == []
    assert listing() == before
    said = {finding.what: finding.value for finding in findings}
    assert said["decoder layers"] == "2 LlamaDecoderLayer: fused"
    assert said["attention"] == ("over segments, by torch's own kernels" if on_gpu() else "over key ranges")
    parameters = AutoModelForCausalLM.from_pretrained(folder).num_parameters()
    assert said["configuration"] == f"LlamaForCausalLM, {parameters:,} parameters, 256 positions"
    assert said["chat template"].startswith("ends answers with '<|im_end|>'")


def nan(tensors: dict[str, Tensor]) -> None:
    tensors[Q][3, 4] = torch.nan


def lost(tensors: dict[str, Tensor]) -> None:
    del tensors[Q]


def reshaped(tensors: dict[str, Tensor]) -> None:
    tensors[Q] = tensors[Q][:16]


def zeroed(tensors: dict[str, Tensor]) -> None:
    tensors[Q].zero_()


def clipped(tensors: dict[str, Tensor]) -> None:
    for name in tensors:
        tensors[name] = tensors[name].half()
    tensors[Q][0, 0] = 65504.0


def untrained(tensors: dict[str, Tensor]) -> None:
    tensors["model.embed_tokens.weight"][256] = 0.0


def untied(tensors: dict[str, Tensor]) -> None:
    tensors["lm_head.weight"] = tensors["model.embed_tokens.weight"] * 2


WEIGHTS = {
    nan: ("weights", "fault", f"{Q} holds nan at [3, 4]"),
    lost: ("weights", "fault", Q),
    reshaped: ("weights", "fault", "in the model [32, 32]"),
    zeroed: ("zeros", "warning", Q),
    clipped: ("range", "warning", "65,504"),
    untrained: ("untrained tokens", "warning", "'<|im_end|>' (is all zeros)"),
    untied: ("tied weights", "warning", "lm_head.weight"),
}


@pytest.mark.parametrize("change", WEIGHTS, ids=lambda change: change.__name__)
def test_damaged_weights_are_told(change: Callable[[dict[str, Tensor]], None], folder: Path):
    what, level, said = WEIGHTS[change]
    findings = found(with_tensors(folder, change))
    assert {(finding.what, finding.level) for finding in findings} == {(what, level)}
    assert any(said in finding.value for finding in findings)
    assert all(finding.why and finding.fix for finding in findings)


def test_many_damaged_tensors_are_told_in_few_lines(folder: Path):
    findings = found(with_tensors(folder, lambda tensors: [tensor.fill_(torch.nan) for tensor in tensors.values()]))
    faults = [finding for finding in findings if finding.what == "weights"]
    assert len(faults) == 9 and faults[-1].value == "and 12 more, which halfbyte verify lists"


def test_a_4_bit_model_is_well_and_what_may_go_wrong_elsewhere_is_told_once(folder: Path, tmp_path: Path):
    quantize_checkpoint(folder, tmp_path / "quantized")
    assert found(tmp_path / "quantized") == []
    notes = [one for one in examine(str(tmp_path / "quantized")) if (one.what, one.level) == ("weights", "note")]
    assert len(notes) == 1 and notes[0].value.endswith("And 13 more, which halfbyte verify lists.")


def test_a_damaged_gguf_file_is_a_fault(tmp_path: Path):
    (tmp_path / "model.gguf").write_bytes(b"GGUF" + bytes(100))
    assert {finding.level for finding in found(tmp_path / "model.gguf")} == {"fault"}


def test_a_file_that_is_cut_off_or_gone_is_told(folder: Path):
    file = folder / "model.safetensors"
    whole = file.read_bytes()
    file.write_bytes(whole[:-100])
    assert any("cut off" in finding.value for finding in found(folder) if finding.level == "fault")
    file.unlink()
    [finding] = found(folder)
    assert (finding.what, finding.level) == ("weights", "fault") and "no weights" in finding.value


@pytest.mark.parametrize(("factor", "level", "said"), [(1.0, "note", "same"), (2.0, "fault", "other")])
def test_a_tensor_in_two_shards_is_told(factor: float, level: str, said: str, folder: Path):
    tensors = load_file(folder / "model.safetensors")
    (folder / "model.safetensors").unlink()
    homes = {name: f"model-0000{1 + index % 2}-of-00002.safetensors" for index, name in enumerate(sorted(tensors))}
    for home in set(homes.values()):
        held = {name: tensor for name, tensor in tensors.items() if homes[name] == home or name == Q}
        held[Q] = held[Q] * (factor if home != homes[Q] else 1.0)
        save_file(held, folder / home, {"format": "pt"})
    (folder / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": homes}))
    [finding] = [one for one in examine(str(folder)) if one.what == "shards"]
    assert (
        finding.level == level
        and finding.value.startswith(Q)
        and f"with {said[:4]}" in finding.value.replace("the ", "")
    )


def no_template(folder: Path) -> None:
    edit(folder / "tokenizer_config.json", chat_template=None)
    (folder / "chat_template.jinja").unlink(missing_ok=True)


def bad_template(folder: Path) -> None:
    (folder / "chat_template.jinja").write_text("{% for m in messages %}{{ m.content")


def silent_template(folder: Path) -> None:
    (folder / "chat_template.jinja").write_text("{{ raise_exception('never') }}")


def broken_tokenizer(folder: Path) -> None:
    (folder / "tokenizer.json").write_text('{"version": "1.0"}')


def no_tokenizer(folder: Path) -> None:
    for file in folder.glob("tokenizer*"):
        file.unlink()


def no_end(folder: Path) -> None:
    edit(folder / "tokenizer_config.json", eos_token=None, pad_token=None)


def end_beyond(folder: Path) -> None:
    edit(folder / "generation_config.json", eos_token_id=99_999)


def other_end(folder: Path) -> None:
    edit(folder / "generation_config.json", eos_token_id=5)
    edit(folder / "config.json", eos_token_id=5)


def bad_generation(folder: Path) -> None:
    (folder / "generation_config.json").write_text("{")


def end_of_a_name(folder: Path) -> None:
    edit(folder / "generation_config.json", eos_token_id=[256, "x"])


def no_heads(folder: Path) -> None:
    edit(folder / "config.json", num_key_value_heads=0)


def token_beyond(folder: Path) -> None:
    about = json.loads((folder / "tokenizer.json").read_text())
    about["added_tokens"].append({**about["added_tokens"][-1], "id": 700, "content": "<|new|>"})
    (folder / "tokenizer.json").write_text(json.dumps(about))


def no_type(folder: Path) -> None:
    edit(folder / "config.json", model_type=None)


def unknown_type(folder: Path) -> None:
    edit(folder / "config.json", model_type="llama9")


BESIDE = {
    bad_template: ("chat template", "fault"),
    silent_template: ("chat template", "fault"),
    broken_tokenizer: ("tokenizer", "fault"),
    no_tokenizer: ("tokenizer", "fault"),
    no_end: ("stop tokens", "warning"),
    end_beyond: ("stop tokens", "fault"),
    other_end: ("stop tokens", "warning"),
    bad_generation: ("generation", "warning"),
    end_of_a_name: ("generation", "warning"),
    no_heads: ("configuration", "fault"),
    token_beyond: ("embedding rows", "fault"),
    no_type: ("configuration", "fault"),
    unknown_type: ("configuration", "fault"),
}


@pytest.mark.parametrize("change", BESIDE, ids=lambda change: change.__name__)
def test_what_beside_the_weights_does_not_fit_is_told(change: Callable[[Path], None], folder: Path):
    change(folder)
    what, level = BESIDE[change]
    findings = found(folder)
    assert (what, level) in {(finding.what, finding.level) for finding in findings}, findings
    assert all(finding.why for finding in findings)


def test_notes_tell_of_padding_and_of_a_missing_template(folder: Path):
    notes = {finding.what: finding for finding in examine(str(folder)) if finding.level == "note"}
    assert "end-of-sequence token too" in notes["pad token"].value
    no_template(folder)
    notes = {finding.what: finding for finding in examine(str(folder)) if finding.level == "note"}
    assert notes["chat template"].value == "none" and "--chat-template" in notes["chat template"].fix


def test_a_family_that_is_not_known_runs_as_it_is_and_is_told(tmp_path: Path, folder: Path):
    from transformers import GPTNeoXConfig, GPTNeoXForCausalLM

    config = GPTNeoXConfig(
        vocab_size=258,
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        eos_token_id=256,
    )
    GPTNeoXForCausalLM(config).save_pretrained(tmp_path / "neox")
    for file in folder.glob("*token*"):
        shutil.copy(file, tmp_path / "neox")
    [finding] = [one for one in examine(str(tmp_path / "neox")) if one.what == "decoder layers"]
    assert finding.level == "note" and finding.value == "2 GPTNeoXLayer are of no family that is known"


def test_weights_are_seen_in_pieces_and_what_is_odd_of_them_is_told(monkeypatch: pytest.MonkeyPatch):
    generator = torch.Generator().manual_seed(0)
    plain, copy = (torch.randn(40, 30, generator=generator) for _ in range(2))
    odd = plain.clone()
    odd[:, 7] *= 200
    large = copy * 3e4
    seen = {}
    for piece in (2**22, 64):
        monkeypatch.setattr("halfbyte.plan.doctor.weights.PIECE", piece)
        weights = Weights()
        for name, tensor in {"a": plain, "odd": odd, "b": plain.clone(), "large": large, "bias": odd[0]}.items():
            weights(name, tensor)
        seen[piece] = list(weights.findings())
    findings = {finding.what: finding.value for finding in seen[2**22]}
    assert seen[64] == seen[2**22]
    assert findings["outliers"].startswith("1 of 4 matrices") and "column 7 of odd" in findings["outliers"]
    assert findings["equal tensors"] == "a and b"
    assert findings["range"].startswith("values up to") and findings["range"].endswith("in large")


def test_an_adapter_that_learnt_nothing_is_told(folder: Path, tmp_path: Path):
    from peft import LoraConfig, get_peft_model

    model = AutoModelForCausalLM.from_pretrained(folder)
    adapted = get_peft_model(model, LoraConfig(r=4, target_modules=["q_proj"], task_type="CAUSAL_LM"))
    adapted.save_pretrained(tmp_path / "adapter")
    [finding] = found(tmp_path / "adapter")
    assert (finding.what, finding.level) == ("learnt", "fault")
    assert "all 2 matrices B are zero" in finding.value
    file = tmp_path / "adapter" / "adapter_model.safetensors"
    tensors = load_file(file)
    for name in tensors:
        tensors[name] += 0.1
    save_file(tensors, file, {"format": "pt"})
    assert found(tmp_path / "adapter") == []
    save_file({name: tensor[..., :-1] + 0 for name, tensor in tensors.items()}, file, {"format": "pt"})
    [finding] = found(tmp_path / "adapter")
    assert (finding.what, finding.level) == ("fit", "fault") and "does not fit the base model" in finding.value
    save_file(tensors, file, {"format": "pt"})
    edit(tmp_path / "adapter" / "adapter_config.json", base_model_name_or_path="/nowhere/at/all", from_the_future=1)
    findings = {finding.what: finding for finding in examine(str(tmp_path / "adapter"))}
    assert findings["base model"].level == "warning"
    assert "from_the_future" in findings["adapter options"].value
    tensors[next(iter(tensors))][0, 0] = torch.inf
    save_file(tensors, file, {"format": "pt"})
    assert any(one.what == "weights" and one.level == "fault" for one in found(tmp_path / "adapter"))


def test_what_the_hub_tells_of_a_model_is_told_and_nothing_is_downloaded(tmp_path: Path):
    def about(gated: Any = False, **files: int) -> Any:
        siblings = [SimpleNamespace(rfilename=name.replace("__", "."), size=size) for name, size in files.items()]
        return SimpleNamespace(siblings=siblings, gated=gated, safetensors=SimpleNamespace(total=10**6))

    whole = list(told_of("a/b", about(config__json=1, model__safetensors=2**30), tmp_path))
    assert [finding.level for finding in whole] == ["note"] and "1.00 GiB" in whole[0].value
    gated = list(told_of("a/b", about("manual", config__json=1, model__safetensors=1), tmp_path))
    assert [finding.what for finding in gated] == ["hub", "gated"]
    huge = list(told_of("a/b", about(config__json=1, model__safetensors=2**60), tmp_path))
    assert huge[-1].level == "fault" and "disk" in huge[-1].what
    other = list(told_of("a/b", about(x__gguf=1), tmp_path))
    assert "GGUF" in other[1].value


def test_what_is_no_model_is_bad_input(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr("halfbyte.hf.models.hub.is_offline_mode", lambda: True)
    for name in ("nobody/nothing", str(tmp_path / "nowhere"), "a b c"):
        with pytest.raises(InputError, match="There is no folder"):
            examine(name)
    with pytest.raises(InputError, match="neither a model"):
        examine(str(tmp_path))

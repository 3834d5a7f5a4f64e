"""Several adapters over one base answer each as if it were alone; what does not fit leaves the model as it was."""

from pathlib import Path

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from transformers import AutoModelForCausalLM

import halfbyte
from halfbyte.errors import InputError
from halfbyte.hf import add_adapter, fuse

IDS = torch.arange(40, 60)[None]


@pytest.fixture(scope="module")
def adapters(tiny_model_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Adapters of different ranks, saved by PEFT over the dense model."""
    made = {}
    for seed, (name, rank) in enumerate({"one": 2, "two": 5}.items()):
        torch.manual_seed(seed)
        base = AutoModelForCausalLM.from_pretrained(tiny_model_folder)
        model = get_peft_model(base, LoraConfig(r=rank, target_modules="all-linear", init_lora_weights=False))
        made[name] = tmp_path_factory.mktemp("adapters") / name
        model.save_pretrained(made[name])
    return made


def logits(model: PeftModel) -> torch.Tensor:
    with torch.no_grad():
        return model(IDS).logits


def test_each_adapter_computes_what_it_does_alone(tiny_model_folder: Path, adapters: dict[str, Path]) -> None:
    base = halfbyte.load(tiny_model_folder)
    fuse(base)
    plain = logits(base)
    model, remark = add_adapter(base, adapters["one"], "first")
    assert remark is None
    assert add_adapter(model, adapters["two"], "second").model is model
    for name, folder in (("first", adapters["one"]), ("second", adapters["two"])):
        model.set_adapter(name)
        assert torch.equal(logits(model), logits(halfbyte.load(folder)))
    with model.disable_adapter():
        assert torch.equal(logits(model), plain)


def test_a_run_takes_further_adapters_and_stays_active(adapters: dict[str, Path]) -> None:
    model = halfbyte.load(adapters["one"])
    before = logits(model)
    add_adapter(model, adapters["two"], "second")
    assert model.active_adapter == "default" and torch.equal(logits(model), before)


def test_what_does_not_fit_is_told_and_leaves_the_model(
    tiny_model_folder: Path, adapters: dict[str, Path], tmp_path: Path
) -> None:
    model = halfbyte.load(adapters["one"])
    before = logits(model)
    broken = tmp_path / "broken"
    broken.mkdir()
    for file in adapters["two"].iterdir():
        (broken / file.name).write_bytes(file.read_bytes())
    config = broken / "adapter_config.json"
    config.write_text(config.read_text().replace('"r": 5', '"r": 4'))
    for path, name, about in (
        (broken, "other", "does not fit"),
        (tiny_model_folder, "other", "is no adapter"),
        (tmp_path / "no", "other", "There is no folder"),
        (adapters["two"], "default", "already"),
        (adapters["two"], "a.b", "cannot be called"),
        (adapters["two"], "none", "cannot be called"),
        (adapters["two"], "q", "parts of the model"),
        (adapters["two"], "lora", "parts of the model"),
    ):
        with pytest.raises(InputError, match=about):
            add_adapter(model, path, name)
        assert list(model.peft_config) == ["default"] and torch.equal(logits(model), before)
    add_adapter(model, adapters["two"], "other")

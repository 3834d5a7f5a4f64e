"""Several adapters over one base answer each as if it were alone; what does not fit leaves the model as it was."""

import copy
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from peft import LoraConfig, PeftModel, get_peft_model
from torch import nn
from transformers import AutoModelForCausalLM

import halfbyte
from halfbyte.errors import InputError
from halfbyte.hf import add_adapter, fuse, not_linear
from halfbyte.hf.layers.expert_targets import as_peft_reads, own_words
from halfbyte.hf.layers.lora_config import lora_config
from halfbyte.hf.models.adapter_files import put_adapter

IDS = torch.arange(40, 60)[None]
FP32 = halfbyte.HalfbyteConfig(compute_dtype="float32")
EXPERTS: dict[str, Any] = {
    "vocab_size": 96, "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 2, "head_dim": 16, "num_local_experts": 4, "num_experts": 4, "num_experts_per_tok": 2,
    "moe_intermediate_size": 32, "pad_token_id": 0, "initializer_range": 0.2,
}  # fmt: skip


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


@pytest.mark.filterwarnings("ignore:The following rank_pattern keys did not match:RuntimeWarning")
@pytest.mark.parametrize(
    ("kind", "more"),
    [
        ("Qwen3Moe", {}),
        ("Qwen2Moe", {"shared_expert_intermediate_size": 32}),  # whose layers are named by their parameters
        ("GptOss", {}),
        ("Llama4Text", {"intermediate_size_mlp": 48}),
    ],
)
def test_experts_take_further_adapters_too(
    kind: str, more: dict[str, int], tmp_path: Path, give_values: Callable[[nn.Module, nn.Module], None]
) -> None:
    torch.manual_seed(0)
    dense = AutoModelForCausalLM.from_config(getattr(transformers, f"{kind}Config")(**EXPERTS | more)).float().eval()
    dense.save_pretrained(tmp_path / "m")
    give_values(halfbyte.load(tmp_path / "m", quantization_config=FP32), dense)
    options: dict[str, dict[str, Any]] = {
        "one": {"rank": 3},
        "two": {"rank": 4, "use_rslora": True, "rank_pattern": {"down_proj": 2}},
        "plain": {"rank": 2, "target_modules": "o_proj"},
        "other": {"rank": 2, "target_modules": "down_proj"},
    }
    for name, given in options.items():
        model = halfbyte.load(tmp_path / "m", quantization_config=FP32)
        config = lora_config(model, lora_alpha=6, never=not_linear(model), **given)
        with own_words():
            adapted = get_peft_model(model, config)
        as_peft_reads(config)
        with torch.no_grad():
            for parameter in adapted.parameters():
                if parameter.requires_grad:
                    parameter.copy_(0.1 * torch.randn(parameter.shape))
        adapted.save_pretrained(tmp_path / name)

    model = put_adapter(halfbyte.load(tmp_path / "m", quantization_config=FP32), tmp_path / "one")
    halfbyte.prepare(model)
    theirs = PeftModel.from_pretrained(copy.deepcopy(dense), tmp_path / "one")
    for name in ("two", "plain"):
        add_adapter(model, tmp_path / name, name)
        theirs.load_adapter(tmp_path / name, name)
    with pytest.raises(InputError, match="all adapters must target the same set of parameters"):
        add_adapter(model, tmp_path / "other", "other")
    for active in ("default", "two", "plain", ["two", "default"]):
        for one in (model, theirs):
            one.base_model.set_adapter(active)
        ours, wanted = (one(input_ids=IDS, labels=IDS) for one in (model, theirs))
        assert (ours.logits - wanted.logits).norm() <= 1e-5 * wanted.logits.norm()
        gradients = []
        for one, found in ((model, ours), (theirs, wanted)):
            trained = {name: x for name, x in one.named_parameters() if x.requires_grad}
            gradients.append(torch.autograd.grad(found.loss, trained))
        assert gradients[0].keys() == gradients[1].keys()
        for name, gradient in gradients[1].items():
            assert (gradients[0][name] - gradient).norm() <= 1e-4 * gradient.norm() + 1e-8, name
    with model.disable_adapter():
        assert (logits(model) - logits(dense)).norm() <= 1e-5 * logits(dense).norm()
    with pytest.raises(InputError, match="Rows cannot each have their adapter where it is on experts"):
        model(input_ids=IDS.expand(2, -1), adapter_names=["two", "default"])

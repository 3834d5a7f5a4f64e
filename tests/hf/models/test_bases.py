"""Bases in int8, in 16 bits and in formats of our own: opened, saved, mapped, trained over, and refused."""

import copy
import json
import math
from pathlib import Path
from typing import Any

import bitsandbytes as bnb
import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, BitsAndBytesConfig, LlamaConfig, LlamaForCausalLM

import halfbyte
from halfbyte.errors import InputError
from halfbyte.hf import HalfbyteConfig, LoraLinear4bit, describe_base, describe_layers, quantize_checkpoint
from halfbyte.nn import DenseLinear, FrozenLinear, Linear8bit, QuantizedLinear

IDS = torch.randint(0, 250, (2, 12), generator=torch.Generator().manual_seed(1))
BOUNDS = {torch.float32: 1e-4, torch.bfloat16: 5e-2}
FORMATS: dict[str, dict[str, Any]] = {
    "blocks": {"quant_type": "int8"},
    "rows": {"quant_type": "int8", "blocksize": "row"},
    "e2m1": {"quant_type": "e2m1"},
    "e3m0": {"quant_type": "e3m0", "double_quant": False},
    "int4": {"quant_type": "int4", "blocksize": 128},
}


def lora(**options: Any) -> LoraConfig:
    return LoraConfig(r=4, lora_alpha=8, target_modules="all-linear", task_type="CAUSAL_LM", **options)


def gradients(model: nn.Module) -> dict[str, Tensor]:
    """Those of six batches, side by side: in one of a few values the rounding of a single one is chance."""
    found: dict[str, list[Tensor]] = {}
    for seed in range(1, 7):
        ids = torch.randint(0, 250, (2, 12), generator=torch.Generator().manual_seed(seed))
        model.zero_grad()
        model(input_ids=ids, labels=ids).loss.backward()
        for name, parameter in model.named_parameters():
            if parameter.grad is not None:
                found.setdefault(name, []).append(parameter.grad.clone())
    return {name: torch.stack(parts) for name, parts in found.items()}


def relative_error(found: dict[str, Tensor], wanted: dict[str, Tensor]) -> float:
    """Return how far all of a gradient is from another one."""
    apart = sum(float((found[name].float() - gradient).square().sum()) for name, gradient in wanted.items())
    return math.sqrt(apart / sum(float(gradient.square().sum()) for gradient in wanted.values()))


@pytest.mark.parametrize("dtype", list(BOUNDS))
@pytest.mark.parametrize("options", [{}, {"use_dora": True}])
@pytest.mark.parametrize("how", [{"quant_type": "none"}, FORMATS["blocks"], FORMATS["rows"]], ids=str)
def test_gradients_are_those_of_peft_over_the_dense_model(
    tiny_model_folder: Path, dtype: torch.dtype, options: dict[str, Any], how: dict[str, Any]
) -> None:
    torch.manual_seed(0)
    base = halfbyte.load(tiny_model_folder, quantization_config=HalfbyteConfig(compute_dtype=dtype, **how))
    assert isinstance(base, LlamaForCausalLM)
    if how["quant_type"] == "none":
        dense = AutoModelForCausalLM.from_pretrained(tiny_model_folder, dtype=torch.float32)
    else:
        dense = copy.deepcopy(base).dequantize(torch.float32).float()
    ours = halfbyte.prepare(get_peft_model(base, lora(**options)))
    assert "fused: 2 Llama layers" in describe_layers(ours)
    assert sum(type(module) is LoraLinear4bit for module in ours.modules()) == 14
    for name, parameter in ours.named_parameters():
        if "lora_B" in name:
            nn.init.normal_(parameter, std=0.1)
    adapters = {name: value for name, value in ours.state_dict().items() if "lora_" in name}

    def theirs(dense: nn.Module) -> dict[str, Tensor]:
        model = get_peft_model(dense, lora(**options))
        assert not model.load_state_dict(adapters, strict=False).unexpected_keys
        return gradients(model)

    rounded = copy.deepcopy(dense).to(torch.bfloat16)
    got, expected = gradients(ours), theirs(dense)
    assert got.keys() == expected.keys() and len(got) >= 28
    assert {gradient.dtype for gradient in got.values()} == {torch.float32}
    for name, gradient in expected.items():
        assert (got[name] - gradient).norm() < BOUNDS[dtype] * gradient.norm(), name
    if dtype == torch.bfloat16:  # no more than bf16 leaves in PEFT's own layers
        assert relative_error(got, expected) < 1.2 * relative_error(theirs(rounded), expected)


@pytest.mark.parametrize("name", FORMATS)
def test_a_folder_opens_as_it_was_saved(tiny_model_folder: Path, tmp_path: Path, name: str) -> None:
    config = HalfbyteConfig(**FORMATS[name])
    model = halfbyte.load(tiny_model_folder, quantization_config=config)
    logits = model(input_ids=IDS).logits
    model.save_pretrained(tmp_path / "saved")
    quantize_checkpoint(tiny_model_folder, tmp_path / "copied", config)
    saved, copied = (load_file(tmp_path / folder / "model.safetensors") for folder in ("saved", "copied"))
    assert saved.keys() == copied.keys() and all(torch.equal(saved[key], copied[key]) for key in saved)
    for folder in ("saved", "copied"):
        loads = [halfbyte.load, AutoModelForCausalLM.from_pretrained]
        for load in loads[: 1 if name == "rows" else 2]:  # transformers opens rows with bitsandbytes
            opened = load(tmp_path / folder)
            assert torch.equal(opened(input_ids=IDS).logits, logits)
            for key in ("quant_type", "blocksize", "double_quant", "compute_dtype"):
                wanted = getattr(model.config.quantization_config, key)
                assert getattr(opened.config.quantization_config, key) == wanted, key
            opened.save_pretrained(tmp_path / "again")
            again, before = (json.loads((tmp_path / at / "config.json").read_text()) for at in ("again", folder))
            assert again["quantization_config"] == before["quantization_config"]


def test_an_8_bit_folder_of_bitsandbytes_opens_and_ours_opens_there(tiny_model_folder: Path, tmp_path: Path) -> None:
    theirs = AutoModelForCausalLM.from_pretrained(
        tiny_model_folder, quantization_config=BitsAndBytesConfig(load_in_8bit=True), dtype=torch.float32
    )
    theirs.save_pretrained(tmp_path / "theirs")
    for how in ({}, {"compute_dtype": "float32"}):
        wish = HalfbyteConfig(**how)
        opened = halfbyte.load(tmp_path / "theirs", quantization_config=wish)
        assert opened.dtype == wish.compute_dtype
    layers = {name: module for name, module in opened.named_modules() if isinstance(module, Linear8bit)}
    others = {name: module for name, module in theirs.named_modules() if isinstance(module, bnb.nn.Linear8bitLt)}
    assert layers.keys() == others.keys() and len(layers) == 14
    for name, layer in layers.items():
        weight, state = layer.quantized_weight, others[name].state_dict()
        values = bnb.functional.int8_vectorwise_dequant(state["weight"], state["SCB"])
        torch.testing.assert_close(weight.dequantize(torch.float32), values, rtol=3e-7, atol=0)
    opened.save_pretrained(tmp_path / "ours")
    saved, source = (load_file(tmp_path / folder / "model.safetensors") for folder in ("ours", "theirs"))
    assert saved.keys() == source.keys()
    assert all(torch.equal(saved[key], source[key]) for key in saved)
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "ours")
    assert sum(isinstance(module, bnb.nn.Linear8bitLt) for module in again.modules()) == 14
    logits = opened(input_ids=IDS).logits  # theirs quantizes the activations too
    assert (again(input_ids=IDS).logits - logits).norm() < 0.05 * logits.norm()


def file_under(tensor: Tensor) -> str:
    """Return the file whose mapping holds the tensor, or an empty string."""
    for line in Path("/proc/self/maps").read_text().splitlines():
        first, last = (int(end, 16) for end in line.split()[0].split("-"))
        if first <= tensor.data_ptr() < last:
            return line.partition("/")[2]
    return ""


@pytest.mark.parametrize("name", FORMATS)
def test_a_folder_is_mapped(tmp_path: Path, name: str) -> None:
    config = LlamaConfig(
        hidden_size=256, intermediate_size=1024, num_hidden_layers=1, num_attention_heads=8, vocab_size=256
    )
    LlamaForCausalLM(config).to(torch.bfloat16).save_pretrained(tmp_path / "dense")
    quantize_checkpoint(tmp_path / "dense", tmp_path / "q", HalfbyteConfig(**FORMATS[name]))
    layers = [module for module in halfbyte.load(tmp_path / "q").modules() if isinstance(module, QuantizedLinear)]
    assert len(layers) == 7 and all(file_under(layer.weight).endswith("q/model.safetensors") for layer in layers)


def test_a_16_bit_base_is_a_plain_model_that_merges(tiny_model_folder: Path, tmp_path: Path) -> None:
    config = HalfbyteConfig(quant_type="none", compute_dtype="float32")
    base = halfbyte.load(tiny_model_folder, quantization_config=config)
    assert sum(isinstance(module, DenseLinear) for module in base.modules()) == 14
    assert "dense, in float32" in describe_base(base)
    assert not base.is_quantized and not hasattr(base.config, "quantization_config")
    base.save_pretrained(tmp_path / "dense")
    assert "quantization_config" not in json.loads((tmp_path / "dense" / "config.json").read_text())
    plain = AutoModelForCausalLM.from_pretrained(tmp_path / "dense")
    torch.testing.assert_close(plain(input_ids=IDS).logits, base(input_ids=IDS).logits)
    model = halfbyte.prepare(get_peft_model(base, lora()))
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            nn.init.normal_(parameter, std=0.1)
    model.eval()
    logits = model(input_ids=IDS).logits
    model.save_pretrained(tmp_path / "adapter")
    theirs = PeftModel.from_pretrained(plain, tmp_path / "adapter")
    torch.testing.assert_close(theirs(input_ids=IDS).logits, logits, rtol=1e-4, atol=1e-4)
    merged = model.merge_and_unload()
    torch.testing.assert_close(merged(input_ids=IDS).logits, logits, rtol=1e-4, atol=1e-4)
    del base.model


def test_8_bits_are_not_merged_into(tiny_model_folder: Path) -> None:
    base = halfbyte.load(tiny_model_folder, quantization_config=HalfbyteConfig(quant_type="int8"))
    model = halfbyte.prepare(get_peft_model(base, lora()))
    with pytest.raises(InputError, match="cannot be merged into 4-bit weights, nor into 8-bit ones"):
        model.merge_adapter()
    assert describe_base(model).endswith("of them in 8 bits")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"quant_type": "int8", "double_quant": True}, "double_quant is for 4 bits, and quant_type is int8"),
        ({"quant_type": "none", "double_quant": True}, "quant_type is none, which has no constants"),
        ({"quant_type": "none", "blocksize": 64}, "with quant_type none there are no blocks"),
        ({"quant_type": "nf4", "blocksize": "row"}, "'row', which is for int8; with nf4 it must be a number"),
        ({"quant_type": "int8", "blocksize": 8}, "blocksize is 8; it must be 32 to 4096, or 'row'"),
        ({"quant_type": "int9"}, r"quant_type is 'int9' \(did you mean 'int8'"),
    ],
)
def test_options_that_contradict_each_other_are_told(options: dict[str, Any], message: str) -> None:
    with pytest.raises(InputError, match=message):
        HalfbyteConfig(**options)


def test_a_folder_in_one_format_is_not_opened_in_another(tiny_model_folder: Path, tmp_path: Path) -> None:
    quantize_checkpoint(tiny_model_folder, tmp_path / "q", HalfbyteConfig(quant_type="int8"))
    for wish in ("none", "fp4"):
        with pytest.raises(InputError, match=f"are in int8 already, so that they cannot be opened in {wish}"):
            halfbyte.load(tmp_path / "q", quantization_config=HalfbyteConfig(quant_type=wish))
    opened = halfbyte.load(tmp_path / "q", quantization_config=HalfbyteConfig())
    assert {type(module) for module in opened.modules() if isinstance(module, FrozenLinear)} == {Linear8bit}


@pytest.mark.parametrize("blocksize", [64, "row"])
def test_damaged_8_bit_folders_are_told(tiny_model_folder: Path, tmp_path: Path, blocksize: int | str) -> None:
    quantize_checkpoint(tiny_model_folder, tmp_path / "q", HalfbyteConfig(quant_type="int8", blocksize=blocksize))
    file = tmp_path / "q" / "model.safetensors"
    tensors = load_file(file)
    weight = "model.layers.0.mlp.up_proj.weight"
    constants = "model.layers.0.mlp.up_proj.SCB" if blocksize == "row" else f"{weight}.absmax"
    spoiled = tensors[constants].clone()
    spoiled[3] = torch.nan
    for changed, message in [
        ({k: v for k, v in tensors.items() if k != weight}, "up_proj"),
        (tensors | {constants: tensors[constants][:-1].clone()}, "the checkpoint is damaged"),
        (tensors | {constants: spoiled}, r"holds nan at \[3\]"),
    ]:
        save_file(changed, file, metadata={"format": "pt"})
        with pytest.raises(InputError, match=message):
            halfbyte.load(tmp_path / "q")
    save_file(tensors, file, metadata={"format": "pt"})
    about = json.loads((tmp_path / "q" / "config.json").read_text())
    del about["quantization_config"]
    (tmp_path / "q" / "config.json").write_text(json.dumps(about))
    with pytest.raises(InputError, match=r"are in 8 bits, but config\.json has no quantization_config"):
        halfbyte.load(tmp_path / "q")

"""GPTQ and AWQ folders as bases: against packers written here after the published layouts."""

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import AutoConfig, LlamaConfig, LlamaForCausalLM

import halfbyte
from halfbyte.deploy.merge import merge
from halfbyte.errors import InputError
from halfbyte.hf import HalfbyteConfig, quantize_checkpoint
from halfbyte.hf.models.foreign.packed import Packing
from halfbyte.nn import Linear4bit, Linear8bit


def pack_along_rows(codes: Tensor, bits: int) -> Tensor:
    """[K, N] to int32 [K bits / 32, N]: AutoGPTQ's qweight, one value after the other from the lowest bits."""
    per = 32 // bits
    packed = torch.zeros(codes.shape[0] // per, codes.shape[1], dtype=torch.int64)
    for k in range(codes.shape[0]):
        packed[k // per] += codes[k].long() << (bits * (k % per))
    return torch.where(packed >= 2**31, packed - 2**32, packed).int()


def pack_along_columns(codes: Tensor, bits: int, order: tuple[int, ...] | None = None) -> Tensor:
    """[R, C] to int32 [R, C bits / 32]; ``order``: the column of each place, as AutoAWQ's ``order_map`` has it."""
    per = 32 // bits
    places = order or tuple(range(per))
    packed = torch.zeros(codes.shape[0], codes.shape[1] // per, dtype=torch.int64)
    for c in range(packed.shape[1]):
        for place, column in enumerate(places):
            packed[:, c] += codes[:, c * per + column].long() << (bits * place)
    return torch.where(packed >= 2**31, packed - 2**32, packed).int()


def rounded(weight: Tensor, bits: int, index: Tensor, symmetric: bool) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Round ``weight`` [N, K] in groups of K: codes [K, N], zeros and scales [G, N], and the values that they mean."""
    groups, most = int(index.max()) + 1, 2**bits - 1
    w = weight.T.float()
    zeros, scales = torch.zeros(groups, w.shape[1]), torch.zeros(groups, w.shape[1])
    for g in range(groups):
        low, high = w[index == g].amin(0).clamp(max=0), w[index == g].amax(0).clamp(min=0)
        if symmetric:
            scales[g] = torch.maximum(-low, high) * 2 / most
            zeros[g] = (most + 1) // 2
        else:
            scales[g] = (high - low) / most
            zeros[g] = (-low / scales[g]).round().clamp(0, most)
    scales = scales.half().float()
    codes = (w / scales[index] + zeros[index]).round().clamp(0, most)
    return codes, zeros, scales, ((codes - zeros[index]) * scales[index]).T


CASES: list[dict[str, Any]] = [
    {"quant_method": "gptq", "bits": 4, "group_size": 32, "sym": True},
    {"quant_method": "gptq", "bits": 4, "group_size": 16, "sym": False, "desc_act": True},
    {"quant_method": "gptq", "bits": 4, "group_size": -1, "sym": False, "checkpoint_format": "gptq_v2"},
    {"quant_method": "gptq", "bits": 8, "group_size": 32, "sym": False},
    {"quant_method": "gptq", "bits": 2, "group_size": 32, "sym": True},
    {"quant_method": "auto-round", "bits": 4, "group_size": 32, "sym": True, "packing_format": "auto_round:auto_gptq"},
    {"quant_method": "auto-round", "bits": 2, "group_size": 32, "sym": False, "packing_format": "auto_round"},
    {"quant_method": "auto-round", "bits": 4, "group_size": 32, "packing_format": "auto_round:gptqmodel"},
    {"quant_method": "auto-round", "bits": 4, "group_size": 32, "packing_format": "auto_round:auto_awq"},
    {"quant_method": "awq", "bits": 4, "group_size": 32, "version": "gemm", "zero_point": True},
]

LESS = {2: 0b01010101010101010101010101010101, 4: 0x11111111, 8: 0x01010101}
"""What GPTQModel 7.7 takes from the integers of zeros before it writes them (``utils/model.py``)."""
WHOLE = ("auto_round", "auto_round:gptqmodel")
"""Those of which AutoRound 0.16 takes nothing (``GPTQ_FORMAT_NO_ZP`` of ``inference/backend.py``)."""


def packed(weight: Tensor, about: dict[str, Any]) -> tuple[dict[str, Tensor], Tensor]:
    """The tensors of a layer, and the weight that they mean."""
    bits, inputs = about["bits"], weight.shape[1]
    size = inputs if about["group_size"] == -1 else about["group_size"]
    index = torch.arange(inputs) // size
    if about.get("desc_act"):
        index = index[torch.randperm(inputs)]
    codes, zeros, scales, values = rounded(weight, bits, index, about.get("sym", False))
    if "awq" in (about["quant_method"], about.get("packing_format", "")[-3:]):
        order = (0, 2, 4, 6, 1, 3, 5, 7)
        parts = {"qweight": pack_along_columns(codes, 4, order), "qzeros": pack_along_columns(zeros, 4, order)}
    else:
        words = pack_along_columns(zeros, bits)
        if about.get("checkpoint_format") != "gptq_v2" and about.get("packing_format") not in WHOLE:
            words -= LESS[bits]
        parts = {"qweight": pack_along_rows(codes, bits), "qzeros": words}
        if about["quant_method"] == "gptq":
            parts["g_idx"] = index.int()
    return parts | {"scales": scales.half()}, values


@pytest.mark.parametrize("about", CASES, ids=lambda about: "-".join(map(str, about.values())))
@pytest.mark.parametrize("shape", [(32, 64), (64, 96)])
def test_a_weight_means_what_was_packed(about: dict[str, Any], shape: tuple[int, int]) -> None:
    torch.manual_seed(0)
    weight = torch.randn(shape)
    weight[::3] = weight[::3].abs()  # whose zeros are 0, and borrow where 1 is taken from them
    parts, values = packed(weight, about)
    assert torch.equal(Packing.of(about).dequantize("x", parts), values)


def folder_of(tmp_path: Path, about: dict[str, Any]) -> Path:
    """A Llama whose linear layers are packed, and beside it one that holds the values that they mean."""
    torch.manual_seed(0)
    config = LlamaConfig(
        hidden_size=64, intermediate_size=96, num_hidden_layers=2, num_attention_heads=4, vocab_size=64
    )
    model = LlamaForCausalLM(config).float()
    tensors = {}
    for name, tensor in model.state_dict().items():
        if name.endswith("_proj.weight"):
            parts, values = packed(tensor, about)
            tensors |= {f"{name.removesuffix('weight')}{part}": value for part, value in parts.items()}
            tensor.copy_(values)
        else:
            tensors[name] = tensor.half()
            tensor.copy_(tensors[name])
    model.save_pretrained(tmp_path / "dense")
    folder = tmp_path / "packed"
    folder.mkdir()
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    configured = json.loads((tmp_path / "dense" / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(configured | {"quantization_config": about, "dtype": "float16"}))
    return folder


IDS = torch.arange(2, 14)[None]


@pytest.mark.parametrize("about", [CASES[1], CASES[-1]], ids=["gptq", "awq"])
def test_a_folder_is_quantized_anew_once_and_opened(
    tmp_path: Path, about: dict[str, Any], monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setenv("HALFBYTE_CACHE", str(tmp_path / "cache"))
    folder = folder_of(tmp_path, about)
    for how, kind in (({}, Linear4bit), ({"quant_type": "int8", "compute_dtype": "float32"}, Linear8bit)):
        config = HalfbyteConfig(**how)
        caplog.clear()
        model = halfbyte.load(folder, quantization_config=config)
        wanted = halfbyte.load(tmp_path / "dense", quantization_config=config)
        assert torch.equal(model(input_ids=IDS).logits, wanted(input_ids=IDS).logits)
        layers = [module for module in model.modules() if isinstance(module, kind)]
        assert len(layers) == 14 and model.name_or_path == str(folder)
        apart = size = 0.0
        dense = load_file(tmp_path / "dense" / "model.safetensors")
        for name, module in model.named_modules():
            if isinstance(module, kind):
                weight = dense[f"{name}.weight"]
                apart += float((module.quantized_weight.dequantize(torch.float32) - weight).square().sum())
                size += float(weight.square().sum())
        assert f"{100 * (apart / size) ** 0.5:.1f} % off those of the source" in caplog.text
    assert len(list((tmp_path / "cache" / "models").iterdir())) == 2
    before = {file: file.stat().st_mtime_ns for file in (tmp_path / "cache").rglob("model.safetensors")}
    halfbyte.load(folder)
    assert {file: file.stat().st_mtime_ns for file in (tmp_path / "cache").rglob("model.safetensors")} == before


def over(folder: Path, dense: Any) -> Any:
    """``dense`` with an adapter that sways what it gives, saved beside its base ``folder``."""
    torch.manual_seed(1)
    config = LoraConfig(r=4, target_modules=["q_proj", "down_proj"], task_type="CAUSAL_LM", init_lora_weights=False)
    adapted = get_peft_model(dense, config).eval()
    adapted.peft_config["default"].base_model_name_or_path = str(folder)
    adapted.save_pretrained(folder.parent / "adapter")
    return adapted


@pytest.mark.parametrize(
    ("about", "is_old"),
    [(CASES[1], False), (CASES[3], True), (CASES[6], False), (CASES[8], False), (CASES[9], False)],
    ids=["gptq, act-order", "gptq, 8 bits, old", "auto-round, 2 bits", "auto-round, awq", "awq"],
)
def test_an_adapter_is_merged_onto_what_was_read_and_onto_what_was_made_of_it(
    tmp_path: Path, about: dict[str, Any], is_old: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HALFBYTE_CACHE", str(tmp_path / "cache"))
    folder = folder_of(tmp_path, about)
    if is_old:  # as AutoGPTQ wrote it
        config = json.loads((folder / "config.json").read_text())
        (folder / "quantize_config.json").write_text(json.dumps(config.pop("quantization_config")))
        (folder / "config.json").write_text(json.dumps(config))
    adapted = over(folder, LlamaForCausalLM.from_pretrained(tmp_path / "dense", dtype=torch.float32))
    expected = adapted(input_ids=IDS).logits
    trained = halfbyte.load(folder).dequantize(torch.float32).float()
    trained = PeftModel.from_pretrained(trained, tmp_path / "adapter").eval()
    wanted = {"original": expected, "quantized": trained(input_ids=IDS).logits}
    assert (wanted["original"] - wanted["quantized"]).abs().max() > 1e-3
    for onto in ("original", "quantized"):
        out = tmp_path / onto
        copy = merge(tmp_path / "adapter", out, onto=onto, to="fp32")
        assert copy.is_quantized == (onto == "quantized")
        assert not list(out.glob("quantize_config.json")) and not list(out.glob("converted.json"))
        assert "quantization_config" not in json.loads((out / "config.json").read_text())
        assert not [name for name in load_file(out / "model.safetensors") if "qweight" in name or "g_idx" in name]
        merged = LlamaForCausalLM.from_pretrained(out, dtype=torch.float32)
        torch.testing.assert_close(merged(input_ids=IDS).logits, wanted[onto], rtol=1e-4, atol=1e-4)
        card = (out / "README.md").read_text()
        assert "\npacked, with an adapter merged onto " in card and ("quantized weights" in card) == copy.is_quantized


def test_an_old_folder_says_how_in_quantize_config(tmp_path: Path) -> None:
    folder = folder_of(tmp_path, CASES[0])
    about = json.loads((folder / "config.json").read_text())
    held = about.pop("quantization_config")
    (folder / "config.json").write_text(json.dumps(about))
    for open_it in (lambda: halfbyte.load(folder), lambda: quantize_checkpoint(folder, tmp_path / "q")):
        with pytest.raises(InputError, match=r"packed \(qweight\), but config\.json has no quantization_config"):
            open_it()
    (folder / "quantize_config.json").write_text(json.dumps({k: v for k, v in held.items() if k != "quant_method"}))
    copy = quantize_checkpoint(folder, tmp_path / "q")
    assert copy.error is not None and 0 < copy.error < 0.2
    assert not (tmp_path / "q" / "quantize_config.json").exists()
    assert AutoConfig.from_pretrained(tmp_path / "q").quantization_config["quant_method"] == "bitsandbytes"
    halfbyte.load(tmp_path / "q")


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"bits": 3}, "3 bits in groups of 32; of gptq 2, 4 and 8 bits are read"),
        ({"bits": None}, "does not say bits and group_size"),
        ({"group_size": 7}, "which do not fit each other in 4 bits and groups of 7"),
        ({"group_size": 64}, "which do not fit each other in 4 bits and groups of 64"),
        ({"quant_method": "awq", "version": "gemv"}, "AWQ's version 'gemv', but only gemm is read"),
        (
            {"quant_method": "auto-round", "packing_format": "auto_round:llm_compressor"},
            "'auto_round:llm_compressor'.*not read",
        ),
        (
            {"quant_method": "auto-round", "packing_format": "auto_round", "data_type": "mx_fp"},
            "data_type 'mx_fp', which is not read",
        ),
        (
            {"quant_method": "fbgemm_fp8"},
            r"quantized \(fbgemm_fp8\), which is not opened: .* GPTQ, AWQ, MXFP4 and GGUF",
        ),
    ],
)
def test_what_cannot_be_read_is_told(
    tmp_path: Path, changed: dict[str, Any], message: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HALFBYTE_CACHE", str(tmp_path / "cache"))
    folder = folder_of(tmp_path, CASES[0])
    file = folder / "model.safetensors"
    if "group_size" in changed:  # without an index the group is counted
        save_file({k: v for k, v in load_file(file).items() if "g_idx" not in k}, file, metadata={"format": "pt"})
    about = json.loads((folder / "config.json").read_text())
    about["quantization_config"] |= changed
    (folder / "config.json").write_text(json.dumps(about))
    with pytest.raises(InputError, match=message):
        halfbyte.load(folder)
    assert not list(tmp_path.glob("cache/models/*/config.json"))


def test_a_missing_part_is_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HALFBYTE_CACHE", str(tmp_path / "cache"))
    folder = folder_of(tmp_path, CASES[0])
    file = folder / "model.safetensors"
    tensors = {k: v for k, v in load_file(file).items() if k != "model.layers.1.mlp.up_proj.scales"}
    save_file(tensors, file, metadata={"format": "pt"})
    with pytest.raises(InputError, match=r"up_proj\.scales is missing in .*, beside its qweight"):
        halfbyte.load(folder)
    shutil.rmtree(folder)

"""GGUF files as bases: against transformers' own loading of them."""

import json
from pathlib import Path
from typing import get_args

import numpy as np
import pytest
import torch
from gguf import GGMLQuantizationType, GGUFWriter
from gguf.quants import quantize
from peft import LoraConfig, get_peft_model
from transformers import AutoModelForCausalLM, AutoTokenizer, GgufConfig

import halfbyte
from halfbyte.choices import Onto
from halfbyte.deploy.merge import merge
from halfbyte.errors import InputError
from halfbyte.hf import HalfbyteConfig, quantize_checkpoint
from halfbyte.hf.models import base_files, shards
from halfbyte.hf.models.check import check_finite
from halfbyte.hf.models.configs import read_config
from halfbyte.hf.models.foreign.gguf import open_gguf
from halfbyte.runs.circumstances import fingerprint

IDS = torch.arange(2, 14)[None]
LAYER = {
    "attn_norm": (64,), "ffn_norm": (64,), "attn_q": (64, 64), "attn_k": (32, 64), "attn_v": (32, 64),
    "attn_output": (64, 64), "ffn_gate": (96, 64), "ffn_up": (96, 64), "ffn_down": (64, 96),
}  # fmt: skip


def write(file: Path, architecture: str = "llama", kind: str = "Q4_0", **extra: np.ndarray) -> Path:
    """A Llama of two layers as llama.cpp's converter lays it out, with a vocabulary of bytes."""
    random = np.random.default_rng(0)
    writer = GGUFWriter(file, architecture)
    writer.add_context_length(128)
    writer.add_embedding_length(64)
    writer.add_block_count(2)
    writer.add_feed_forward_length(96)
    writer.add_head_count(4)
    writer.add_head_count_kv(2)
    writer.add_layer_norm_rms_eps(1e-5)
    writer.add_rope_dimension_count(16)
    writer.add_rope_freq_base(10000.0)
    writer.add_vocab_size(64)
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("default")
    writer.add_token_list(["<s>", "</s>", *(chr(33 + i) for i in range(61)), '!"'])
    writer.add_token_types([3, 3] + [1] * 62)
    writer.add_token_merges(['! "'])
    writer.add_bos_token_id(0)
    writer.add_eos_token_id(1)
    shapes = {"token_embd": (64, 64), "output_norm": (64,), "output": (64, 64)}
    shapes |= {f"blk.{i}.{name}": shape for i in range(2) for name, shape in LAYER.items()}
    for name, shape in shapes.items():
        values = random.standard_normal(shape).astype(np.float32) * 0.1 + (1 if "norm" in name else 0)
        if len(shape) == 1:
            writer.add_tensor(f"{name}.weight", values)
        else:
            of = GGMLQuantizationType[kind]
            writer.add_tensor(f"{name}.weight", quantize(values, of), raw_dtype=of)
    for name, values in extra.items():
        writer.add_tensor(name, values)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return file


def theirs(file: Path) -> torch.nn.Module:
    """transformers' model of a file, dense in fp32."""
    return AutoModelForCausalLM.from_pretrained(
        file.parent, gguf_file=file.name, quantization_config=GgufConfig(dequantize=True), dtype=torch.float32
    )


@pytest.mark.parametrize("kind", ["Q4_0", "Q5_1", "Q8_0", "BF16", "F16"])
def test_a_file_is_the_model_that_transformers_makes_of_it(
    tmp_path: Path, kind: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HALFBYTE_CACHE", str(tmp_path / "cache"))
    file = write(tmp_path / "model.gguf", kind=kind)
    theirs(file).save_pretrained(tmp_path / "dense")
    for how in ({}, {"quant_type": "int8", "compute_dtype": "float32"}):
        config = HalfbyteConfig(**how)
        wanted = halfbyte.load(tmp_path / "dense", quantization_config=config).state_dict()
        got = halfbyte.load(file, quantization_config=config).state_dict()
        assert got.keys() == wanted.keys()
        assert all(torch.equal(got[name], wanted[name]) for name in wanted)
    for name, tensor in got.items():
        check_finite(name, tensor)


@pytest.mark.parametrize("kind", ["BF16", "F32"])
def test_a_file_is_the_same_base_as_a_folder_of_its_values(
    tmp_path: Path, kind: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HALFBYTE_CACHE", str(tmp_path / "cache"))
    file = write(tmp_path / "model.gguf", kind=kind)
    theirs(file).save_pretrained(tmp_path / "dense")
    quantize_checkpoint(tmp_path / "dense", tmp_path / "four")
    few = write(tmp_path / "few.gguf", kind="Q8_0")
    bases = [file, tmp_path / "dense", tmp_path / "four"]
    for number, base in enumerate(bases):
        model = get_peft_model(halfbyte.load(base), LoraConfig(r=2, target_modules="all-linear", task_type="CAUSAL_LM"))
        folder = tmp_path / f"over {number}"
        model.save_pretrained(folder, save_embedding_layers=False)
        known = base_files.fingerprint(model.get_base_model().opened_from, [HalfbyteConfig()])
        assert known
        known.called(str(base)).save(folder)
        for other in bases:
            about = json.loads((folder / "adapter_config.json").read_text()) | {"base_model_name_or_path": str(other)}
            (folder / "adapter_config.json").write_text(json.dumps(about))
            assert base_files.check_base(folder, halfbyte.load(folder).get_base_model().opened_from)
            if other != bases[2]:
                merge(folder, tmp_path / "merged", onto="original", overwrite=True)
        about["base_model_name_or_path"] = str(few)
        (folder / "adapter_config.json").write_text(json.dumps(about))
        with pytest.raises(InputError, match="another base model"):
            halfbyte.load(folder)
        with pytest.raises(InputError, match="another base model"):
            merge(folder, tmp_path / "merged", onto="original", overwrite=True)


def test_an_adapter_names_the_file_and_finds_it_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HALFBYTE_CACHE", str(tmp_path / "cache"))
    (tmp_path / "files").mkdir()
    file = write(tmp_path / "files" / "model.gguf")
    base = halfbyte.load(tmp_path / "files")  # the folder of one file
    model = get_peft_model(base, LoraConfig(r=2, target_modules="all-linear", task_type="CAUSAL_LM"))
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter)
    logits = halfbyte.prepare(model.eval())(input_ids=IDS).logits
    model.save_pretrained(tmp_path / "adapter", save_embedding_layers=False)  # PEFT would look for config.json
    again = halfbyte.load(tmp_path / "adapter")
    assert again.peft_config["default"].base_model_name_or_path == str(file)
    assert torch.equal(again(input_ids=IDS).logits, logits)
    tokenizer = halfbyte.load_tokenizer(file)
    assert tokenizer("$", add_special_tokens=False).input_ids == [5]
    before = fingerprint(str(file))
    write(file, kind="Q8_0")
    assert fingerprint(str(file)) != before


def test_an_adapter_is_merged_onto_the_file_s_weights_and_onto_the_quantized_ones(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HALFBYTE_CACHE", str(tmp_path / "cache"))
    (tmp_path / "files").mkdir()
    file = write(tmp_path / "files" / "model.gguf")
    (tmp_path / "files" / "notes").write_text("another's")
    model = get_peft_model(halfbyte.load(file), LoraConfig(r=2, target_modules=["q_proj"], task_type="CAUSAL_LM"))
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter)
    halfbyte.prepare(model.eval()).save_pretrained(tmp_path / "adapter", save_embedding_layers=False)
    dense = theirs(file)
    held = halfbyte.load(file)
    for onto in get_args(Onto):
        merge(tmp_path / "adapter", tmp_path / onto, onto=onto, to="fp32")
        assert not (tmp_path / onto / "notes").exists()
        assert halfbyte.load_tokenizer(tmp_path / onto)("$", add_special_tokens=False).input_ids == [5]
        merged = AutoModelForCausalLM.from_pretrained(tmp_path / onto, dtype=torch.float32)
        for name, module in merged.named_modules():
            if not isinstance(module, torch.nn.Linear):
                continue
            base = held.get_submodule(name)
            weight = base.dequantize(torch.float32) if hasattr(base, "dequantize") and onto == "quantized" else None
            weight = dense.get_submodule(name).weight if weight is None else weight
            layer = model.get_base_model().get_submodule(name)
            if hasattr(layer, "lora_A"):
                weight = weight + layer.scaling["default"] * (
                    layer.lora_B["default"].weight @ layer.lora_A["default"].weight
                )
            bound = 2**-8 if onto == "quantized" and name == "lm_head" else 0  # a dense head, in bf16 as in training
            torch.testing.assert_close(module.weight, weight, rtol=bound + 1e-6, atol=1e-6)


def test_what_cannot_be_read_is_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HALFBYTE_CACHE", str(tmp_path / "cache"))
    good = write(tmp_path / "good.gguf")
    (tmp_path / "damaged.gguf").write_bytes(good.read_bytes()[:2000])
    (tmp_path / "none.gguf").write_bytes(b"not at all")
    write(tmp_path / "model-00001-of-00003.gguf")
    write(tmp_path / "strange.gguf", architecture="rwkv7")
    experts = np.zeros((2, 96, 64), dtype=np.float32)
    write(tmp_path / "experts.gguf", **{"blk.0.ffn_up_exps.weight": experts})
    for name, message in [
        ("damaged.gguf", "cannot be read as GGUF"),
        ("none.gguf", "cannot be read as GGUF"),
        ("model-00001-of-00003.gguf", "is part 1 of 3; put the parts together"),
        ("strange.gguf", r"strange\.gguf cannot be used: .*rwkv7 is not supported"),
        ("experts.gguf", r"is a mixture of experts \(blk\.0\.ffn_up_exps\.weight\)"),
    ]:
        with pytest.raises(InputError, match=message) as told:
            halfbyte.load(tmp_path / name)
        assert "\n" not in str(told.value)
    with pytest.raises(InputError, match=r"holds 6 GGUF files; give one of them"):
        halfbyte.load(tmp_path)
    assert not list(tmp_path.glob("cache/models/*/config.json"))
    copy = quantize_checkpoint(good, tmp_path / "q")
    assert copy.error is not None and 0.05 < copy.error < 0.15  # NF4 over 4 bits


def test_a_type_that_cannot_be_expanded_is_told(tmp_path: Path) -> None:
    file = tmp_path / "model.gguf"
    writer = GGUFWriter(file, "llama")
    writer.add_tensor("x", np.zeros((4, 320), dtype=np.uint8), raw_dtype=GGMLQuantizationType.Q8_1)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    with pytest.raises(InputError, match="of the type Q8_1, which the package gguf cannot expand"):
        open_gguf(file)


def test_the_error_of_a_copy_that_was_interrupted_is_of_all_its_files(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def stop(done: int, _: int) -> None:
        if done == 9:
            raise KeyboardInterrupt

    file = write(tmp_path / "model.gguf", kind="Q8_0")
    whole = quantize_checkpoint(file, tmp_path / "whole")
    monkeypatch.setattr(shards, "SHARD_BYTES", 8192)
    with pytest.raises(KeyboardInterrupt):
        quantize_checkpoint(file, tmp_path / "copy", progress=stop)
    copy = quantize_checkpoint(file, tmp_path / "copy")
    assert len(list((tmp_path / "copy").glob("*.safetensors"))) > 2
    assert copy.error == pytest.approx(whole.error, rel=1e-12) and 0.05 < copy.error < 0.15
    assert (copy.values, copy.packed) == (whole.values, whole.packed)


def test_configuration_and_tokenizer_are_read_from_a_file_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HALFBYTE_CACHE", str(tmp_path / "cache"))
    file = write(tmp_path / "model.gguf")
    fresh = AutoTokenizer.from_pretrained(file.parent, gguf_file=file.name)
    config = read_config(file).to_dict()

    def no_file(*_: object) -> None:
        raise AssertionError("the file is read again")

    with monkeypatch.context() as patched:
        patched.setattr("gguf.GGUFReader.__init__", no_file)
        assert read_config(file).to_dict() == config
        kept = halfbyte.load_tokenizer(file)
    text = 'the "end"</s> of ! it'
    assert kept(text) == fresh(text)
    assert kept.special_tokens_map == fresh.special_tokens_map
    assert kept.chat_template == fresh.chat_template

    file.unlink()
    write(file, kind="F16", more=np.zeros(32, np.float32))
    with monkeypatch.context() as patched:
        patched.setattr("gguf.GGUFReader.__init__", no_file)
        with pytest.raises(AssertionError, match="read again"):
            read_config(file)

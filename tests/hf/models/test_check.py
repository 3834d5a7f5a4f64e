"""A checkpoint that is not the model's is told by the tensors' names; one with values that are no numbers too."""

import json
import logging
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers as t
from safetensors.torch import load_file, save_file
from torch import Tensor

import halfbyte
from halfbyte.errors import InputError
from halfbyte.hf import quantize_checkpoint

NORM = "model.norm.weight"
DOWN = "model.layers.1.mlp.down_proj.weight"


@pytest.fixture(params=["load", "quantize", "load 4 bits", "load bin"])
def attempt(
    request: pytest.FixtureRequest, tmp_path: Path
) -> Callable[[Path, Callable[[dict[str, Tensor]], Any]], Any]:
    """Change a copy of a folder's tensors, then open it, as it is or in another form, or quantize it."""

    def change_and_try(source: Path, change: Callable[[dict[str, Tensor]], Any]) -> Any:
        folder = tmp_path / "changed"
        if request.param == "load 4 bits":
            quantize_checkpoint(source, folder)
        else:
            shutil.copytree(source, folder)
        tensors = load_file(folder / "model.safetensors")
        change(tensors)
        if request.param == "load bin":
            (folder / "model.safetensors").unlink()
            torch.save(tensors, folder / "pytorch_model.bin")
        else:
            save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
        return quantize_checkpoint(folder, tmp_path / "q") if request.param == "quantize" else halfbyte.load(folder)

    return change_and_try


def drop(*names: str) -> Callable[[dict[str, Tensor]], Any]:
    return lambda tensors: [tensors.pop(key) for key in list(tensors) if key.startswith(names)]


def test_nothing_changed_is_opened(attempt: Any, tiny_model_folder: Path) -> None:
    attempt(tiny_model_folder, lambda tensors: None)


@pytest.mark.parametrize("missing", [NORM, "model.embed_tokens.weight", DOWN])
def test_a_missing_tensor_is_named(attempt: Any, tiny_model_folder: Path, missing: str) -> None:
    with pytest.raises(
        InputError, match=rf"1 tensor is missing \({missing}\)|2 tensors are missing \(lm_head.weight, "
    ):
        attempt(tiny_model_folder, drop(missing))


def test_tensors_without_a_place_are_named_and_counted(attempt: Any, tiny_model_folder: Path) -> None:
    def third_layer(tensors: dict[str, Tensor]) -> None:
        for name in [name for name in tensors if ".layers.1." in name]:
            tensors[name.replace(".1.", ".2.")] = tensors[name].clone()

    with pytest.raises(InputError, match=r"9 tensors are without a place .*layers\.2\.input_layernorm.*, and 3 more\)"):
        attempt(tiny_model_folder, third_layer)


def test_both_shapes_are_told(attempt: Any, tiny_model_folder: Path) -> None:
    def shorter(tensors: dict[str, Tensor]) -> None:
        tensors[NORM] = tensors[NORM][:30].clone()

    with pytest.raises(InputError, match=r"of another shape \(model\.norm\.weight is \[30\], in the model \[32\]\)"):
        attempt(tiny_model_folder, shorter)


def test_old_buffers_are_left_out_without_a_word(
    attempt: Any, tiny_model_folder: Path, caplog: pytest.LogCaptureFixture
) -> None:
    def older(tensors: dict[str, Tensor]) -> None:
        tensors["model.layers.0.self_attn.rotary_emb.inv_freq"] = torch.ones(4)
        tensors["model.layers.0.self_attn.bias"] = torch.ones(1, 1, 8, 8, dtype=torch.bool)

    attempt(tiny_model_folder, older)
    assert not [record for record in caplog.records if "use for part" in record.message]


@pytest.mark.parametrize("value", [torch.nan, torch.inf, -torch.inf])
@pytest.mark.parametrize("name", [NORM, DOWN])
def test_a_value_that_is_not_finite_is_told_with_its_index(
    attempt: Any, tiny_model_folder: Path, name: str, value: float
) -> None:
    def spoil(tensors: dict[str, Tensor]) -> None:
        if tensors[name].is_floating_point():
            tensors[name].view(-1)[7] = value
        else:  # what a weight with such a value is in 4 bits
            tensors[f"{name}.nested_absmax"][0] = value

    index = r"\[7\]" if name == NORM else r"\[(0, 7|0)\]"
    with pytest.raises(
        InputError, match=rf"^{name}(\.nested_absmax)? holds {value} at {index} \(as (bfloat16|float32)\)"
    ):
        attempt(tiny_model_folder, spoil)


def test_what_becomes_infinite_in_the_compute_dtype_is_told(tiny_model_folder: Path, tmp_path: Path) -> None:
    shutil.copytree(tiny_model_folder, tmp_path / "m")
    tensors = load_file(tmp_path / "m" / "model.safetensors")
    tensors[DOWN][1, 2] = 1e6
    save_file(tensors, tmp_path / "m" / "model.safetensors", metadata={"format": "pt"})
    halfbyte.load(tmp_path / "m")
    fp16 = halfbyte.HalfbyteConfig(compute_dtype="float16")
    with pytest.raises(InputError, match=r"holds inf at \[1, 2\] \(as float16\)"):
        halfbyte.load(tmp_path / "m", quantization_config=fp16)
    with pytest.raises(InputError, match=r"holds inf at \[1, 2\] \(as float16\)"):
        quantize_checkpoint(tmp_path / "m", tmp_path / "q", fp16)


def test_an_index_that_names_the_wrong_file_is_told(tiny_model_folder: Path, tmp_path: Path) -> None:
    t.AutoModelForCausalLM.from_pretrained(tiny_model_folder).save_pretrained(tmp_path, max_shard_size="20KB")
    halfbyte.load(tmp_path)
    index = json.loads((tmp_path / "model.safetensors.index.json").read_text())["weight_map"]
    file = tmp_path / index[NORM]
    tensors = load_file(file)
    del tensors[NORM]
    save_file(tensors, file, metadata={"format": "pt"})
    for attempt in (lambda: halfbyte.load(tmp_path), lambda: quantize_checkpoint(tmp_path, tmp_path / "q")):
        with pytest.raises(InputError, match=rf"json says that {NORM} is in {file.name}"):
            attempt()
    file.unlink()
    for attempt in (lambda: halfbyte.load(tmp_path), lambda: quantize_checkpoint(tmp_path, tmp_path / "q")):
        with pytest.raises(InputError, match=rf"{file.name} is missing, but model\.safetensors\.index\.json names it"):
            attempt()


def test_a_missing_expert_is_told(tmp_path: Path) -> None:
    config = t.MixtralConfig(
        hidden_size=32, intermediate_size=48, num_hidden_layers=1, num_attention_heads=2, num_key_value_heads=1,
        num_local_experts=3, vocab_size=32,
    )  # fmt: skip
    t.MixtralForCausalLM(config).to(torch.bfloat16).save_pretrained(tmp_path)
    halfbyte.load(tmp_path)
    tensors = load_file(tmp_path / "model.safetensors")
    gone = next(name for name in tensors if ".experts.1." in name)
    del tensors[gone]
    save_file(tensors, tmp_path / "model.safetensors", metadata={"format": "pt"})
    for attempt in (lambda: halfbyte.load(tmp_path), lambda: quantize_checkpoint(tmp_path, tmp_path / "q")):
        with pytest.raises(
            InputError, match=r"1 tensor is missing \(model\.layers\.0\.mlp\.experts\.1\.(gate|up|down)_proj\.weight\)"
        ):
            attempt()


def test_a_new_head_is_said_and_allowed(tiny_model_folder: Path, caplog: pytest.LogCaptureFixture) -> None:
    model = halfbyte.load(tiny_model_folder, auto_class=t.AutoModelForSequenceClassification)
    assert model.score.weight.isfinite().all()
    assert (
        "LlamaForSequenceClassification is new: the checkpoint has none" in caplog.text
        and "score.weight" in caplog.text
    )


def test_a_head_of_other_classes_is_told_or_made_anew(tmp_path: Path) -> None:
    config = t.LlamaConfig(
        hidden_size=32, intermediate_size=48, num_hidden_layers=1, num_attention_heads=2, vocab_size=32, num_labels=3,
        pad_token_id=0,
    )  # fmt: skip
    t.LlamaForSequenceClassification(config).save_pretrained(tmp_path)
    config.num_labels = 5
    config.save_pretrained(tmp_path)
    with pytest.raises(InputError, match=r"score\.weight is \[3, 32\], in the model \[5, 32\]"):
        halfbyte.load(tmp_path)
    model = halfbyte.load(tmp_path, ignore_mismatched_sizes=True)
    assert model.score.weight.shape == (5, 32)


def test_an_error_of_the_kernels_is_its_own(tiny_model_folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(*args: Any, **kwargs: Any) -> None:
        raise ZeroDivisionError("a bug")

    monkeypatch.setattr("halfbyte.hf.models.quantizer.quantize_4bit", broken)
    with pytest.raises(ZeroDivisionError, match="a bug"):
        halfbyte.load(tiny_model_folder)


def test_transformers_table_is_not_logged_beside_our_sentence(
    tiny_model_folder: Path, caplog: pytest.LogCaptureFixture
) -> None:
    logger = logging.getLogger("transformers")
    logger.propagate, before = True, logger.propagate
    try:
        halfbyte.load(tiny_model_folder, auto_class=t.AutoModelForSequenceClassification)
    finally:
        logger.propagate = before
    assert "LOAD REPORT" not in caplog.text


def test_a_4_bit_weight_that_is_not_whole_is_told_by_its_name(tiny_model_folder: Path, tmp_path: Path) -> None:
    quantize_checkpoint(tiny_model_folder, tmp_path / "q")
    file = tmp_path / "q" / "model.safetensors"
    whole = load_file(file)
    for part, message in [
        (".absmax", rf"^{DOWN}\.absmax is missing"),
        (".nested_quant_map", rf"^{DOWN}\.nested_quant_map is missing"),
        ("", rf"^{DOWN} is missing"),
        (".quant_state.bitsandbytes__nf4", rf"{DOWN}\.nested_absmax.*{DOWN} is \[1280, 1\], in the model \[32, 80\]"),
    ]:
        save_file({k: v for k, v in whole.items() if k != f"{DOWN}{part}"}, file, metadata={"format": "pt"})
        with pytest.raises(InputError, match=message):
            halfbyte.load(tmp_path / "q")


def test_whether_weights_are_in_4_bits_is_not_left_to_the_configuration(
    tiny_model_folder: Path, tmp_path: Path
) -> None:
    quantize_checkpoint(tiny_model_folder, tmp_path / "q")
    shutil.copytree(tiny_model_folder, tmp_path / "m")
    shutil.copy(tmp_path / "q" / "config.json", tmp_path / "m")
    shutil.copy(tiny_model_folder / "config.json", tmp_path / "q")
    for attempt in (halfbyte.load, lambda path: quantize_checkpoint(path, tmp_path / "r")):
        with pytest.raises(InputError, match=r"are in 4 bits, but config\.json has no quantization_config"):
            attempt(tmp_path / "q")
    with pytest.raises(InputError, match=r"are dense, but config\.json has a quantization_config"):
        halfbyte.load(tmp_path / "m")


def test_a_pooler_that_a_checkpoint_lacks_is_new_dense_and_saved(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    config = t.BertConfig(
        hidden_size=64, num_hidden_layers=1, num_attention_heads=2, intermediate_size=96, vocab_size=64
    )
    t.BertForMaskedLM(config).save_pretrained(tmp_path / "m")
    quantize_checkpoint(tmp_path / "m", tmp_path / "q")
    for folder in ("m", "q"):
        caplog.clear()
        model = halfbyte.load(tmp_path / folder, auto_class=t.AutoModelForSequenceClassification)
        assert "(bert.pooler.dense.bias, bert.pooler.dense.weight, classifier.bias, classifier.weight)" in caplog.text
        assert "has no use for part of the checkpoint (cls.predictions.bias, " in caplog.text
        pooler = model.bert.pooler.dense
        assert type(pooler) is torch.nn.Linear and pooler.weight.isfinite().all()
        model.save_pretrained(tmp_path / f"{folder} saved")
        again = halfbyte.load(tmp_path / f"{folder} saved")
        ids = torch.arange(6)[None]
        assert torch.equal(again(input_ids=ids).logits, model(input_ids=ids).logits)

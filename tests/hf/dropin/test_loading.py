"""BitsAndBytesConfig gives our model: the same bytes, every field obeyed, said or refused."""

import logging
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel, get_peft_model
from transformers import AutoModelForCausalLM, AutoTokenizer, BitsAndBytesConfig, LlamaForCausalLM

import halfbyte
from halfbyte.errors import InputError
from halfbyte.hf.dropin import said
from halfbyte.hf.dropin.loading import as_halfbyte
from halfbyte.hf.layers.adapters import LoraLinear4bit
from halfbyte.nn import Linear4bit, Linear8bit


def four(**more: Any) -> BitsAndBytesConfig:
    return BitsAndBytesConfig(load_in_4bit=True, **more)


def test_a_configuration_gives_ours_with_its_fields(installed: None, tiny_model_folder: Path) -> None:
    config = four(bnb_4bit_quant_type="nf4", bnb_4bit_use_double_quant=True, bnb_4bit_compute_dtype=torch.bfloat16)
    model = AutoModelForCausalLM.from_pretrained(
        tiny_model_folder, quantization_config=config, device_map="auto", attn_implementation="flash_attention_2"
    )
    layer = model.model.layers[0].mlp.up_proj
    assert type(layer) is Linear4bit and layer.compute_dtype == torch.bfloat16
    weight = layer.quantized_weight
    assert weight.quant_type == "nf4" and weight.statistics.nested is not None
    assert model.config._attn_implementation == "halfbyte"
    assert type(model.lm_head) is torch.nn.Linear


@pytest.mark.parametrize("double", [True, False])
@pytest.mark.parametrize("kind", ["nf4", "fp4"])
def test_a_folder_of_bitsandbytes_opens_with_its_bytes(
    tiny_model_folder: Path, tmp_path: Path, kind: str, double: bool
) -> None:
    config = four(bnb_4bit_quant_type=kind, bnb_4bit_use_double_quant=double)
    theirs = AutoModelForCausalLM.from_pretrained(tiny_model_folder, quantization_config=config)
    theirs.save_pretrained(tmp_path)
    halfbyte.install(cuda=False)
    try:
        opened = AutoModelForCausalLM.from_pretrained(tmp_path)
        quantized = LlamaForCausalLM.from_pretrained(tiny_model_folder, quantization_config=config)
    finally:
        halfbyte.undo()
    for name, module in theirs.named_modules():
        if name.endswith("_proj"):
            for ours in (opened, quantized):
                layer = ours.get_submodule(name)
                assert type(layer) is Linear4bit
                assert torch.equal(layer.quantized_weight.packed.flatten(), module.weight.data.flatten())


def test_old_keyword_arguments_are_as_the_configuration_and_are_said_once(
    installed: None, tiny_model_folder: Path, caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level(logging.WARNING, "halfbyte"):
        for _ in range(2):
            model = AutoModelForCausalLM.from_pretrained(
                tiny_model_folder,
                load_in_4bit=True,
                bnb_4bit_quant_type="nf4",
                bnb_4bit_compute_dtype=torch.float16,
                torch_dtype=torch.float16,
                use_auth_token=None,
                max_memory={0: "80000MB"},
                use_flash_attention_2=True,
            )
    assert model.model.layers[1].self_attn.q_proj.quantized_weight.quant_type == "nf4"
    assert model.dtype == torch.bfloat16 and model.config._attn_implementation == "halfbyte"
    said = [record.getMessage() for record in caplog.records if record.name == "halfbyte"]
    assert len(said) == len(set(said)) == 5
    assert any("float16" in line and "bfloat16" in line for line in said)


def test_a_tokenizer_with_arguments_of_2023(installed: None, tiny_model_folder: Path) -> None:
    tokenizer = AutoTokenizer.from_pretrained(
        tiny_model_folder, padding_side="right", use_fast=False, tokenizer_type="llama", use_auth_token=None
    )
    assert tokenizer.padding_side == "right" and len(tokenizer) == 258
    assert str(tokenizer._pad_token) == tokenizer.pad_token == "<|im_end|>"
    tokenizer.pad_token = None
    assert tokenizer._pad_token is None


def test_qlora_py_s_arguments_beside_a_configuration_are_taken_and_a_contradiction_is_not(
    installed: None, tiny_model_folder: Path
) -> None:
    model = AutoModelForCausalLM.from_pretrained(
        tiny_model_folder, load_in_4bit=True, load_in_8bit=False, quantization_config=four(bnb_4bit_quant_type="nf4")
    )
    assert type(model.model.layers[0].mlp.up_proj) is Linear4bit
    with pytest.raises(ValueError, match=r"load_in_8bit=True\) contradicts"):
        AutoModelForCausalLM.from_pretrained(tiny_model_folder, load_in_8bit=True, quantization_config=four())


def test_float32_is_obeyed_where_the_model_is_in_float32(installed: None, tiny_model_folder: Path) -> None:
    dense = AutoModelForCausalLM.from_pretrained(tiny_model_folder, dtype=torch.float32, quantization_config=four())
    assert dense.dtype == torch.float32 and dense.model.layers[0].mlp.up_proj.compute_dtype == torch.float32
    halves = AutoModelForCausalLM.from_pretrained(tiny_model_folder, quantization_config=four())
    assert halves.dtype == torch.bfloat16 and halves.model.layers[0].mlp.up_proj.compute_dtype == torch.bfloat16


@pytest.mark.parametrize(
    ("config", "words"),
    [
        (BitsAndBytesConfig(), "neither load_in_4bit=True nor load_in_8bit=True"),
        (four(bnb_4bit_quant_type="int4"), "bnb_4bit_quant_type='int4'"),
        (BitsAndBytesConfig(load_in_8bit=True, llm_int8_has_fp16_weight=True), "llm_int8_has_fp16_weight=True"),
    ],
)
def test_what_there_is_not_is_refused_in_one_sentence(config: BitsAndBytesConfig, words: str) -> None:
    with pytest.raises(InputError, match=words) as refusal:
        as_halfbyte(config)
    assert "\n" not in str(refusal.value)


@pytest.mark.parametrize(
    ("dtype", "computed"),
    [(torch.float32, torch.float32), (torch.float16, torch.bfloat16), (torch.bfloat16, torch.bfloat16)],
)
def test_8_bit_layers_compute_in_the_dtype_of_the_model(
    installed: None, tiny_model_folder: Path, dtype: torch.dtype, computed: torch.dtype
) -> None:
    config = BitsAndBytesConfig(load_in_8bit=True)
    model = AutoModelForCausalLM.from_pretrained(tiny_model_folder, quantization_config=config, dtype=dtype)
    layer = model.model.layers[0].mlp.up_proj
    assert type(layer) is Linear8bit and layer.compute_dtype == computed and model.dtype == computed


def test_fields_that_mean_nothing_here_are_said(caplog: pytest.LogCaptureFixture) -> None:
    said.forget()
    as_halfbyte(BitsAndBytesConfig(load_in_8bit=True))
    assert not caplog.records
    as_halfbyte(BitsAndBytesConfig(load_in_8bit=True, llm_int8_threshold=0.0, llm_int8_enable_fp32_cpu_offload=True))
    assert "llm_int8_threshold=0.0" in caplog.text and "llm_int8_enable_fp32_cpu_offload=True" in caplog.text


def test_every_field_of_the_configuration_is_known() -> None:
    import inspect

    fields = set(inspect.signature(BitsAndBytesConfig.__init__).parameters) - {"self", "kwargs"}
    assert fields == {
        "load_in_8bit", "load_in_4bit", "llm_int8_threshold", "llm_int8_skip_modules",
        "llm_int8_enable_fp32_cpu_offload", "llm_int8_has_fp16_weight", "bnb_4bit_compute_dtype",
        "bnb_4bit_quant_type", "bnb_4bit_use_double_quant", "bnb_4bit_quant_storage",
    }  # fmt: skip


def test_adapters_are_ready_when_they_are_made(model: Any, lora: Any, tiny_model_folder: Path, tmp_path: Path) -> None:
    adapted = get_peft_model(model, lora(init_lora_weights=False))
    assert type(adapted.base_model.model.model.layers[0].mlp.up_proj) is LoraLinear4bit
    adapted.add_adapter("second", lora(r=2))
    adapted.save_pretrained(tmp_path)
    base = AutoModelForCausalLM.from_pretrained(tiny_model_folder, quantization_config=four(bnb_4bit_quant_type="nf4"))
    again = PeftModel.from_pretrained(base, tmp_path)
    assert type(again.base_model.model.model.layers[1].self_attn.q_proj) is LoraLinear4bit
    ids = torch.arange(40).view(2, 20)
    torch.testing.assert_close(again.eval()(ids).logits, adapted.eval()(ids).logits, rtol=0, atol=0)
    own = AutoModelForCausalLM.from_pretrained(tiny_model_folder, quantization_config=four(bnb_4bit_quant_type="nf4"))
    own.add_adapter(lora())
    assert type(own.model.layers[0].mlp.down_proj) is LoraLinear4bit


def test_preparing_for_k_bits_freezes_and_asks_but_copies_nothing(model: Any) -> None:
    import peft

    dtypes = {name: parameter.dtype for name, parameter in model.named_parameters()}
    prepared = peft.prepare_model_for_kbit_training(model)
    assert prepared is model and model.is_activation_checkpointing
    assert {name: parameter.dtype for name, parameter in model.named_parameters()} == dtypes
    assert not any(parameter.requires_grad for parameter in model.parameters())
    dense = torch.nn.ModuleDict({"x": torch.nn.Linear(2, 2).bfloat16()})
    assert peft.prepare_model_for_kbit_training(dense)["x"].weight.dtype == torch.float32  # PEFT's own


def test_models_that_are_not_quantized_are_the_library_s(installed: None, lora: Any, tiny_model_folder: Path) -> None:
    model = AutoModelForCausalLM.from_pretrained(
        tiny_model_folder, attn_implementation="flash_attention_2", torch_dtype=torch.bfloat16
    )
    assert type(model.model.layers[0].mlp.up_proj) is torch.nn.Linear
    adapted = get_peft_model(model, lora())
    merged = adapted.merge_and_unload()
    assert type(merged.model.layers[0].mlp.up_proj) is torch.nn.Linear


@pytest.mark.slow
def test_it_all_works_where_bitsandbytes_is_not_installed(tiny_model_folder: Path, tmp_path: Path) -> None:
    program = f"""
import sys
sys.modules["bitsandbytes"] = None
import warnings; warnings.simplefilter("ignore")
import halfbyte
halfbyte.install(cuda=False)
import torch
from datasets import Dataset
from peft import LoraConfig, get_peft_model, prepare_model_for_kbit_training
from transformers import AutoModelForCausalLM, BitsAndBytesConfig, Trainer, TrainingArguments
from transformers.utils import is_bitsandbytes_available
assert not is_bitsandbytes_available()
config = BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4")
model = AutoModelForCausalLM.from_pretrained({str(tiny_model_folder)!r}, quantization_config=config)
model = get_peft_model(prepare_model_for_kbit_training(model), LoraConfig(task_type="CAUSAL_LM"))
rows = Dataset.from_list([{{"input_ids": list(range(9)), "labels": list(range(9))}}] * 4)
args = dict(output_dir={str(tmp_path)!r}, max_steps=1, bf16=True, report_to="none", disable_tqdm=True)
trainer = Trainer(model, TrainingArguments(**args, optim="paged_adamw_8bit"), train_dataset=rows)
trainer.train()
assert type(trainer.optimizer.optimizer) is halfbyte.optim.AdamW
try:
    Trainer(model, TrainingArguments(**args, optim="lion_8bit"), train_dataset=rows).train()
except ValueError as error:
    assert "optim='lion_8bit' is bitsandbytes' alone" in str(error), error
else:
    raise AssertionError
"""
    subprocess.run([sys.executable, "-c", program], check=True, timeout=300)


def test_norms_that_a_script_casts_to_fp32_compute_as_transformers_do(
    installed: None, tiny_model_folder: Path, lora: Any
) -> None:
    """A line of the Falcon notebook of 2023, which many have copied."""
    torch.manual_seed(0)
    base = AutoModelForCausalLM.from_pretrained(
        tiny_model_folder, quantization_config=four(bnb_4bit_quant_type="nf4"), attn_implementation="sdpa"
    )
    model = get_peft_model(base, lora(init_lora_weights=False))
    for name, module in model.named_modules():
        if "norm" in name:
            module.to(torch.float32)
    ids = torch.arange(40).view(2, 20)
    results = []
    for prepared in (True, False):
        if not prepared:
            halfbyte.unprepare(model)
        model.zero_grad()
        with torch.autocast("cpu", torch.bfloat16, enabled=not prepared):  # as fp16=True was in that notebook
            loss = model.train()(input_ids=ids, labels=ids).loss
        loss.backward()
        results.append((loss, [p.grad.clone() for p in model.parameters() if p.requires_grad]))
    (ours, mine), (theirs, wanted) = results
    torch.testing.assert_close(ours, theirs.float(), rtol=1e-2, atol=1e-3)
    for one, other in zip(mine, wanted, strict=True):
        assert (one - other).norm() < 0.05 * other.norm()

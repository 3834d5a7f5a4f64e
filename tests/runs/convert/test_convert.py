"""Configurations of axolotl and LLaMA-Factory as ours: what each key becomes, and that none is lost."""

from pathlib import Path
from typing import Any, get_args

import pytest
import yaml
from typer.testing import CliRunner

from halfbyte.choices import QuantType
from halfbyte.cli import app
from halfbyte.errors import InputError
from halfbyte.runs.config import TrainConfig
from halfbyte.runs.convert import TOOLS, convert
from halfbyte.runs.convert.keys import Converted

HERE = Path(__file__).parent
FILES = sorted([*HERE.glob("*/*.yml"), *HERE.glob("*/*.yaml")])
AXOLOTL, LLAMA_FACTORY = HERE / "axolotl", HERE / "llama_factory"
NOTHING = (None, False, "", [], {})


def changed(file: Path, tmp_path: Path, **values: Any) -> Converted:
    """The conversion of ``file`` with other values for some keys."""
    copy = tmp_path / file.name
    copy.write_text(yaml.safe_dump(yaml.safe_load(file.read_text()) | values))
    return convert(copy)


@pytest.mark.parametrize("file", FILES, ids=lambda file: file.name)
def test_what_is_written_is_read_back_the_same(file: Path, tmp_path: Path):
    made = convert(file)
    written = tmp_path / "ours.yaml"
    written.write_text(made.to_yaml())
    assert TrainConfig.from_yaml(written) == made.config()
    for key in made.lacking:
        assert f"# no counterpart: {key}: " in written.read_text()


@pytest.mark.parametrize("file", FILES, ids=lambda file: file.name)
def test_no_key_is_lost(file: Path, tmp_path: Path):
    """Without a key something else comes out, unless it says the default or nothing."""
    whole = convert(file)
    values = yaml.safe_load(file.read_text())
    tool = next(tool for tool in TOOLS if any(mark <= values.keys() for mark in tool.marks))
    for key, value in values.items():
        said_by_default = key in tool.defaults and tool.defaults[key] == value
        if any(value is nothing or value == nothing for nothing in NOTHING) or said_by_default:
            continue
        copy = tmp_path / file.name
        copy.write_text(yaml.safe_dump({name: other for name, other in values.items() if name != key}))
        try:
            without = convert(copy)
        except InputError:
            continue
        shown = (without.values, without.lacking, without.dropped, without.notes)
        ours = (whole.values, whole.lacking, whole.dropped, whole.notes)
        if shown == ours:  # LoRA's own settings, which are ours by default too
            assert key in ("load_in_4bit", "quantization_method"), key
            assert whole.values["quant_type"] == "nf4"


def test_axolotls_qlora_example_becomes_this_run():
    made = convert(AXOLOTL / "llama-2_qlora.yml")
    assert made.tool == "axolotl"
    assert made.values == {
        "model": "NousResearch/Llama-2-7b-hf",
        "data": {"path": "mhenrichsen/alpaca_2k_test", "format": "alpaca"},
        "eval_share": 0.05,
        "output": "./outputs/qlora-out",
        "max_length": 4096,
        "rank": 32,
        "lora_alpha": 16,
        "lora_dropout": 0.05,
        "target_modules": "all-linear",
        "quant_type": "nf4",
        "double_quant": True,
        "compute_dtype": "bfloat16",
        "gradient_accumulation_steps": 4,
        "batch_size": 2,
        "epochs": 4.0,
        "optimizer": "paged_adamw_32bit",
        "lr_scheduler_type": "cosine",
        "warmup_ratio": 0.1,
        "learning_rate": 2e-4,
        "weight_decay": 0.0,
        "max_grad_norm": 1.0,  # transformers' default, which axolotl leaves
        "seed": 42,  # the same
        "group_by_length": False,
    }
    assert set(made.lacking) == {"evals_per_epoch", "saves_per_epoch"}
    assert set(made.dropped) == {
        "model_type", "tokenizer_type", "sample_packing", "gradient_checkpointing", "logging_steps",
        "attn_implementation",
    }  # fmt: skip


def test_other_axolotl_examples_keep_what_is_their_own():
    falcon = convert(AXOLOTL / "archived_falcon_config-7b-qlora.yml")
    assert falcon.values["data"] == {
        "path": "QingyiSi/Alpaca-CoT", "config": "Chain-of-Thought/formatted_cot_data/gsm8k_train.json",
        "format": "alpaca",
    }  # fmt: skip
    assert falcon.values["trust_remote_code"] is True
    assert falcon.values["weight_decay"] == 1e-6
    assert falcon.values["early_stopping_patience"] == 3
    assert {"special_tokens", "auto_resume_from_checkpoints"} <= set(falcon.lacking)
    xgen = convert(AXOLOTL / "archived_xgen-7b_xgen-7b-8k-qlora.yml")
    assert xgen.values["data"]["format"] == "text"
    assert xgen.values["learning_rate"] == 2e-5
    qwen = convert(AXOLOTL / "qwen3_32b-qlora.yaml")
    assert qwen.values["data"] == {"path": "mlabonne/FineTome-100k", "split": "train", "format": "messages"}
    assert qwen.values["target_modules"] == ["q_proj", "k_proj", "v_proj", "o_proj", "down_proj", "up_proj"]
    assert qwen.lacking["datasets[0].split"][0] == "train[:20%]"
    assert qwen.lacking["optimizer"][0] == "adamw_torch_4bit"
    assert "optimizer" not in qwen.values
    gemma = convert(AXOLOTL / "gemma3_gemma-3-1b-qlora.yml")
    assert gemma.values["optimizer"] == "adamw_8bit"
    assert "eval_share" not in gemma.values
    assert gemma.lacking["chat_template"][0] == "gemma3"


def test_llama_factorys_qlora_example_becomes_this_run():
    made = convert(LLAMA_FACTORY / "train_qlora_qwen3_lora_sft_bnb_npu.yaml")
    assert made.tool == "LLaMA-Factory"
    assert made.values == {
        "model": "Qwen/Qwen3-4B-Instruct-2507",
        "trust_remote_code": True,
        "method": "sft",
        "data": [{"path": f"data/{name}.json", "max_rows": 1000} for name in ("identity", "alpaca_en_demo")],
        "output": "saves/qwen3-4b/lora/sft",
        "max_length": 2048,
        "rank": 8,
        "lora_alpha": 16,  # twice the rank, LLaMA-Factory's default
        "lora_dropout": 0.0,
        "target_modules": "all-linear",
        "quant_type": "nf4",
        "double_quant": False,
        "compute_dtype": "bfloat16",
        "batch_size": 1,
        "gradient_accumulation_steps": 8,
        "learning_rate": 1e-4,
        "epochs": 3.0,
        "optimizer": "adamw_torch",
        "lr_scheduler_type": "cosine",
        "warmup_ratio": 0.1,
        "max_grad_norm": 1.0,
        "save_steps": 500,
        "seed": 42,
        "group_by_length": False,
    }
    assert set(made.lacking) == {"dataset: identity", "dataset: alpaca_en_demo"}


def test_llama_factorys_version_1_is_read_too():
    made = convert(LLAMA_FACTORY / "v1_train_qlora_quantization.yaml")
    assert made.values["rank"] == 16
    assert made.values["lora_alpha"] == 32
    assert made.values["target_modules"] == "all-linear"
    assert made.values["quant_type"] == "nf4"
    assert made.values["max_steps"] == 10
    assert made.lacking["train_dataset"][0] == "data/v1_sft_demo.yaml"


def test_a_base_in_other_bits_is_ours_if_there_is_one(tmp_path: Path):
    for file, values, word, key in (
        (AXOLOTL / "llama-2_qlora.yml", {"adapter": "lora", "load_in_4bit": False}, "none", "adapter"),
        (AXOLOTL / "llama-2_qlora.yml", {"adapter": "lora", "load_in_4bit": False, "load_in_8bit": True}, "int8",
         "load_in_8bit"),
        (LLAMA_FACTORY / "train_qlora_qwen3_lora_sft_otfq.yaml", {"quantization_bit": 8}, "int8", "quantization_bit"),
    ):  # fmt: skip
        made = changed(file, tmp_path, **values)
        if word in get_args(QuantType):
            assert made.values["quant_type"] == word
        else:
            assert key in made.lacking
            assert any("held in 4 bits" in note for note in made.notes)


def test_data_sets_of_llama_factory_are_looked_up(tmp_path: Path):
    folder = tmp_path / "data"
    folder.mkdir()
    (folder / "dataset_info.json").write_text(
        '{"identity": {"file_name": "who.json"}, "alpaca_en_demo": {"hf_hub_url": "llamafactory/alpaca_en", "subset": '
        '"one", "split": "test", "formatting": "sharegpt", "columns": {"messages": "conversations", "images": "i"}}}'
    )
    made = changed(LLAMA_FACTORY / "train_qlora_qwen3_lora_sft_otfq.yaml", tmp_path)
    assert made.values["data"] == [
        {"path": "data/who.json", "format": "alpaca", "max_rows": 1000},
        {"path": "llamafactory/alpaca_en", "config": "one", "split": "test", "format": "messages", "max_rows": 1000},
    ]
    assert "dataset: alpaca_en_demo.images" in made.lacking


def test_schedules_and_warm_ups(tmp_path: Path):
    file = AXOLOTL / "llama-2_qlora.yml"
    constant = changed(file, tmp_path, lr_scheduler="constant")
    assert (constant.values["lr_scheduler_type"], constant.values["warmup_ratio"]) == ("constant", 0.0)
    steps = changed(file, tmp_path, warmup_steps=10, max_steps=40)
    assert steps.values["warmup_ratio"] == 0.25
    unknown = changed(file, tmp_path, warmup_steps=10)
    assert "warmup_steps" in unknown.lacking
    written = changed(file, tmp_path, learning_rate="2e-4")  # text to YAML 1.1
    assert written.values["learning_rate"] == 2e-4
    neither = changed(file, tmp_path, warmup_ratio=None)
    assert neither.values["warmup_ratio"] == 0.03  # axolotl's default


@pytest.mark.parametrize(
    ("values", "told"),
    [
        ({"adapter": None}, "would train all weights"),
        ({"adapter": "llama-adapter"}, "set adapter to qlora or lora"),
        ({"rl": "grpo"}, "no such method"),
        ({"datasets": []}, "names no datasets"),
        ({"datasets": [{"type": "alpaca"}]}, "datasets\\[0\\] has no path"),
        ({"lora_target_linear": False}, "names no layers"),
    ],
)
def test_what_cannot_be_converted_is_one_sentence(values: dict[str, Any], told: str, tmp_path: Path):
    with pytest.raises(InputError, match=told) as error:
        changed(AXOLOTL / "llama-2_qlora.yml", tmp_path, **values)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("values", "told"),
    [
        ({"stage": "ppo"}, "no such method"),
        ({"finetuning_type": "full"}, "trains LoRA adapters"),
        ({"dataset": None}, "names no dataset"),
    ],
)
def test_the_same_for_llama_factory(values: dict[str, Any], told: str, tmp_path: Path):
    with pytest.raises(InputError, match=told):
        changed(LLAMA_FACTORY / "train_qlora_qwen3_lora_sft_otfq.yaml", tmp_path, **values)


def test_the_command_writes_a_file_once_and_tells_what_is_lost(tmp_path: Path):
    file, output = AXOLOTL / "llama-2_qlora.yml", tmp_path / "ours.yaml"
    shown = CliRunner().invoke(app, ["convert-config", str(file)])
    assert shown.exit_code == 0
    assert "No counterpart: evals_per_epoch: 4 (write eval_steps)" in shown.stderr
    written = CliRunner().invoke(app, ["convert-config", str(file), "--output", str(output)])
    assert written.exit_code == 0
    assert output.read_text() == shown.stdout
    again = CliRunner().invoke(app, ["convert-config", str(file), "--output", str(output)])
    assert isinstance(again.exception, InputError)
    for text, told in (
        ("a: [", "this is not YAML"),
        ("- a", "expected 'option: value'"),
        ("a: 1", "no configuration of"),
    ):
        file = tmp_path / "wrong.yaml"
        file.write_text(text)
        with pytest.raises(InputError, match=told):
            convert(file)


def test_tokens_layers_and_an_adapter_to_train_on_are_options(tmp_path: Path):
    made = changed(AXOLOTL / "llama-3_qlora-1b.yml", tmp_path, tokens=["<x>"], lora_layers_to_transform=[0, 1])
    assert (made.values["new_tokens"], made.values["layers_to_transform"]) == (["<x>"], [0, 1])
    made = changed(LLAMA_FACTORY / "train_qlora_qwen3_lora_sft_otfq.yaml", tmp_path, add_tokens="<x>,<y>")
    assert made.values["new_tokens"] == ["<x>", "<y>"]
    for file, key in (
        (AXOLOTL / "llama-2_qlora.yml", "lora_model_dir"),
        (LLAMA_FACTORY / "train_qlora_qwen3_lora_sft_otfq.yaml", "adapter_name_or_path"),
    ):
        made = changed(file, tmp_path, **{key: "runs/first"})
        assert made.values["adapter"] == "runs/first" and not {"rank", "target_modules"} & made.values.keys()
        assert made.config().adapter and "has its own lora_alpha" in made.notes[-1]

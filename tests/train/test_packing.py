"""Whether a run packs, and what memory it then plans with."""

import json
from pathlib import Path
from typing import Any

import pytest
from transformers import AutoTokenizer, MambaConfig, MambaForCausalLM

from halfbyte import data, hf
from halfbyte.errors import InputError
from halfbyte.hf import trainers
from halfbyte.train import TrainConfig
from halfbyte.train.build import build_model, build_trainer
from halfbyte.train.methods import METHODS
from halfbyte.train.packing import plan_step


def config_for(folder: Path, tmp_path: Path, lengths: list[int], **options: Any) -> TrainConfig:
    file = tmp_path / "rows.jsonl"
    file.write_text("".join(json.dumps({"text": "x" * (length - 1)}) + "\n" for length in lengths), encoding="utf-8")
    output = tmp_path / "run"
    output.mkdir(exist_ok=True)
    options = {"rank": 4, "lora_dropout": 0.0, "max_length": 128, "batch_size": 2, "max_steps": 2} | options
    options = {"sample_prompts": []} | options
    return TrainConfig(model=str(folder), data=str(file), output=output, **options)


def test_a_run_packs_where_it_pays_and_plans_for_the_fullest_pass(tiny_model_folder: Path, tmp_path: Path) -> None:
    config = config_for(tiny_model_folder, tmp_path, [20, 30, 40, 10] * 8)
    rows = data.prepare(config, AutoTokenizer.from_pretrained(tiny_model_folder))
    model = build_model(config)
    told: list[str] = []
    policy, tokens = plan_step(config, model, rows, told.append)
    assert tokens == 2 * 128  # of the longest step's 8 x 40
    assert len(told) == 1 and told[0].startswith("Packing: 8 rows a step in 1.0 passes of up to 256 tokens")
    unpacked = config.model_copy(update={"packing": False})
    padded, none = plan_step(unpacked, model, rows, told.append)
    assert none is None and len(told) == 1
    # seven rows of 40 tokens hold the 256, where padded batches have two
    layers = hf.layers.activations.measure(model, 40, 1)
    more = sum(layer.kept for layer in layers) + 2 * max(layer.kept for layer in layers)
    assert policy.bytes - padded.bytes == 5 * more

    # where memory is short, a pass gets no more than the longest padded batch
    small = config.model_copy(update={"memory": 1})
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("halfbyte.train.build.anonymous_memory", lambda: 1 - padded.bytes)
        narrow, tokens = plan_step(small, model, rows, told.append)
    assert tokens == 2 * 40 and narrow.recomputed == 0


def test_a_run_of_equal_rows_is_packed_only_when_asked(tiny_model_folder: Path, tmp_path: Path) -> None:
    config = config_for(tiny_model_folder, tmp_path, [128] * 16, gradient_accumulation_steps=1)
    rows = data.prepare(config, AutoTokenizer.from_pretrained(tiny_model_folder))
    model = build_model(config)
    assert plan_step(config, model, rows, print)[1] is None
    assert plan_step(config.model_copy(update={"packing": True}), model, rows, print)[1] == 2 * 128


def test_a_model_with_a_state_is_padded_and_said_or_refused(tiny_model_folder: Path, tmp_path: Path) -> None:
    tokenizer = AutoTokenizer.from_pretrained(tiny_model_folder)
    folder = tmp_path / "mamba"
    MambaForCausalLM(MambaConfig(vocab_size=len(tokenizer), hidden_size=64, num_hidden_layers=2)).save_pretrained(
        folder
    )
    tokenizer.save_pretrained(folder)
    config = config_for(folder, tmp_path, [20, 30, 40, 10] * 8, target_modules=["in_proj", "x_proj"])
    rows = data.prepare(config, tokenizer)
    model = build_model(config)
    told: list[str] = []
    assert plan_step(config, model, rows, told.append)[1] is None
    assert told == ["Rows are padded, not packed: the samples of a packed row would see each other in MambaForCausalLM"]
    with pytest.raises(
        InputError, match=r"^The samples of a step cannot be packed: .* MambaForCausalLM; leave packing"
    ):
        plan_step(config.model_copy(update={"packing": True}), model, rows, told.append)


def test_the_trainer_of_a_run_packs(tiny_model_folder: Path, tmp_path: Path) -> None:
    losses = []
    for name, packer in (("padded", None), ("packed", data.Packer(256))):
        (tmp_path / name).mkdir()
        config = config_for(
            tiny_model_folder, tmp_path / name, [20, 30, 40, 10] * 8, compute_dtype="float32", learning_rate=1e-2
        )
        tokenizer = AutoTokenizer.from_pretrained(tiny_model_folder)
        model = build_model(config)
        trainer = build_trainer(
            config, METHODS["sft"], model, tokenizer, data.prepare(config, tokenizer), packer=packer
        )
        assert isinstance(trainer, trainers.SFTTrainer)
        passes: list[Any] = []
        model.register_forward_hook(lambda *_, to=passes: to.append(None))
        trainer.train()
        losses.append([line["loss"] for line in trainer.state.log_history if "loss" in line])
        assert len(passes) == (8 if packer is None else 2)
    # activations are bf16, as the model is
    assert losses[1] == pytest.approx(losses[0], rel=2e-3)

"""Losses of qlora.py's command line, step by step, beside its own computation over bitsandbytes with the same rows."""

import json
import sys
import warnings
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model, prepare_model_for_kbit_training
from transformers import AutoModelForCausalLM, AutoTokenizer, BitsAndBytesConfig

from halfbyte.hf.trainers.sampler import EpochSampler
from halfbyte.train.qlora.flags import Flags, parse
from halfbyte.train.qlora.run import qlora
from halfbyte.train.qlora.table import FLAGS

from . import plain

sys.path.insert(0, str(Path(__file__).parents[3] / "examples"))
from halfbyte.example.sources import MODEL, convert, fetch
from halfbyte.files import cache_folder

STEPS = 6
PAIRS = [(f"Name a number above {i}.", "" if i % 2 else "Digits only.", f"{i * 7 + 1}") for i in range(40)]


def script_losses(flags: Flags, adapter: Path) -> list[float]:
    """What the script does with these flags, over bitsandbytes: its base, adapter, batches, loss and steps."""
    dtype = torch.bfloat16 if flags["bf16"] else torch.float32
    base = AutoModelForCausalLM.from_pretrained(
        flags["model_name_or_path"],
        dtype=dtype,
        device_map="cpu",
        quantization_config=BitsAndBytesConfig(
            load_in_4bit=True,
            bnb_4bit_quant_type=flags["quant_type"],
            bnb_4bit_use_double_quant=flags["double_quant"],
            bnb_4bit_compute_dtype=dtype,
        ),
    )
    model: Any = prepare_model_for_kbit_training(base, use_gradient_checkpointing=False)
    model = PeftModel.from_pretrained(model, str(adapter), is_trainable=True).train()
    for name, module in model.named_modules() if flags["bf16"] else ():
        if "lm_head" in name or "embed_tokens" in name:
            module.to(dtype)
    tokenizer = AutoTokenizer.from_pretrained(flags["model_name_or_path"])
    rows, _ = plain.parts(flags, "alpaca")
    size = flags["per_device_train_batch_size"]
    places = list(EpochSampler(np.ones(len(rows), np.int8), None, flags["seed"]))[: STEPS * size]
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=flags["learning_rate"], weight_decay=0.0)
    losses = []
    for step in range(STEPS):
        made = [plain.ids_and_labels(rows[i], tokenizer, flags) for i in places[step * size :][:size]]
        longest = max(len(ids) for ids, _ in made)
        ids = torch.tensor([ids + [0] * (longest - len(ids)) for ids, _ in made])
        labels = torch.tensor([labels + [-100] * (longest - len(labels)) for _, labels in made])
        mask = torch.tensor([[1] * len(ids) + [0] * (longest - len(ids)) for ids, _ in made])
        with torch.autocast("cpu", torch.bfloat16, enabled=flags["bf16"]):
            loss = model(input_ids=ids, attention_mask=mask, labels=labels).loss
        losses.append(loss.item())
        loss.backward()
        torch.nn.utils.clip_grad_norm_(trained, flags["max_grad_norm"])
        optimizer.step()
        optimizer.zero_grad()
    return losses


@pytest.mark.slow
@pytest.mark.parametrize(("more", "apart"), [([], 1e-3), (["--bf16"], 6e-2)], ids=["fp32", "bf16"])
def test_losses_are_the_scripts_over_bitsandbytes(more: list[str], apart: float, tmp_path: Path) -> None:
    base = convert(fetch(MODEL, cache_folder()), cache_folder() / "SmolLM2-135M-Instruct")
    file, output = tmp_path / "rows.jsonl", tmp_path / "out"
    lines = [dict(zip(("instruction", "input", "output"), pair, strict=True)) for pair in PAIRS]
    file.write_text("".join(json.dumps(line) + "\n" for line in lines))
    words = [
        "--model_name_or_path", str(base), "--dataset", str(file), "--dataset_format", "alpaca", "--output_dir",
        str(output), "--max_steps", str(STEPS), "--logging_steps", "1", "--per_device_train_batch_size", "4",
        "--gradient_accumulation_steps", "1", "--group_by_length", "False", "--lora_r", "16", "--save_strategy", "no",
        *more,
    ]  # fmt: skip
    # an adapter alone, as the script leaves it, which both begin over
    adapter = output / "checkpoint-1/adapter_model"
    torch.manual_seed(0)
    lora: Any = {"r": 16, "lora_alpha": 16, "target_modules": "all-linear", "task_type": "CAUSAL_LM"}
    get_peft_model(AutoModelForCausalLM.from_pretrained(base), LoraConfig(**lora)).save_pretrained(adapter)
    flags = parse(FLAGS, words)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        theirs = script_losses(flags, adapter)
        qlora(flags)
    # in fp32 they were 0.09 % apart at the most; in bf16 ours up to 1.7 % above those in fp32, theirs up to 4.7 %
    log = json.loads((output / "trainer_state.json").read_text())["log_history"]
    ours = [entry["loss"] for entry in log if "loss" in entry]
    assert ours == pytest.approx(theirs, rel=apart)
    assert theirs[-1] < 0.9 * theirs[0]

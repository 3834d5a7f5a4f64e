"""Small trainers of ours, and TRL's own beside them."""

from pathlib import Path
from typing import Any

import pytest
import torch
import trl
from datasets import Dataset
from peft import LoraConfig, get_peft_model
from transformers import AutoModelForCausalLM, AutoTokenizer

from halfbyte.hf import trainers as ours

ANSWERS = [" It is so.", " No, never.", " Perhaps on Sunday, if it rains.", " Yes."]
ROWS = {
    "sft": [{"prompt": f"{'Really ' * (i % 3)}{i}?", "completion": ANSWERS[i % 4]} for i in range(7)],
    "dpo": [{"prompt": f"{i}?", "chosen": ANSWERS[i % 4], "rejected": ANSWERS[(i + 1) % 4]} for i in range(6)],
    "kto": [{"prompt": f"{i}?", "completion": ANSWERS[i % 4], "label": i % 2 == 0} for i in range(6)],
    "texts": [{"text": f"{'Really ' * (i % 3)}{i}? {ANSWERS[i % 4]}"} for i in range(7)],
    "chats": [
        {"messages": [{"role": "user", "content": f"{i}?"}, {"role": "assistant", "content": ANSWERS[i % 4]}]}
        for i in range(7)
    ],
}
KINDS: dict[str, dict[str, Any]] = {
    "ours": {
        "sft": (ours.SFTTrainer, ours.SFTConfig),
        "dpo": (ours.DPOTrainer, ours.DPOConfig),
        "kto": (ours.KTOTrainer, ours.KTOConfig),
    },
    "theirs": {
        "sft": (trl.SFTTrainer, trl.SFTConfig),
        "dpo": (trl.DPOTrainer, trl.DPOConfig),
        "kto": (trl.KTOTrainer, trl.KTOConfig),
    },
}
GENERATION = (
    "{% for message in messages %}{{ message.role }}\n"
    "{% if message.role == 'assistant' %}{% generation %}{{ message.content }}{% endgeneration %}"
    "{% else %}{{ message.content }}{% endif %}\n{% endfor %}"
)


def small_trainer(kind: str, folder: Path, output: Path, which: str = "ours", rows: str = "", **more: Any) -> Any:
    """A trainer of ours, or of TRL's, over the tiny model in fp32 with an adapter that does something."""
    trainer, config = KINDS[which][kind]
    extra = {name: more.pop(name) for name in ("compute_metrics", "callbacks", "train_dataset") if name in more}
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    torch.manual_seed(0)
    lora = LoraConfig(r=4, target_modules="all-linear", task_type="CAUSAL_LM", init_lora_weights=False)
    if more.get("chat_template_path"):
        file = output.with_suffix(".jinja")
        file.write_text(GENERATION)
        more["chat_template_path"] = str(file)
    arguments = {
        "max_steps": 2,
        "per_device_train_batch_size": 2,
        "learning_rate": 1e-2,
        "logging_steps": 1,
        "save_strategy": "no",
        "train_sampling_strategy": "sequential",
        "report_to": "none",
        "disable_tqdm": True,
        "dataloader_pin_memory": False,
        "bf16": False,
        "use_cpu": True,
    } | more
    if not any("checkpointing" in name for name in more):
        arguments["activation_checkpointing"] = False
    data = Dataset.from_list(ROWS[rows or kind])
    return trainer(
        model=get_peft_model(model, lora),
        args=config(**arguments | {"output_dir": str(output)}),
        **{"train_dataset": data} | extra,
        eval_dataset=data.select(range(3)),
        processing_class=AutoTokenizer.from_pretrained(folder),
    )


@pytest.fixture
def build() -> Any:
    """``build(kind, model folder, output folder, "ours" or "theirs", rows, **arguments)``."""
    return small_trainer

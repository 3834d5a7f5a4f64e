"""A script in several processes, by torchrun or accelerate over ``-m halfbyte run``: one model, and one's losses."""

import json
import re
import subprocess
import sys
from pathlib import Path

import pytest

pytestmark = pytest.mark.slow

SCRIPT = """
import json, os, sys
from datasets import Dataset
from peft import LoraConfig
from transformers import AutoModelForCausalLM, AutoTokenizer, BitsAndBytesConfig, set_seed
from trl import SFTConfig, SFTTrainer

path, batch = sys.argv[1:]
set_seed(0)
model = AutoModelForCausalLM.from_pretrained(
    path, quantization_config=BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4"), device_map="auto"
)
trainer = SFTTrainer(
    model,
    SFTConfig("out" + batch, max_steps=4, per_device_train_batch_size=int(batch), logging_steps=1, report_to="none",
              disable_tqdm=True, learning_rate=1e-2),
    train_dataset=Dataset.from_list([{"text": f"Red apples, {i} pears, {'and more ' * (i % 5)}."} for i in range(16)]),
    processing_class=AutoTokenizer.from_pretrained(path),
    peft_config=LoraConfig(r=4, target_modules="all-linear", task_type="CAUSAL_LM"),
)
trainer.train()
trainer.save_model("out" + batch)
losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
if trainer.is_world_process_zero():
    print("LOSSES", os.environ.get("WORLD_SIZE", "1"), json.dumps(losses))
"""
TORCHRUN = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"]
ACCELERATE = ["-m", "accelerate.commands.launch", "--config_file=accelerate.yaml", "--main_process_port=0"]
CONFIG = """\
compute_environment: LOCAL_MACHINE
distributed_type: MULTI_GPU
mixed_precision: {precision}
num_machines: 1
num_processes: 2
machine_rank: 0
rdzv_backend: static
main_training_function: main
"""


def losses(folder: Path, launcher: list[str], model: Path, batch: int) -> tuple[int, list[float], str]:
    command = [sys.executable, *launcher, "-m", "halfbyte", "run", "script.py", str(model), str(batch)]
    done = subprocess.run(command, cwd=folder, capture_output=True, text=True, timeout=600, check=False)
    assert done.returncode == 0, done.stderr
    found = re.search(r"LOSSES (\d) (.*)", done.stdout)
    assert found
    return int(found[1]), json.loads(found[2]), done.stderr


def test_two_processes_train_what_one_with_twice_the_batch_trains(tiny_model_folder: Path, tmp_path: Path) -> None:
    (tmp_path / "script.py").write_text(SCRIPT)
    processes, alone, _ = losses(tmp_path, [], tiny_model_folder, 4)
    assert processes == 1 and len(alone) == 4 and alone[-1] < alone[0] - 0.1
    launchers = [(TORCHRUN, ""), (ACCELERATE, "bf16"), (ACCELERATE, "fp16")]
    for launcher, precision in launchers:
        (tmp_path / "accelerate.yaml").write_text(CONFIG.format(precision=precision))
        processes, together, said = losses(tmp_path, launcher, tiny_model_folder, 2)
        assert processes == 2
        # rows are the same, and what differs is the order of sums
        assert together == pytest.approx(alone, rel=1e-5), launcher
        assert said.count("halfbyte: device_map='auto'") == 1
        assert (tmp_path / "out2" / "adapter_model.safetensors").is_file()

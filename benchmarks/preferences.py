"""What DPO and KTO take in memory and processor time beside TRL's own trainers over bitsandbytes, on one small model.

    python benchmarks/preferences.py                 each side and method in a process of its own

SmolLM2-135M-Instruct, LoRA of rank 16 on every linear layer, two steps of four rows of some 130 tokens by AdamW with
32-bit state. ``trl`` is TRL's trainer over bitsandbytes' NF4 as a script would have it, ``trl, checkpointing`` the same
with activation checkpointing. Memory is the highest anonymous memory above what it was after the imports, read every 20
ms; processor time is that of the two steps.
"""

import argparse
import json
import subprocess
import sys
import tempfile
import threading
import time
import warnings
from pathlib import Path
from typing import Any

import torch

sys.path.insert(0, str(Path(__file__).parents[1] / "examples"))
from halfbyte.example.sources import MODEL, convert, fetch
from halfbyte.files import cache_folder

SIDES, METHODS = ("halfbyte", "trl", "trl, checkpointing"), ("dpo", "kto")
ROWS, LENGTH = 16, 60
WORDS = (
    "the model learns which of two answers is better and keeps near to the one before it while rows are long".split()  # noqa: SIM905
)


def rows_of(method: str) -> list[dict[str, Any]]:
    """Return pairs of answers, or twice as many judged ones."""

    def text(seed: int) -> str:
        return " " + " ".join(WORDS[(i * 7 + seed * 13 + i // 5) % len(WORDS)] for i in range(LENGTH))

    pairs = [{"prompt": text(i), "chosen": text(i + 1), "rejected": text(i + 2)} for i in range(ROWS)]
    if method == "dpo":
        return pairs
    return [
        {"prompt": pair["prompt"], "completion": pair[name], "label": name == "chosen"}
        for pair in pairs
        for name in ("chosen", "rejected")
    ]


def anonymous() -> float:
    """Return this process's anonymous memory in MiB."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith("RssAnon")) / 1024


def measured(side: str, method: str, base: str) -> dict[str, Any]:
    """Train two steps in this process."""
    warnings.simplefilter("ignore")
    import bitsandbytes  # noqa: F401  # so that both sides have the same imports
    import trl
    from datasets import Dataset
    from peft import LoraConfig
    from transformers import AutoModelForCausalLM, AutoTokenizer, BitsAndBytesConfig

    import halfbyte
    from halfbyte.hf import trainers as ours

    before = highest = anonymous()
    done = threading.Event()

    def watch() -> None:
        nonlocal highest
        while not done.wait(0.02):
            highest = max(highest, anonymous())

    watching = threading.Thread(target=watch)
    watching.start()
    made: Any = ours if side == "halfbyte" else trl
    trainer, config = getattr(made, f"{method.upper()}Trainer"), getattr(made, f"{method.upper()}Config")
    if side == "halfbyte":
        model: Any = halfbyte.load(base, quantization_config=halfbyte.HalfbyteConfig())
    else:
        in_4_bits = BitsAndBytesConfig(
            load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_use_double_quant=True,
            bnb_4bit_compute_dtype=torch.bfloat16,
        )  # fmt: skip
        model = AutoModelForCausalLM.from_pretrained(
            base, dtype=torch.bfloat16, device_map="cpu", quantization_config=in_4_bits
        )
    own = {} if side == "halfbyte" else {"activation_checkpointing": side.endswith("checkpointing")}
    with tempfile.TemporaryDirectory() as folder:
        arguments = config(
            output_dir=folder, per_device_train_batch_size=4, max_steps=2, learning_rate=1e-4, save_strategy="no",
            report_to="none", disable_tqdm=True, use_cpu=True, bf16=False, optim="adamw_torch", **own,
        )  # fmt: skip
        training = trainer(
            model=model,
            args=arguments,
            train_dataset=Dataset.from_list(rows_of(method)),
            processing_class=AutoTokenizer.from_pretrained(base),
            peft_config=LoraConfig(r=16, target_modules="all-linear", task_type="CAUSAL_LM"),
        )
        begun = time.process_time()
        training.train()
        seconds = time.process_time() - begun
    done.set()
    watching.join()
    return {"side": side, "method": method, "mebibytes": round(highest - before), "seconds": round(seconds, 1)}


def main() -> None:
    """Measure every side and method, and print a table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--one", nargs=2, metavar=("SIDE", "METHOD"), help="measure these alone, in this process")
    given = parser.parse_args()
    base = str(convert(fetch(MODEL, cache_folder()), cache_folder() / "SmolLM2-135M-Instruct"))
    if given.one:
        print(json.dumps(measured(*given.one, base)))
        return
    print("| | method | memory, MiB | processor seconds |\n|---|---|---|---|")
    for method in METHODS:
        for side in SIDES:
            command = [sys.executable, __file__, "--one", side, method]
            result = subprocess.run(command, check=True, capture_output=True, text=True)
            figures = json.loads(result.stdout.splitlines()[-1])
            print(f"| {side} | {method} | {figures['mebibytes']:,} | {figures['seconds']} |", flush=True)


if __name__ == "__main__":
    main()

"""What the processes of tests/hf/trainers/test_distributed.py run: one training of a tiny model.

python distributed_run.py MODEL OUTPUT '{"batch": 2, "steps": 4, ...}'
"""

import json
import os
import signal
import sys
import time
from pathlib import Path
from typing import Any

import torch
import trl
from datasets import Dataset
from peft import LoraConfig
from transformers import AutoTokenizer, TrainerCallback

import halfbyte
from halfbyte.data import Packer
from halfbyte.errors import InputError
from halfbyte.hf.trainers import SFTConfig, SFTTrainer, distributed

ROWS = [{"prompt": f"What is {i}?", "completion": f" It is {i}." + " yes" * (i % 4)} for i in range(16)]


class Watch(TrainerCallback):
    """Writes down each step; kills or harms this process as the options say."""

    def __init__(self, options: dict[str, Any]) -> None:
        self.options = options
        self.stop = False
        self.steps = 0
        self.passes: list[int] = []
        self.wishes: list[int] = []
        if options.get("sigterm"):
            signal.signal(signal.SIGTERM, self.ask)

    def pack(self, batches: Any, agree: Any) -> Any:
        def wish(number: int) -> int:
            self.wishes.append(number)
            agreed: int = agree(number)
            return agreed

        return Packer(self.options["packed"])(batches, wish)

    def ask(self, *_: Any) -> None:
        self.stop = True

    def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        self.steps = state.global_step
        me = distributed.rank() == self.options.get("rank", -1) and state.global_step == 2
        if me and self.options.get("sigterm"):
            os.kill(os.getpid(), signal.SIGTERM)
            time.sleep(0.2)
        if me and self.options.get("fail"):
            raise InputError("the disk is made of cheese")
        if self.stop:
            control.should_save = control.should_training_stop = True


def main() -> None:
    folder, output, options = sys.argv[1], Path(sys.argv[2]), json.loads(sys.argv[3])
    watch = Watch(options)
    seen = {}
    try:
        arguments = (trl.SFTConfig if options.get("trl") else SFTConfig)(
            output_dir=str(output),
            max_steps=options.get("steps", 4),
            per_device_train_batch_size=options["batch"],
            per_device_eval_batch_size=options["batch"],
            gradient_accumulation_steps=options.get("accumulation", 1),
            learning_rate=1e-2,
            lr_scheduler_type="constant",
            logging_steps=1,
            save_strategy="steps",
            save_steps=options.get("save_steps", 100),
            train_sampling_strategy=options.get("order", "random"),
            report_to="none",
            disable_tqdm=True,
            bf16=False,
        )
        config = halfbyte.HalfbyteConfig(compute_dtype=torch.float32)
        model = halfbyte.load(folder, quantization_config=config, dtype=torch.float32)
        torch.manual_seed(options.get("seed", 0))
        trainer = SFTTrainer(
            model=model,
            args=arguments,
            train_dataset=Dataset.from_list(ROWS),
            eval_dataset=Dataset.from_list(ROWS[: options["evaluated"]]) if "evaluated" in options else None,
            processing_class=AutoTokenizer.from_pretrained(folder),
            peft_config=LoraConfig(r=4, target_modules="all-linear", task_type="CAUSAL_LM"),
            callbacks=[watch],
            packer=watch.pack if "packed" in options else None,
        )
        if options.get("infinite") == distributed.rank():
            name = "base_model.model.model.layers.1.mlp.up_proj.lora_A.default.weight"
            trainer.model.get_parameter(name).register_hook(lambda gradient: gradient * torch.inf)
        trainer.model.register_forward_hook(lambda *_: watch.passes.append(trainer.state.global_step))
        trainer.train(resume_from_checkpoint=options.get("resume"))
        trainer.save_model(str(output / "adapter"))
        seen = {"losses": [line["loss"] for line in trainer.state.log_history if "loss" in line]}
        seen["tokens"] = trainer.trained_tokens
        if "evaluated" in options:
            seen["eval_loss"] = trainer.evaluate()["eval_loss"]
    except InputError as error:
        seen = {"error": str(error), "kind": type(error).__name__}
    seen |= {"passes": watch.passes, "wishes": watch.wishes}
    seen |= {"steps": watch.steps, "threads": torch.get_num_threads(), "processes": distributed.world_size()}
    Path(f"{output}.{distributed.rank()}.json").write_text(json.dumps(seen))
    distributed.leave()


main()

"""Trainers as scripts make them: ours over our weights, with old arguments, and the losses of the script without us."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import trl
from datasets import Dataset
from peft import PeftModel, get_peft_model, prepare_model_for_kbit_training
from transformers import (
    AutoModelForCausalLM,
    BitsAndBytesConfig,
    DataCollatorForLanguageModeling,
    Seq2SeqTrainer,
    Trainer,
    TrainerCallback,
    TrainingArguments,
)
from trl import DPOTrainer, KTOTrainer, SFTConfig, SFTTrainer

import halfbyte
from halfbyte.hf.layers.adapters import LoraLinear4bit
from halfbyte.hf.trainers.base import BaseTrainer
from halfbyte.optim import AdamW

ROWS = [{"question": f"{i}?" + " Really?" * (i % 3), "answer": f"Yes {i}."} for i in range(8)]
TEXTS = Dataset.from_list([{"text": f"{row['question']} {row['answer']}"} for row in ROWS])
PAIRS = Dataset.from_list([{"prompt": f"{i}?", "chosen": " Yes.", "rejected": " No, no."} for i in range(6)])
QUIET = {"report_to": "none", "disable_tqdm": True, "logging_steps": 1}


def small(folder: Path, **more: Any) -> dict[str, Any]:
    return {"output_dir": str(folder), "max_steps": 2, "per_device_train_batch_size": 2} | QUIET | more


def losses(trainer: Any) -> list[float]:
    return [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]


def of_batch(batch: Any) -> list[str]:
    """A formatting function as of TRL 0.4 to 0.12."""
    texts = []
    for i in range(len(batch["question"])):
        texts.append(f"### Q: {batch['question'][i]}\n ### Answer: {batch['answer'][i]}")
    return texts


def test_sft_as_of_2023_is_ours(model: Any, lora: Any, tokenizer: Any, tmp_path: Path) -> None:
    collator = trl.DataCollatorForCompletionOnlyLM(" ### Answer:", tokenizer=tokenizer)
    trainer = SFTTrainer(
        model,
        args=TrainingArguments(
            **small(tmp_path, evaluation_strategy="steps", eval_steps=1, fp16=True, optim="paged_adamw_8bit")
        ),
        train_dataset=Dataset.from_list(ROWS),
        eval_dataset=Dataset.from_list(ROWS),
        tokenizer=tokenizer,
        peft_config=lora(),
        max_seq_length=64,
        formatting_func=of_batch,
        data_collator=collator,
        packing=False,
    )
    assert isinstance(trainer, BaseTrainer) and isinstance(trainer, SFTTrainer)
    assert trainer.args.max_length == 64 and trainer.tokenizer is tokenizer
    trainer.train()
    assert len(losses(trainer)) == 2 and type(trainer.optimizer.optimizer) is AdamW
    assert trainer.optimizer.optimizer.state_bits == 8
    batch = collator([{"input_ids": row} for row in trainer.train_dataset["input_ids"][:2]])
    kept = [row[labels != -100] for row, labels in zip(batch["input_ids"], batch["labels"], strict=True)]
    # one token is a byte here; the last is the end of the text, which the collator takes for padding as it did then
    assert [tokenizer.decode(ids) for ids in kept] == [" Yes 0.", " Yes 1."]
    assert (tmp_path / "checkpoint-2" / "adapter_model.safetensors").is_file()
    trainer.save_model(str(tmp_path / "final"))
    assert (tmp_path / "final" / "adapter_config.json").is_file()


def test_preference_trainers_with_the_arguments_that_they_took_themselves(
    installed: None, tiny_model_folder: Path, lora: Any, tokenizer: Any, tmp_path: Path
) -> None:
    from trl import ORPOConfig, ORPOTrainer

    def base() -> Any:
        return AutoModelForCausalLM.from_pretrained(tiny_model_folder, load_in_4bit=True)

    common = {"tokenizer": tokenizer, "peft_config": lora()}
    args = TrainingArguments(**small(tmp_path / "dpo", remove_unused_columns=False, bf16=True))
    dpo = DPOTrainer(
        base(), None, args=args, beta=0.2, train_dataset=PAIRS, max_length=64, max_prompt_length=9, **common
    )
    assert isinstance(dpo, BaseTrainer) and dpo.beta == 0.2 and dpo.args.max_length == 64
    dpo.train()
    assert losses(dpo)[0] == pytest.approx(0.6931, abs=1e-3)  # ln 2: the policy is its reference

    rows = Dataset.from_list([{"prompt": f"{i}?", "completion": " Yes.", "label": i % 2 == 0} for i in range(6)])
    config = trl.KTOConfig(**small(tmp_path / "kto", max_prompt_length=9))
    kto = KTOTrainer(model=base(), args=config, train_dataset=rows, **common)
    kto.train()
    assert isinstance(kto, BaseTrainer) and losses(kto)[0] == pytest.approx(0.5, abs=1e-3)

    orpo = ORPOTrainer(
        model=base(), args=ORPOConfig(**small(tmp_path / "orpo", max_length=64)), train_dataset=PAIRS, **common
    )
    assert isinstance(orpo, BaseTrainer)
    orpo.train()
    first = orpo.state.log_history[0]
    assert first["loss"] == pytest.approx(first["nll_loss"] - 0.1 * first["log_odds_ratio"], rel=0.02)


class Own(Trainer):
    """As of transformers 4.30: a loss without num_items_in_batch."""

    def compute_loss(self, model: Any, inputs: Any, return_outputs: bool = False) -> Any:
        output = model(**inputs)
        return (output.loss, output) if return_outputs else output.loss


class Watch(TrainerCallback):
    """Finds the folder of a checkpoint by its name, as qlora.py's callback does."""

    found: list[bool]

    def on_save(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.found.append((Path(args.output_dir) / f"checkpoint-{state.global_step}").is_dir())


@pytest.mark.parametrize("kind", [Trainer, Seq2SeqTrainer, Own])
def test_the_plain_trainer_with_a_collator(
    model: Any, lora: Any, tokenizer: Any, tmp_path: Path, kind: Any, caplog: pytest.LogCaptureFixture
) -> None:
    from transformers import Seq2SeqTrainingArguments

    adapted = get_peft_model(prepare_model_for_kbit_training(model), lora(target_modules=["q_proj", "v_proj"]))
    assert type(adapted.base_model.model.model.layers[0].self_attn.q_proj) is LoraLinear4bit
    rows = TEXTS.map(lambda row: tokenizer(row["text"]))
    arguments = small(tmp_path, gradient_accumulation_steps=2, fp16=True, optim="paged_adamw_32bit", save_steps=1)
    watch = Watch()
    watch.found = []
    seen: list[Any] = []
    handle = adapted.get_base_model().register_forward_hook(
        lambda module, args, output: seen.append(output.logits) if module.training else None
    )
    trainer = kind(
        model=adapted,
        args=Seq2SeqTrainingArguments(**arguments, group_by_length=True),
        train_dataset=rows,
        tokenizer=tokenizer,
        data_collator=DataCollatorForLanguageModeling(tokenizer, mlm=False),
        callbacks=[watch],
    )
    assert isinstance(trainer, kind)
    trainer.train()
    handle.remove()
    assert seen and all(logits is None for logits in seen)  # the head's loss at labels alone
    assert type(trainer.optimizer.optimizer) is AdamW and trainer.optimizer.optimizer.page_dir is not None
    assert watch.found == [True, True]
    assert all(4 < loss < 9 for loss in losses(trainer))  # ln 258 = 5.6: a mean, not a sum over micro-batches
    assert not adapted.is_activation_checkpointing  # memory is enough, so the wish costs nothing
    assert any("gradient checkpointing is as memory needs it" in record.getMessage() for record in caplog.records)


def test_a_script_s_own_subclass_keeps_its_methods(model: Any, lora: Any, tokenizer: Any, tmp_path: Path) -> None:
    class Mine(SFTTrainer):
        def __init__(self, *args: Any, extra: int, **kwargs: Any) -> None:
            super().__init__(*args, **kwargs)
            self.extra = extra
            self.logged = 0

        def log(self, *args: Any, **kwargs: Any) -> None:
            self.logged += 1
            super().log(*args, **kwargs)

    trainer = Mine(
        model=model, args=SFTConfig(**small(tmp_path)), train_dataset=TEXTS, tokenizer=tokenizer, peft_config=lora(),
        extra=3,
    )  # fmt: skip
    trainer.train()
    assert isinstance(trainer, Mine) and isinstance(trainer, BaseTrainer)
    assert (trainer.extra, trainer.logged, type(trainer).__name__) == (3, 3, "Mine")


def test_dense_models_go_through_trl_s_own_class(
    installed: None, tiny_model_folder: Path, tokenizer: Any, tmp_path: Path
) -> None:
    dense = AutoModelForCausalLM.from_pretrained(tiny_model_folder)
    trainer = SFTTrainer(
        dense, args=SFTConfig(**small(tmp_path), max_seq_length=30), train_dataset=TEXTS, tokenizer=tokenizer
    )
    assert type(trainer) is SFTTrainer
    trainer.train()


@pytest.mark.parametrize("how", ["model_init_kwargs", "load_in_8bit", "folder"])
def test_a_model_s_name_is_opened_quantized(
    installed: None, tiny_model_folder: Path, lora: Any, tokenizer: Any, tmp_path: Path, how: str
) -> None:
    config = BitsAndBytesConfig(load_in_4bit=True)
    name = str(tiny_model_folder)
    options: dict[str, Any] = {"model_init_kwargs": {"quantization_config": config}}
    if how == "load_in_8bit":
        options = {"model_init_kwargs": {how: True}}
    if how == "folder":
        name, options = str(tmp_path / "packed"), {}
        AutoModelForCausalLM.from_pretrained(tiny_model_folder, quantization_config=config).save_pretrained(name)
    trainer = SFTTrainer(
        name, args=SFTConfig(**small(tmp_path / "out"), **options), train_dataset=TEXTS, processing_class=tokenizer,
        peft_config=lora(),
    )  # fmt: skip
    assert isinstance(trainer, BaseTrainer)
    trainer.train()


def test_a_resumed_run_gives_the_same_bits_by_the_name_that_transformers_gives_a_checkpoint(
    installed: None, tiny_model_folder: Path, lora: Any, tokenizer: Any, tmp_path: Path
) -> None:
    def run(folder: Path, **more: Any) -> Any:
        base = AutoModelForCausalLM.from_pretrained(tiny_model_folder, load_in_4bit=True)
        trainer = SFTTrainer(
            base, args=SFTConfig(**small(folder, max_steps=6, save_steps=3, optim="paged_adamw_8bit")),
            train_dataset=TEXTS, tokenizer=tokenizer, peft_config=lora(lora_dropout=0.1),
        )  # fmt: skip
        trainer.train(**more)
        return trainer.model.state_dict()

    whole = run(tmp_path)
    again = run(tmp_path, resume_from_checkpoint=str(tmp_path / "checkpoint-3"))
    assert all(torch.equal(whole[name], again[name]) for name in whole)


def test_links_to_checkpoints_that_are_gone_go_too(model: Any, lora: Any, tokenizer: Any, tmp_path: Path) -> None:
    args = SFTConfig(**small(tmp_path, max_steps=4, save_steps=1, save_total_limit=2))
    SFTTrainer(model, args=args, train_dataset=TEXTS, tokenizer=tokenizer, peft_config=lora()).train()
    assert sorted(path.name for path in tmp_path.glob("checkpoint-*")) == ["checkpoint-3", "checkpoint-4"]


@pytest.mark.filterwarnings("ignore::FutureWarning", "ignore:torch.utils.checkpoint:UserWarning")
@pytest.mark.parametrize("trainer_of", ["sft", "plain"])
def test_losses_are_those_of_the_same_script_over_bitsandbytes(
    even_model_folder: Path, lora: Any, tokenizer: Any, tmp_path: Path, trainer_of: str
) -> None:
    """The same rows in the same order, through bitsandbytes' layers, PEFT's, and transformers' own head and step."""

    def script(folder: Path) -> list[float]:
        config = BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_use_double_quant=True)
        base = AutoModelForCausalLM.from_pretrained(
            even_model_folder, quantization_config=config, dtype=torch.float32, device_map="auto"
        )
        torch.manual_seed(0)
        arguments = small(
            folder, max_steps=8, learning_rate=1e-2, gradient_accumulation_steps=2, use_cpu=True, optim="adamw_torch"
        )
        if trainer_of == "sft":
            trainer = SFTTrainer(
                base, args=SFTConfig(**arguments, bf16=False), train_dataset=TEXTS, processing_class=tokenizer,
                peft_config=lora(),
            )  # fmt: skip
        else:
            trainer = Trainer(
                get_peft_model(prepare_model_for_kbit_training(base), lora()),
                args=TrainingArguments(**arguments),
                train_dataset=TEXTS.map(lambda row: tokenizer(row["text"]), remove_columns=["text"]),
                data_collator=DataCollatorForLanguageModeling(tokenizer, mlm=False),
            )
        trainer.train()
        return losses(trainer)

    theirs = script(tmp_path / "theirs")
    halfbyte.install(cuda=False)
    try:
        ours = script(tmp_path / "ours")
    finally:
        halfbyte.undo()
    assert len(theirs) == 8 and theirs[-1] < 0.9 * theirs[0]
    assert ours == pytest.approx(theirs, rel=0.02)


def test_an_adapter_that_is_there_is_trained_whatever_peft_config_says(
    model: Any, lora: Any, tokenizer: Any, tmp_path: Path
) -> None:
    adapted = get_peft_model(model, lora(r=3))
    trainer = SFTTrainer(
        adapted, args=SFTConfig(**small(tmp_path)), train_dataset=TEXTS, tokenizer=tokenizer, peft_config=lora(r=9)
    )
    assert trainer.model is adapted and adapted.peft_config["default"].r == 3


def test_a_chat_format_of_2024_is_set_up_and_trained(model: Any, lora: Any, tokenizer: Any, tmp_path: Path) -> None:
    from trl import setup_chat_format
    from trl.commands.cli_utils import TrlParser

    assert TrlParser is trl.TrlParser
    with pytest.raises(ValueError, match="already added"):
        setup_chat_format(model, tokenizer)
    tokenizer.chat_template = None
    model, tokenizer = setup_chat_format(model, tokenizer, resize_to_multiple_of=64)
    chats = [
        {"messages": [{"role": "user", "content": f"{i}?"}, {"role": "assistant", "content": "Yes."}]} for i in "12"
    ]
    assert model.get_input_embeddings().weight.shape[0] == 320
    assert tokenizer.apply_chat_template(chats[0]["messages"], tokenize=False) == (
        "<|im_start|>user\n1?<|im_end|>\n<|im_start|>assistant\nYes.<|im_end|>\n"
    )
    trainer = SFTTrainer(
        model, args=SFTConfig(**small(tmp_path)), train_dataset=Dataset.from_list(chats), tokenizer=tokenizer,
        peft_config=lora(),
    )  # fmt: skip
    trainer.train()
    assert len(losses(trainer)) == 2


def test_adapters_that_were_made_before_are_made_ready(
    tiny_model_folder: Path, lora: Callable[..., Any], tokenizer: Any, tmp_path: Path
) -> None:
    base = AutoModelForCausalLM.from_pretrained(tiny_model_folder, quantization_config=halfbyte.HalfbyteConfig())
    adapted = get_peft_model(base, lora())
    layer = adapted.base_model.model.model.layers[0].mlp.up_proj
    assert isinstance(adapted, PeftModel) and type(layer) is not LoraLinear4bit
    halfbyte.install(cuda=False)
    try:
        Trainer(adapted, args=TrainingArguments(**small(tmp_path)), train_dataset=TEXTS)
    finally:
        halfbyte.undo()
    assert type(layer) is LoraLinear4bit


def test_texts_are_trained_where_a_prompt_stands_beside_them(
    model: Any, lora: Any, tokenizer: Any, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    rows = Dataset.from_list([{"prompt": f"{i}?", "output": "Yes.", "text": f"{i}? Yes."} for i in range(4)])
    trainer = SFTTrainer(
        model, train_dataset=rows, eval_dataset=rows, tokenizer=tokenizer, peft_config=lora(),
        dataset_text_field="text", args=TrainingArguments(**small(tmp_path)),
    )  # fmt: skip
    assert tokenizer.decode(trainer.train_dataset[1]["input_ids"]).startswith("1? Yes.")
    trainer.train()
    assert "the texts are trained" in caplog.text and trainer.evaluate()["eval_loss"] > 0

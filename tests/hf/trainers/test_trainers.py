"""The trainer: its loss and gradients against a plain cross entropy, its data order, its state files."""

import copy
import random
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from datasets import Dataset
from peft import LoraConfig, get_peft_model
from torch import Tensor, nn
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    Gemma2Config,
    GPT2Config,
    GraniteConfig,
    LlamaConfig,
    TrainerCallback,
)
from trl import SFTConfig

import halfbyte
from halfbyte.data import Collator
from halfbyte.hf.trainers import EpochSampler, SFTTrainer
from halfbyte.hf.trainers.state import random_state, set_random_state

VOCABULARY = 97
SMALL = {"vocab_size": VOCABULARY, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
LAYERS = {"hidden_size": 24, "intermediate_size": 40, "num_hidden_layers": 2, "num_attention_heads": 2}
FAMILIES = {
    "llama": LlamaConfig(**SMALL, **LAYERS, tie_word_embeddings=True),
    "gemma2": Gemma2Config(**SMALL, **LAYERS, num_key_value_heads=1, head_dim=12, final_logit_softcapping=2.0),
    "granite": GraniteConfig(**SMALL, **LAYERS, logits_scaling=3.0),
    "gpt2": GPT2Config(**SMALL, n_embd=24, n_layer=2, n_head=2, resid_pdrop=0, embd_pdrop=0, attn_pdrop=0),
}


class Gradients(TrainerCallback):
    """Keeps the gradients of the first step."""

    def on_pre_optimizer_step(self, args: Any, state: Any, control: Any, model: nn.Module, **_: Any) -> None:
        named = model.named_parameters()
        self.found = {name: p.grad.clone() for name, p in named if p.requires_grad and p.grad is not None}


def some_rows() -> list[dict[str, list[int]]]:
    """Six rows of unequal length and with unequal shares of trained tokens, one of them trained from its start."""
    numbers = random.Random(5)
    rows = []
    for length, prompt in [(9, 5), (17, 16), (4, 1), (30, 3), (12, 11), (7, 0)]:
        ids = [numbers.randrange(3, VOCABULARY) for _ in range(length)]
        rows.append({"input_ids": ids, "labels": [-100] * prompt + ids[prompt:]})
    return rows


def small_model(family: str) -> Any:
    torch.manual_seed(1)
    model = AutoModelForCausalLM.from_config(copy.deepcopy(FAMILIES[family]))
    if family == "granite":
        model.accepts_loss_kwargs = False  # as Gemma 4 and others declare
    lora = LoraConfig(r=4, target_modules="all-linear", task_type="CAUSAL_LM", fan_in_fan_out=family == "gpt2")
    model = get_peft_model(model, lora)
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            nn.init.normal_(parameter, std=0.1)  # zero would hide the gradients of A
    return model


def trainer(model: Any, folder: Path, tokenizer: Any, callback: TrainerCallback, **arguments: Any) -> SFTTrainer:
    packing = arguments.get("packing", False)
    config = SFTConfig(
        output_dir=str(folder),
        **{"max_steps": 1, "max_grad_norm": 0} | arguments,
        logging_steps=1,
        save_strategy="no",
        bf16=False,
        activation_checkpointing=False,
        dataset_kwargs={"skip_prepare_dataset": not packing},
        remove_unused_columns=False,
        dataloader_pin_memory=False,
        report_to="none",
        disable_tqdm=True,
    )
    return SFTTrainer(
        model=model,
        args=config,
        train_dataset=Dataset.from_list(some_rows()),
        data_collator=None if packing else Collator(0),
        processing_class=tokenizer,
        callbacks=[callback],
    )


def plain_loss(model: Any) -> Tensor:
    """The mean over all trained tokens of all rows, each row on its own, from the model's own logits."""
    losses = []
    for row in some_rows():
        logits = model(input_ids=torch.tensor([row["input_ids"]])).logits[0, :-1]
        targets = torch.tensor(row["labels"][1:])
        losses.append(nn.functional.cross_entropy(logits[targets != -100], targets[targets != -100], reduction="none"))
    return torch.cat(losses).mean()


@pytest.mark.parametrize(("batch", "accumulation"), [(6, 1), (2, 3)])
@pytest.mark.parametrize("family", FAMILIES)
def test_loss_and_gradients_are_those_of_the_mean_over_trained_tokens(
    family: str, batch: int, accumulation: int, tiny_model_folder: Path, tmp_path: Path
) -> None:
    model = small_model(family)
    expected_loss = plain_loss(model.eval())
    expected_loss.backward()
    expected = {name: p.grad.clone() for name, p in model.named_parameters() if p.requires_grad}
    model.zero_grad()

    gradients = Gradients()
    tokenizer = AutoTokenizer.from_pretrained(tiny_model_folder)
    arguments = {"per_device_train_batch_size": batch, "gradient_accumulation_steps": accumulation}
    run = trainer(model, tmp_path, tokenizer, gradients, **arguments)
    run.train()

    assert run.state.log_history[0]["loss"] == pytest.approx(expected_loss.item(), rel=1e-5)
    assert run.trained_tokens == sum(label != -100 for row in some_rows() for label in row["labels"][1:])
    assert gradients.found.keys() == expected.keys()
    for name, gradient in expected.items():
        # fp32; padding and batching reorder sums of up to 50 terms
        torch.testing.assert_close(gradients.found[name], gradient, rtol=1e-4, atol=1e-6 * gradient.abs().max().item())


def test_packing_trains_each_sample_as_if_it_were_alone(tiny_model_folder: Path, tmp_path: Path) -> None:
    config = halfbyte.HalfbyteConfig(compute_dtype=torch.float32)
    base = halfbyte.load(tiny_model_folder, quantization_config=config)
    lora = LoraConfig(r=4, target_modules="all-linear", task_type="CAUSAL_LM", init_lora_weights=False)
    dense = get_peft_model(copy.deepcopy(base).dequantize(torch.float32).float(), lora)
    model = get_peft_model(base, lora)
    adapters = {name: value for name, value in model.state_dict().items() if "lora_" in name}
    dense.load_state_dict(adapters, strict=False)
    expected_loss = plain_loss(dense.eval())
    expected_loss.backward()

    gradients = Gradients()
    tokenizer = AutoTokenizer.from_pretrained(tiny_model_folder)
    arguments = {"packing": True, "max_length": 40, "per_device_train_batch_size": 1, "gradient_accumulation_steps": 2}
    run = trainer(model, tmp_path, tokenizer, gradients, **arguments)
    assert sorted(map(sum, run.train_dataset["seq_lengths"])) == [39, 40]  # of six samples
    run.train()
    assert run.state.log_history[0]["loss"] == pytest.approx(expected_loss.item(), rel=1e-5)
    for name, parameter in dense.named_parameters():
        if parameter.grad is not None:
            error = (gradients.found[name] - parameter.grad).norm()
            assert error < 1e-5 * parameter.grad.norm(), name


@pytest.mark.parametrize("group", [None, 4])
def test_data_order_is_a_permutation_that_seed_and_epoch_decide(group: int | None) -> None:
    lengths = [random.Random(i).randrange(1, 50) for i in range(37)]

    def order(seed: int, epoch: int) -> list[int]:
        sampler = EpochSampler(lengths, group, seed)
        sampler.set_epoch(epoch)
        torch.rand(3)  # the global random state has no say
        return list(sampler)

    assert order(3, 1) == order(3, 1)
    sampler = EpochSampler(np.array(lengths, np.int32), group, 3)
    sampler.set_epoch(1)
    assert list(sampler) == order(3, 1)
    assert sorted(order(3, 1)) == list(range(37))
    assert len({tuple(order(seed, epoch)) for seed in range(3) for epoch in range(3)}) == 9


def test_grouping_by_length_halves_the_padding_at_least() -> None:
    lengths = [random.Random(i).randrange(1, 200) for i in range(400)]

    def padding(group: int | None) -> int:
        order = list(EpochSampler(lengths, group, 0))
        batches = [[lengths[i] for i in order[start : start + 4]] for start in range(0, 400, 4)]
        return sum(max(batch) * len(batch) - sum(batch) for batch in batches)

    assert padding(4) < padding(None) / 2


def test_random_state_survives_its_files() -> None:
    def draw() -> list[float]:
        return [random.random(), random.gauss(0, 1), np.random.rand(), np.random.randn(), torch.rand(()).item()]

    random.gauss(0, 1)  # leaves a second value behind, which is part of the state
    np.random.randn()
    tensors, numbers = random_state()
    first = draw()
    set_random_state(tensors, numbers)
    assert draw() == first


def test_gradients_are_clipped_to_the_norm_and_their_own_norm_is_told(tiny_model_folder: Path, tmp_path: Path) -> None:
    model = small_model("llama")
    plain_loss(model.eval()).backward()
    expected = torch.stack([p.grad.norm() for p in model.parameters() if p.grad is not None]).norm().item()
    model.zero_grad()
    gradients = Gradients()
    tokenizer = AutoTokenizer.from_pretrained(tiny_model_folder)
    run = trainer(model, tmp_path, tokenizer, gradients, per_device_train_batch_size=6, max_grad_norm=expected / 8)
    run.train()
    clipped = torch.stack([gradient.norm() for gradient in gradients.found.values()]).norm().item()
    assert run.state.log_history[0]["grad_norm"] == pytest.approx(expected, rel=1e-4)
    assert clipped == pytest.approx(expected / 8, rel=1e-4)


class Disturbing(TrainerCallback):
    """Puts the model into evaluation after each step, as an evaluation of one's own does; notes what comes then."""

    def on_step_end(self, args: Any, state: Any, control: Any, model: nn.Module, **_: Any) -> None:
        model.eval()

    def on_pre_optimizer_step(self, args: Any, state: Any, control: Any, model: nn.Module, **_: Any) -> None:
        self.training = all(module.training for module in model.modules())

    def on_step_begin(self, args: Any, state: Any, control: Any, model: nn.Module, **_: Any) -> None:
        self.left_over = [name for name, p in model.named_parameters() if p.grad is not None]


def test_every_step_trains_all_modules_from_no_gradients(tiny_model_folder: Path, tmp_path: Path) -> None:
    model, seen = small_model("llama"), Disturbing()
    tokenizer = AutoTokenizer.from_pretrained(tiny_model_folder)
    trainer(model, tmp_path, tokenizer, seen, max_steps=3).train()
    assert seen.training and not seen.left_over
    assert "train" not in vars(model) and "zero_grad" not in vars(model)

"""Our SFT, DPO and KTO trainers against TRL's own: the same batch, the same loss, gradients and metrics."""

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
import trl
from datasets import Dataset
from peft import LoraConfig, get_peft_model
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, AutoTokenizer

import halfbyte
from halfbyte import kernels
from halfbyte.hf import trainers as ours
from halfbyte.hf.layers.adapters import LoraLinear4bit
from halfbyte.nn import cross_entropy

PAIRS = [
    {"prompt": "What is red?", "chosen": " An apple, mostly.", "rejected": " The sea."},
    {"prompt": "Two and two?", "chosen": " Four.", "rejected": " Five, if you insist on it."},
    {"prompt": "Hello!", "chosen": " Good day.", "rejected": " No."},
]
UNPAIRED = [
    {"prompt": pair["prompt"], "completion": pair[side], "label": side == "chosen"}
    for pair in PAIRS
    for side in ("chosen", "rejected")
]
TEXTS = [{"prompt": pair["prompt"], "completion": pair["chosen"]} for pair in PAIRS]
KINDS: dict[str, tuple[Any, Any, Any, Any, list[dict[str, Any]]]] = {
    "sft": (ours.SFTTrainer, trl.SFTTrainer, ours.SFTConfig, trl.SFTConfig, TEXTS),
    "dpo": (ours.DPOTrainer, trl.DPOTrainer, ours.DPOConfig, trl.DPOConfig, PAIRS),
    "kto": (ours.KTOTrainer, trl.KTOTrainer, ours.KTOConfig, trl.KTOConfig, UNPAIRED),
}


def fp32_model(folder: Path) -> Any:
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    model = get_peft_model(model, LoraConfig(r=4, target_modules="all-linear", task_type="CAUSAL_LM"))
    generator = torch.Generator().manual_seed(0)
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            parameter.data = torch.randn(parameter.shape, generator=generator) * 0.1
    return model


def arguments(folder: Path, **more: Any) -> dict[str, Any]:
    return {
        "output_dir": str(folder),
        "per_device_train_batch_size": 3,
        "max_steps": 2,
        "logging_steps": 1,
        "dataloader_pin_memory": False,
        "report_to": "none",
        "disable_tqdm": True,
        **more,
    }


def result(trainer: Any) -> tuple[Tensor, dict[str, Tensor], dict[str, list[float]]]:
    """Loss, gradients and metrics of the first three samples."""
    batch = trainer.data_collator([trainer.train_dataset[i] for i in range(3)])
    trainer.model.train()
    loss = trainer.compute_loss(trainer.model, trainer._prepare_inputs(batch))
    loss.backward()
    gradients = {name: p.grad for name, p in trainer.model.named_parameters() if p.grad is not None}
    return loss, gradients, dict(trainer._metrics["train"])


@pytest.mark.parametrize("kind", [*KINDS, "dpo, wpo"])
def test_loss_gradients_and_metrics_are_trl_s(
    kind: str, tiny_model_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(cross_entropy, "WIDTH", 64)  # several chunks of a small vocabulary
    our_trainer, their_trainer, our_config, their_config, rows = KINDS[kind.split(",")[0]]
    more = {"use_weighting": True} if "wpo" in kind else {}
    tokenizer = AutoTokenizer.from_pretrained(tiny_model_folder)
    model = fp32_model(tiny_model_folder)

    def build(cls: Any, config: Any) -> Any:
        return cls(
            model=copy.deepcopy(model),
            args=config(**arguments(tmp_path, bf16=False, activation_checkpointing=False, **more)),
            train_dataset=Dataset.from_list(rows),
            processing_class=tokenizer,
        )

    chunks = []
    fold = kernels.fold_softmax
    monkeypatch.setattr(kernels, "fold_softmax", lambda *a, **kw: chunks.append(len(a[0])) or fold(*a, **kw))
    loss, gradients, metrics = result(build(our_trainer, our_config))
    assert chunks
    chunks.clear()
    expected_loss, expected_gradients, expected_metrics = result(build(their_trainer, their_config))
    assert not chunks
    torch.testing.assert_close(loss, expected_loss, rtol=1e-5, atol=1e-6)
    assert gradients.keys() == expected_gradients.keys() and len(gradients) > 20
    for name, gradient in expected_gradients.items():
        assert (gradients[name] - gradient).norm() <= 1e-5 * gradient.norm() + 1e-9, name
    assert metrics.keys() == expected_metrics.keys()
    for name, values in expected_metrics.items():
        assert metrics[name] == pytest.approx(values, rel=1e-4, abs=1e-5), name


@pytest.mark.parametrize("kind", KINDS)
def test_trainers_train_on_four_bits_and_leave_plain_files(kind: str, tiny_model_folder: Path, tmp_path: Path) -> None:
    our_trainer, _, our_config, _, rows = KINDS[kind]
    model = halfbyte.load(tiny_model_folder, quantization_config=halfbyte.HalfbyteConfig())
    trainer = our_trainer(
        model=model,
        args=our_config(**arguments(tmp_path, save_steps=1, learning_rate=1e-2)),
        train_dataset=Dataset.from_list(rows),
        processing_class=AutoTokenizer.from_pretrained(tiny_model_folder),
        peft_config=LoraConfig(r=4, target_modules="all-linear", task_type="CAUSAL_LM"),
    )
    layers = [module for module in trainer.model.modules() if isinstance(module, LoraLinear4bit)]
    assert len(layers) == 14  # TRL put the adapter on, we prepared it
    before = {name: p.detach().clone() for name, p in trainer.model.named_parameters() if p.requires_grad}
    trainer.train()
    assert all(parameter.dtype == torch.float32 for parameter in before.values())
    changed = [name for name, p in trainer.model.named_parameters() if p.requires_grad and not p.equal(before[name])]
    assert any("lora_B" in name for name in changed)
    files = {file.suffix for file in tmp_path.rglob("*") if file.is_file()}
    assert files <= {".safetensors", ".json", ".jinja"}


def test_autocast_and_checkpointing_are_off_unless_a_script_asks_for_them(tmp_path: Path) -> None:
    for _, _, config, _, _ in KINDS.values():
        args = config(output_dir=str(tmp_path))
        assert (args.bf16, args.fp16, args.activation_checkpointing, args.gradient_checkpointing) == (False,) * 4
        assert config(output_dir=str(tmp_path), bf16=True, use_cpu=True).bf16
        assert config(output_dir=str(tmp_path), activation_checkpointing=True).activation_checkpointing
        with pytest.warns(FutureWarning, match=r"`gradient_checkpointing` is deprecated"):
            assert config(output_dir=str(tmp_path), gradient_checkpointing=True).activation_checkpointing


def test_without_arguments_the_defaults_are_ours(
    tiny_model_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    trainer = ours.SFTTrainer(
        fp32_model(tiny_model_folder),
        train_dataset=Dataset.from_list(TEXTS),
        processing_class=AutoTokenizer.from_pretrained(tiny_model_folder),
    )
    assert isinstance(trainer.args, ours.SFTConfig) and not trainer.args.bf16
    assert trainer.args.output_dir.endswith("-SFT")


def test_a_gradient_that_is_not_finite_is_told_with_step_samples_and_parameter(
    tiny_model_folder: Path, tmp_path: Path
) -> None:
    model = fp32_model(tiny_model_folder)
    trainer = ours.DPOTrainer(
        model=model,
        args=ours.DPOConfig(**arguments(tmp_path, learning_rate=0.25, lr_scheduler_type="constant")),
        train_dataset=Dataset.from_list(PAIRS),
        processing_class=AutoTokenizer.from_pretrained(tiny_model_folder),
    )
    name = "base_model.model.model.layers.1.mlp.up_proj.lora_A.default.weight"
    model.get_parameter(name).register_hook(lambda gradient: gradient * torch.inf)
    before = [p.detach().clone() for p in model.parameters()]
    with pytest.raises(halfbyte.InputError) as error:
        trainer.train()
    assert "the gradient of step 1 is not finite" in str(error.value)
    assert f"first in the gradient of {name}, on a batch of sequences of" in str(error.value)
    assert "lower learning_rate than 0.25" in str(error.value)
    assert all(torch.equal(one, other) for one, other in zip(model.parameters(), before, strict=True))


def test_an_output_that_is_not_finite_is_told_with_the_rows_of_the_data(
    tiny_model_folder: Path, tmp_path: Path
) -> None:
    class Broken(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return x / (x.shape[0] - x.shape[0])

    model = fp32_model(tiny_model_folder)
    model.base_model.model.model.layers[1].mlp.act_fn = Broken()
    ids = [[5, 6, 7, 8], [9, 10, 11]]
    trainer = ours.SFTTrainer(
        model=model,
        args=ours.SFTConfig(**arguments(tmp_path, dataset_kwargs={"skip_prepare_dataset": True})),
        train_dataset=Dataset.from_list([{"input_ids": row, "labels": row} for row in ids]),
        data_collator=halfbyte.data.Collator(0),
        processing_class=AutoTokenizer.from_pretrained(tiny_model_folder),
    )
    with pytest.raises(halfbyte.InputError) as error:
        trainer.train()
    assert "loss and with it the gradient of step 1 is not finite" in str(error.value)
    assert "first in the output of base_model.model.model.layers.1.mlp.act_fn" in str(error.value)
    batches = ("0 and 1 of the training data, of 4 and 3", "1 and 0 of the training data, of 3 and 4")
    assert any(f"on rows {batch} tokens" in str(error.value) for batch in batches)


@pytest.mark.parametrize("prepared", [False, True])
@pytest.mark.parametrize("kind", KINDS)
def test_a_copy_of_a_model_under_training_runs_on_its_own_weights(
    kind: str, prepared: bool, tiny_model_folder: Path, tmp_path: Path
) -> None:
    our_trainer, _, our_config, _, rows = KINDS[kind]
    lora = LoraConfig(r=4, target_modules="all-linear", task_type="CAUSAL_LM", init_lora_weights=False)
    model = get_peft_model(halfbyte.load(tiny_model_folder), lora)
    if prepared:
        halfbyte.prepare_for_training(model)
    trainer = our_trainer(
        model=model,
        args=our_config(**arguments(tmp_path)),
        train_dataset=Dataset.from_list(rows),
        processing_class=AutoTokenizer.from_pretrained(tiny_model_folder),
    )
    trained = trainer.model.eval()
    ids = torch.arange(5, 25).view(2, 10)
    batch = {"input_ids": ids, "labels": ids, "fused_lm_head": True}
    expected, loss = trained(input_ids=ids).logits, trained(**batch).loss
    copied = copy.deepcopy(trained)
    with torch.no_grad():
        for parameter in trained.parameters():
            if parameter.is_floating_point():
                parameter.zero_()
    assert torch.equal(copied(input_ids=ids).logits, expected) and torch.equal(copied(**batch).loss, loss)
    assert not trained(input_ids=ids).logits.any()

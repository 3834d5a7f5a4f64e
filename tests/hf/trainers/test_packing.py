"""A packed run against the same run unpacked, and against each sample alone."""

from pathlib import Path
from typing import Any

import pytest
import torch
import transformers as t
from datasets import Dataset
from peft import LoraConfig, get_peft_model
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, AutoTokenizer

import halfbyte
from halfbyte.data import Collator, Packer
from halfbyte.errors import InputError
from halfbyte.hf import packing_obstacle
from halfbyte.hf.layers.attention_choice import choose_attention
from halfbyte.hf.trainers import SFTConfig, SFTTrainer

SIZES = {"hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2, "num_attention_heads": 4}
WORDS = {"vocab_size": 128, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
SMALL = {**SIZES, **WORDS}
GROUPED = {**SMALL, "num_key_value_heads": 2}
MIXED = {"layer_types": ["sliding_attention", "full_attention"], "sliding_window": 5}
HYBRID = {**GROUPED, "num_hidden_layers": 4}
EXPERTS = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 32}
SEEN = "the samples of a packed row would see each other in "
MASK = "attends with a whole mask"

# family: configuration, and what stands against packing, if anything
FAMILIES: dict[str, tuple[Any, str | None]] = {
    "llama": (lambda: t.LlamaConfig(**GROUPED), None),
    "mistral": (lambda: t.MistralConfig(**GROUPED, sliding_window=5), None),
    "qwen2": (lambda: t.Qwen2Config(**GROUPED, **MIXED, use_sliding_window=True), None),
    "gemma2": (lambda: t.Gemma2Config(**GROUPED, **MIXED, head_dim=16, query_pre_attn_scalar=20), None),
    "gemma3": (lambda: t.Gemma3TextConfig(**GROUPED, **MIXED, head_dim=16, query_pre_attn_scalar=20), None),
    "phi3": (lambda: t.Phi3Config(**GROUPED), None),
    "smollm3": (lambda: t.SmolLM3Config(**GROUPED, no_rope_layers=[1, 0]), None),
    "gpt-neox": (lambda: t.GPTNeoXConfig(**SMALL), None),
    "gpt2": (lambda: t.GPT2Config(n_embd=64, n_layer=2, n_head=4, attn_pdrop=0.0, **WORDS), None),
    "gpt2 that drops attention": (lambda: t.GPT2Config(n_embd=64, n_layer=2, n_head=4, **WORDS), MASK),
    "mixtral": (lambda: t.MixtralConfig(**GROUPED, num_local_experts=4, router_aux_loss_coef=0.0), None),
    "qwen3-moe": (lambda: t.Qwen3MoeConfig(**GROUPED, head_dim=16, **EXPERTS), "balances experts"),
    "bloom": (lambda: t.BloomConfig(hidden_size=64, n_layer=2, n_head=4, **WORDS), SEEN + "BloomForCausalLM"),
    "falcon, alibi": (lambda: t.FalconConfig(**SMALL, alibi=True), SEEN),
    "mpt": (lambda: t.MptConfig(d_model=64, n_heads=4, n_layers=2, **WORDS), SEEN),
    "mamba": (lambda: t.MambaConfig(hidden_size=64, num_hidden_layers=2, **WORDS), SEEN),
    "rwkv": (lambda: t.RwkvConfig(**SIZES, **WORDS, attention_hidden_size=64), SEEN),
    "falcon-h1": (
        lambda: t.FalconH1Config(**GROUPED, mamba_d_ssm=64, mamba_n_heads=4, mamba_d_head=16, mamba_d_state=16),
        SEEN,
    ),
    "qwen3-next": (
        lambda: t.Qwen3NextConfig(
            **HYBRID,
            **EXPERTS,
            head_dim=16,
            linear_num_value_heads=4,
            linear_num_key_heads=2,
            linear_key_head_dim=16,
            linear_value_head_dim=16,
            shared_expert_intermediate_size=32,
            router_aux_loss_coef=0.0,
        ),
        SEEN,
    ),
    "lfm2": (lambda: t.Lfm2Config(**GROUPED, layer_types=["conv", "full_attention"]), SEEN),
    "recurrent-gemma": (
        lambda: t.RecurrentGemmaConfig(**{**HYBRID, "num_hidden_layers": 3}, head_dim=16, lru_width=64),
        SEEN,
    ),
}


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.filterwarnings("ignore")
def test_families_that_keep_samples_apart_are_told_from_others(family: str) -> None:
    config, wanted = FAMILIES[family]
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config(), dtype=torch.float32)
    choose_attention(model)
    state = torch.random.get_rng_state()
    found = packing_obstacle(model.train(), 30)
    assert found is None if wanted is None else wanted in str(found)
    assert model.training and torch.equal(torch.random.get_rng_state(), state)


def test_rotary_embeddings_that_grow_with_the_batch_stand_against_packing_where_they_grow() -> None:
    config = t.LlamaConfig(**GROUPED, max_position_embeddings=64)
    config.rope_parameters = {"rope_type": "dynamic", "factor": 2.0, "rope_theta": 1e4}
    model = AutoModelForCausalLM.from_config(config)
    choose_attention(model)
    assert packing_obstacle(model, 64) is None
    assert "LlamaForCausalLM's positions (dynamic) depend on the longest sample" in str(packing_obstacle(model, 65))


def rows(count: int) -> Dataset:
    numbers = torch.Generator().manual_seed(4)
    made = []
    for _ in range(count):
        length = int(torch.randint(3, 40, (1,), generator=numbers))
        ids = torch.randint(3, 250, (length,), generator=numbers).tolist()
        prompt = int(torch.randint(0, length - 1, (1,), generator=numbers))
        made.append({"input_ids": ids, "labels": [-100] * prompt + ids[prompt:]})
    return Dataset.from_list(made)


def trainer(folder: Path, output: Path, packer: Packer | None, dropout: float = 0.0, **more: Any) -> SFTTrainer:
    """A trainer over the tiny model in 4 bits and fp32; 22 rows in steps of 6, of which the last is smaller."""
    config = halfbyte.HalfbyteConfig(compute_dtype=torch.float32)
    model = halfbyte.load(folder, quantization_config=config, dtype=torch.float32)
    torch.manual_seed(0)
    arguments = {
        "num_train_epochs": 2,
        "per_device_train_batch_size": 2,
        "gradient_accumulation_steps": 3,
        "learning_rate": 1e-2,
        "logging_steps": 1,
        "save_strategy": "no",
        "report_to": "none",
        "disable_tqdm": True,
        "dataloader_pin_memory": False,
        "use_cpu": True,
        "dataset_kwargs": {"skip_prepare_dataset": True},
        "include_num_input_tokens_seen": "non_padding",
    } | more
    return SFTTrainer(
        model=get_peft_model(model, LoraConfig(r=4, lora_dropout=dropout, target_modules="all-linear")),
        args=SFTConfig(output_dir=str(output), **arguments),
        train_dataset=rows(22),
        data_collator=Collator(0),
        processing_class=AutoTokenizer.from_pretrained(folder),
        packer=packer,
    )


def passes_of(model: nn.Module) -> list[Any]:
    """What the model is given while it trains, collected."""
    seen: list[Any] = []
    model.register_forward_pre_hook(lambda _, args, kwargs: seen.append(kwargs), with_kwargs=True)
    return seen


def log_of(built: SFTTrainer) -> list[dict[str, Any]]:
    names = ("loss", "grad_norm", "learning_rate", "epoch", "step", "num_input_tokens_seen")
    return [{name: line[name] for name in names} for line in built.state.log_history if "loss" in line]


@pytest.mark.parametrize("order", ["random", "group_by_length", "sequential"])
@pytest.mark.parametrize("tokens", [85, 240])
def test_packing_changes_no_loss_of_a_run(order: str, tokens: int, tiny_model_folder: Path, tmp_path: Path) -> None:
    plain, packed = (
        trainer(tiny_model_folder, tmp_path / name, packer, train_sampling_strategy=order)
        for name, packer in (("plain", None), ("packed", Packer(tokens)))
    )
    before, after = passes_of(plain.model), passes_of(packed.model)
    plain.train()
    packed.train()
    assert len(log_of(plain)) == 8 and len(before) == 22
    # fp32, and AdamW lifts the rounding of tiny gradients in its first steps
    for one, other in zip(log_of(plain), log_of(packed), strict=True):
        assert other == pytest.approx(one, rel=1e-4)
    assert packed.trained_tokens == plain.trained_tokens
    assert len(after) == 8 if tokens == 240 else 8 < len(after) < 22
    assert max(seen["input_ids"].numel() for seen in after) <= tokens
    assert all("attention_mask" not in seen for seen in after)
    trained = {name: p for name, p in plain.model.named_parameters() if p.requires_grad}
    for name, p in packed.model.named_parameters():
        if p.requires_grad:
            assert (p - trained[name]).norm() < 1e-3 * trained[name].norm(), name


def test_the_first_step_s_gradients_are_those_of_the_step_unpacked(tiny_model_folder: Path, tmp_path: Path) -> None:
    found: list[dict[str, Tensor]] = []

    class Keep(t.TrainerCallback):  # type: ignore[misc]
        def on_pre_optimizer_step(self, *_: Any, model: nn.Module, **__: Any) -> None:
            found.append({name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None})

    for name, packer in (("plain", None), ("packed", Packer(90))):
        built = trainer(tiny_model_folder, tmp_path / name, packer, max_steps=1)
        for module in built.model.modules():
            if hasattr(module, "lora_B") and "default" in module.lora_B:
                torch.manual_seed(0)
                nn.init.normal_(module.lora_B["default"].weight, std=0.1)
        built.add_callback(Keep())
        built.train()
    plain, packed = found
    assert plain.keys() == packed.keys() and len(plain) >= 16
    for name, gradient in plain.items():
        assert (packed[name] - gradient).norm() < 1e-5 * gradient.norm(), name


def test_a_resumed_packed_run_gives_the_same_bits(tiny_model_folder: Path, tmp_path: Path) -> None:
    def run(name: str) -> SFTTrainer:
        saved = {"save_strategy": "steps", "save_steps": 2, "save_total_limit": None}
        return trainer(tiny_model_folder, tmp_path / name, Packer(100), dropout=0.2, **saved)

    whole = run("whole")
    whole.train()
    again = run("again")
    again.train(resume_from_checkpoint=str(tmp_path / "whole/checkpoints/step-000002"))  # within the first epoch
    weights = dict(whole.model.named_parameters())
    assert all(torch.equal(p, weights[name]) for name, p in again.model.named_parameters())
    assert log_of(again)[-6:] == log_of(whole)[-6:]


def test_what_would_change_with_packing_is_refused(tiny_model_folder: Path, tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"cannot be packed: neftune_noise_alpha makes noise .*; leave packing out\."):
        trainer(tiny_model_folder, tmp_path, Packer(100), neftune_noise_alpha=5.0)


def test_a_packed_step_that_diverges_names_its_samples(tiny_model_folder: Path, tmp_path: Path) -> None:
    built = trainer(tiny_model_folder, tmp_path, Packer(240), train_sampling_strategy="sequential")
    built.model.get_parameter("base_model.model.model.layers.1.mlp.up_proj.lora_A.default.weight").data.fill_(torch.nan)
    lengths = [len(row["input_ids"]) for row in rows(6)]  # type: ignore[call-overload]
    told = f"on rows 0, 1, 2, 3, 4 and 5 of the training data, of {', '.join(map(str, lengths[:5]))} and {lengths[5]}"
    with pytest.raises(InputError, match=f"{told} tokens"):
        built.train()


@pytest.mark.parametrize("strategy", ["bfd", "bfd_split"])
@pytest.mark.filterwarnings("ignore")
def test_trl_s_own_packing_is_obeyed_and_its_samples_are_apart(
    strategy: str, build: Any, tiny_model_folder: Path, tmp_path: Path
) -> None:
    built = build(
        "sft",
        tiny_model_folder,
        tmp_path / "run",
        packing=True,
        packing_strategy=strategy,
        max_length=64,
        max_steps=1,
        completion_only_loss=True,
    )
    alone = build("sft", tiny_model_folder, tmp_path / "alone", max_steps=1, completion_only_loss=True)
    seen = passes_of(built.model)
    built.train()
    [batch] = seen
    starts = (batch["position_ids"][0] == 0).nonzero()[:, 0]
    wanted = {tuple(row["input_ids"]): row["labels"] for row in alone.train_dataset}
    total, count = 0.0, 0
    ids_and_labels = (batch[name][0].tensor_split(starts[1:]) for name in ("input_ids", "labels"))
    samples = list(zip(*ids_and_labels, strict=True))
    assert len(samples) > 2
    alone.model.load_state_dict(build("sft", tiny_model_folder, tmp_path / "again").model.state_dict())
    for ids, labels in samples:
        assert [-100, *wanted[tuple(ids.tolist())][1:]] == labels.tolist()
        with torch.no_grad():
            logits = alone.model.eval()(input_ids=ids[None]).logits[0, :-1]
        total += float(nn.functional.cross_entropy(logits, labels[1:], reduction="sum"))
        count += int((labels[1:] != -100).sum())
    assert built.state.log_history[0]["loss"] == pytest.approx(total / count, rel=1e-5)
    assert "have packed the rows already" in str(built.packing_obstacle())

"""Runs that learn from preferences, beside TRL's own trainers over a dense model, and how they stop and go on."""

import copy
import json
import math
import os
import shutil
import signal
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import trl
from datasets import Dataset
from peft import PeftModel, get_peft_model_state_dict, set_peft_model_state_dict
from safetensors.torch import load_file
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM, Qwen2MoeConfig

import halfbyte
from halfbyte import data, hf
from halfbyte.errors import InputError
from halfbyte.hf import trainers as ours
from halfbyte.hf.trainers.orpo import orpo
from halfbyte.runs.events import Evaluation, StepMetrics
from halfbyte.runs.metrics import read_events
from halfbyte.train import Interrupted, TrainConfig, fine_tune
from halfbyte.train.build import build_model

WORDS = ["An apple", "The sea, mostly", "Four", "Five, if you insist", "Good day", "No", "A heron on Sunday", "Rome"]
METHODS = ("dpo", "kto", "orpo")


@pytest.fixture
def options(tiny_model_folder: Path, tmp_path: Path) -> dict[str, Any]:
    """Eight pairs of answers, a method's file of them, and options of a short run in fp32."""
    lines = [
        {"prompt": f"{'really ' * (i % 3)}{i}?", "chosen": WORDS[i], "rejected": WORDS[(i + 3) % 8]} for i in range(8)
    ]
    file = tmp_path / "pairs.jsonl"
    file.write_text("".join(json.dumps(line) + "\n" for line in lines))
    return {
        "model": str(tiny_model_folder),
        "data": str(file),
        "output": tmp_path / "run",
        "preset": "quick",
        "sample_prompts": [],
        "eval_samples": 0,
        "rank": 8,
        "batch_size": 2,
        "gradient_accumulation_steps": 2,
        "learning_rate": 1e-2,
        "optimizer": "adamw_torch",
        "compute_dtype": "float32",
        "group_by_length": False,
    }


def steps_of(run: Path) -> list[StepMetrics]:
    return [event for event in read_events(run / "metrics.jsonl") if isinstance(event, StepMetrics)]


def both(figures: dict[str, float]) -> bool:
    return {"rewards/chosen", "rewards/rejected"} <= figures.keys()


def difference(figures: dict[str, float]) -> float:
    return figures["rewards/chosen"] - figures["rewards/rejected"]


THEIRS: dict[str, tuple[Any, Any]] = {
    "dpo": (trl.DPOTrainer, trl.DPOConfig),
    "kto": (trl.KTOTrainer, trl.KTOConfig),
    "orpo": (orpo.ORPOTrainer, orpo.ORPOConfig),
}


def theirs(method: str, config: TrainConfig, rows: list[dict[str, Any]], steps: int, **options: Any) -> Any:
    """TRL's trainer after its run over a dense fp32 copy of the same base, with the same first adapter and order."""
    quantized = build_model(config)
    adapter = {name: x.clone() for name, x in get_peft_model_state_dict(quantized).items()}
    base = hf.load(config.model, quantization_config=hf.HalfbyteConfig(compute_dtype=torch.float32))
    dense = copy.deepcopy(base).dequantize(torch.float32).float()
    lora = quantized.peft_config["default"]
    trainer_class, config_class = THEIRS[method]
    order = list(ours.EpochSampler(np.ones(len(rows), np.int8), None, config.seed))

    trainer = trainer_class(
        model=dense,
        peft_config=lora,
        args=config_class(
            output_dir=str(config.output.with_name("theirs")),
            per_device_train_batch_size=config.batch_size,
            gradient_accumulation_steps=config.gradient_accumulation_steps,
            learning_rate=config.learning_rate,
            lr_scheduler_type="linear",
            max_steps=steps,
            max_grad_norm=config.max_grad_norm,
            adam_beta2=config.adam_beta2,
            train_sampling_strategy="sequential",
            activation_checkpointing=False,
            bf16=False,
            use_cpu=True,
            logging_steps=1,
            save_strategy="no",
            report_to="none",
            disable_tqdm=True,
            optim="adamw_torch",
            **options,
        ),
        train_dataset=Dataset.from_list([rows[place] for place in order]),
        processing_class=hf.load_tokenizer(config.model),
    )
    set_peft_model_state_dict(trainer.model, adapter)
    trainer.train()
    return trainer


@pytest.mark.parametrize(
    ("method", "own"),
    [
        ("dpo", {}),
        ("dpo", {"loss_type": "ipo", "beta": 0.3}),
        ("dpo", {"loss_type": "robust", "label_smoothing": 0.1, "precompute_ref_log_probs": True}),
        ("kto", {"desirable_weight": 1.5, "undesirable_weight": 0.7}),
        ("kto", {"loss_type": "apo_zero_unpaired"}),
        ("orpo", {"beta": 0.2}),
    ],
)
def test_the_losses_of_a_run_are_those_of_trl_s_trainer_over_the_dense_model(
    method: str, own: dict[str, Any], options: dict[str, Any]
) -> None:
    """Same adapter, no dropout, the base that holds the dequantized weights: what differs is the order of sums."""
    steps = 2
    config = TrainConfig(**(options | {"method": method, "max_steps": steps} | own))
    run = fine_tune(config)
    template = "<|im_start|>user\n{}<|im_end|>\n<|im_start|>assistant\n"
    lines = [json.loads(line) for line in Path(options["data"]).read_text().splitlines()]
    rows: list[dict[str, Any]] = [line | {"prompt": template.format(line["prompt"])} for line in lines]
    if method == "kto":
        sides = ("chosen", "rejected")
        rows = [
            {"prompt": row["prompt"], "completion": row[side], "label": side == "chosen"}
            for row in rows
            for side in sides
        ]
    more = {"loss_type": [own["loss_type"]]} if method == "dpo" and "loss_type" in own else {}
    more |= {} if method == "orpo" else {"disable_dropout": False}
    expected = theirs(method, config, rows, steps, **(own | more)).state.log_history
    found = steps_of(run.output)
    assert len(found) == steps
    for step, log in zip(found, expected, strict=False):  # the last one is the closing summary
        assert step.loss == pytest.approx(log["loss"], rel=1e-3)
        assert step.grad_norm == pytest.approx(log["grad_norm"], rel=1e-2)
        assert len(step.figures) >= 5
        if method == "kto" and both(log):
            log["rewards/margins"] = difference(log)  # TRL's is of the micro-batches that have answers of both kinds
        for name, value in step.figures.items():
            assert value == pytest.approx(log[name], rel=5e-3, abs=2e-4), name
    assert found[0].loss != found[1].loss


def interrupted(config: dict[str, Any], after: int) -> None:
    def listen(event: Any) -> None:
        if isinstance(event, StepMetrics) and event.step == after - 1:
            os.kill(os.getpid(), signal.SIGINT)

    with pytest.raises(Interrupted):
        fine_tune(TrainConfig(**config), listen)


@pytest.mark.parametrize(
    ("method", "own"),
    [
        ("dpo", {"precompute_ref_log_probs": True}),
        pytest.param("dpo", {"lora_dropout": 0.1}, marks=pytest.mark.slow),
        ("kto", {"optimizer": "paged_adamw_8bit"}),
        ("dpo", {"init_lora_weights": "loftq"}),
        pytest.param("kto", {"init_lora_weights": "loftq"}, marks=pytest.mark.slow),
        pytest.param("dpo", {"init_lora_weights": "orthogonal"}, marks=pytest.mark.slow),
        pytest.param("orpo", {"lora_dropout": 0.1}, marks=pytest.mark.slow),
        ("text", {"lora_dropout": 0.1, "max_length": 16}),
    ],
)
def test_a_resumed_run_is_bitwise_the_uninterrupted_one(
    method: str, own: dict[str, Any], options: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("halfbyte.optim.adamw.SMALLEST_8BIT", 64)  # so that these small layers have state in 8 bits
    options |= {"method": method, "epochs": 3, "group_by_length": True, **own}
    if method == "text":
        texts = Path(options["data"]).with_name("texts.jsonl")
        texts.write_text("".join(json.dumps({"text": word * 3}) + "\n" for word in WORDS))
        options["data"] = str(texts)
    whole = fine_tune(TrainConfig(**(options | {"output": tmp_path / "whole"})))
    interrupted(options, 3)
    resumed = fine_tune(TrainConfig(**options, resume=True))
    assert [path for path in whole.output.iterdir() if path.is_dir()] == []  # the reference's copy is not kept
    one, other = (load_file(run.output / "adapter_model.safetensors") for run in (whole, resumed))
    assert one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)
    timed = {"tokens_per_second", "elapsed", "memory_bytes"}
    assert [step.model_dump(exclude=timed) for step in steps_of(whole.output)] == [
        step.model_dump(exclude=timed) for step in steps_of(resumed.output)
    ]


@pytest.mark.parametrize("method", METHODS)
def test_a_run_learns_what_is_preferred_and_tells_it(method: str, options: dict[str, Any]) -> None:
    options |= {"method": method, "eval_data": options["data"], "epochs": 8, "eval_steps": 5}
    run = fine_tune(TrainConfig(**options))
    events = [event for event in read_events(run.output / "metrics.jsonl") if isinstance(event, Evaluation)]
    steps = steps_of(run.output)[-1].step
    assert [event.step for event in events] == [*range(0, steps, 5), steps]  # before, between and after
    first, last = events[0].figures, events[-1].figures
    assert last["loss"] < first["loss"] and last["rewards/margins"] > first["rewards/margins"] + 0.02
    assert all(
        event.figures["rewards/margins"] == pytest.approx(difference(event.figures), abs=1e-5) for event in events
    )
    if method != "kto":
        assert last["rewards/accuracies"] > max(first["rewards/accuracies"], 0.7)
    summary = json.loads((run.output / "summary.json").read_text())
    tail = [step.figures["rewards/margins"] for step in steps_of(run.output)[-10:] if both(step.figures)]
    assert summary["figures"]["rewards/margins"] == pytest.approx(sum(tail) / len(tail))
    # trained tokens: both answers of each pair with their stops, each one token a character
    letters = sum(len(WORDS[i]) + len(WORDS[(i + 3) % 8]) + 2 for i in range(8))
    assert summary["trained_tokens"] == 8 * letters

    assert not (run.output / "ref").exists()
    base = AutoModelForCausalLM.from_pretrained(options["model"], dtype=torch.float32)
    tokenizer = hf.load_tokenizer(options["model"])
    pairs = data.tokenize(data.read_examples(options["data"]), tokenizer, 512, form="pairs").rows
    batch = data.PairCollator(0)(pairs)
    labels = batch["input_ids"].masked_fill(batch["completion_mask"] == 0, -100)

    def margins(model: Any) -> Tensor:
        """How much likelier each better answer is, by PEFT's and transformers' own code, in nats."""
        with torch.no_grad():
            logits = model(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"]).logits[:, :-1]
        scores = logits.log_softmax(-1).gather(2, labels[:, 1:].clamp(min=0)[..., None])[..., 0]
        answers = labels[:, 1:] != -100
        sums = (scores * answers).sum(1)
        sums = sums / answers.sum(1) if method == "orpo" else sums  # of which the method takes the mean
        return sums[:8] - sums[8:]

    before = margins(base)
    after = margins(PeftModel.from_pretrained(base, run.output))
    assert (after > before).float().mean() > 0.7 and after.mean() > before.mean()


def test_the_reference_may_be_computed_once_and_is_the_base_without_a_copy(
    options: dict[str, Any], tmp_path: Path
) -> None:
    options |= {"method": "dpo", "max_steps": 3}
    switched, once = (
        fine_tune(TrainConfig(**(options | {"output": tmp_path / str(early), "precompute_ref_log_probs": early})))
        for early in (False, True)
    )
    for one, other in zip(steps_of(switched.output), steps_of(once.output), strict=True):
        assert one.loss == pytest.approx(other.loss, rel=1e-4)
    assert steps_of(once.output)[0].loss == pytest.approx(np.log(2), rel=1e-5)


@pytest.mark.filterwarnings("ignore:You have requested `ensure_weight_tying`")  # PEFT's, of the copy
def test_what_pissa_subtracts_is_no_part_of_the_reference_s_copy(options: dict[str, Any]) -> None:
    options |= {"init_lora_weights": "pissa", "modules_to_save": "embed_tokens", "max_steps": 1}
    [step] = steps_of(fine_tune(TrainConfig(**options, method="dpo")).output)
    # the first step's model is its own reference: -log sigmoid(0)
    assert step.loss == pytest.approx(math.log(2), rel=1e-5)


def pair_trainer(model: Any, folder: Path, tokenizer: Any, rows: list[dict[str, Any]], **arguments: Any) -> Any:
    args = ours.DPOConfig(output_dir=str(folder), max_steps=1, report_to="none", disable_tqdm=True, **arguments)
    return ours.DPOTrainer(model=model, args=args, train_dataset=Dataset.from_list(rows), processing_class=tokenizer)


def test_a_trained_adapter_keeps_its_copy_as_reference(options: dict[str, Any], tmp_path: Path) -> None:
    config = TrainConfig(**options)
    tokenizer = hf.load_tokenizer(config.model)
    rows = [{"prompt": "a", "chosen": "b", "rejected": "c"}]
    fresh = pair_trainer(build_model(config), tmp_path, tokenizer, rows)
    assert list(fresh.model.peft_config) == ["default"]
    model = build_model(config)
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter, std=0.1)
    assert list(pair_trainer(model, tmp_path, tokenizer, rows).model.peft_config) == ["default", "ref"]


@pytest.mark.parametrize("method", ["dpo", "kto"])
def test_a_mixture_with_shared_experts_has_a_reference_too(
    method: str, options: dict[str, Any], tiny_model_folder: Path, tmp_path: Path
) -> None:
    folder = tmp_path / "mixture"
    shutil.copytree(tiny_model_folder, folder, ignore=shutil.ignore_patterns("*.safetensors", "config.json"))
    config = Qwen2MoeConfig(
        vocab_size=258, hidden_size=32, intermediate_size=48, num_hidden_layers=1, num_attention_heads=4,
        num_key_value_heads=2, num_experts=3, num_experts_per_tok=2, moe_intermediate_size=16,
        shared_expert_intermediate_size=16, router_aux_loss_coef=0.0, bos_token_id=None, eos_token_id=1, pad_token_id=1,
    )  # fmt: skip
    AutoModelForCausalLM.from_config(config).save_pretrained(folder)
    options |= {"model": str(folder), "method": method, "max_steps": 2}
    first = fine_tune(TrainConfig(**options)).output
    del options["rank"]
    again = fine_tune(TrainConfig(**options | {"adapter": first, "output": tmp_path / "again"})).output
    for run in (first, again):  # which begins as its reference
        assert steps_of(run)[0].loss == pytest.approx({"dpo": math.log(2), "kto": 0.5}[method], abs=1e-4)
        names = load_file(run / "adapter_model.safetensors")
        assert any(".shared_expert.gate_proj.lora_B" in name for name in names)
        assert not any(".ref" in name for name in names)


def test_an_evaluation_is_the_mean_over_pairs_the_first_one_and_those_after_it(
    options: dict[str, Any], tmp_path: Path
) -> None:
    config = TrainConfig(**options)
    tokenizer, model = hf.load_tokenizer(config.model), build_model(config)
    rows = [{"prompt": "why?", "chosen": WORDS[i], "rejected": WORDS[(i + 3) % 8]} for i in range(4)]
    trainer = pair_trainer(model, tmp_path, tokenizer, rows, per_device_eval_batch_size=3, dataloader_pin_memory=False)
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter, std=0.1)
    evaluated = trainer.train_dataset
    losses = [trainer.evaluate(evaluated)["eval_loss"] for _ in range(2)]
    alone = [trainer.evaluate(evaluated.select([i]))["eval_loss"] for i in range(4)]
    assert np.std(alone) > 0.01
    assert losses == pytest.approx([np.mean(alone)] * 2, rel=1e-4)


class Largest(TorchDispatchMode):
    """Remembers the largest tensor that any operation has made, in bytes."""

    def __init__(self) -> None:
        super().__init__()
        self.bytes = 0

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = function(*args, **(kwargs or {}))
        for tensor in result if isinstance(result, (tuple, list)) else [result]:
            if isinstance(tensor, Tensor):
                self.bytes = max(self.bytes, tensor.numel() * tensor.element_size())
        return result


@pytest.mark.parametrize("method", METHODS)
def test_no_step_holds_the_logits_of_its_tokens(method: str, options: dict[str, Any], tmp_path: Path) -> None:
    vocabulary, length, pairs = 20_000, 100, 2
    folder = tmp_path / "wide"
    tokenizer = hf.load_tokenizer(options["model"])
    torch.manual_seed(0)
    small = LlamaConfig(
        vocab_size=vocabulary, hidden_size=32, intermediate_size=64, num_hidden_layers=1, num_attention_heads=2,
        num_key_value_heads=2, bos_token_id=None, eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )  # fmt: skip
    LlamaForCausalLM(small).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    letters = np.random.default_rng(0).choice(list("abcdefgh"), (2 * pairs, length))
    answers = ["".join(row) for row in letters]
    lines = [{"prompt": "a", "chosen": answers[2 * i], "rejected": answers[2 * i + 1]} for i in range(pairs)]
    Path(options["data"]).write_text("".join(json.dumps(line) + "\n" for line in lines))
    options |= {"model": str(folder), "method": method, "max_steps": 1, "batch_size": 2 * pairs}
    with Largest() as largest:
        fine_tune(TrainConfig(**options))
    weight, logits = vocabulary * 32 * 4, 2 * pairs * length * vocabulary * 4
    assert 0 < largest.bytes <= 2 * weight < logits / 5


BAD: list[tuple[str, dict[str, Any], str]] = [
    ("dpo", {"prompt": "a", "completion": "b"}, "is a Completion, but method dpo learns from Preference rows"),
    ("dpo", {"prompt": "a", "completion": "b", "label": True}, "is a Judged, but method dpo learns from Preference"),
    ("orpo", {"text": "a"}, "is a Text, but method orpo learns from Preference rows"),
    ("kto", {"text": "a"}, "is a Text, but method kto learns from Judged or Preference rows"),
    ("text", {"prompt": "a", "completion": "b"}, "is a Completion, but method text learns from Text rows"),
    ("kto", {"prompt": "a", "completion": "b", "label": False}, "All 1 answers are judged bad"),
    ("dpo", {"prompt": "a", "chosen": "b", "rejected": "b"}, "chosen and a rejected answer that are alike"),
    ("dpo", {"prompt": "a" * 80, "chosen": "b", "rejected": "c"}, "its prompt alone takes 99 tokens"),
    ("kto", {"prompt": "a" * 80, "completion": "b", "label": True}, "its prompt alone takes 99 tokens"),
    ("dpo", {"prompt": "a" * 22, "chosen": "bcdefghij" * 9 + "k", "rejected": "bcdefghij" * 9 + "l"}, "alike as they"),
]


@pytest.mark.parametrize(("method", "row", "sentence"), BAD)
def test_rows_that_a_method_cannot_learn_from_are_told(
    method: str, row: dict[str, Any], sentence: str, options: dict[str, Any]
) -> None:
    Path(options["data"]).write_text(json.dumps(row))
    with pytest.raises(InputError, match=sentence):
        fine_tune(TrainConfig(**(options | {"method": method, "max_length": 64})))
    assert not options["output"].exists()


def test_options_that_do_not_go_together_are_told(options: dict[str, Any]) -> None:
    def refused(sentence: str, **more: Any) -> None:
        with pytest.raises(InputError, match=sentence):
            given = {name: str(value) if name == "output" else value for name, value in (options | more).items()}
            fine_tune(TrainConfig.from_yaml(None, given))
        assert not options["output"].exists()

    refused("'beta' belongs to method dpo and kto and orpo, but the method is sft", beta=0.2)
    refused("'desirable_weight' belongs to method kto", method="dpo", desirable_weight=2)
    refused("'train_on' says nothing to method dpo", method="dpo", train_on="last")
    refused("method dpo has no loss_type kto; it has sigmoid", method="dpo", loss_type="kto")
    refused("loss_type.*sigmoid.*kto", method="dpo", loss_type="nonsense")
    refused("label_smoothing belongs to loss_type robust.* but the loss is sigmoid", method="dpo", label_smoothing=0.1)
    refused("exo_pair needs a label_smoothing", method="dpo", loss_type="exo_pair")
    refused("packing is not for method dpo", method="dpo", packing=True)
    refused("'train_on' says nothing to method orpo", method="orpo", train_on="last")
    refused("'thinking' says nothing to method text", method="text", thinking="off")
    refused("bias 'all' does not go with method dpo: biases are the base's", method="dpo", bias="all")
    refused("batch_size is 1, but method kto", method="kto", batch_size=1)


def test_a_method_has_its_learning_rate_unless_one_is_given(options: dict[str, Any]) -> None:
    del options["learning_rate"], options["preset"]
    assert TrainConfig(**options).learning_rate == 2e-4
    assert TrainConfig(**options, method="dpo").learning_rate == 5e-6
    assert TrainConfig(**options, method="dpo").lora_dropout == 0
    assert TrainConfig(**options, method="orpo", preset="paper").learning_rate == 8e-5
    assert TrainConfig(**options, method="dpo", learning_rate=1e-3).learning_rate == 1e-3
    assert TrainConfig(**options, method="kto", preset="quick").learning_rate == 5e-5
    assert TrainConfig(**options, method="dpo", lora_dropout=0.1).lora_dropout == 0.1


def test_the_model_opens_and_answers(options: dict[str, Any]) -> None:
    run = fine_tune(TrainConfig(**options, method="orpo", max_steps=1))
    assert isinstance(halfbyte.load(run.output), PeftModel)

"""Adapters of every kind through whole runs: what PEFT opens, what resumes, what is refused."""

import json
import os
import shutil
import signal
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import AutoPeftModelForCausalLM, LoraConfig, PeftModel, get_peft_model
from peft.optimizers import create_loraplus_optimizer
from safetensors.torch import load_file
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaConfig, LlamaForCausalLM

import halfbyte
from halfbyte import hf
from halfbyte.errors import InputError
from halfbyte.hf.layers.eva import begin_with_eva, eva_config
from halfbyte.hf.layers.lora_config import lora_config
from halfbyte.hf.models.new_tokens import add_tokens, give_rows
from halfbyte.runs.events import Event, Note, StepMetrics
from halfbyte.train import Interrupted, TrainConfig, fine_tune
from halfbyte.train.build import build_model, build_optimizer

FP32 = {"quantization_config": halfbyte.HalfbyteConfig(compute_dtype="float32")}
ANSWERS = ["yes", "no, <never>", "perhaps on Sunday", "ask again"]
NEW = {"new_tokens": ["<never>", "really"]}
KINDS: dict[str, dict[str, Any]] = {
    "many": {
        "use_dora": True,
        "use_rslora": True,
        "loraplus_lr_ratio": 4,
        "rank_pattern": "q_proj=4,layers.1.mlp.*=2",
        "alpha_pattern": {"q_proj": 3},
        "layers_to_transform": "0-1",
        "exclude_modules": "o_proj",
        "neftune_noise_alpha": 5,
        "lora_dropout": 0.1,
        "weight_decay": 0.1,
    }
    | NEW,
    "pissa": {"init_lora_weights": "pissa_niter_2", "weight_decay": 0.1} | NEW,
    "olora": {"init_lora_weights": "olora", "rank_pattern": {"up_proj": 2}},
    "loftq": {"init_lora_weights": "loftq", "use_dora": True},
    "eva": {"init_lora_weights": "eva", "rank": 4},
    "whole": {"modules_to_save": "embed_tokens", "lora_dropout": 0.1},
    "head": {"modules_to_save": ["lm_head"], "bias": "lora_only", "init_lora_weights": "orthogonal"},
}
UNTIED = ("head", "pissa")
QUICK = ("many", "pissa")


@pytest.fixture(scope="module")
def untied_folder(tiny_model_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The tiny model with a head of its own and biases."""
    folder = tmp_path_factory.mktemp("models") / "untied"
    shutil.copytree(tiny_model_folder, folder)
    with torch.random.fork_rng():
        torch.manual_seed(1)
        config = LlamaConfig.from_pretrained(folder, tie_word_embeddings=False, attention_bias=True)
        AutoModelForCausalLM.from_config(config).to(torch.bfloat16).save_pretrained(folder)
    return folder


@pytest.fixture
def options(tiny_model_folder: Path, tmp_path: Path) -> dict[str, Any]:
    file = tmp_path / "rows.jsonl"
    rows = [{"instruction": f"{'really ' * (i % 4)}{i}?", "output": ANSWERS[i % 4]} for i in range(13)]
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return {
        "model": str(tiny_model_folder),
        "data": str(file),
        "output": tmp_path / "run",
        "preset": "quick",
        "sample_prompts": [],
        "eval_samples": 0,
        "rank": 8,
        "batch_size": 2,
        "learning_rate": 5e-3,
        "max_steps": 4,
        "compute_dtype": "float32",
        "optimizer": "adamw_torch",
    }


def with_kind(options: dict[str, Any], kind: str, untied_folder: Path) -> dict[str, Any]:
    return options | KINDS[kind] | ({"model": str(untied_folder)} if kind in UNTIED else {})


def logits(model: Any, ids: list[int]) -> Tensor:
    with torch.no_grad():
        found: Tensor = model.eval()(input_ids=torch.tensor([ids])).logits
    return found


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize(
    "kind", [kind if kind in QUICK else pytest.param(kind, marks=pytest.mark.slow) for kind in KINDS]
)
def test_a_resumed_run_is_bitwise_the_whole_one_and_opens_in_plain_peft(
    kind: str, options: dict[str, Any], untied_folder: Path, tmp_path: Path
) -> None:
    options = with_kind(options, kind, untied_folder)
    losses: list[float] = []
    keep = lambda event: losses.append(event.loss) if isinstance(event, StepMetrics) else None  # noqa: E731
    whole = fine_tune(TrainConfig(**options), keep).output
    with pytest.raises(Interrupted):
        fine_tune(TrainConfig(**(options | {"output": tmp_path / "parts", "save_steps": 1})), stop_after(2))
    assert (tmp_path / "parts" / "checkpoints").is_dir()
    parts = fine_tune(TrainConfig(**(options | {"output": tmp_path / "parts", "save_steps": 1, "resume": True}))).output
    one, other = (load_file(folder / "adapter_model.safetensors") for folder in (whole, parts))
    assert one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)
    assert (whole / "adapter_config.json").read_text() == (parts / "adapter_config.json").read_text()
    assert losses[-1] < losses[0]

    tokenizer = AutoTokenizer.from_pretrained(whole)
    ids = tokenizer("<never> really 3?")["input_ids"]
    ours = logits(halfbyte.load(whole, **FP32), ids)
    dense = halfbyte.load(options["model"], **FP32).dequantize(torch.float32).float()
    before = logits(dense, [5, 6, 7])
    if "new_tokens" in options:
        assert ids[0] == len(tokenizer) - 2 and ids[2] == ids[0] + 1
        dense.resize_token_embeddings(len(tokenizer))
        held = {name: tensor.shape for name, tensor in one.items() if "embed" in name or "head" in name}
        assert set(held.values()) == {(2, 32)}, held  # no whole embedding is saved
    opened = PeftModel.from_pretrained(dense, whole)
    torch.testing.assert_close(logits(opened, ids), ours, rtol=1e-3, atol=1e-3)
    after = logits(opened, [5, 6, 7])[..., : before.shape[-1]]
    assert (after - before).norm() > 1e-2 * before.norm()  # and it has learned something


def stop_after(step: int) -> Any:
    """A listener that interrupts the run as Ctrl-C does, in the step after this one."""

    def listen(event: Event) -> None:
        if isinstance(event, StepMetrics) and event.step == step - 1:
            os.kill(os.getpid(), signal.SIGINT)

    return listen


@pytest.mark.filterwarnings("ignore")
def test_a_folder_with_new_tokens_opens_as_peft_opens_models_by_themselves(options: dict[str, Any]) -> None:
    output = fine_tune(TrainConfig(**(options | NEW))).output
    ids = AutoTokenizer.from_pretrained(output)("<never> really")["input_ids"]
    opened = AutoPeftModelForCausalLM.from_pretrained(output, dtype=torch.float32)
    ours = logits(halfbyte.load(output, **FP32), ids)
    assert logits(opened, ids).shape == ours.shape
    # 16 bits under the one and 4 under the other
    assert torch.nn.functional.cosine_similarity(logits(opened, ids).flatten(), ours.flatten(), 0) > 0.95
    assert "<never>" in hf.load_tokenizer(output).get_vocab()
    # both tokens are in the data, and their rows have learned from it
    before = AutoModelForCausalLM.from_pretrained(options["model"]).get_input_embeddings().weight.float()
    pieces = [hf.load_tokenizer(options["model"])(token)["input_ids"] for token in NEW["new_tokens"]]
    [rows] = [x for name, x in load_file(output / "adapter_model.safetensors").items() if "tokens_delta" in name]
    for row, own in zip(rows, pieces, strict=True):
        assert 1e-3 < (row - before[own].mean(0)).abs().max() < 0.1  # four steps of 5e-3 at the most


def test_rows_that_an_embedding_has_to_spare_are_taken_first(options: dict[str, Any], tmp_path: Path) -> None:
    """As in models whose vocabulary is padded; here one that is mapped from a 4-bit folder."""
    wide, four = tmp_path / "wide", tmp_path / "four"
    shutil.copytree(options["model"], wide)
    config = LlamaConfig.from_pretrained(wide, vocab_size=264)
    AutoModelForCausalLM.from_config(config).to(torch.bfloat16).save_pretrained(wide)
    hf.quantize_checkpoint(wide, four)
    file = (four / "model.safetensors").read_bytes()
    output = fine_tune(TrainConfig(**(options | NEW | {"model": str(four)}))).output
    assert (four / "model.safetensors").read_bytes() == file
    held = {n: x.shape for n, x in load_file(output / "adapter_model.safetensors").items() if "lora" not in n}
    assert set(held.values()) == {(2, 32)}
    ids = AutoTokenizer.from_pretrained(output)("<never> really")["input_ids"]
    opened = PeftModel.from_pretrained(halfbyte.load(four, **FP32).dequantize(torch.float32).float(), output)
    found = logits(halfbyte.load(output, **FP32), ids)
    assert found.shape[-1] == 264
    torch.testing.assert_close(logits(opened, ids), found, rtol=1e-3, atol=1e-3)


def test_a_new_row_begins_as_the_mean_of_its_pieces(options: dict[str, Any], untied_folder: Path) -> None:
    for folder in (options["model"], untied_folder):
        model, tokenizer = halfbyte.load(folder, **FP32), hf.load_tokenizer(folder)
        pieces = tokenizer("<never>")["input_ids"]
        embedding, head = (x.weight.clone() for x in (model.get_input_embeddings(), model.get_output_embeddings()))
        [token] = add_tokens(tokenizer, ["<never>"])
        rows = give_rows(model, [token])
        assert token.pieces == pieces and len(pieces) == 7
        tied = folder == options["model"]
        assert rows == {name: [token.id] for name in ("model.embed_tokens", "lm_head")[: 1 if tied else 2]}
        for module, before in ((model.get_input_embeddings(), embedding), (model.get_output_embeddings(), head)):
            assert torch.equal(module.weight[: len(before)], before)
            torch.testing.assert_close(module.weight[token.id], before[pieces].mean(0))


def test_dora_begins_as_the_base_in_16_bits_too(options: dict[str, Any]) -> None:
    config = TrainConfig(**(options | {"use_dora": True, "compute_dtype": "bfloat16"}))
    expected = logits(halfbyte.load(options["model"]), [1, 2, 3, 4])
    model = build_model(config)
    assert (logits(model, [1, 2, 3, 4]) - expected).norm() < 0.02 * expected.norm()
    for layer in model.modules():
        if isinstance(layer, hf.LoraLinear4bit):
            exact = layer.base_layer.quantized_weight.dequantize(torch.float32).norm(dim=1)
            torch.testing.assert_close(layer.lora_magnitude_vector["default"].weight, exact, rtol=1e-5, atol=0)


def test_loraplus_groups_are_pefts_with_the_run_s_decay(options: dict[str, Any], tmp_path: Path) -> None:
    config = TrainConfig(**(options | {"loraplus_lr_ratio": 16, "weight_decay": 0.1, "use_dora": True}))
    model = build_model(config)
    ours = build_optimizer(config, model, tmp_path)
    theirs = create_loraplus_optimizer(
        model, torch.optim.AdamW, lr=config.learning_rate, loraplus_lr_ratio=16, loraplus_weight_decay=0.1
    )
    expected = {id(p): (group["lr"], group["weight_decay"]) for group in theirs.param_groups for p in group["params"]}
    got = {id(p): (group["lr"], group["weight_decay"]) for group in ours.param_groups for p in group["params"]}
    assert got == expected and len(got) == sum(p.requires_grad for p in model.parameters()) == 14 * 3
    names = {id(p): name for name, p in model.named_parameters()}
    assert all((rate == 16 * 5e-3) == ("lora_A" not in names[key]) for key, (rate, _) in got.items())


@pytest.mark.filterwarnings("ignore:Unable to fetch remote file")
@pytest.mark.parametrize(
    "begun",
    [
        NEW | {"use_dora": True, "use_rslora": True},
        pytest.param({"init_lora_weights": "pissa_niter_2"}, marks=pytest.mark.slow),
        pytest.param({"modules_to_save": "embed_tokens", "bias": "all"}, marks=pytest.mark.slow),
    ],
)
def test_training_on_begins_where_the_adapter_is(
    begun: dict[str, Any], options: dict[str, Any], tmp_path: Path
) -> None:
    first = fine_tune(TrainConfig(**(options | begun))).output
    losses: list[StepMetrics] = []
    more = options | {"adapter": first, "output": tmp_path / "more", "learning_rate": 1e-9, "max_steps": 1}
    more.pop("rank")
    keep = lambda event: losses.append(event) if isinstance(event, StepMetrics) else None  # noqa: E731
    again = fine_tune(TrainConfig(**more), keep).output
    one, other = (load_file(folder / "adapter_model.safetensors") for folder in (first, again))
    assert one.keys() == other.keys()
    for name, tensor in one.items():
        torch.testing.assert_close(other[name], tensor, rtol=0, atol=1e-7)
    assert any(not torch.equal(other[name], tensor) for name, tensor in one.items())
    assert len(AutoTokenizer.from_pretrained(again)) == len(AutoTokenizer.from_pretrained(first))
    configs = [json.loads((folder / "adapter_config.json").read_text()) for folder in (first, again)]
    targets = [sorted(config.pop("target_modules")) for config in configs]  # PEFT writes a set
    assert configs[0] == configs[1] and targets[0] == targets[1]
    assert bool(configs[0]["trainable_token_indices"]) == configs[0]["use_dora"] == ("use_dora" in begun)


@pytest.mark.filterwarnings("ignore")
def test_an_adapter_of_peft_s_own_is_trained_on(options: dict[str, Any], tmp_path: Path) -> None:
    base = AutoModelForCausalLM.from_pretrained(options["model"])
    get_peft_model(base, LoraConfig(r=3, target_modules=["q_proj"], task_type="CAUSAL_LM")).save_pretrained(
        tmp_path / "a"
    )
    rank = options.pop("rank")
    output = fine_tune(TrainConfig(**(options | {"adapter": tmp_path / "a"}))).output
    assert {
        tensor.shape[0] for name, tensor in load_file(output / "adapter_model.safetensors").items() if "_A" in name
    } == {3}
    assert "<never>" not in AutoTokenizer.from_pretrained(output).get_vocab()
    for wrong, words in (
        ({"rank": rank}, "rank 8"),
        ({"rank": 16}, "rank 16"),
        ({"lora_alpha": 32}, "lora_alpha 32.0"),
    ):
        with pytest.raises(InputError, match=rf"{words} is not that of the adapter .*, which is \d; leave \w+ away"):
            fine_tune(TrainConfig(**(options | wrong | {"adapter": tmp_path / "a", "output": tmp_path / "b"})))
    saved = TrainConfig.from_yaml(output / "config.yaml", {"output": tmp_path / "b"})
    assert not {"rank", "lora_alpha", "lora_dropout", "target_modules"} & saved.model_fields_set
    other = tmp_path / "other"
    shutil.copytree(options["model"], other)
    config = LlamaConfig.from_pretrained(other, hidden_size=64)
    AutoModelForCausalLM.from_config(config).save_pretrained(other)
    wrong = options | {"model": str(other), "adapter": tmp_path / "a", "output": tmp_path / "c"}
    with pytest.raises(InputError, match=r"does not fit the base model .*lora_A.weight is \[3, 32\] and should be"):
        fine_tune(TrainConfig(**wrong))
    assert not (tmp_path / "c").exists()


def test_an_adapter_of_another_base_is_refused_or_told(options: dict[str, Any], tmp_path: Path) -> None:
    first = fine_tune(TrainConfig(**options)).output
    more = {key: value for key, value in options.items() if key != "rank"} | {"adapter": first, "max_steps": 1}

    def base(name: str, **change: Any) -> dict[str, Any]:
        folder = tmp_path / name
        shutil.copytree(options["model"], folder)
        if change:
            about = json.loads((folder / "config.json").read_text()) | change
            (folder / "config.json").write_text(json.dumps(about))
        return more | {"model": str(folder), "output": tmp_path / f"over {name}"}

    mistral = base("mistral", model_type="mistral", architectures=["MistralForCausalLM"])
    with pytest.raises(
        InputError, match=r"was trained over \S+, whose model_type is 'llama' and not 'mistral'; name that"
    ):
        fine_tune(TrainConfig(**mistral))
    assert not mistral["output"].exists()
    with pytest.raises(InputError, match=r"whose rms_norm_eps is 1e-06 and not 0\.01"):
        fine_tune(TrainConfig(**base("norms", rms_norm_eps=0.01)))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        fine_tune(TrainConfig(**base("copy")))
    other = base("other")
    AutoModelForCausalLM.from_config(LlamaConfig.from_pretrained(other["model"])).save_pretrained(other["model"])
    with pytest.raises(
        InputError, match=r"was trained on another base model \(tiny\) than \S+other: of 20 tensors model"
    ):
        fine_tune(TrainConfig(**other))
    assert not other["output"].exists()
    shutil.copytree(first, tmp_path / "unknown")
    (tmp_path / "unknown" / "base_fingerprint.json").unlink()
    with pytest.warns(UserWarning, match=r"was trained over \S+tiny, and this run trains it on over \S+other"):
        fine_tune(TrainConfig(**(other | {"adapter": tmp_path / "unknown"})))
    with pytest.warns(UserWarning, match="over a base in quant_type nf4, and this run holds it in int8"):
        fine_tune(TrainConfig(**(more | {"quant_type": "int8", "output": tmp_path / "int8"})))


def test_biases_that_were_trained_leave_no_reference(
    options: dict[str, Any], untied_folder: Path, tmp_path: Path
) -> None:
    options |= {"model": str(untied_folder), "max_steps": 1}
    first = fine_tune(TrainConfig(**(options | {"bias": "all"}))).output
    pairs = tmp_path / "pairs.jsonl"
    pairs.write_text(json.dumps({"prompt": "a", "chosen": "b", "rejected": "c"}))
    del options["rank"]
    options |= {"adapter": first, "method": "dpo", "data": str(pairs), "output": tmp_path / "dpo"}
    with pytest.raises(InputError, match=r"has trained biases, .* method dpo has no reference"):
        fine_tune(TrainConfig(**options))


def test_noise_is_drawn_in_training_alone_and_rows_are_padded(options: dict[str, Any], tmp_path: Path) -> None:
    seen: list[Event] = []
    quiet = fine_tune(TrainConfig(**(options | {"max_steps": 1})), seen.append)
    loud = fine_tune(
        TrainConfig(**(options | {"max_steps": 1, "neftune_noise_alpha": 50, "output": tmp_path / "b"})), seen.append
    )
    assert next(event.loss for event in seen if isinstance(event, StepMetrics)) != loud.summary.loss
    assert sum(isinstance(event, Note) and event.text.startswith("Packing") for event in seen) <= 1
    assert quiet.summary.trained_parameters == loud.summary.trained_parameters


def test_whole_modules_are_trained_in_fp32(options: dict[str, Any]) -> None:
    config = TrainConfig(**(options | {"modules_to_save": "embed_tokens", "compute_dtype": "bfloat16"}))
    output = fine_tune(config).output
    held = {name: x for name, x in load_file(output / "adapter_model.safetensors").items() if "lora" not in name}
    assert (
        held and {x.dtype for x in held.values()} == {torch.float32} and {x.shape for x in held.values()} == {(258, 32)}
    )
    before = AutoModelForCausalLM.from_pretrained(options["model"]).get_input_embeddings().weight
    moved = next(iter(held.values())) - before.float()
    assert 0 < moved.abs()[moved != 0].min() < 2**-12  # steps that bf16 would have lost
    assert torch.isfinite(logits(halfbyte.load(output), [1, 2, 3])).all()


@pytest.mark.parametrize("targets", ["all-linear", ["q_proj", "up_proj"]])
def test_layers_that_are_named_are_the_only_ones(targets: Any) -> None:
    shape = {"hidden_size": 32, "intermediate_size": 48, "num_attention_heads": 2, "vocab_size": 32}
    model = LlamaForCausalLM(LlamaConfig(**shape, num_hidden_layers=4))
    config = lora_config(model, rank=4, lora_alpha=8, target_modules=targets, layers_to_transform=[1, 3])
    adapted = get_peft_model(model, config)
    numbers = {name.split(".layers.")[1][0] for name, _ in adapted.named_parameters() if "lora_" in name}
    assert numbers == {"1", "3"}


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"rank": 17}, r"rank 17 is larger than the layer \S+k_proj, of 16 by 32; .* rank_pattern k_proj=16"),
        ({"rank_pattern": "q_prok=4"}, r"rank_pattern 'q_prok' matches no layer that gets LoRA .did you mean 'q_proj'"),
        ({"alpha_pattern": "lm_head=4"}, r"alpha_pattern 'lm_head' matches no layer that gets LoRA"),
        ({"rank_pattern": {"(q": 4}}, r"rank_pattern '\(q' is no regular expression"),
        ({"modules_to_save": "lm_heat"}, r"modules_to_save 'lm_heat' matches no module .*did you mean 'lm_head'"),
        ({"modules_to_save": "q_proj"}, r"modules_to_save 'q_proj' matches \S+, which holds frozen quantized weights"),
        ({"modules_to_save": "act_fn"}, r"modules_to_save 'act_fn' matches \S+, which has nothing to train"),
        ({"exclude_modules": "mlp"}, r"exclude_modules 'mlp' matches model.layers.0.mlp, which is no layer but holds"),
        ({"exclude_modules": "o_prjo"}, r"exclude_modules 'o_prjo' matches no module of the model .did you mean"),
        ({"layers_to_transform": "1,2"}, r"layers_to_transform 2 matches no layer of the model, counted from 0"),
        ({"layers_to_transform": "1", "target_modules": ".*q_proj"}, r"layers_to_transform does not go with"),
        ({"new_tokens": ["Q"]}, r"new_tokens 'Q' is a token already \(id \d+\); leave it out"),
        ({"init_lora_weights": "orthogonal", "rank": 3}, r"needs an even rank"),
        ({"adapter": "/nowhere"}, r"/nowhere holds no adapter"),
    ],
)
def test_what_fits_nothing_is_one_sentence_and_leaves_no_folder(
    change: dict[str, Any], words: str, options: dict[str, Any]
) -> None:
    with pytest.raises(InputError, match=words) as told:
        fine_tune(TrainConfig(**(options | change)))
    assert "\n" not in str(told.value) and not options["output"].exists()


@pytest.mark.parametrize("start", ["loftq", "pissa"])
def test_a_start_from_the_weights_over_layers_that_stay_dense(
    start: str, options: dict[str, Any], task_folder: Any, tmp_path: Path
) -> None:
    """T5's ``wo`` is never quantized: LoftQ has no residual there, PiSSA says how to leave it out."""
    rows = tmp_path / "rows.jsonl"
    rows.write_text("".join(json.dumps({"text": f"{i}?", "target": ANSWERS[i % 4]}) + "\n" for i in range(8)))
    options |= {"task": "seq2seq", "model": str(task_folder("t5")), "data": str(rows), "max_steps": 1, "rank": 4}
    options |= {"init_lora_weights": start}
    if start == "pissa":
        with pytest.raises(
            InputError, match=r"DenseReluDense\.wo \(Linear\) is none; leave it out with exclude_modules wo"
        ):
            fine_tune(TrainConfig(**options))
        options |= {"exclude_modules": "wo"}
    model = build_model(TrainConfig(**options)) if start == "pissa" else None
    output = fine_tune(TrainConfig(**options)).output
    kept = {name for name in load_file(output / "adapter_model.safetensors") if ".wo." in name}
    assert bool(kept) == (start == "loftq") and (model is None or hf.layers.starts.has_starts(model))


def test_loftq_over_a_4_bit_base_is_refused(options: dict[str, Any], tmp_path: Path) -> None:
    hf.quantize_checkpoint(Path(options["model"]), tmp_path / "four")
    with pytest.raises(InputError, match=r"needs the weights before they are quantized"):
        fine_tune(TrainConfig(**(options | {"model": str(tmp_path / "four"), "init_lora_weights": "loftq"})))


@pytest.mark.filterwarnings("ignore:lora with eva initialization used with low_cpu_mem_usage")
def test_eva_says_where_its_directions_cannot_be_found(options: dict[str, Any]) -> None:
    config = LoraConfig(
        r=8, target_modules=["q_proj"], task_type="CAUSAL_LM", init_lora_weights="eva", eva_config=eva_config([8], [32])
    )
    assert config.eva_config.rho == 2 and eva_config([8, 17], [32]).rho == 1
    model = get_peft_model(halfbyte.load(options["model"], **FP32), config)
    ids = torch.arange(14).view(1, 14)
    batch = {"input_ids": ids, "attention_mask": torch.ones_like(ids), "labels": ids}
    with pytest.raises(InputError, match=r"'eva' looks for 16 directions and found 14 tokens in a batch"):
        begin_with_eva(model, [batch])


@pytest.mark.filterwarnings("ignore:lora with eva initialization used with low_cpu_mem_usage")
def test_eva_spans_the_principal_directions_of_a_layer_s_inputs(options: dict[str, Any]) -> None:
    config = LoraConfig(
        r=4,
        target_modules=["q_proj"],
        task_type="CAUSAL_LM",
        init_lora_weights="eva",
        eva_config=eva_config([17], [32]),
    )
    model = get_peft_model(halfbyte.load(options["model"], **FP32), config)
    ids = torch.randint(0, 250, (4, 64), generator=torch.Generator().manual_seed(3))
    inputs: list[Tensor] = []
    layer = model.base_model.model.model.layers[0].self_attn.q_proj
    handle = layer.register_forward_hook(lambda _, x, y: inputs.append(x[0].detach().reshape(-1, 32)))
    model(input_ids=ids)
    handle.remove()
    begin_with_eva(model, [{"input_ids": ids, "attention_mask": torch.ones_like(ids), "labels": ids}])
    centred = inputs[0] - inputs[0].mean(0)
    a = layer.lora_A["default"].weight
    torch.testing.assert_close(a @ a.T, torch.eye(4), rtol=0, atol=1e-4)
    most = torch.linalg.svdvals(centred)[:4].square().sum()
    assert (centred @ a.T).square().sum() > 0.98 * most  # of any four directions, the most that can be
    assert not layer.lora_B["default"].weight.any()


@pytest.mark.filterwarnings("ignore:lora with eva initialization used with low_cpu_mem_usage")
def test_eva_begins_in_fp32_over_a_base_in_bf16(options: dict[str, Any]) -> None:
    """PEFT makes new matrices in the dtype of the model, whose small steps bf16 would lose."""
    output = fine_tune(
        TrainConfig(**(options | {"init_lora_weights": "eva", "rank": 2, "max_steps": 1, "compute_dtype": "bfloat16"}))
    ).output
    assert {x.dtype for x in load_file(output / "adapter_model.safetensors").values()} == {torch.float32}

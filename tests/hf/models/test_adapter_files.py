"""Adapter folders of every kind put on their base, and those that do not fit it: refused, and why."""

import copy
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from datasets import Dataset
from peft import LoraConfig, get_peft_model
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoTokenizer, GPT2Config, GPT2LMHeadModel, LlamaConfig

import halfbyte
from halfbyte.deploy.merge import merge
from halfbyte.errors import InputError
from halfbyte.hf.layers.adapters import KINDS
from halfbyte.hf.trainers import SFTConfig, SFTTrainer

IDS = torch.arange(5, 25).view(2, 10)
SOME = {"task_type": "CAUSAL_LM", "target_modules": ["q_proj", "down_proj"]}
ONE = {"task_type": "CAUSAL_LM", "target_modules": ["q_proj"]}
PROMPT = {"task_type": "CAUSAL_LM", "num_virtual_tokens": 4}
ADAPTERS: dict[str, Callable[[], Any]] = {
    "ADALORA": lambda: peft.AdaLoraConfig(**SOME, total_step=10, init_r=6, target_r=4),
    "ADAPTION_PROMPT": lambda: peft.AdaptionPromptConfig(task_type="CAUSAL_LM", adapter_len=4, adapter_layers=1),
    "BEFT": lambda: peft.BeftConfig(**ONE),
    "BOFT": lambda: peft.BOFTConfig(**SOME, boft_block_size=4),
    "C3A": lambda: peft.C3AConfig(**ONE, block_size=8),
    "CARTRIDGE": lambda: peft.CartridgeConfig(**PROMPT),
    "CPT": lambda: peft.CPTConfig(
        task_type="CAUSAL_LM", cpt_token_ids=[5, 6], cpt_mask=[1, 1], cpt_tokens_type_mask=[1, 1]
    ),
    "FOURIERFT": lambda: peft.FourierFTConfig(**SOME, n_frequency=20),
    "GRALORA": lambda: peft.GraloraConfig(**ONE, r=4),
    "IA3": lambda: peft.IA3Config(**SOME, feedforward_modules=["down_proj"], init_ia3_weights=False),
    "LILY": lambda: peft.LilyConfig(**ONE, r=4),
    "LN_TUNING": lambda: peft.LNTuningConfig(task_type="CAUSAL_LM", target_modules=["input_layernorm"]),
    "LORA": lambda: LoraConfig(**SOME, r=4, init_lora_weights=False),
    "LORA with biases": lambda: LoraConfig(**SOME, r=4, lora_bias=True, bias="all", init_lora_weights=False),
    "LORA, weight-decomposed": lambda: LoraConfig(**SOME, r=4, use_dora=True, init_lora_weights=False),
    "LORA, head alone": lambda: LoraConfig(
        task_type="CAUSAL_LM", r=4, target_modules=["lm_head"], init_lora_weights=False
    ),
    "LORA and tokens": lambda: LoraConfig(**SOME, r=4, trainable_token_indices=[5, 6]),
    "LORA and a head": lambda: LoraConfig(**SOME, r=4, modules_to_save=["lm_head"]),
    "MISS": lambda: peft.MissConfig(**SOME, r=4),
    "OFT": lambda: peft.OFTConfig(**ONE, oft_block_size=8),
    "PREFIX_TUNING": lambda: peft.PrefixTuningConfig(**PROMPT),
    "PROMPT_TUNING": lambda: peft.PromptTuningConfig(**PROMPT),
    "PVERA": lambda: peft.PveraConfig(**ONE, r=8),
    "P_TUNING": lambda: peft.PromptEncoderConfig(**PROMPT, encoder_hidden_size=8),
    "RANDLORA": lambda: peft.RandLoraConfig(**ONE, r=4),
    "ROAD": lambda: peft.RoadConfig(**ONE, group_size=8),
    "SHADOW": lambda: peft.ShadowConfig(task_type="CAUSAL_LM"),
    "TRAINABLE_TOKENS": lambda: peft.TrainableTokensConfig(
        task_type="CAUSAL_LM", target_modules=["embed_tokens"], token_indices=[5, 6]
    ),
    "VBLORA": lambda: peft.VBLoRAConfig(**ONE, num_vectors=16, vector_length=16),
    "VERA": lambda: peft.VeraConfig(**ONE, r=8),
    "WAVEFT": lambda: peft.WaveFTConfig(**ONE, n_frequency=20),
}


NOT_MERGED = (
    *("ADAPTION_PROMPT", "BEFT", "CARTRIDGE", "CPT", "LORA with biases", "LILY", "PREFIX_TUNING", "PROMPT_TUNING"),
    *("P_TUNING", "SHADOW"),
)
"""They change no weights, or weights and biases that the base has not, or what PEFT (0.21) merges not."""


@pytest.fixture(scope="module")
def untied_folder(tiny_model_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The tiny model with a head of its own, its tokenizer beside it."""
    folder = tmp_path_factory.mktemp("models") / "untied"
    shutil.copytree(tiny_model_folder, folder)
    torch.manual_seed(1)
    config = LlamaConfig.from_pretrained(folder, tie_word_embeddings=False)
    AutoModelForCausalLM.from_config(config).to(torch.bfloat16).save_pretrained(folder)
    return folder


def in_fp32(folder: Path) -> Any:
    config = halfbyte.HalfbyteConfig(compute_dtype=torch.float32)
    return halfbyte.load(folder, quantization_config=config, dtype=torch.float32)


def from_files(folder: Path) -> Any:
    """What transformers opens by itself."""
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    assert not [module for module in model.modules() if type(module).__module__.startswith(("halfbyte", "peft"))]
    return model


def logits(model: Any) -> Tensor:
    with torch.no_grad():
        found: Tensor = model.eval()(input_ids=IDS).logits
    return found


def saved(model: Any, folder: Path, config: Any = None) -> Path:
    """A LoRA adapter that sways the logits, in a folder."""
    torch.manual_seed(2)
    config = config or LoraConfig(**SOME, r=4, init_lora_weights=False)
    get_peft_model(model, config).save_pretrained(folder)
    return folder


def rewrite(folder: Path, change: Callable[[dict[str, Tensor]], dict[str, Tensor]]) -> Path:
    file = folder / "adapter_model.safetensors"
    save_file(change(load_file(file)), file)
    return folder


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("kind", ADAPTERS)
def test_adapters_run_over_4_bits_as_over_dense_weights_and_open_again(
    kind: str, untied_folder: Path, tmp_path: Path
) -> None:
    base = in_fp32(untied_folder)
    dense = copy.deepcopy(base).dequantize(torch.float32).float()
    torch.manual_seed(0)
    theirs = get_peft_model(copy.deepcopy(dense), ADAPTERS[kind]())
    torch.manual_seed(0)
    ours = get_peft_model(base, ADAPTERS[kind]())
    generator = torch.Generator().manual_seed(1)
    own, buffers = dict(ours.named_parameters()), dict(ours.named_buffers())
    with torch.no_grad():
        for name, parameter in theirs.named_parameters():
            if parameter.requires_grad:
                parameter.add_(torch.randn(parameter.shape, generator=generator) * 0.1)
                own[name].copy_(parameter)
        for name, buffer in theirs.named_buffers():
            if name in buffers and buffers[name].shape == buffer.shape:
                buffers[name].copy_(buffer)
    assert halfbyte.prepare(ours) is ours
    expected, found = logits(theirs), logits(ours)
    torch.testing.assert_close(found, expected, rtol=1e-3, atol=1e-4)
    assert (expected[:, -10:] - logits(dense)).abs().max() > 1e-3

    ours.save_pretrained(tmp_path)
    opened = in_fp32(tmp_path)
    torch.testing.assert_close(logits(opened), found, rtol=1e-5, atol=1e-5)  # prompts are saved as sums
    opened.generate(input_ids=IDS[:1], attention_mask=torch.ones_like(IDS[:1]), max_new_tokens=2)
    if any(isinstance(getattr(layer, "base_layer", None), halfbyte.Linear4bit) for layer in opened.modules()):
        if hasattr(opened.base_model, "merge_adapter"):
            with pytest.raises(InputError, match="cannot be merged into 4-bit weights"):
                opened.merge_adapter()
        halfbyte.unprepare(opened)
        assert not [module for module in opened.modules() if "merge" in vars(module)]
        halfbyte.prepare(opened)

    if kind in NOT_MERGED:
        with pytest.raises(InputError, match=f"of the kind {kind} changes no weights|PEFT cannot merge the adapter"):
            merge(tmp_path, tmp_path / "merged")
        assert not list(tmp_path.glob("*merged*")) + list(tmp_path.glob(".*merged*"))
        return
    merge(tmp_path, tmp_path / "merged", to="fp32")
    torch.testing.assert_close(logits(from_files(tmp_path / "merged")), found, rtol=1e-4, atol=1e-4)
    whole = opened.merge_and_unload()
    torch.testing.assert_close(logits(whole), found, rtol=1e-4, atol=1e-4)
    whole.save_pretrained(tmp_path / "whole")
    torch.testing.assert_close(logits(from_files(tmp_path / "whole")), found, rtol=1e-4, atol=1e-4)


@pytest.mark.filterwarnings("ignore")
def test_adalora_is_merged_with_the_ranks_that_it_pruned(untied_folder: Path, tmp_path: Path) -> None:
    torch.manual_seed(0)
    dense = AutoModelForCausalLM.from_pretrained(untied_folder, dtype=torch.float32)
    plain = logits(dense)
    options = {"init_r": 6, "target_r": 2, "tinit": 1, "tfinal": 2, "deltaT": 1, "total_step": 12, "lora_alpha": 32}
    model = get_peft_model(copy.deepcopy(dense), peft.AdaLoraConfig(**SOME, **options)).train()
    optimizer = torch.optim.AdamW([x for x in model.parameters() if x.requires_grad], lr=0.05)
    for step in range(1, 12):
        model(input_ids=IDS, labels=IDS).loss.backward()
        optimizer.step()
        model.base_model.update_and_allocate(step)
        optimizer.zero_grad()
    model.peft_config["default"].base_model_name_or_path = str(untied_folder)
    model.save_pretrained(tmp_path / "adapter")
    weights = load_file(tmp_path / "adapter" / "adapter_model.safetensors")
    ranks = {len(x) for name, x in weights.items() if name.endswith("lora_A")}
    assert len(ranks) > 1 and max(ranks) <= 6
    theirs = logits(peft.PeftModel.from_pretrained(dense, tmp_path / "adapter").eval())
    assert (theirs - plain).abs().max() > 0.1
    merge(tmp_path / "adapter", tmp_path / "merged", onto="original", to="fp32")
    torch.testing.assert_close(logits(from_files(tmp_path / "merged")), theirs, rtol=1e-4, atol=1e-4)
    merge(tmp_path / "adapter", tmp_path / "over 4 bits", to="fp32")
    ours = in_fp32(tmp_path / "adapter")
    torch.testing.assert_close(logits(from_files(tmp_path / "over 4 bits")), logits(ours), rtol=2e-3, atol=2e-3)


def test_every_kind_that_runs_was_tried() -> None:
    assert {kind.split(",")[0].split(" ")[0] for kind in ADAPTERS} == set(KINDS)


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize(
    "config", [peft.LoHaConfig(**SOME), peft.LoKrConfig(**SOME), peft.HRAConfig(**SOME), peft.DeloraConfig(**SOME)]
)
def test_kinds_that_need_dense_weights_are_refused(config: Any, tiny_model_folder: Path, tmp_path: Path) -> None:
    kind = config.peft_type.value
    saved(AutoModelForCausalLM.from_pretrained(tiny_model_folder), tmp_path, config)
    with pytest.raises(InputError, match=f"of the kind {kind} do not run over 4-bit weights; use one of LORA, ADALORA"):
        halfbyte.load(tmp_path)
    if kind != "DELORA":  # fails when PEFT puts it on
        with pytest.raises(InputError, match=f"of the kind {kind} do not run"):
            halfbyte.prepare(get_peft_model(halfbyte.load(tiny_model_folder), config))


def other_base(kind: str, tiny_model_folder: Path, folder: Path) -> Path:
    shutil.copytree(tiny_model_folder, folder)
    config = LlamaConfig.from_pretrained(folder)
    changes = {"wide": {"hidden_size": 64}, "shallow": {"num_hidden_layers": 1}, "deep": {"num_hidden_layers": 5}}
    if kind == "gpt2":
        GPT2LMHeadModel(GPT2Config(vocab_size=config.vocab_size, n_embd=32, n_layer=2, n_head=2)).save_pretrained(
            folder
        )
    else:
        AutoModelForCausalLM.from_config(LlamaConfig(**config.to_dict() | changes[kind])).save_pretrained(folder)
    return folder


LAYER = r"base_model\.model\.model\.layers"


@pytest.mark.parametrize(
    ("base", "words"),
    [
        ("wide", rf"{LAYER}\.0\.self_attn\.q_proj\.lora_A\.weight is \[4, 32\] and should be \[4, 64\]; .* and 1 more"),
        ("shallow", rf"the base model has no place for {LAYER}\.1\..* and 1 more"),
        ("deep", rf"the base model needs, and the file lacks, {LAYER}\.2\..* and 9 more"),
        ("gpt2", r"the base model has none of its layers, down_proj, q_proj"),
    ],
)
@pytest.mark.filterwarnings("ignore")
def test_an_adapter_of_another_base_is_refused_with_names_and_shapes(
    base: str, words: str, tiny_model_folder: Path, tmp_path: Path
) -> None:
    folder = saved(halfbyte.load(tiny_model_folder), tmp_path / "adapter")
    other = other_base(base, tiny_model_folder, tmp_path / base)
    file = folder / "adapter_config.json"
    file.write_text(file.read_text().replace(str(tiny_model_folder), str(other)))
    with pytest.raises(InputError, match=rf"{folder} does not fit the base model {other}: {words}\. Name the model"):
        halfbyte.load(folder)


def test_another_rank_in_the_configuration_is_refused(tiny_model_folder: Path, tmp_path: Path) -> None:
    folder = saved(halfbyte.load(tiny_model_folder), tmp_path / "adapter")
    file = folder / "adapter_config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {"r": 8}))
    with pytest.raises(InputError, match=r"lora_A\.weight is \[4, 32\] and should be \[8, 32\]"):
        halfbyte.load(folder)


WRAPPED: dict[str, Callable[[str], str]] = {
    "compiled": lambda name: name.replace("base_model.model.", "base_model.model._orig_mod."),
    "compiled outside": lambda name: f"_orig_mod.{name}",
    "in parallel": lambda name: f"module.{name}",
    "put on twice": lambda name: f"base_model.model.{name}",
    "without PEFT's prefix": lambda name: name.removeprefix("base_model.model."),
    "from the model's own state": lambda name: name.replace(".weight", ".default.weight"),
}


@pytest.mark.parametrize("wrapper", WRAPPED)
def test_names_that_a_wrapper_changed_are_found_and_told(wrapper: str, tiny_model_folder: Path, tmp_path: Path) -> None:
    folder = saved(halfbyte.load(tiny_model_folder), tmp_path / "adapter")
    expected = logits(halfbyte.load(folder))
    assert not torch.equal(expected, logits(halfbyte.load(tiny_model_folder)))
    rewrite(folder, lambda tensors: {WRAPPED[wrapper](name): tensor for name, tensor in tensors.items()})
    with pytest.warns(UserWarning, match=r"8 tensors of the adapter .* have names that a wrapper has changed"):
        model = halfbyte.load(folder)
    assert torch.equal(logits(model), expected)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda t: {k.replace("lora_A", "lora_C"): v for k, v in t.items()}, "has no place for .*lora_C.* and 1 more"),
        (lambda t: dict(list(t.items())[::2]), "needs, and the file lacks, .* and 1 more"),
        (lambda t: {"x": torch.ones(1)}, "has no place for x"),
        (lambda t: {}, "needs, and the file lacks, .* and 5 more"),
        (lambda t: t | {"base_model.model.lm_heat.weight": torch.ones(1)}, "has no place for .*lm_heat"),
    ],
)
def test_names_that_are_not_found_are_refused(change: Any, words: str, tiny_model_folder: Path, tmp_path: Path) -> None:
    folder = rewrite(saved(halfbyte.load(tiny_model_folder), tmp_path / "adapter"), change)
    with pytest.raises(InputError, match=rf"does not fit the base model .*: the base model {words}"):
        halfbyte.load(folder)


def test_a_folder_without_a_whole_adapter_is_told(tiny_model_folder: Path, tmp_path: Path) -> None:
    folder = saved(halfbyte.load(tiny_model_folder), tmp_path / "adapter")
    file, config = folder / "adapter_model.safetensors", folder / "adapter_config.json"
    whole, text = file.read_bytes(), config.read_text()
    file.write_bytes(whole[:50])
    with pytest.raises(InputError, match="cannot be read: "):
        halfbyte.load(folder)
    file.unlink()
    with pytest.raises(InputError, match=r"holds no adapter_model\.safetensors; copy it there"):
        halfbyte.load(folder)
    file.write_bytes(whole)
    for kind in ("LORE", None):
        config.write_text(json.dumps(json.loads(text) | {"peft_type": kind}))
        with pytest.raises(InputError, match="cannot be read: "):
            halfbyte.load(folder)


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize(
    "extra",
    [{}, {"modules_to_save": ["embed_tokens"]}, {"trainable_token_indices": [258]}],
    ids=["resized", "saved", "tokens"],
)
def test_added_tokens_are_saved_and_opened(
    extra: dict[str, Any], tied: bool, tiny_model_folder: Path, untied_folder: Path, tmp_path: Path
) -> None:
    folder = tiny_model_folder if tied else untied_folder
    tokenizer = AutoTokenizer.from_pretrained(folder)
    rows = len(tokenizer)
    tokenizer.add_tokens(["<new>", "<newer>"])
    model = halfbyte.load(folder)
    torch.manual_seed(0)
    model.resize_token_embeddings(len(tokenizer))
    trainer = SFTTrainer(
        model=model,
        args=SFTConfig(output_dir=str(tmp_path), max_steps=1, save_steps=1, report_to="none", disable_tqdm=True),
        train_dataset=Dataset.from_list([{"prompt": "Use <new>", "completion": " ok"}] * 4),
        processing_class=tokenizer,
        peft_config=LoraConfig(**SOME, r=4, **extra),
    )
    trainer.train()
    trainer.save_model(str(tmp_path / "ours"))
    trainer.model.save_pretrained(tmp_path / "peft")
    ids = torch.tensor([[5, rows, rows + 1]])
    with torch.no_grad():
        expected = trainer.model.eval()(input_ids=ids).logits
    assert expected.shape[-1] == rows + 2
    for name in ("ours", "peft", "checkpoints/step-000001"):
        opened = halfbyte.load(tmp_path / name)
        with torch.no_grad():
            assert torch.equal(opened(input_ids=ids).logits, expected), name
        opened.generate(input_ids=ids, attention_mask=torch.ones_like(ids), max_new_tokens=2)
    assert len(halfbyte.load_tokenizer(tmp_path / "ours")) == rows + 2
    trainer.args.max_steps = 2
    trainer.train(resume_from_checkpoint=True)


def test_a_model_whose_rows_stayed_saves_no_embeddings(tiny_model_folder: Path, tmp_path: Path) -> None:
    trainer = SFTTrainer(
        model=halfbyte.load(tiny_model_folder),
        args=SFTConfig(output_dir=str(tmp_path), report_to="none"),
        train_dataset=Dataset.from_list([{"prompt": "Two?", "completion": " ok"}]),
        processing_class=AutoTokenizer.from_pretrained(tiny_model_folder),
        peft_config=LoraConfig(**SOME, r=4),
    )
    trainer.save_model(str(tmp_path))
    assert not [name for name in load_file(tmp_path / "adapter_model.safetensors") if "lora" not in name]

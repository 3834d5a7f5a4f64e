"""GGUF files of runs and models: number formats against gguf's own, refusals, LoRA files, Modelfiles."""

import json
import os
import shutil
import subprocess
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from gguf import GGUFReader
from gguf.quants import dequantize, quantize
from llama import CACHE, library_folder, opened
from peft import LoraConfig, get_peft_model
from safetensors.torch import load_file, save_file
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, GenerationConfig

import halfbyte
from halfbyte.choices import GGUF_TYPES
from halfbyte.deploy.export import ggml, llama_library
from halfbyte.deploy.export.gguf import export_gguf
from halfbyte.deploy.export.lora_gguf import export_lora_gguf
from halfbyte.deploy.export.modelfile import turns_of
from halfbyte.deploy.merge import merge
from halfbyte.errors import InputError
from halfbyte.hf import HalfbyteConfig, quantize_checkpoint
from halfbyte.hf.models.base_files import Source, fingerprint
from halfbyte.hf.models.dense import dense_model
from halfbyte.hf.models.fingerprint import FILE as FINGERPRINT
from halfbyte.hf.models.foreign.gguf import GgufCheckpoint
from halfbyte.hf.models.hub import locate

IDS = list(range(40, 80))


@pytest.fixture
def base(tiny_model_folder: Path, tmp_path: Path) -> Path:
    """A model of 64 channels: whole blocks."""
    return widened(tiny_model_folder, tmp_path / "base", 64)


def widened(source: Path, folder: Path, width: int, **options: Any) -> Path:
    tokenizer = AutoTokenizer.from_pretrained(source)
    config = AutoModelForCausalLM.from_pretrained(source).config
    for key, value in {"hidden_size": width, "intermediate_size": 2 * width, "head_dim": 16, **options}.items():
        setattr(config, key, value)
    torch.manual_seed(0)
    model = type(AutoModelForCausalLM.from_config(config))(config).to(torch.bfloat16)
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def adapter(base: Path, folder: Path, **options: Any) -> Path:
    """An adapter that sways what its base gives."""
    model = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
    given = {"r": 4, "lora_alpha": 8, "target_modules": "all-linear", "task_type": "CAUSAL_LM"} | options
    adapted = get_peft_model(model, LoraConfig(**given))
    generator = torch.Generator().manual_seed(2)
    with torch.no_grad():
        for x in adapted.parameters():
            if x.requires_grad:
                x.add_(0.1 * torch.randn(x.shape, generator=generator))
    adapted.peft_config["default"].base_model_name_or_path = str(base)
    adapted.save_pretrained(folder)
    return folder


@torch.no_grad()
def logits(folder: Path) -> torch.Tensor:
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    found: torch.Tensor = model(input_ids=torch.tensor([IDS])).logits[0]
    return found


def apart(found: torch.Tensor, wanted: torch.Tensor) -> float:
    return float((found - wanted).abs().max() / wanted.std())


@pytest.mark.parametrize("kind", [*ggml.FLOATS, *ggml.CODES])
def test_bytes_are_those_of_the_package_gguf(kind: str) -> None:
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(5000, 96, generator=generator) * torch.logspace(-8, 2, 5000)[:, None]
    x[3], x[7, :32], x[9, 5] = 0.0, -1.5, 300.0
    theirs = quantize(x.numpy(), ggml.kind_of(kind))
    ours = ggml.packed(x, kind)
    assert np.array_equal(ours.view(np.uint8), theirs.view(np.uint8))
    assert ours.nbytes == ggml.packed_bytes(x.shape, kind) and ours.shape == ggml.packed_shape(x.shape, kind)


@pytest.mark.parametrize("to", [*ggml.FLOATS, *ggml.CODES])
def test_a_file_holds_the_merged_weights_in_the_type_that_is_asked_for(to: Any, base: Path, tmp_path: Path) -> None:
    merge(adapter(base, tmp_path / "adapter"), tmp_path / "merged", to="fp32")
    merged = load_file(tmp_path / "merged" / "model.safetensors")
    copy = export_gguf(tmp_path / "adapter", tmp_path / "out", to=to)
    read = {tensor.name: tensor for tensor in GGUFReader(copy.file).tensors}
    name = "mlp.down_proj.weight"
    for layer in (0, 1):
        tensor = read[f"blk.{layer}.ffn_down.weight"]
        wanted = merged[f"model.layers.{layer}.{name}"].numpy()
        assert np.array_equal(
            dequantize(tensor.data, tensor.tensor_type),
            dequantize(quantize(wanted, ggml.kind_of(to)), ggml.kind_of(to)),
        )
    embedding = read["token_embd.weight"].tensor_type.name.lower()
    assert embedding == ("q8_0" if to in ggml.CODES else to)  # the head's too
    assert read["output_norm.weight"].tensor_type.name == "F32"
    assert copy.is_quantized
    assert "output.weight" not in read


def test_a_run_is_merged_onto_either_weights_and_a_folder_of_any_form_is_taken(base: Path, tmp_path: Path) -> None:
    adapter(base, tmp_path / "adapter")
    for onto in ("quantized", "original"):
        merge(tmp_path / "adapter", tmp_path / onto, onto=onto, to="fp32")  # type: ignore[arg-type]
        model = dense_model(tmp_path / "adapter", onto, torch.float32)  # type: ignore[arg-type]
        merged = load_file(tmp_path / onto / "model.safetensors")
        assert {name: tuple(x.shape) for name, x in model.tensors.items() for x in [x]} == {
            name: tuple(x.shape) for name, x in merged.items()
        }
        assert all(torch.equal(model.read(name), x) for name, x in merged.items())
    quantize_checkpoint(base, tmp_path / "four", HalfbyteConfig(compute_dtype=torch.float32))
    four = dense_model(tmp_path / "four", dtype=torch.float32)
    wanted = halfbyte.load(tmp_path / "four").dequantize(torch.float32).state_dict()
    assert all(torch.equal(four.read(name), wanted[name].float()) for name in four.tensors)
    plain = dense_model(base, dtype=torch.float32)
    original = load_file(base / "model.safetensors")
    assert set(plain.tensors) == set(original)
    assert all(torch.equal(plain.read(name), x.float()) for name, x in original.items())
    with pytest.raises(InputError, match=r"holds no adapter .*leave --base out"):
        dense_model(base, base=base)


def test_files_beside_an_adapter_go_before_those_of_its_base(base: Path, tmp_path: Path) -> None:
    adapter(base, tmp_path / "adapter")
    own = AutoTokenizer.from_pretrained(base)
    own.chat_template = "{{ messages[0]['content'] }}!"
    own.save_pretrained(tmp_path / "adapter")
    copy = export_gguf(tmp_path / "adapter", tmp_path / "out", to="f16")
    fields = GGUFReader(copy.file).fields
    assert fields["tokenizer.chat_template"].contents() == own.chat_template


def test_rows_that_are_no_whole_blocks_fall_back_and_that_is_said(tiny_model_folder: Path, tmp_path: Path) -> None:
    copy = export_gguf(tiny_model_folder, tmp_path / "out", to="q4_0")  # 80 wide within the gated layer
    assert copy.kinds == {"f32": 5, "q8_0": 1, "q4_0": 12, "f16": 2}
    assert copy.notes == [
        "2 of the matrices are in f16, since their rows are no whole blocks of 32 (blk.0.ffn_down.weight)."
    ]


def test_bad_input_is_a_sentence_and_nothing_is_left(base: Path, tmp_path: Path, monkeypatch: Any) -> None:
    def refused(message: str, run: Path = base, out: str = "out", **options: Any) -> None:
        before = sorted(os.listdir(tmp_path))
        with pytest.raises(InputError, match=message):
            export_gguf(run, tmp_path / out, **options)
        assert sorted(os.listdir(tmp_path)) == before

    shutil.copytree(base, tmp_path / "nan")
    weights = load_file(base / "model.safetensors")
    name = "model.layers.1.mlp.up_proj.weight"
    save_file(weights | {name: weights[name] * float("nan")}, tmp_path / "nan" / "model.safetensors", {"format": "pt"})
    refused(f"{name} holds nan at", run=tmp_path / "nan")
    shutil.copytree(base, tmp_path / "large")
    save_file(weights | {name: weights[name] * 1e7}, tmp_path / "large" / "model.safetensors", {"format": "pt"})
    refused("blk.1.ffn_up.weight has values beyond fp16's 65504; export bf16 or f32", run=tmp_path / "large", to="f16")
    export_gguf(tmp_path / "large", tmp_path / "bf16", to="bf16")
    (tmp_path / "used").mkdir()
    (tmp_path / "used" / "notes").write_text("mine")
    refused("is there already", out="used")
    refused("holds no model that could be overwritten", out="used", overwrite=True)
    refused("is there already", out="bf16")
    export_gguf(base, tmp_path / "bf16", to="f16", overwrite=True)
    assert sorted(file.name for file in (tmp_path / "bf16").iterdir()) == ["Modelfile", "README.md", "bf16-f16.gguf"]
    refused("holds the adapter or the base itself", run=tmp_path / "bf16" / "bf16-f16.gguf", out="bf16", overwrite=True)
    usage = shutil.disk_usage(tmp_path)._replace(free=1000)
    monkeypatch.setattr(shutil, "disk_usage", lambda _: usage)
    refused(r"The exported model takes .* are free in")


@torch.no_grad()
def held(file: Path, base: Path) -> torch.Tensor:
    """The logits of the model whose weights are those that a file stands for."""
    model = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
    with torch.device("meta"):
        read = GgufCheckpoint(file, type(model)(model.config))
    model.load_state_dict({name: read.read(name) for name in read.names}, strict=False)
    found: torch.Tensor = model(input_ids=torch.tensor([IDS])).logits[0]
    return found


@pytest.mark.slow
@pytest.mark.parametrize("to", [*ggml.FLOATS, *ggml.CODES])
def test_llama_cpp_decodes_every_type(to: Any, base: Path, tmp_path: Path) -> None:
    """It rounds activations to 8 bits, or to what the matrix is in, before it multiplies."""
    copy = export_gguf(base, tmp_path / "out", to=to)
    with opened(copy.file) as llama:
        found = llama.logits(IDS)
    wanted = held(copy.file, base)
    bound = {"f32": 1e-5, "f16": 3e-3, "bf16": 2e-2}.get(to, 5e-2)
    assert float((found - wanted).norm() / wanted.norm()) < bound


@pytest.mark.slow
@pytest.mark.parametrize("to", ["q4_k_m", "q5_k_m", "q6_k", "q4_k_s", "q5_k_s"])
def test_k_quants_are_llama_cpp_s_own(
    to: Any, tiny_model_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    library_folder()
    monkeypatch.setenv("HALFBYTE_CACHE", str(CACHE))
    base = widened(tiny_model_folder, tmp_path / "base", 256)
    copy = export_gguf(base, tmp_path / "out", to=to)
    assert sorted(file.name for file in copy.folder.iterdir()) == ["Modelfile", "README.md", f"out-{to}.gguf"]
    assert copy.kinds[to[:4]] >= 6, copy.kinds
    if to.endswith("_m"):
        assert copy.kinds["q6_k"] >= 2, copy.kinds
    with opened(copy.file) as llama:
        found = llama.logits(IDS)
    wanted = held(copy.file, base)
    assert float((found - wanted).norm() / wanted.norm()) < 0.1  # activations are in 8 bits by blocks of 256


def test_without_llama_cpp_k_quants_are_refused_with_the_command(
    base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PATH", "")
    monkeypatch.setattr(llama_library, "library", lambda: None)
    with pytest.raises(InputError, match=r"llama-quantize MODEL-f16.gguf MODEL-q4_k_m.gguf Q4_K_M$"):
        export_gguf(base, tmp_path / "out", to="q4_k_m")
    assert set(llama_library.FTYPES) == set(GGUF_TYPES) - set(ggml.FLOATS) - set(ggml.CODES)


LORAS: dict[str, dict[str, Any]] = {
    "plain": {},
    "rslora": {"use_rslora": True},
    "patterns": {"rank_pattern": {"q_proj": 2, "up_proj": 6}, "alpha_pattern": {"down_proj": 3, "k_proj": 16}},
    "rslora and patterns": {"use_rslora": True, "rank_pattern": {"k_proj": 2}, "alpha_pattern": {"k_proj": 3}},
}


@pytest.mark.parametrize("name", [pytest.param(n, marks=[] if n == "plain" else pytest.mark.slow) for n in LORAS])
def test_a_lora_file_over_the_base_s_file_is_the_merged_model(name: str, base: Path, tmp_path: Path) -> None:
    adapter(base, tmp_path / "adapter", **LORAS[name])
    merge(tmp_path / "adapter", tmp_path / "merged", onto="original", to="fp32")
    wanted, plain = logits(tmp_path / "merged"), logits(base)
    assert apart(plain, wanted) > 0.3
    file = export_gguf(base, tmp_path / "base gguf", to="f32").file
    lora = export_lora_gguf(tmp_path / "adapter", tmp_path / "lora")
    assert lora.modules == 14
    with opened(file, lora=lora.file) as llama:
        assert apart(llama.logits(IDS), wanted) < 5e-3
        assert torch.equal(llama.logits(IDS).argmax(-1)[-1], wanted.argmax(-1)[-1])
    half = export_lora_gguf(tmp_path / "adapter", tmp_path / "half", to="f16")
    with opened(file, lora=half.file) as llama:
        assert apart(llama.logits(IDS), wanted) < 1e-2


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"use_dora": True}, "is DoRA, .*halfbyte adapter convert"),
        ({"modules_to_save": ["lm_head"]}, "has more than what LoRA adds to matrices"),
        ({"init_lora_weights": "pissa"}, "began with pissa, .*halfbyte adapter convert"),
        ({"trainable_token_indices": [5, 6]}, "has more than what LoRA adds"),
        ({"target_modules": ["q_proj", "embed_tokens"]}, "changes the embedding"),
        ({"target_modules": ["q_proj", "lm_head"]}, "no matrix of its own for lm_head"),
    ],
)
@pytest.mark.filterwarnings("ignore:Model with `tie_word_embeddings", "ignore:.*tied", "ignore:.*embedding")
def test_what_a_lora_file_has_no_words_for_is_refused(
    options: dict[str, Any], message: str, base: Path, tmp_path: Path
) -> None:
    adapter(base, tmp_path / "adapter", **options)
    with pytest.raises(InputError, match=message):
        export_lora_gguf(tmp_path / "adapter", tmp_path / "lora")
    assert not (tmp_path / "lora").exists()


def test_a_lora_file_is_of_the_base_that_it_was_trained_on_and_replaces_no_adapter(base: Path, tmp_path: Path) -> None:
    folder = adapter(base, tmp_path / "adapter")
    other = widened(base, tmp_path / "other", 2 * AutoConfig.from_pretrained(base).hidden_size)
    with pytest.raises(InputError, match=r"do not fit: .* is \[.*\] in the model"):
        export_lora_gguf(folder, tmp_path / "lora", base=other)
    trained = fingerprint(Source(locate(base)), [HalfbyteConfig()])
    assert trained is not None
    trained.called(str(base)).save(folder)
    weights = load_file(base / "model.safetensors")
    name = next(name for name in weights if name.endswith("q_proj.weight"))
    save_file(weights | {name: weights[name] + 1}, base / "model.safetensors", {"format": "pt"})
    with pytest.raises(InputError, match="not what it was when the adapter"):
        export_lora_gguf(folder, tmp_path / "lora")
    (folder / FINGERPRINT).unlink()
    shutil.copytree(folder, tmp_path / "own")
    (tmp_path / "own" / "x.gguf").write_text("")
    for read in (tmp_path / "own", folder):
        with pytest.raises(InputError, match="holds no model that could be overwritten"):
            export_lora_gguf(read, tmp_path / "own", overwrite=True)
    assert (tmp_path / "own" / "adapter_model.safetensors").is_file() and not (tmp_path / "lora").exists()


CHATML = (
    "{% if messages[0]['role'] != 'system' %}<|im_start|>system\nBe kind.<|im_end|>\n{% endif %}"
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
FOLDED = (
    "{{ bos_token }}{% set s = '' %}{% if messages[0].role == 'system' %}{% set s = messages[0].content + '\n\n' %}"
    "{% set messages = messages[1:] %}{% endif %}{% for m in messages %}{% if m.role == 'user' %}"
    "[INST] {% if loop.first %}{{ s }}{% endif %}{{ m.content }} [/INST]{% else %} {{ m.content }}{{ eos_token }}"
    "{% endif %}{% endfor %}"
)
FORGETTING = (
    "{% for m in messages %}{% if m.role == 'assistant' and not loop.last %}<a>short{% else %}<{{ m.role }}>"
    "{{ m.content }}{% endif %}{% endfor %}<a>"
)
CHATS = [
    [{"role": "user", "content": "One"}],
    [{"role": "system", "content": "Say \"no\""}, {"role": "user", "content": "Two {{ x }}"}],
    [
        {"role": "user", "content": "Three"}, {"role": "assistant", "content": "3"},
        {"role": "user", "content": "Four"},
        {"role": "assistant", "content": "4"}, {"role": "user", "content": "Five"},
    ],
    [
        {"role": "system", "content": "Be"}, {"role": "user", "content": "Six"}, {"role": "assistant", "content": "6"},
        {"role": "user", "content": "Seven"},
    ],
]  # fmt: skip


@pytest.mark.parametrize("template", [CHATML, FOLDED, None])
def test_turns_read_off_a_template_write_what_it_writes(template: str | None, tiny_model_folder: Path) -> None:
    tokenizer = AutoTokenizer.from_pretrained(tiny_model_folder)
    tokenizer.bos_token = "<|im_start|>"
    if template:
        tokenizer.chat_template = template
    for begins in (False, True):
        turns = turns_of(tokenizer, begins)
        assert turns is not None
        for chat in CHATS:
            wanted = tokenizer.apply_chat_template(chat, tokenize=False, add_generation_prompt=True)
            assert turns.render(chat) == (wanted.removeprefix(tokenizer.bos_token) if begins else wanted)


@pytest.mark.slow
@pytest.mark.skipif(shutil.which("go") is None, reason="Go is not installed")
@pytest.mark.parametrize("template", [CHATML, FOLDED, None])
def test_go_writes_what_the_template_writes(template: str | None, tiny_model_folder: Path, tmp_path: Path) -> None:
    tokenizer = AutoTokenizer.from_pretrained(tiny_model_folder)
    tokenizer.bos_token = "<|im_start|>"
    if template:
        tokenizer.chat_template = template
    turns = turns_of(tokenizer, False)
    assert turns is not None
    asked = json.dumps({"template": turns.template(), "chats": CHATS})
    command = ["go", "run", str(Path(__file__).with_name("ollama.go"))]
    environment = os.environ | {"GOCACHE": str(tmp_path), "GOFLAGS": "-mod=mod"}
    found = subprocess.run(command, input=asked, capture_output=True, text=True, check=True, env=environment)
    assert json.loads(found.stdout) == [
        tokenizer.apply_chat_template(chat, tokenize=False, add_generation_prompt=True) for chat in CHATS
    ]


def test_a_template_that_rewrites_the_past_is_not_put_in_a_modelfile(tiny_model_folder: Path) -> None:
    tokenizer = AutoTokenizer.from_pretrained(tiny_model_folder)
    tokenizer.chat_template = FORGETTING
    assert turns_of(tokenizer, False) is None
    tokenizer.chat_template = "{{ raise_exception('never') }}"
    assert turns_of(tokenizer, False) is None


@pytest.mark.parametrize(("name", "quote"), [("poet", ""), ("my poet", "'")])
def test_the_modelfile_has_template_stops_and_settings(base: Path, tmp_path: Path, name: str, quote: str) -> None:
    GenerationConfig(eos_token_id=[256, 257], temperature=0.7, top_p=0.9, do_sample=True).save_pretrained(base)
    copy = export_gguf(base, tmp_path / name, to="q8_0")
    lines = (copy.folder / "Modelfile").read_text().splitlines()
    assert lines[0] == f"FROM ./{name}-q8_0.gguf"
    assert lines[1].startswith('TEMPLATE """{{ if .System }}{{ "<|im_start|>system') and lines[1].endswith('"""')
    tokenizer = AutoTokenizer.from_pretrained(base)
    assert lines[2:] == [
        *(f'PARAMETER stop "{tokenizer.convert_ids_to_tokens(i)}"' for i in (256, 257)),
        "PARAMETER temperature 0.7", "PARAMETER top_p 0.9",
    ]  # fmt: skip
    card = (copy.folder / "README.md").read_text()
    assert f"llama-cli -m {quote}{name}-q8_0.gguf{quote} --jinja" in card
    assert f"ollama create {quote}{name}{quote} -f Modelfile" in card
    assert "library_name: gguf" in card


def test_the_template_is_in_the_file(base: Path, tmp_path: Path) -> None:
    copy = export_gguf(base, tmp_path / "out", to="f16")
    fields = {name: field.contents() for name, field in GGUFReader(copy.file).fields.items()}
    assert fields["tokenizer.chat_template"] == AutoTokenizer.from_pretrained(base).chat_template
    assert fields["general.architecture"] == "llama" and fields["general.name"] == "out"
    assert json.dumps(fields["tokenizer.ggml.pre"]) == '"gpt-2"'

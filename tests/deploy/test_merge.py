"""A merged model is base and adapter, in transformers' own classes; the interrupted go on; nothing half-written."""

import contextlib
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import (
    AutoConfig,
    AutoModel,
    AutoModelForCausalLM,
    AutoModelForSeq2SeqLM,
    AutoModelForSequenceClassification,
    GenerationConfig,
    GPT2Config,
    GPT2LMHeadModel,
    PreTrainedModel,
)

import halfbyte
from halfbyte import cli
from halfbyte.choices import Onto
from halfbyte.deploy.merge import merge
from halfbyte.errors import InputError
from halfbyte.hf import HalfbyteConfig, quantize_checkpoint
from halfbyte.hf.models import shards
from halfbyte.hf.models.merging import Merged

IDS = torch.randint(5, 250, (2, 17), generator=torch.Generator().manual_seed(1))
ADAPTERS: dict[str, dict[str, Any]] = {
    "plain": {},
    "ranks": {"use_rslora": True, "rank_pattern": {"q_proj": 2}, "alpha_pattern": {"down_proj": 3}},
    "dora": {"use_dora": True},
    "embedding saved": {"modules_to_save": ["embed_tokens"]},
    "head saved": {"modules_to_save": ["lm_head"]},
    "some tokens": {"trainable_token_indices": [7, 9]},
    "head": {"target_modules": ["q_proj", "lm_head"]},
    "embedding": {"target_modules": ["q_proj", "embed_tokens"]},
}


def shaken(model: PreTrainedModel, **options: Any) -> PeftModel:
    """The model with an adapter that sways what it gives."""
    given = {"r": 4, "lora_alpha": 8, "target_modules": ["q_proj", "down_proj"], "task_type": "CAUSAL_LM"} | options
    adapted = get_peft_model(model, LoraConfig(**given))
    generator = torch.Generator().manual_seed(2)
    with torch.no_grad():
        for parameter in adapted.parameters():
            if parameter.requires_grad:
                parameter.add_(0.1 * torch.randn(parameter.shape, generator=generator))
    return adapted.eval()


def saved(adapted: PeftModel, folder: Path, base: Path) -> Path:
    adapted.peft_config["default"].base_model_name_or_path = str(base)
    adapted.save_pretrained(folder)
    return folder


@torch.no_grad()
def logits(model: Any, **inputs: Any) -> Tensor:
    found: Tensor = model.eval()(**{"input_ids": IDS} | inputs).logits
    return found.float()


def opened(folder: Path, auto: Any = AutoModelForCausalLM) -> Any:
    model = auto.from_pretrained(folder, dtype=torch.float32)
    assert not [module for module in model.modules() if type(module).__module__.startswith(("halfbyte", "peft"))]
    return model


def dense(folder: Path) -> Any:
    """The model whose weights are what the 4-bit ones stand for."""
    model = halfbyte.load(folder, quantization_config=HalfbyteConfig(compute_dtype=torch.float32))
    return model.dequantize(torch.float32).float()


@pytest.fixture
def adapter(tiny_model_folder: Path, tmp_path: Path) -> Path:
    model = AutoModelForCausalLM.from_pretrained(tiny_model_folder, dtype=torch.float32)
    return saved(shaken(model), tmp_path / "adapter", tiny_model_folder)


@pytest.mark.filterwarnings("ignore:Model with `tie_word_embeddings", "ignore:.*tied", "ignore:.*embedding")
@pytest.mark.parametrize("onto", ["quantized", "original"])
@pytest.mark.parametrize("name", ADAPTERS)
def test_it_is_base_and_adapter_as_peft_puts_them_together(
    name: str, onto: Any, tiny_model_folder: Path, tmp_path: Path
) -> None:
    base = (
        dense(tiny_model_folder)
        if onto == "quantized"
        else AutoModelForCausalLM.from_pretrained(tiny_model_folder, dtype=torch.float32)
    )
    adapted = shaken(base, **ADAPTERS[name])
    expected = logits(adapted)
    folder = saved(adapted, tmp_path / "adapter", tiny_model_folder)
    copy = merge(folder, tmp_path / "merged", onto=onto, to="fp32")
    torch.testing.assert_close(logits(opened(tmp_path / "merged")), expected, rtol=1e-4, atol=1e-4)
    assert copy.is_quantized == (onto == "quantized")
    untied = name in ("embedding saved", "head saved", "head", "embedding")
    assert AutoConfig.from_pretrained(tmp_path / "merged").tie_word_embeddings != untied
    assert ("lm_head.weight" in load_file(tmp_path / "merged" / "model.safetensors")) == untied
    whole = halfbyte.load(folder, quantization_config=HalfbyteConfig(compute_dtype=torch.float32))
    if onto == "quantized":
        with pytest.warns(UserWarning, match="no longer tied") if untied else contextlib.nullcontext():
            merged = whole.merge_and_unload()
        torch.testing.assert_close(logits(merged), expected, rtol=1e-4, atol=1e-4)


def test_sums_are_made_in_fp32_and_rounded_once(adapter: Path, tiny_model_folder: Path) -> None:
    name = "model.layers.1.mlp.down_proj.weight"
    lora = load_file(adapter / "adapter_model.safetensors")
    a, b = (lora[f"base_model.model.{name.replace('.weight', '')}.lora_{letter}.weight"] for letter in "AB")
    original = load_file(tiny_model_folder / "model.safetensors")[name]
    trained = halfbyte.load(tiny_model_folder).get_submodule(name.removesuffix(".weight")).dequantize(torch.float32)
    pairs: tuple[tuple[Onto, Tensor], ...] = (("original", original.float()), ("quantized", trained))
    for onto, weight in pairs:
        for dtype in (torch.bfloat16, torch.float16, torch.float32):
            found = Merged(adapter, onto, dtype).read(name)
            exact = weight.double() + 2 * b.double() @ a.double()
            assert found.dtype == dtype
            bound = torch.finfo(dtype).eps / 2 * exact.abs().max() + 1e-6
            assert (found.double() - exact).abs().max() <= bound


@pytest.mark.filterwarnings("ignore:fan_in_fan_out")
@pytest.mark.parametrize("how", [{}, {"use_dora": True}])
def test_conv1d_keeps_its_form(how: dict[str, Any], tmp_path: Path) -> None:
    torch.manual_seed(0)
    GPT2LMHeadModel(GPT2Config(vocab_size=256, n_embd=64, n_layer=2, n_head=4)).save_pretrained(tmp_path / "base")
    quantize_checkpoint(tmp_path / "base", tmp_path / "four", HalfbyteConfig(compute_dtype=torch.float32))
    adapted = shaken(dense(tmp_path / "base"), target_modules=["c_attn", "c_proj"], **how)
    expected = logits(adapted)
    for base in ("base", "four"):
        folder = saved(adapted, tmp_path / f"over {base}", tmp_path / base)
        (folder / "base_format.json").write_text(json.dumps({"quant_type": "nf4", "compute_dtype": "float32"}))
        merge(folder, tmp_path / f"merged {base}", to="fp32")
        torch.testing.assert_close(logits(opened(tmp_path / f"merged {base}")), expected, rtol=1e-4, atol=1e-4)
    config = HalfbyteConfig(compute_dtype=torch.float32)
    whole = halfbyte.load(tmp_path / "over base", quantization_config=config).merge_and_unload()
    whole.save_pretrained(tmp_path / "whole")
    torch.testing.assert_close(logits(opened(tmp_path / "whole")), expected, rtol=1e-4, atol=1e-4)
    plain = halfbyte.load(tmp_path / "base", quantization_config=config)
    there = logits(plain)
    plain.dequantize(torch.float32).save_pretrained(tmp_path / "plain")
    torch.testing.assert_close(logits(opened(tmp_path / "plain")), there, rtol=1e-4, atol=1e-4)


@pytest.mark.filterwarnings("ignore:Setting `save_embedding_layers`")
def test_tokens_that_were_added_are_merged_too(tiny_model_folder: Path, tmp_path: Path) -> None:
    model = AutoModelForCausalLM.from_pretrained(tiny_model_folder, dtype=torch.float32)
    model.resize_token_embeddings(270, mean_resizing=False)
    adapted = shaken(model, trainable_token_indices=[266, 269])
    folder = saved(adapted, tmp_path / "adapter", tiny_model_folder)
    merge(folder, tmp_path / "merged", onto="original", to="fp32")
    merged = opened(tmp_path / "merged")
    assert merged.config.vocab_size == merged.get_input_embeddings().weight.shape[0] == 270
    ids = torch.tensor([[5, 266, 6, 269]])
    rows = [*range(260), 266, 269]
    torch.testing.assert_close(
        logits(merged, input_ids=ids)[..., rows], logits(adapted, input_ids=ids)[..., rows], rtol=1e-4, atol=1e-4
    )


def test_classifiers_and_sequence_models_are_merged(task_folder: Callable[[str], Path], tmp_path: Path) -> None:
    model = AutoModelForSequenceClassification.from_pretrained(task_folder("bert"), num_labels=3, dtype=torch.float32)
    adapted = shaken(model, task_type="SEQ_CLS", target_modules=["query"], modules_to_save=["classifier"])
    folder = saved(adapted, tmp_path / "no pooler", task_folder("bert"))
    with pytest.raises(InputError, match=r"Neither the base .* nor the adapter .* has bert.pooler.dense.bias and"):
        merge(folder, tmp_path / "merged")
    for family in ("bert", "distilbert", "roberta"):
        base = task_folder(family)
        model = AutoModelForSequenceClassification.from_pretrained(base, num_labels=3, dtype=torch.float32)
        targets = ["q_lin", "v_lin"] if family == "distilbert" else ["query", "value"]
        head = {"distilbert": ["pre_classifier", "classifier"], "bert": ["bert.pooler", "classifier"]}.get(
            family, ["classifier"]
        )
        adapted = shaken(model, task_type="SEQ_CLS", target_modules=targets, modules_to_save=head)
        folder = saved(adapted, tmp_path / family, base)
        merge(folder, tmp_path / f"{family}-merged", onto="original", to="fp32")
        merged = opened(tmp_path / f"{family}-merged", AutoModelForSequenceClassification)
        assert merged.config.num_labels == 3
        torch.testing.assert_close(logits(merged), logits(adapted), rtol=1e-4, atol=1e-4)
    for family in ("t5", "bart"):
        model = AutoModelForSeq2SeqLM.from_pretrained(task_folder(family), dtype=torch.float32)
        targets = ["q", "wo"] if family == "t5" else ["q_proj", "fc2"]
        adapted = shaken(model, task_type="SEQ_2_SEQ_LM", target_modules=targets)
        folder = saved(adapted, tmp_path / family, task_folder(family))
        merge(folder, tmp_path / f"{family}-merged", onto="original", to="fp32")
        merged = opened(tmp_path / f"{family}-merged", AutoModelForSeq2SeqLM)
        torch.testing.assert_close(
            logits(merged, decoder_input_ids=IDS[:, :4]),
            logits(adapted, decoder_input_ids=IDS[:, :4]),
            rtol=1e-4, atol=1e-4,
        )  # fmt: skip


def test_a_base_in_4_bits_has_no_original_unless_it_is_named(tiny_model_folder: Path, tmp_path: Path) -> None:
    quantize_checkpoint(tiny_model_folder, tmp_path / "four")
    quantize_checkpoint(tiny_model_folder, tmp_path / "eight", HalfbyteConfig(quant_type="int8"))
    for base in ("four", "eight"):
        adapted = shaken(halfbyte.load(tmp_path / base))
        folder = saved(adapted, tmp_path / f"over {base}", tmp_path / base)
        bits = 4 if base == "four" else 8
        with pytest.raises(InputError, match=rf"lies in {bits} bits itself, .* name the 16-bit model .* with --base"):
            merge(folder, tmp_path / "merged", onto="original")
        merge(folder, tmp_path / f"{base} merged", to="fp32")
        expected = logits(halfbyte.load(folder, quantization_config=HalfbyteConfig(compute_dtype=torch.float32)))
        torch.testing.assert_close(logits(opened(tmp_path / f"{base} merged")), expected, rtol=1e-4, atol=1e-4)
    merge(tmp_path / "over four", tmp_path / "merged", onto="original", base=tiny_model_folder, to="fp32")
    plain = PeftModel.from_pretrained(
        AutoModelForCausalLM.from_pretrained(tiny_model_folder, dtype=torch.float32), tmp_path / "over four"
    )
    torch.testing.assert_close(logits(opened(tmp_path / "merged")), logits(plain), rtol=1e-4, atol=1e-4)


def test_who_was_interrupted_goes_on(adapter: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(shards, "SHARD_BYTES", 8192)
    merge(adapter, tmp_path / "whole")
    read: list[str] = []
    plain = Merged.read
    monkeypatch.setattr(Merged, "read", lambda self, name: read.append(name) or plain(self, name))

    def stop(done: int, total: int) -> None:
        if done == total // 2:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        merge(adapter, tmp_path / "merged", progress=stop)
    assert not (tmp_path / "merged").exists() and list(tmp_path.glob(".merged.*.grown"))
    before, progress = len(read), []
    merge(adapter, tmp_path / "merged", progress=lambda done, total: progress.append((done, total)))
    total = progress[-1][1]
    assert before == total // 2 and before + len(read[before:]) < 1.5 * total and len(read[before:]) < 0.8 * total
    assert progress[-1] == (total, total)
    assert not list(tmp_path.glob(".merged*"))
    names = sorted(file.name for file in (tmp_path / "whole").iterdir())
    assert names == sorted(file.name for file in (tmp_path / "merged").iterdir()) and "config.json" in names
    names.remove("README.md")  # which calls the model by its folder
    for name in names:
        assert (tmp_path / "whole" / name).read_bytes() == (tmp_path / "merged" / name).read_bytes(), name

    with pytest.raises(KeyboardInterrupt):
        merge(adapter, tmp_path / "other", progress=stop)
    merge(adapter, tmp_path / "other", to="fp32")  # another model: begun anew, and nothing is left of the first
    assert {x.dtype for x in opened_tensors(tmp_path / "other")} == {torch.float32}
    assert not list(tmp_path.glob(".other*"))


def opened_tensors(folder: Path) -> list[Tensor]:
    return [x for file in folder.glob("*.safetensors") for x in load_file(file).values()]


def test_what_cannot_be_merged_is_told_and_nothing_is_left(
    adapter: Path, tiny_model_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = tmp_path / "merged"
    with pytest.raises(InputError, match="holds no adapter"):
        merge(tiny_model_folder, out)
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "notes").write_text("mine")
    with pytest.raises(InputError, match="is there already"):
        merge(adapter, tmp_path / "full")
    with pytest.raises(InputError, match="holds no model that could be overwritten"):
        merge(adapter, tmp_path / "full", overwrite=True)
    with pytest.raises(InputError, match="holds the adapter or the base itself"):
        merge(adapter, tiny_model_folder, overwrite=True)
    shutil.copytree(adapter, tmp_path / "classifier")
    (tmp_path / "classifier" / "config.json").write_text("{}")  # as a classifier's run has it
    with pytest.raises(InputError, match="holds no model that could be overwritten"):
        merge(adapter, tmp_path / "classifier", overwrite=True)
    with pytest.raises(InputError, match="A name is empty"):
        merge("", out)
    with monkeypatch.context() as patched:
        patched.setattr("shutil.disk_usage", lambda _: type("Usage", (), {"free": 1000})())
        with pytest.raises(InputError, match=r"The merged model takes .*, and .* are free in .*; free some space"):
            merge(adapter, out)
    file = adapter / "adapter_model.safetensors"
    weights = load_file(file)
    first = next(name for name in weights if "lora_B" in name)
    for value, message in ((float("nan"), "lora_B.* holds nan"), (1e6, r"as float16\)")):
        save_file(weights | {first: torch.full_like(weights[first], value)}, file)
        with pytest.raises(InputError, match=message):
            merge(adapter, out, to="fp16")
    assert not out.exists() and not list(tmp_path.glob(".merged*"))
    save_file(weights, file)
    config = json.loads((adapter / "adapter_config.json").read_text())
    (adapter / "adapter_config.json").write_text(json.dumps(config | {"base_model_name_or_path": "/nowhere"}))
    with pytest.raises(InputError, match="names /nowhere as its base model, but it is not there"):
        merge(adapter, out)
    merge(adapter, out, base=tiny_model_folder)


def test_tokenizer_template_and_stops_of_the_run_come_along(
    adapter: Path, tiny_model_folder: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    def invoke(*arguments: Any) -> tuple[int, str, str]:
        monkeypatch.setattr("sys.argv", ["halfbyte", *map(str, arguments)])
        with pytest.raises(SystemExit) as end:
            cli.main()
        return int(end.value.code or 0), *capfd.readouterr()

    GenerationConfig(eos_token_id=[3, 4]).save_pretrained(adapter)
    (adapter / "chat_template.jinja").write_text("{{ 'mine' }}")
    (adapter / "README.md").write_text("card")
    code, out, _ = invoke("merge", adapter, adapter.parent / "merged", "--to", "fp16")
    assert code == 0 and "Merged onto the quantized weights that it was trained over" in out
    folder = adapter.parent / "merged"
    assert GenerationConfig.from_pretrained(folder).eos_token_id == [3, 4]
    assert (folder / "chat_template.jinja").read_text() == "{{ 'mine' }}"
    assert (folder / "tokenizer.json").read_bytes() == (tiny_model_folder / "tokenizer.json").read_bytes()
    assert (folder / "README.md").read_text() != "card" and not (folder / "adapter_config.json").exists()
    assert AutoConfig.from_pretrained(folder).dtype == torch.float16
    assert AutoModel.from_pretrained(folder).dtype == torch.float16
    for arguments in (["--onto", "originl"], ["--to", "fp8"]):
        assert invoke("merge", adapter, adapter.parent / "more", *arguments)[0] == 2
    code, _, error = invoke("merge", adapter, folder)
    assert code == 2 and "--overwrite" in error
    assert not (adapter.parent / "more").exists()

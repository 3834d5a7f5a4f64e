"""A base is known in every form of it, by whoever made that, and told from every other one."""

import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, BitsAndBytesConfig, LlamaConfig, LlamaForCausalLM

import halfbyte
from halfbyte.errors import InputError
from halfbyte.hf import HalfbyteConfig, add_adapter, quantize_checkpoint
from halfbyte.hf.models import base_files
from halfbyte.hf.models.base_files import Source, check_base, fingerprint
from halfbyte.hf.models.fingerprint import FILE, Fingerprint, dense_digest
from halfbyte.hf.models.hub import Place, locate
from halfbyte.quant import codebook

SHAPE: dict[str, Any] = {
    "hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 2, "vocab_size": 258, "initializer_range": 0.2, "tie_word_embeddings": True,
}  # fmt: skip
WEIGHTS = "model.safetensors"


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A cache of each test's own."""
    monkeypatch.setenv("HALFBYTE_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache" / "fingerprints"


def dense(folder: Path, seed: int = 0, **shape: Any) -> Path:
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        LlamaForCausalLM(LlamaConfig(**SHAPE | shape)).to(torch.bfloat16).save_pretrained(folder)
    return folder


def sharded(of: Path, folder: Path) -> Path:
    AutoModelForCausalLM.from_pretrained(of).save_pretrained(folder, max_shard_size="40KB")
    assert len(list(folder.glob("*.safetensors"))) > 2
    return folder


def renamed(of: Path, folder: Path) -> Path:
    """Bytes alone: times are those of now."""
    folder.mkdir(parents=True)
    for file in of.iterdir():
        shutil.copyfile(file, folder / file.name)
    return folder


def wide(of: Path, folder: Path) -> Path:
    AutoModelForCausalLM.from_pretrained(of, dtype=torch.float32).save_pretrained(folder)
    assert load_file(folder / WEIGHTS)["model.norm.weight"].dtype == torch.float32
    return folder


def with_a_stored_head(of: Path, folder: Path) -> Path:
    shutil.copytree(of, folder)
    tensors = load_file(folder / WEIGHTS)
    save_file(
        tensors | {"lm_head.weight": tensors["model.embed_tokens.weight"].clone()}, folder / WEIGHTS, {"format": "pt"}
    )
    return folder


def torchs_own(of: Path, folder: Path) -> Path:
    shutil.copytree(of, folder)
    torch.save(load_file(folder / WEIGHTS), folder / "pytorch_model.bin")
    (folder / WEIGHTS).unlink()
    return folder


def ours(of: Path, folder: Path, **how: Any) -> Path:
    quantize_checkpoint(of, folder, HalfbyteConfig(**how))
    return folder


def ours_saved(of: Path, folder: Path) -> Path:
    halfbyte.load(of).save_pretrained(folder)
    assert not (folder / FILE).exists()
    return folder


def bitsandbytes(of: Path, folder: Path, double: bool = True, dtype: torch.dtype = torch.bfloat16) -> Path:
    config = BitsAndBytesConfig(
        load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_use_double_quant=double, bnb_4bit_compute_dtype=dtype
    )
    AutoModelForCausalLM.from_pretrained(of, quantization_config=config, dtype=dtype).save_pretrained(folder)
    assert any("bitsandbytes__nf4" in name for name in load_file(folder / WEIGHTS)) and not (folder / FILE).exists()
    return folder


FORMS: dict[str, Callable[[Path, Path], Path]] = {
    "16 bits": renamed,
    "16 bits, sharded": sharded,
    "32 bits": wide,
    "with a stored head": with_a_stored_head,
    "pytorch_model.bin": torchs_own,
    "quantize": ours,
    "quantize, moved": lambda of, folder: renamed(ours(of, folder.with_name("first")), folder),
    "quantize, fp4 of a sharded one": lambda of, folder: ours(
        sharded(of, folder.with_name("first")), folder, quant_type="fp4"
    ),
    "quantize, int8": lambda of, folder: ours(of, folder, quant_type="int8"),
    "quantize, e2m1": lambda of, folder: ours(of, folder, quant_type="e2m1"),
    "save_pretrained": ours_saved,
    "bitsandbytes": bitsandbytes,
    "bitsandbytes, single": lambda of, folder: bitsandbytes(of, folder, double=False),
    "bitsandbytes, fp16": lambda of, folder: bitsandbytes(of, folder, dtype=torch.float16),
}


def adapter(folder: Path, base: Path, form: HalfbyteConfig | None = None) -> Path:
    """An adapter as a run over ``base`` leaves it."""
    model = get_peft_model(
        halfbyte.load(base), LoraConfig(r=2, target_modules=["q_proj", "down_proj"], task_type="CAUSAL_LM")
    )
    model.save_pretrained(folder)
    found = fingerprint(Source(locate(base)), [form or HalfbyteConfig()])
    assert found
    found.called(str(base)).save(folder)
    return folder


def over(folder: Path, base: Path) -> Path:
    """The adapter in ``folder`` with another base named in its configuration."""
    about = json.loads((folder / "adapter_config.json").read_text())
    (folder / "adapter_config.json").write_text(json.dumps(about | {"base_model_name_or_path": str(base)}))
    return folder


@pytest.fixture(scope="module")
def forms(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    home = tmp_path_factory.mktemp("forms")
    base = dense(home / "base")
    return {name: make(base, home / name.replace(" ", "_") / "model") for name, make in FORMS.items()}


@pytest.fixture(scope="module")
def others(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Bases that differ from that of ``forms``, each in two ways of holding it."""
    home = tmp_path_factory.mktemp("others")
    made = {
        "another seed": dense(home / "seed", 1),
        "another width": dense(home / "width", intermediate_size=192),
        "more layers": dense(home / "layers", num_hidden_layers=3),
        "a head of its own": dense(home / "head", tie_word_embeddings=False),
    }
    for name in ("model.layers.1.mlp.up_proj.weight", "model.embed_tokens.weight", "model.norm.weight"):
        folder = made[f"a value of {name}"] = dense(home / name)
        tensors = load_file(folder / WEIGHTS)
        tensors[name].view(-1)[5] += 1
        save_file(tensors, folder / WEIGHTS, {"format": "pt"})
    for name, folder in list(made.items()):
        made[f"{name}, bitsandbytes"] = bitsandbytes(folder, home / f"{folder.name} theirs")
        made[f"{name}, quantize"] = ours(folder, home / f"{folder.name} ours")
    return made


UNKNOWN = ("bitsandbytes, fp16",)
"""Of which nothing is known that is known of other folders in 4 bits: every number was rounded otherwise."""
OTHERWISE = ("quantize, fp4 of a sharded one", "quantize, int8", "quantize, e2m1")
"""Of whose linear layers nothing is known that is known of bitsandbytes' nf4."""


@pytest.mark.parametrize("trained", FORMS)
@pytest.mark.filterwarnings("ignore")
def test_every_form_of_a_base_is_the_same(trained: str, forms: dict[str, Path], tmp_path: Path) -> None:
    folder = adapter(tmp_path / "adapter", forms[trained])
    for name, base in forms.items():
        is_known = check_base(folder, Source(locate(base)))
        assert is_known or {name, trained} & set(UNKNOWN), name
    for name in ("16 bits", "quantize", "bitsandbytes", trained):
        assert isinstance(halfbyte.load(over(folder, forms[name])), PeftModel)


@pytest.mark.parametrize("trained", FORMS)
@pytest.mark.filterwarnings("ignore")
def test_other_bases_are_refused_in_a_sentence(
    trained: str, forms: dict[str, Path], others: dict[str, Path], tmp_path: Path
) -> None:
    folder = adapter(tmp_path / "adapter", forms[trained])
    for name, base in others.items():
        if trained in UNKNOWN and "," in name and ("a value of" in name or "seed" in name):
            continue
        if trained in OTHERWISE and name.endswith("up_proj.weight, bitsandbytes"):
            continue
        with pytest.raises(InputError) as error:
            check_base(folder, Source(locate(base)))
        told = str(error.value)
        assert told.startswith(
            f"The adapter {folder} was trained on another base model ({forms[trained].name}) than {base}: "
        )
        assert told.endswith(f"; use it with that one, or remove its {FILE} to have no base compared.")
        if name.startswith("a value of"):
            assert f"{name.removeprefix('a value of ').split(',')[0]} holds other values" in told
    for name in (
        "another seed",
        "another width, quantize",
        *(["another seed, bitsandbytes"] * (trained not in UNKNOWN)),
    ):
        with pytest.raises(InputError, match="another base model"):
            halfbyte.load(over(folder, others[name]))


def test_what_differs_is_named(forms: dict[str, Path], others: dict[str, Path]) -> None:
    def of(folder: Path) -> Fingerprint:
        found = fingerprint(Source(locate(folder)))
        assert found
        return found

    base = of(forms["16 bits"])
    for name, told in {
        "another width": "model.layers.0.mlp.down_proj.weight is [64, 192] and not [64, 128]",
        "more layers": "it has model.layers.2.input_layernorm.weight too",
        "a head of its own": "it has lm_head.weight too",
        "another seed": "of 20 tensors model.embed_tokens.weight holds other values, as do 14 more",
        "a value of model.norm.weight": "of 20 tensors model.norm.weight holds other values",
    }.items():
        assert base.difference(of(others[name])) == told
    assert of(others["more layers"]).difference(base) == "it has no model.layers.2.input_layernorm.weight"


@pytest.mark.parametrize("place", ["codes", "absmax", "nested_absmax", "embed_tokens", "norm"])
@pytest.mark.parametrize("trained", ["16 bits", "quantize"])
def test_a_changed_byte_of_a_4_bit_folder_is_seen(
    place: str, trained: str, forms: dict[str, Path], tmp_path: Path
) -> None:
    folder = adapter(tmp_path / "adapter", forms[trained])
    changed = renamed(forms["quantize"], tmp_path / "changed")
    assert check_base(folder, Source(locate(changed)))
    tensors = load_file(changed / WEIGHTS)
    up = "model.layers.1.mlp.up_proj.weight"
    name = {"codes": up, "embed_tokens": "model.embed_tokens.weight", "norm": "model.norm.weight"}.get(
        place, f"{up}.{place}"
    )
    tensors[name].view(-1).view(torch.uint8)[7 % tensors[name].nbytes] ^= 1
    save_file(tensors, changed / WEIGHTS, {"format": "pt"})
    with pytest.raises(InputError, match=rf"of 20 tensors {name.removesuffix(f'.{place}')} holds other values; use"):
        check_base(folder, Source(locate(changed)))


def test_the_base_that_was_changed_in_its_place_is_told_so(tmp_path: Path) -> None:
    base = dense(tmp_path / "base")
    folder = adapter(tmp_path / "adapter", base)
    assert check_base(folder, Source(locate(base)))
    dense(base, 1)
    with pytest.raises(InputError, match=r"base is not what it was when the adapter .* was trained on it: .*; put its"):
        halfbyte.load(folder)


def test_further_adapters_are_held_to_the_base_and_need_no_remark(
    forms: dict[str, Path], others: dict[str, Path], tmp_path: Path
) -> None:
    first, second = (adapter(tmp_path / name, forms[name]) for name in ("16 bits", "quantize"))
    stranger = adapter(tmp_path / "stranger", others["another seed"])
    model = halfbyte.load(first)
    with pytest.raises(InputError, match="another base model"):
        add_adapter(model, stranger, "stranger")
    assert list(model.peft_config) == ["default"]
    assert add_adapter(model, second, "second").remark is None  # it names another folder
    (stranger / FILE).unlink()
    assert "may not do well" in str(add_adapter(model, stranger, "stranger").remark)


def test_adapters_without_a_fingerprint_are_not_compared(
    forms: dict[str, Path], others: dict[str, Path], tmp_path: Path, cache: Path
) -> None:
    folder = over(adapter(tmp_path / "adapter", forms["16 bits"]), others["another seed"])
    (folder / FILE).unlink()
    shutil.rmtree(cache)
    assert isinstance(halfbyte.load(folder), PeftModel) and not cache.exists()
    assert not check_base(folder, Source(locate(others["another seed"])))


def test_a_fingerprint_that_cannot_be_read_is_told(forms: dict[str, Path], tmp_path: Path) -> None:
    folder = adapter(tmp_path / "adapter", forms["16 bits"])
    text = (folder / FILE).read_text()
    for broken in (text[:-20], "[]", "{}", text.replace('"version": 1', '"version": 2')):
        (folder / FILE).write_text(broken)
        with pytest.raises(InputError, match=r"does not say which base model .*; copy it again, or remove it"):
            halfbyte.load(folder)


def test_weights_are_read_once_and_again_when_a_file_has_changed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    base = dense(tmp_path / "base")
    source = Source(locate(base))
    read: list[Any] = []
    digests = base_files.dense_digests
    monkeypatch.setattr(base_files, "dense_digests", lambda *args: read.append(args[1]) or digests(*args))
    first = fingerprint(source, [HalfbyteConfig()])
    assert len(read) == 20
    assert fingerprint(source, [HalfbyteConfig()]) == fingerprint(source) == first and len(read) == 20
    other = fingerprint(source, [HalfbyteConfig("fp4")])  # another format is asked for
    assert other and len(read) == 40 and {"dense", "nf4-64-bfloat16", "fp4-64-bfloat16"} <= other.digests.keys()
    assert fingerprint(source, [HalfbyteConfig()]) == other and len(read) == 40
    about = (base / WEIGHTS).stat()
    os.utime(base / WEIGHTS, ns=(about.st_atime_ns, about.st_mtime_ns + 1))
    again = fingerprint(source)
    assert first and again and first.difference(again) is None and again.digests.keys() == {"dense"}
    assert len(read) == 60
    dense(base, 1)
    changed = fingerprint(source)
    assert changed and first.difference(changed) and len(read) == 80


def test_what_quantize_has_stored_is_not_read_again(
    forms: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, cache: Path
) -> None:
    folder = adapter(tmp_path / "adapter", forms["16 bits"])
    made = ours(forms["16 bits"], tmp_path / "ours")
    shutil.copytree(made, tmp_path / "with its times")
    moved = renamed(made, tmp_path / "moved")
    shutil.rmtree(cache)

    def never(*_: Any) -> None:
        raise AssertionError("weights were read")

    with monkeypatch.context() as patch:
        patch.setattr(base_files, "_made", never)
        assert check_base(folder, Source(locate(made))) and check_base(
            folder, Source(locate(tmp_path / "with its times"))
        )
        with pytest.raises(AssertionError):
            check_base(folder, Source(locate(moved)))
    assert check_base(folder, Source(locate(moved)))  # once
    monkeypatch.setattr(base_files, "_made", never)
    assert check_base(folder, Source(locate(moved)))


def test_a_cache_that_is_damaged_or_cannot_be_written_is_no_obstacle(
    forms: dict[str, Path],
    tmp_path: Path,
    cache: Path,
    caplog: pytest.LogCaptureFixture,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    source = Source(locate(forms["16 bits"]))
    first = fingerprint(source)
    [file] = cache.iterdir()
    for text in ("", "{", "{}", '{"stamp": 1}', file.read_text()[:-100]):
        file.write_text(text)
        assert fingerprint(source) == first
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("HALFBYTE_CACHE", str(tmp_path / "file"))
    assert fingerprint(source) == first
    assert "cannot be kept" in caplog.text


def test_the_digest_of_values_is_that_of_their_narrowest_dtype() -> None:
    x = torch.randn(1000, generator=torch.Generator().manual_seed(0))
    for narrow, dtypes in {
        x.bfloat16(): (torch.float32, torch.float64),
        x.half(): (torch.float32, torch.float64),
        x: (torch.float64,),
    }.items():
        assert {dense_digest(narrow.to(dtype)) for dtype in dtypes} == {dense_digest(narrow)}
    assert len({dense_digest(one) for one in (x, x.half(), x.bfloat16(), x.bfloat16().half())}) == 3
    assert dense_digest(torch.zeros(3)) != dense_digest(-torch.zeros(3))


@pytest.mark.parametrize("bits", [8, 11], ids=["bf16", "fp16"])
def test_codes_of_nf4_are_the_same_by_division_and_by_the_reciprocal(bits: int) -> None:
    """Over all ratios of two such numbers; the reciprocal is what bitsandbytes' CUDA kernel multiplies by."""
    table = codebook("nf4").numpy()
    middles = (table[1:] + table[:-1]) / 2
    significands = np.arange(2 ** (bits - 1), 2**bits, dtype=np.float32)
    for exponent in range(8):  # smaller ones are zero
        x = (significands * np.float32(2.0**-exponent))[:, None]
        divided, multiplied = x / significands, x * (np.float32(1) / significands)
        for sign in (1, -1):
            codes = (np.searchsorted(middles, sign * ratio) for ratio in (divided, multiplied))
            assert np.array_equal(*codes)


def test_a_model_of_the_hub_is_read_where_it_was_downloaded(
    forms: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "hub"))
    source = Source(Place("some/model", False, {"local_files_only": True}))
    assert fingerprint(source) is None
    home = tmp_path / "hub/models--some--model"
    (home / "refs").mkdir(parents=True)
    (home / "refs/main").write_text("abc")
    renamed(forms["16 bits"], home / "snapshots/abc")
    assert fingerprint(source) == fingerprint(Source(locate(forms["16 bits"])))


def test_tensors_by_other_names_are_the_same_and_at_other_places_are_not(forms: dict[str, Path]) -> None:
    base = fingerprint(Source(locate(forms["16 bits"])))
    assert base
    rows = dict(base.rows)
    renamed_ = Fingerprint(base.architecture, {name.replace("mlp", "feed_forward"): row for name, row in rows.items()})
    assert base.difference(renamed_) is None and base.knows(renamed_)
    names = [f"model.layers.{i}.mlp.up_proj.weight" for i in (0, 1)]
    swapped = Fingerprint(base.architecture, rows | {names[0]: rows[names[1]], names[1]: rows[names[0]]})
    assert base.difference(swapped) == f"of 20 tensors {names[0]} holds other values, as do 1 more"


@pytest.mark.parametrize("kind", ["mixtral", "gpt2", "opt"])
@pytest.mark.filterwarnings("ignore")
def test_families_whose_files_are_put_together_or_transposed(kind: str, tmp_path: Path) -> None:
    import transformers

    configs = {
        "mixtral": lambda: transformers.MixtralConfig(**SHAPE, num_local_experts=4, num_experts_per_tok=2),
        "gpt2": lambda: transformers.GPT2Config(n_embd=64, n_layer=2, n_head=4, vocab_size=258, n_positions=64),
        "opt": lambda: transformers.OPTConfig(
            hidden_size=64, ffn_dim=128, num_hidden_layers=2, num_attention_heads=4, vocab_size=258,
            max_position_embeddings=64, word_embed_proj_dim=64,
        ),
    }  # fmt: skip
    for seed, name in enumerate(("base", "other")):
        torch.manual_seed(seed)
        model = AutoModelForCausalLM.from_config(configs[kind]()).to(torch.bfloat16)
        for parameter in model.parameters():
            torch.nn.init.normal_(parameter, std=0.1)
        model.save_pretrained(tmp_path / name)
    made = {name: tmp_path / name for name in ("base", "other")}
    for name in ("base", "other"):
        made[f"{name} ours"] = ours(made[name], tmp_path / f"{name} ours")
        made[f"{name} theirs"] = bitsandbytes(made[name], tmp_path / f"{name} theirs")
    prints = {name: fingerprint(Source(locate(folder)), [HalfbyteConfig()]) for name, folder in made.items()}
    for one, first in prints.items():
        for other, second in prints.items():
            assert first and second
            found, same = first.difference(second), one.split()[0] == other.split()[0]
            assert (found is None) == same, (one, other, found)
            assert first.knows(second) or not same

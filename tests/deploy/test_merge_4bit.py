"""A model merged into 4 bits: the base's constants, other codes, and what was learnt is still there."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model
from safetensors.torch import load_file
from theirs import by_values
from torch import Tensor
from transformers import AutoModelForCausalLM, GPT2Config, GPT2LMHeadModel

import halfbyte
from halfbyte import cli
from halfbyte.choices import Rounding
from halfbyte.deploy.merge import merge
from halfbyte.errors import InputError
from halfbyte.hf import HalfbyteConfig, quantize_checkpoint
from halfbyte.hf.models.four_bits import In4Bits
from halfbyte.hf.models.merging import Merged
from halfbyte.quant import QuantizedWeight, quantize_4bit
from halfbyte.quant.rounding import nearest

IDS = torch.randint(5, 250, (4, 33), generator=torch.Generator().manual_seed(1))
TEXTS = [torch.randint(5, 250, (40,), generator=torch.Generator().manual_seed(seed)) for seed in range(30)]
WAYS: tuple[Rounding, ...] = ("outputs", "random", "original")


def adapter_on(base: Path, folder: Path, **options: Any) -> Path:
    """A PEFT adapter whose change of each weight is a few hundredths of the distance between two codes."""
    model = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
    given = {"r": 4, "lora_alpha": 4, "target_modules": ["q_proj", "v_proj", "up_proj", "down_proj"]} | options
    adapted = get_peft_model(model, LoraConfig(task_type="CAUSAL_LM", **given))
    generator = torch.Generator().manual_seed(2)
    with torch.no_grad():
        for parameter in adapted.parameters():
            if parameter.requires_grad:
                parameter.copy_(0.06 * torch.randn(parameter.shape, generator=generator))
    adapted.save_pretrained(folder)
    return folder


@pytest.fixture
def adapter(tiny_model_folder: Path, tmp_path: Path) -> Path:
    return adapter_on(tiny_model_folder, tmp_path / "adapter")


@torch.no_grad()
def log_probs(model: Any) -> Tensor:
    found: Tensor = model.eval()(input_ids=IDS).logits
    return found.float().log_softmax(-1)


def opened(folder: Path) -> Any:
    return halfbyte.load(folder, quantization_config=HalfbyteConfig(compute_dtype=torch.float32))


def divergence(exact: Tensor, other: Tensor) -> float:
    return float((exact.exp() * (exact - other)).sum(-1).mean())


def weights_in(folder: Path) -> dict[str, QuantizedWeight]:
    state = load_file(folder / "model.safetensors")
    names = [key.partition(".quant_state")[0] for key in state if ".quant_state" in key]
    return {name: QuantizedWeight.from_state_dict(state, name) for name in names}


@pytest.mark.parametrize("rounding", WAYS)
def test_only_codes_are_other_and_bitsandbytes_opens_it(
    rounding: Rounding, adapter: Path, tiny_model_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("halfbyte.deploy.merge._texts", lambda *_: (rounding, TEXTS if rounding == "outputs" else []))
    merge(adapter, tmp_path / "merged", to="nf4", rounding=rounding)
    quantize_checkpoint(tiny_model_folder, tmp_path / "base")
    base, made = weights_in(tmp_path / "base"), weights_in(tmp_path / "merged")
    assert base.keys() == made.keys() and len(base) == 14
    changed = 0
    for name, weight in made.items():
        ours, theirs = weight.statistics, base[name].statistics
        assert torch.equal(ours.absmax, theirs.absmax) and ours.nested and theirs.nested
        assert torch.equal(ours.nested.absmax, theirs.nested.absmax) and ours.nested.offset == theirs.nested.offset
        changed += not torch.equal(weight.packed, base[name].packed)
    assert changed >= 8
    size = {name: (tmp_path / name / "model.safetensors").stat().st_size for name in ("base", "merged")}
    assert abs(size["base"] - size["merged"]) < 200_000  # the room of the header
    ours = log_probs(opened(tmp_path / "merged"))
    theirs = AutoModelForCausalLM.from_pretrained(tmp_path / "merged", device_map="cpu")
    assert by_values(theirs) == 14
    assert divergence(ours, log_probs(theirs)) < 1e-3  # which computes in bf16


def test_at_random_more_of_what_was_learnt_is_kept_than_by_the_nearest_codes(adapter: Path) -> None:
    """Of each weight's change, the part that is there: its projection on the change."""
    merged, model = Merged(adapter), In4Bits(adapter, "random")
    kept: dict[str, list[float]] = {"made": [], "nearest": []}
    changed = [
        name for name in model.sizes if any(part in name for part in ("q_proj", "v_proj", "up_proj", "down_proj"))
    ]
    for name in model.sizes:
        tensors = model.make(name)
        if name not in changed:
            continue
        exact, grid = merged.exact(name), merged.base.quantized(name)
        assert isinstance(grid, QuantizedWeight)
        base = grid.dequantize(torch.float32)
        change = exact - base
        assert change.abs().max() < 0.5 * base.abs().max() / 7  # less than half of a step between codes
        for way, weight in (
            ("made", QuantizedWeight.from_state_dict(tensors, name)), ("nearest", nearest(exact, grid)),
        ):  # fmt: skip
            kept[way].append(float(((weight.dequantize(torch.float32) - base) * change).sum() / change.square().sum()))
    assert len(kept["made"]) == 8
    made, lost = (sum(values) / 8 for values in kept.values())
    assert abs(made - 1) < 0.25 and lost < 0.6


def test_outputs_are_nearer_to_base_and_adapter_than_at_random(
    adapter: Path, tmp_path: Path, tiny_model_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    exact = log_probs(opened(adapter))
    found = {}
    for rounding in ("outputs", "random"):
        monkeypatch.setattr("halfbyte.deploy.merge._texts", lambda *_, way=rounding: (way, TEXTS))
        merge(adapter, tmp_path / rounding, to="nf4")
        found[rounding] = divergence(exact, log_probs(opened(tmp_path / rounding)))
    without = divergence(exact, log_probs(opened(tiny_model_folder)))
    assert found["outputs"] < found["random"] and found["outputs"] < without


def test_original_is_the_nearest_to_the_original_weights_and_the_change(
    adapter: Path, tiny_model_folder: Path, tmp_path: Path
) -> None:
    quantize_checkpoint(tiny_model_folder, tmp_path / "four")
    config = json.loads((adapter / "adapter_config.json").read_text())
    config["base_model_name_or_path"] = str(tmp_path / "four")
    (adapter / "adapter_config.json").write_text(json.dumps(config))
    merge(adapter, tmp_path / "merged", to="nf4", rounding="original", base=tiny_model_folder)
    exact, base = Merged(adapter, "original", torch.float32, base=tiny_model_folder), weights_in(tmp_path / "four")
    for name, weight in weights_in(tmp_path / "merged").items():
        assert torch.equal(weight.packed, nearest(exact.exact(name), base[name]).packed)
    with pytest.raises(InputError, match=r"lies in 4 bits itself.*--base"):
        merge(adapter, tmp_path / "again", to="nf4", rounding="original")
    assert not (tmp_path / "again").exists()


def test_the_same_seed_makes_the_same_files(adapter: Path, tmp_path: Path) -> None:
    files = []
    for number, seed in enumerate((None, 0, 1)):
        merge(adapter, tmp_path / str(number), to="nf4", rounding="random", seed=seed)
        files.append((tmp_path / str(number) / "model.safetensors").read_bytes())
    assert files[0] == files[1] != files[2]


@pytest.mark.filterwarnings("ignore:fan_in_fan_out")
def test_conv1d_keeps_its_form(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    torch.manual_seed(0)
    config = GPT2Config(vocab_size=256, n_embd=64, n_layer=2, n_head=4, initializer_range=0.1)
    GPT2LMHeadModel(config).save_pretrained(tmp_path / "base")
    folder = adapter_on(
        tmp_path / "base", tmp_path / "adapter", target_modules=["c_attn", "c_fc"],
        fan_in_fan_out=True,
    )  # fmt: skip
    monkeypatch.setattr("halfbyte.deploy.merge._texts", lambda *_: ("outputs", TEXTS))
    merge(folder, tmp_path / "merged", to="nf4")
    state = load_file(tmp_path / "merged" / "model.safetensors")
    packed = [name for name in state if state[name].dtype == torch.uint8 and name.endswith("weight")]
    assert len(packed) == 8
    exact, found = log_probs(opened(folder)), log_probs(opened(tmp_path / "merged"))
    assert divergence(exact, found) < divergence(exact, log_probs(opened(tmp_path / "base")))


def test_a_module_that_was_saved_whole_stays_dense(adapter: Path, tiny_model_folder: Path, tmp_path: Path) -> None:
    folder = adapter_on(tiny_model_folder, tmp_path / "whole", target_modules=["q_proj"], modules_to_save=["o_proj"])
    merge(folder, tmp_path / "merged", to="nf4")
    trained = load_file(folder / "adapter_model.safetensors")
    state = load_file(tmp_path / "merged" / "model.safetensors")
    model = opened(tmp_path / "merged")
    for layer in range(2):
        name = f"model.layers.{layer}.self_attn.o_proj.weight"
        assert torch.equal(state[name], trained[f"base_model.model.{name}"].bfloat16())
        assert type(model.get_submodule(name.removesuffix(".weight"))) is torch.nn.Linear


@pytest.mark.parametrize("quant_type", ["fp4", "int8", "e2m1"])
def test_a_base_in_other_bits_gets_constants_of_its_own(
    quant_type: str, adapter: Path, tiny_model_folder: Path, tmp_path: Path
) -> None:
    (adapter / "base_format.json").write_text(
        json.dumps(
            {
                "quant_type": quant_type,
                "blocksize": 64,
                "double_quant": quant_type != "int8",
                "compute_dtype": "bfloat16",
            }
        )
    )
    merge(adapter, tmp_path / "merged", to="nf4")
    exact = Merged(adapter)
    for name, weight in weights_in(tmp_path / "merged").items():
        own = quantize_4bit(exact.exact(name).bfloat16())
        assert weight.quant_type == "nf4" and torch.equal(weight.statistics.absmax, own.statistics.absmax)


def test_a_model_that_is_merged_in_two_parts_is_the_same(
    adapter: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("halfbyte.hf.models.shards.SHARD_BYTES", 8000)
    monkeypatch.setattr("halfbyte.deploy.merge._texts", lambda *_: ("outputs", TEXTS))
    merge(adapter, tmp_path / "whole", to="nf4")

    def stop(done: int, total: int) -> None:
        if done > total // 2:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        merge(adapter, tmp_path / "parts", to="nf4", progress=stop)
    assert not (tmp_path / "parts").exists()
    merge(adapter, tmp_path / "parts", to="nf4")
    names = sorted(file.name for file in (tmp_path / "whole").glob("*.safetensors"))
    assert len(names) > 2
    for name in names:
        assert (tmp_path / "whole" / name).read_bytes() == (tmp_path / "parts" / name).read_bytes()


@pytest.mark.parametrize(
    ("options", "sentence"),
    [
        (["--rounding", "random"], "rounding is for 4 bits alone; say --to nf4"),
        (["--to", "nf4", "--rounding", "random", "--data", "x.jsonl"], "rounding random takes no data"),
        (["--to", "nf4", "--rounding", "outputs"], "is no run of halfbyte, so its data are not known; name some"),
        (["--to", "nf4", "--onto", "original"], "say --rounding original"),
        (["--to", "nf4", "--data", "nowhere.jsonl"], "nowhere.jsonl"),
    ],
)
def test_options_that_do_not_go_together_are_told(
    options: list[str],
    sentence: str,
    adapter: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capfd: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setattr("sys.argv", ["halfbyte", "merge", str(adapter), str(tmp_path / "merged"), *options])
    with pytest.raises(SystemExit) as end:
        cli.main()
    assert end.value.code == 2 and sentence in " ".join(capfd.readouterr().err.split())
    assert not (tmp_path / "merged").exists()


def test_an_adapter_over_16_bits_has_no_4_bits_to_keep(adapter: Path, tmp_path: Path) -> None:
    (adapter / "base_format.json").write_text(
        json.dumps({"quant_type": "none", "blocksize": None, "double_quant": False, "compute_dtype": "bfloat16"})
    )
    with pytest.raises(InputError, match=r"trained over a base in 16 bits.*quantize that"):
        merge(adapter, tmp_path / "merged", to="nf4")

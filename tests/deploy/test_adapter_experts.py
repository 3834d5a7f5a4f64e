"""Adapters on stacks of experts, looked at and made anew, against what PEFT adds to transformers' own stacks."""

import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers as t
from peft import LoraConfig, PeftModel, get_peft_model
from peft.tuners.lora.layer import ParamWrapper
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from halfbyte import cli
from halfbyte.deploy.adapters import combine, convert, diff, info, truncate
from halfbyte.errors import InputError
from halfbyte.hf.models.low_rank import read_low_rank, save_low_rank

KINDS = ["Mixtral", "Qwen3Moe", "GptOss", "Llama4Text"]
SHAPE: dict[str, Any] = {
    "vocab_size": 96, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 2,
    "num_key_value_heads": 2, "head_dim": 16, "num_experts_per_tok": 2, "moe_intermediate_size": 24, "pad_token_id": 0,
    "shared_expert_intermediate_size": 24,
}  # fmt: skip
STACKS = ["experts.gate_up_proj", "experts.down_proj"]
GATE = "model.layers.0.mlp.experts.gate_up_proj"
pytestmark = pytest.mark.filterwarnings("ignore:The following (rank|alpha)_pattern keys did not match:RuntimeWarning")
"""PEFT (0.21) says so of patterns for parameters, though they match."""


def mixture(kind: str, experts: int = 5, **more: Any) -> t.PreTrainedModel:
    """A model of random values."""
    torch.manual_seed(0)
    given = SHAPE | {"num_local_experts": experts, "num_experts": experts, "initializer_range": 0.2} | more
    model: t.PreTrainedModel = t.AutoModelForCausalLM.from_config(getattr(t, f"{kind}Config")(**given)).float().eval()
    return model


def adapter(folder: Path, model: t.PreTrainedModel, seed: int = 2, **options: Any) -> Path:
    """An adapter that PEFT made, its values random."""
    given = {"r": 4, "lora_alpha": 8, "target_modules": ["q_proj"], "target_parameters": STACKS} | options
    adapted = get_peft_model(model, LoraConfig(task_type="CAUSAL_LM", **given))
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in adapted.parameters():
            if parameter.requires_grad:
                parameter.copy_(0.1 * torch.randn(parameter.shape, generator=generator))
    adapted.save_pretrained(folder)
    adapted.unload()
    return folder


def sums(kind: str, folder: Path, **shape: Any) -> dict[str, Tensor]:
    """What PEFT adds to each weight; of a stack to each expert's, under the names that are told here."""
    model = PeftModel.from_pretrained(mixture(kind, **shape), folder)
    found: dict[str, Tensor] = {}
    for name, module in model.named_modules():
        if not hasattr(module, "get_delta_weight"):
            continue
        delta = module.get_delta_weight("default").detach()
        path = name.removeprefix("base_model.model.").replace(".base_layer", "")
        if isinstance(module, ParamWrapper) and delta.ndim == 3:
            found |= {f"{path}.{number}.{module.parameter_name}": matrix for number, matrix in enumerate(delta)}
        else:
            found[path] = delta
    return found


def stack_of(name: str) -> str:
    """The stack of an expert's matrix; "" of another module."""
    path, _, parameter = name.rpartition(".")
    return f"{path.rpartition('.')[0]}.{parameter}" if ".experts." in name else ""


def near(found: dict[str, Tensor], wanted: dict[str, Tensor]) -> None:
    assert found.keys() == wanted.keys()
    for name, x in wanted.items():
        torch.testing.assert_close(found[name], x, rtol=1e-4, atol=1e-5, msg=name)


def relative(found: dict[str, Tensor], wanted: dict[str, Tensor]) -> float:
    apart = sum(float((found[name] - x).square().sum()) for name, x in wanted.items())
    return math.sqrt(apart / sum(float(x.square().sum()) for x in wanted.values()))


@pytest.mark.parametrize("kind", KINDS)
def test_an_expert_s_pair_is_what_peft_adds_to_its_matrix(kind: str, tmp_path: Path) -> None:
    folder = adapter(
        tmp_path / "a", mixture(kind), use_rslora=True, rank_pattern={"experts.gate_up_proj": 2, "q_proj": 3},
        alpha_pattern={r"layers.1.*\.down_proj": 5},
    )  # fmt: skip
    wanted = sums(kind, folder)
    read = read_low_rank(folder)
    assert len(wanted) == 2 + 2 * 2 * 5 and not read.others
    for name, part in read.parts.items():
        delta = wanted[name] if part.shape == tuple(wanted[name].shape) else wanted[name].T  # PEFT's is of the stack
        torch.testing.assert_close(part.dense(), delta, rtol=1e-4, atol=1e-6)
    save_low_rank(read, tmp_path / "again")
    near(sums(kind, tmp_path / "again"), wanted)
    for module in info(folder).modules:
        values = torch.linalg.svdvals(wanted[module.name].double())
        assert module.norm == pytest.approx(float(values.norm()), rel=1e-5)
        assert module.stack == stack_of(module.name)
        assert module.rank == (2 if "gate_up" in module.name else 3 if "q_proj" in module.name else 4)
        kept = values.square().cumsum(0) / values.square().sum()
        assert kept[module.effective - 1] >= 0.99 - 1e-6
        assert module.effective == 1 or kept[module.effective - 2] < 0.99


def test_stacks_that_peft_has_named_itself_are_known(tmp_path: Path) -> None:
    names = {"target_modules": ["q_proj", "w1", "w2", "w3"], "target_parameters": None}  # as before stacks
    folder = adapter(tmp_path / "a", mixture("Mixtral"), **names)
    about = json.loads((folder / "adapter_config.json").read_text())
    assert {*about["target_parameters"]} == {"gate_up_proj", "down_proj"} and about["target_modules"] == ["q_proj"]
    wanted = sums("Mixtral", folder)
    made = truncate(folder, tmp_path / "whole", rank=8)
    assert made.ranks == (4, 8) and made.error < 1e-6 and len(wanted) == 2 + 2 * 2 * 5
    near(sums("Mixtral", tmp_path / "whole"), wanted)


@pytest.mark.parametrize("kind", KINDS)
def test_truncating_is_the_nearest_of_each_expert_and_one_rank_of_a_stack(kind: str, tmp_path: Path) -> None:
    folder = adapter(tmp_path / "a", mixture(kind), r=6)
    file = folder / "adapter_model.safetensors"
    weights = load_file(file)
    for name, x in weights.items():  # each expert another number of ranks that matter
        if "experts" in name and "lora_A" in name:
            x.view(5, 6, -1).mul_((torch.arange(6) <= torch.arange(5)[:, None])[..., None] + 1e-3)
    save_file(weights, file)
    wanted = sums(kind, folder)
    made = truncate(folder, tmp_path / "two", rank=2)
    found = sums(kind, tmp_path / "two")
    assert made.ranks == (2, 2) and relative(found, wanted) == pytest.approx(made.error, rel=1e-3)
    for name, x in wanted.items():
        u, values, v = torch.linalg.svd(x.double(), full_matrices=False)
        torch.testing.assert_close(found[name].double(), (u[:, :2] * values[:2]) @ v[:2], rtol=1e-4, atol=1e-5)
    made = truncate(folder, tmp_path / "most", energy=0.99)
    found = sums(kind, tmp_path / "most")
    needed = {module.name: module.effective for module in info(folder).modules}
    for name, part in read_low_rank(tmp_path / "most").parts.items():
        beside = [needed[other] for other in needed if stack_of(other) and stack_of(other) == stack_of(name)]
        assert part.rank == max(beside or [needed[name]])
        assert float((found[name] - wanted[name]).square().sum()) <= 0.01 * float(wanted[name].square().sum()) * 1.0001
    assert made.ranks[0] < 6 and relative(found, wanted) == pytest.approx(made.error, rel=1e-2)


@pytest.mark.parametrize("kind", KINDS)
def test_cat_is_exact_and_svd_the_nearest_expert_by_expert(kind: str, tmp_path: Path) -> None:
    base = mixture(kind)
    one = adapter(tmp_path / "one", base, 1, target_parameters=["experts.down_proj"])
    two = adapter(tmp_path / "two", base, 2, r=3, target_modules=["v_proj"], use_rslora=True)
    first, second = sums(kind, one), sums(kind, two)
    zero = torch.zeros(1)
    wanted = {n: 0.7 * first.get(n, zero) - 0.2 * second.get(n, zero) for n in first.keys() | second.keys()}
    for pair, ranks in (({str(one): 0.7, str(two): -0.2}, (3, 7)), ({str(two): -0.2, str(one): 0.7}, (3, 7))):
        out = tmp_path / f"sum{len([*tmp_path.iterdir()])}"
        made = combine(pair, out)
        assert made.error == 0 and made.ranks == ranks
        near(sums(kind, out), wanted)
    made = combine({str(one): 0.7, str(two): -0.2}, tmp_path / "near", method="svd", rank=2)
    found = sums(kind, tmp_path / "near")
    assert made.ranks == (2, 2) and relative(found, wanted) == pytest.approx(made.error, rel=1e-3)
    for name, x in wanted.items():
        best = float(torch.linalg.svdvals(x.double())[2:].norm())
        assert float((found[name] - x).norm()) == pytest.approx(best, rel=1e-3, abs=1e-6)
    apart = {module.name: module for module in diff(one, two)[0]}
    for name in first.keys() & second.keys():
        assert apart[name].apart == pytest.approx(float((second[name] - first[name]).norm() / first[name].norm()), 1e-4)


@pytest.mark.parametrize("method", ["linear", "ties", "magnitude_prune"])
def test_the_other_ways_are_what_peft_makes_of_a_layer_for_each_expert(method: Any, tmp_path: Path) -> None:
    base = mixture("Mixtral")
    paths = [adapter(tmp_path / str(seed), base, seed) for seed in (1, 2)]
    density = None if method == "linear" else 0.6
    combine({str(paths[0]): 0.7, str(paths[1]): -0.4}, tmp_path / "ours", method=method, density=density)
    layers = nn.ModuleList(nn.Linear(32, 96, bias=False) for _ in range(5))
    model = get_peft_model(layers, LoraConfig(r=4, lora_alpha=8, target_modules=r"\d"), "one")
    model.add_adapter("two", LoraConfig(r=4, lora_alpha=8, target_modules=r"\d"))
    for name, folder in zip(("one", "two"), paths, strict=True):
        weights = load_file(folder / "adapter_model.safetensors")
        a, b = (weights[f"base_model.model.{GATE.rpartition('.')[0]}.base_layer.lora_{x}.weight"] for x in "AB")
        for number, layer in enumerate(model.base_model.model):
            layer.lora_A[name].weight.data = a[4 * number : 4 * number + 4].clone()
            layer.lora_B[name].weight.data = b[:, number::5].clone()
    model.add_weighted_adapter(["one", "two"], [0.7, -0.4], "sum", combination_type=method, density=density)
    found = sums("Mixtral", tmp_path / "ours")
    for number, layer in enumerate(model.base_model.model):
        wanted = layer.get_delta_weight("sum")
        assert wanted.any()
        torch.testing.assert_close(found[GATE.replace("gate_up", f"{number}.gate_up")], wanted, rtol=1e-4, atol=1e-5)


def test_a_shared_expert_keeps_its_rank_and_scale(tmp_path: Path) -> None:
    base = mixture("Qwen2Moe")
    shared = ["shared_expert.gate_proj.weight", *STACKS]
    one = adapter(tmp_path / "one", base, 1, target_parameters=shared, rank_pattern={"experts.down_proj": 6})
    two = adapter(tmp_path / "two", base, 2, target_parameters=STACKS, r=2)
    first, second = sums("Qwen2Moe", one), sums("Qwen2Moe", two)
    wanted = {name: first[name] + second.get(name, torch.zeros(1)) for name in first}
    for pair in ((one, two), (two, one)):
        combine(dict.fromkeys(map(str, pair), 1.0), tmp_path / f"sum-{pair[0].name}")
        near(sums("Qwen2Moe", tmp_path / f"sum-{pair[0].name}"), wanted)


def test_plain_lora_of_a_beginning_is_exact(tmp_path: Path) -> None:
    base = mixture("GptOss")
    one, began = adapter(tmp_path / "one", base, 1), adapter(tmp_path / "began", base, 2)
    file = one / "adapter_config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {"init_lora_weights": "olora"}))
    first, second = sums_of_plain(one), sums("GptOss", began)
    made = convert(one, tmp_path / "out", initial=began)
    assert made.error == 0 and made.ranks == (8, 8)
    near(sums("GptOss", tmp_path / "out"), {name: first[name] - second[name] for name in first})


def sums_of_plain(folder: Path) -> dict[str, Tensor]:
    """Of an adapter that says it began with OLoRA, for which PEFT would look for weights."""
    file = folder / "adapter_config.json"
    text = file.read_text()
    file.write_text(text.replace("olora", "gaussian"))
    found = sums("GptOss", folder)
    file.write_text(text)
    return found


def test_what_does_not_fit_together_is_told(tmp_path: Path) -> None:
    one = adapter(tmp_path / "one", mixture("Mixtral"))
    few = adapter(tmp_path / "few", mixture("Mixtral", 3))
    wide = adapter(tmp_path / "wide", mixture("Mixtral", intermediate_size=64))
    for other, message in (
        (few, rf"of different models: {GATE} has 3 experts in one and 5 in the other"),
        (wide, r"gate_up_proj is \[128, 32\] in one and \[96, 32\] in the other"),
    ):
        for use in (lambda other=other: combine({str(one): 1, str(other): 1}, tmp_path / "out"),
                    lambda other=other: diff(one, other)):  # fmt: skip
            with pytest.raises(InputError, match=message):
                use()
    config = json.loads((one / "adapter_config.json").read_text())
    for change, message in (
        ({"r": 3}, rf"has 20 rows in A of {GATE}, no multiple of its rank, which adapter_config.json says is 3"),
        ({"target_parameters": ["experts.down_proj"]}, r"is on down_proj of .*experts by its adapter_config.json"),
        ({"use_dora": True}, rf"is DoRA on {GATE} \(5 experts of \[96, 32\]\)"),
    ):
        (one / "adapter_config.json").write_text(json.dumps(config | change))
        with pytest.raises(InputError, match=message):
            truncate(one, tmp_path / "out", rank=1)
    (one / "adapter_config.json").write_text(json.dumps(config))
    weights = load_file(one / "adapter_model.safetensors")
    key = next(key for key in weights if "experts.lora_B" in key)
    save_file(weights | {key: weights[key][:, :16].clone()}, one / "adapter_model.safetensors")
    with pytest.raises(InputError, match=r"lora_A.weight, \[20, 48\], and .*lora_B.weight, \[32, 16\], which have no"):
        truncate(one, tmp_path / "out", rank=1)
    assert not (tmp_path / "out").exists()


def test_the_commands_tell_of_experts(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    def run(*arguments: Any) -> tuple[int, str, str]:
        monkeypatch.setattr("sys.argv", ["halfbyte", *map(str, arguments)])
        with pytest.raises(SystemExit) as end:
            cli.main()
        return int(end.value.code or 0), *capfd.readouterr()

    monkeypatch.setenv("COLUMNS", "200")
    base = mixture("Mixtral")
    base.save_pretrained(tmp_path / "base")
    one = adapter(tmp_path / "one", base)
    code, out, _ = run("adapter", "info", one)
    assert code == 0 and "parameters in 22 modules" in out
    rows = [line.replace("│", "").split() for line in out.splitlines() if "experts." in line]
    assert [row[:2] for row in rows] == [["experts.gate_up_proj", "10"], ["experts.down_proj", "10"]]
    code, out, _ = run("adapter", "info", one, "--modules")
    assert code == 0 and [line.replace("│", "").split()[1] for line in out.splitlines() if GATE in line] == ["5"]
    code, out, _ = run("adapter", "diff", one, one)
    assert code == 0 and "experts.down_proj" in out
    config = json.loads((one / "adapter_config.json").read_text()) | {"base_model_name_or_path": str(tmp_path / "base")}
    (one / "adapter_config.json").write_text(json.dumps(config))
    code, _, error = run("export", one, tmp_path / "out", "--format", "lora-gguf")
    assert code == 2 and f"is on experts ({GATE}, 5 of [96, 32])" in error and not (tmp_path / "out").exists()

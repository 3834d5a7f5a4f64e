"""Adapters looked at and made anew, against dense sums, numpy's singular values and PEFT's own ways."""

import json
import logging
import math
import sys
from importlib.abc import MetaPathFinder
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import AutoModelForCausalLM, PreTrainedModel

import halfbyte
from halfbyte import cli
from halfbyte.deploy import adapters
from halfbyte.deploy.adapters import combine, convert, diff, info, truncate
from halfbyte.errors import InputError

IDS = torch.randint(5, 250, (2, 17), generator=torch.Generator().manual_seed(1))


@pytest.fixture
def base(tiny_model_folder: Path) -> PreTrainedModel:
    model: PreTrainedModel = AutoModelForCausalLM.from_pretrained(tiny_model_folder, dtype=torch.float32)
    return model


def adapter(folder: Path, base: Path, seed: int = 2, scale: float = 0.1, **options: Any) -> Path:
    """An adapter in a folder, its values random."""
    model = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
    given = {"r": 4, "lora_alpha": 8, "target_modules": ["q_proj", "down_proj"], "task_type": "CAUSAL_LM"} | options
    adapted = get_peft_model(model, LoraConfig(**given))
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in adapted.parameters():
            if parameter.requires_grad:
                parameter.add_(scale * torch.randn(parameter.shape, generator=generator))
    adapted.peft_config["default"].base_model_name_or_path = str(base)
    adapted.save_pretrained(folder)
    return folder


def sums(base: Path, folder: Path) -> dict[str, Tensor]:
    """What PEFT adds to each weight."""
    model = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32), folder)
    return {
        name.removeprefix("base_model.model."): module.get_delta_weight("default").detach()
        for name, module in model.named_modules()
        if hasattr(module, "get_delta_weight")
    }


@torch.no_grad()
def logits(base: Path, folder: Path) -> Tensor:
    model = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32), folder)
    found: Tensor = model.eval()(input_ids=IDS).logits
    return found


def relative(found: dict[str, Tensor], wanted: dict[str, Tensor]) -> float:
    apart = sum(float((found[name] - wanted[name]).square().sum()) for name in wanted)
    return math.sqrt(apart / sum(float(x.square().sum()) for x in wanted.values()))


def test_info_has_the_norms_and_singular_values_of_the_sums(tiny_model_folder: Path, tmp_path: Path) -> None:
    folder = adapter(
        tmp_path / "a", tiny_model_folder, use_rslora=True, rank_pattern={"q_proj": 2}, alpha_pattern={"down_proj": 3}
    )
    found, wanted = info(folder), sums(tiny_model_folder, folder)
    assert {module.name for module in found.modules} == wanted.keys() and len(wanted) == 4
    for module in found.modules:
        values = torch.linalg.svdvals(wanted[module.name].double())
        assert module.shape == tuple(wanted[module.name].shape)
        assert module.rank == (2 if "q_proj" in module.name else 4)
        assert module.norm == pytest.approx(float(values.norm()), rel=1e-5)
        assert module.stable == pytest.approx(float(values.norm() ** 2 / values[0] ** 2), rel=1e-5)
        parts = values.square().cumsum(0) / values.square().sum()
        assert parts[module.effective - 1] >= 0.99 - 1e-6
        assert module.effective == 1 or parts[module.effective - 2] < 0.99
        assert module.parameters == module.rank * sum(module.shape)


def test_info_advises(tiny_model_folder: Path, tmp_path: Path) -> None:
    folder = adapter(tmp_path / "a", tiny_model_folder, r=16, lora_alpha=16)
    file = folder / "adapter_model.safetensors"
    weights = load_file(file)
    assert info(folder).advice == "Most modules use all of rank 16; a higher one may learn more."
    low = {name: x * (torch.arange(16) < 3)[:, None] if "lora_A" in name else x for name, x in weights.items()}
    save_file(low, file)
    assert "Rank 16 was trained, and 99% of the energy lies in 3 to 3" in str(info(folder).advice)
    save_file({name: x * 0 if "lora_B" in name else x for name, x in weights.items()}, file)
    assert info(folder).advice == "All of it is zero: the adapter changes nothing."


@pytest.mark.filterwarnings("ignore:Model has `tie_word_embeddings", "ignore:Setting `save_embedding_layers`")
def test_the_nearest_of_a_rank_has_the_error_that_is_told(tiny_model_folder: Path, tmp_path: Path) -> None:
    folder = adapter(tmp_path / "a", tiny_model_folder, r=8, target_modules=["q_proj", "down_proj", "embed_tokens"])
    wanted = sums(tiny_model_folder, folder)
    made = truncate(folder, tmp_path / "two", rank=2)
    found = sums(tiny_model_folder, tmp_path / "two")
    assert made.ranks == (2, 2) and relative(found, wanted) == pytest.approx(made.error, rel=1e-4)
    for name, x in wanted.items():
        u, values, v = torch.linalg.svd(x.double(), full_matrices=False)
        best = (u[:, :2] * values[:2]) @ v[:2]
        torch.testing.assert_close(found[name].double(), best, rtol=1e-4, atol=1e-5)
    made = truncate(folder, tmp_path / "most", energy=0.9)
    found = sums(tiny_model_folder, tmp_path / "most")
    assert made.ranks[1] < 8
    for name, x in wanted.items():
        assert float((found[name] - x).square().sum()) <= 0.1 * float(x.square().sum()) * (1 + 1e-4)
    assert relative(found, wanted) == pytest.approx(made.error, rel=1e-4)
    made = truncate(folder, tmp_path / "all", energy=1)
    torch.testing.assert_close(
        logits(tiny_model_folder, tmp_path / "all"), logits(tiny_model_folder, folder), rtol=1e-4, atol=1e-4
    )
    wrong: tuple[tuple[dict[str, Any], str], ...] = (
        ({}, "one of the two"),
        ({"rank": 2, "energy": 0.5}, "one of the two"),
        ({"rank": 0}, "rank is 0"),
        ({"energy": 1.5}, "energy is 1.5"),
    )
    for given, message in wrong:
        with pytest.raises(InputError, match=message):
            truncate(folder, tmp_path / "no", **given)
    with pytest.raises(InputError, match="is there already"):
        truncate(folder, tmp_path / "two", rank=1)


def test_cat_is_exact_and_svd_the_nearest(tiny_model_folder: Path, tmp_path: Path) -> None:
    one = adapter(tmp_path / "one", tiny_model_folder, 1)
    two = adapter(tmp_path / "two", tiny_model_folder, 2, r=3, target_modules=["q_proj", "up_proj"], use_rslora=True)
    first, second = sums(tiny_model_folder, one), sums(tiny_model_folder, two)
    wanted = {
        name: 0.7 * first.get(name, torch.zeros(1)) - 0.2 * second.get(name, torch.zeros(1))
        for name in first.keys() | second.keys()
    }
    made = combine({str(one): 0.7, str(two): -0.2}, tmp_path / "sum")
    assert made.error == 0 and made.ranks == (3, 7)
    found = sums(tiny_model_folder, tmp_path / "sum")
    for name, x in wanted.items():
        torch.testing.assert_close(found[name], x, rtol=1e-4, atol=1e-5)
    made = combine({str(one): 0.7, str(two): -0.2}, tmp_path / "near", method="svd", rank=4)
    found = sums(tiny_model_folder, tmp_path / "near")
    assert relative(found, wanted) == pytest.approx(made.error, rel=1e-3)
    best = torch.linalg.svdvals(wanted["model.layers.0.self_attn.q_proj"].double())[4:].norm()
    name = "model.layers.0.self_attn.q_proj"
    assert (found[name] - wanted[name]).norm().item() == pytest.approx(float(best), rel=1e-3)


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("method", ["linear", "ties", "dare_linear", "dare_ties", "magnitude_prune"])
def test_the_other_ways_are_peft_s(method: Any, tiny_model_folder: Path, tmp_path: Path) -> None:
    paths = [adapter(tmp_path / str(seed), tiny_model_folder, seed) for seed in (1, 2)]
    density = None if method == "linear" else 0.6
    made = combine(
        dict(zip(map(str, paths), (0.7, -0.4), strict=True)), tmp_path / "ours", method=method, density=density
    )
    base = AutoModelForCausalLM.from_pretrained(tiny_model_folder, dtype=torch.float32)
    model = PeftModel.from_pretrained(base, paths[0], adapter_name="one")
    model.load_adapter(str(paths[1]), "two")
    names = [name for name, module in model.named_modules() if hasattr(module, "get_delta_weight")]
    ours = sums(tiny_model_folder, tmp_path / "ours")
    if method.startswith("dare"):  # which draws: PEFT's draws come in another order
        weights = load_file(tmp_path / "ours" / "adapter_model.safetensors")
        dropped = torch.cat([(x == 0).flatten() for x in weights.values()]).float().mean().item()
        assert dropped == pytest.approx(0.4**2, abs=0.03) and made.error > 0  # by both
        first, second = (weights[f"base_model.model.{name}.lora_A.weight"] == 0 for name in ours if "q_proj" in name)
        assert not torch.equal(first, second)
        combine(dict(zip(map(str, paths), (0.7, -0.4), strict=True)), tmp_path / "all", method=method, density=1)
        ours, method, density = sums(tiny_model_folder, tmp_path / "all"), method.replace("dare_", ""), 1
    model.add_weighted_adapter(["one", "two"], [0.7, -0.4], "sum", combination_type=method, density=density)
    for name in names:
        wanted = model.get_submodule(name).get_delta_weight("sum")
        torch.testing.assert_close(ours[name.removeprefix("base_model.model.")], wanted, rtol=1e-4, atol=1e-5)


@pytest.mark.filterwarnings("ignore:Model has `tie_word_embeddings")
def test_what_cannot_be_combined_is_told(tiny_model_folder: Path, tmp_path: Path) -> None:
    one = adapter(tmp_path / "one", tiny_model_folder)
    others = {
        "dora": ({"use_dora": True}, "is DoRA"),
        "whole": ({"modules_to_save": ["lm_head"]}, "holds more than LoRA"),
        "modules": ({"target_modules": ["k_proj"]}, "has other modules"),
        "rank": ({"r": 2}, r"these have 2 and 4; take cat or svd"),
    }
    for name, (options, message) in others.items():
        other = adapter(tmp_path / name, tiny_model_folder, **options)
        with pytest.raises(InputError, match=message):
            combine({str(one): 1, str(other): 1}, tmp_path / "out", method="linear")
    with pytest.raises(InputError, match="two adapters or more"):
        combine({str(one): 1}, tmp_path / "out")
    with pytest.raises(InputError, match="density is 2"):
        combine({str(one): 1, str(adapter(tmp_path / "same", tiny_model_folder)): 1}, tmp_path / "out",
                method="ties", density=2)  # fmt: skip
    same = {str(one): 1, str(tmp_path / "same"): 1}
    for options, message in (
        ({"rank": 2}, "--rank says nothing of cat"),
        ({"method": "svd", "density": 0.5}, "--density says nothing of svd"),
        ({"method": "svd", "rank": 0}, "A rank is 1 or more, not 0"),
        ({"method": "svd", "rank": -2}, "A rank is 1 or more, not -2"),
    ):
        with pytest.raises(InputError, match=message):
            combine(same, tmp_path / "out", **options)
    with pytest.raises(InputError, match="One adapter is named twice"):
        combine({str(one): 1, f"{one}/": 1}, tmp_path / "out")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("key", "value", "message"),
    [
        ("lora_alpha", float("nan"), "says lora_alpha nan; it must be a finite number"),
        ("lora_alpha", "much", "says lora_alpha 'much'; it must be a finite number"),
        ("alpha_pattern", {"q_proj": None, "k_proj": "x"}, "says k_proj 'x'; it must be a finite number"),
        ("r", 2.5, "says r 2.5; it must be a whole number of 1 or more"),
    ],
)
def test_settings_that_are_no_numbers_are_told(
    key: str, value: Any, message: str, tiny_model_folder: Path, tmp_path: Path
) -> None:
    one = adapter(tmp_path / "one", tiny_model_folder)
    config = json.loads((one / "adapter_config.json").read_text()) | {key: value}
    (one / "adapter_config.json").write_text(json.dumps(config))
    with pytest.raises(InputError, match=message):
        truncate(one, tmp_path / "out", rank=1)
    with pytest.raises(InputError, match=message):
        halfbyte.hf.load(one)
    weights = load_file(one / "adapter_model.safetensors")
    (one / "adapter_config.json").write_text(json.dumps(config | {"r": 4, "lora_alpha": 8, "alpha_pattern": {}}))
    save_file({name: x for name, x in weights.items() if "lora_A" not in name}, one / "adapter_model.safetensors")
    with pytest.raises(InputError, match=r"lora_B.weight and lacks its lora_A; copy it again"):
        truncate(one, tmp_path / "out", rank=1)


@pytest.mark.filterwarnings("ignore")
def test_dora_becomes_the_nearest_plain_lora(tiny_model_folder: Path, tmp_path: Path) -> None:
    folder = adapter(tmp_path / "dora", tiny_model_folder, use_dora=True)
    (folder / "base_format.json").write_text(json.dumps({"quant_type": "none"}))
    with pytest.raises(InputError, match="is DoRA, whose sum is no product"):
        truncate(folder, tmp_path / "out", rank=2)
    with pytest.raises(InputError, match="a rank that is to be given"):
        convert(folder, tmp_path / "out")
    whole = convert(folder, tmp_path / "whole", rank=32)
    assert whole.error < 1e-6
    torch.testing.assert_close(
        logits(tiny_model_folder, tmp_path / "whole"), logits(tiny_model_folder, folder), rtol=1e-3, atol=1e-3
    )
    some = convert(folder, tmp_path / "some", rank=6)
    wanted, found = (sums(tiny_model_folder, tmp_path / name) for name in ("whole", "some"))
    assert 0 < some.error < 1 and relative(found, wanted) == pytest.approx(some.error, rel=1e-3)
    with pytest.raises(InputError, match="is plain LoRA already"):
        convert(tmp_path / "some", tmp_path / "out", rank=2)


def test_pissa_of_peft_becomes_plain_lora_exactly(tiny_model_folder: Path, tmp_path: Path) -> None:
    model = AutoModelForCausalLM.from_pretrained(tiny_model_folder, dtype=torch.float32)
    config = LoraConfig(r=4, target_modules=["q_proj"], task_type="CAUSAL_LM", init_lora_weights="pissa")
    adapted = get_peft_model(model, config)
    adapted.save_pretrained(tmp_path / "began")
    with torch.no_grad():
        for name, parameter in adapted.named_parameters():
            if "lora_" in name:
                parameter.add_(0.1 * torch.randn(parameter.shape, generator=torch.Generator().manual_seed(3)))
        expected = adapted.eval()(input_ids=IDS).logits
    adapted.save_pretrained(tmp_path / "pissa")
    with pytest.raises(InputError, match=r"began with pissa, which was taken out of its base; name .* --initial"):
        convert(tmp_path / "pissa", tmp_path / "out")
    made = convert(tmp_path / "pissa", tmp_path / "out", initial=tmp_path / "began")
    assert made.error == 0 and made.ranks == (8, 8)
    torch.testing.assert_close(logits(tiny_model_folder, tmp_path / "out"), expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("method", ["cat", "svd"])
def test_one_adapter_is_scaled(method: Any, tiny_model_folder: Path, tmp_path: Path) -> None:
    one = adapter(tmp_path / "one", tiny_model_folder, use_rslora=True)
    combine({str(one): -0.25}, tmp_path / "out", method=method)
    before, after = sums(tiny_model_folder, one), sums(tiny_model_folder, tmp_path / "out")
    assert before.keys() == after.keys()
    for name, value in before.items():
        torch.testing.assert_close(after[name], -0.25 * value, rtol=1e-4, atol=1e-6)


def test_differences_are_those_of_the_sums(tiny_model_folder: Path, tmp_path: Path) -> None:
    one = adapter(tmp_path / "one", tiny_model_folder, 1)
    two = adapter(tmp_path / "two", tiny_model_folder, 2, r=3, target_modules=["q_proj", "up_proj"])
    first, second = sums(tiny_model_folder, one), sums(tiny_model_folder, two)
    found, settings = diff(one, two)
    assert settings["r"] == (4, 3) and "target_modules" in settings and "lora_alpha" not in settings
    for module in found:
        a, b = (x.get(module.name) for x in (first, second))
        assert module.norms == pytest.approx([0 if x is None else x.norm().item() for x in (a, b)], rel=1e-5)
        if a is None or b is None:
            assert module.cosine == 0 and module.apart == (math.inf if a is None else pytest.approx(1))
        else:
            assert module.apart == pytest.approx(((b - a).norm() / a.norm()).item(), rel=1e-4)
            cosine = torch.nn.functional.cosine_similarity(a.flatten(), b.flatten(), dim=0).item()
            assert module.cosine == pytest.approx(cosine, abs=1e-5)
    assert all(module.apart < 1e-6 and module.cosine == pytest.approx(1) for module in diff(one, one)[0])


def test_the_commands_tell_and_refuse(
    tiny_model_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    def run(*arguments: Any) -> tuple[int, str, str]:
        monkeypatch.setattr("sys.argv", ["halfbyte", "adapter", *map(str, arguments)])
        with pytest.raises(SystemExit) as end:
            cli.main()
        return int(end.value.code or 0), *capfd.readouterr()

    one, two = (adapter(tmp_path / name, tiny_model_folder, seed) for seed, name in enumerate(("one", "two"), 1))
    code, out, _ = run("info", one)
    assert code == 0 and "q_proj" in out and "parameters in 4 modules" in out
    assert len(json.loads(run("info", one, "--json")[1])["modules"]) == 4
    code, out, _ = run("truncate", one, tmp_path / "low", "--rank", 2)
    assert code == 0 and "of rank 2, with an error of" in out
    code, out, _ = run("combine", f"{one}=0.5", two, tmp_path / "sum")
    assert code == 0 and "of rank 8, exactly" in out
    code, out, _ = run("diff", one, tmp_path / "low")
    assert code == 0 and "r: 4 in the first, 2 in the second" in out
    for arguments, message in (
        (("info", tiny_model_folder), "holds no adapter"),
        (("combine", f"{one}=x", two, tmp_path / "o"), "has no number behind the ="),
        (("combine", f"{one}=nan", two, tmp_path / "o"), "must be a finite number"),
        (("combine", one, one, tmp_path / "o"), "is there twice"),
        (("combine", one, tmp_path / "o"), "two adapters or more"),
        (("convert", one, tmp_path / "o"), "is plain LoRA already"),
        (("truncat", one, tmp_path / "o"), "truncate"),
    ):
        code, _, error = run(*arguments)
        assert code == 2 and message in error and not (tmp_path / "o").exists(), arguments


@pytest.mark.parametrize(
    "words",
    [("info", "a"), ("truncate", "a", "o"), ("combine", "a", "b", "o"), ("convert", "a", "o"), ("diff", "a", "b")],
    ids=lambda words: words[0],
)
def test_what_libraries_log_while_they_are_imported_stays_away_from_the_terminal(
    words: tuple[str, ...], monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    class Talkative(MetaPathFinder):
        def find_spec(self, name: str, path: Any, target: Any = None) -> None:
            if name == adapters.__name__:
                logging.getLogger("bitsandbytes.backends.cpu.ops").warning("Failed to load")
                raise InputError("It was imported.")

    monkeypatch.setattr("sys.argv", ["halfbyte", "adapter", *words])
    monkeypatch.setattr("sys.meta_path", [Talkative(), *sys.meta_path])
    monkeypatch.delitem(sys.modules, adapters.__name__)
    with pytest.raises(SystemExit) as end:
        cli.main()
    assert end.value.code == 2 and not caplog.records

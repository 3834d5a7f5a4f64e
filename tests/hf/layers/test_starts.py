"""How adapters begin over 4 bits, against closed formulas and plain PEFT over the dequantized base."""

import copy
import weakref
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from peft.tuners.lora import Linear as LoraLinear
from torch import Tensor
from transformers import AutoModelForCausalLM, GPT2Config, GPT2LMHeadModel

import halfbyte
from halfbyte import hf
from halfbyte.errors import InputError
from halfbyte.nn.principal import principal

IDS = torch.randint(0, 250, (2, 12), generator=torch.Generator().manual_seed(1))
FP32 = {"quantization_config": halfbyte.HalfbyteConfig(compute_dtype="float32")}


def lora(**options: Any) -> LoraConfig:
    options = {"r": 4, "lora_alpha": 12, "target_modules": "all-linear"} | options
    return LoraConfig(task_type="CAUSAL_LM", **options)


def started(folder: Path, name: str, **options: Any) -> PeftModel:
    """A prepared model in fp32 whose adapter begins as ``name`` says."""
    torch.manual_seed(0)
    return halfbyte.prepare(hf.initialize(get_peft_model(halfbyte.load(folder, **FP32), lora(**options)), name))


def layers(model: PeftModel) -> dict[str, LoraLinear]:
    return {path: layer for path, layer in model.named_modules() if isinstance(layer, LoraLinear)}


def logits(model: Any) -> Tensor:
    with torch.no_grad():
        result: Tensor = model.eval()(input_ids=IDS).logits
    return result


def step(model: PeftModel, rate: float = 0.05) -> None:
    """One step down the gradient."""
    model.train()(input_ids=IDS, labels=IDS).loss.backward()
    for parameter in model.parameters():
        if parameter.grad is not None:
            parameter.data -= rate * parameter.grad
            parameter.grad = None


@pytest.mark.parametrize("options", [{}, {"use_rslora": True}, {"rank_pattern": {"q_proj": 6, "down_proj": 2}}])
@pytest.mark.parametrize("name", ["pissa", "pissa_niter_4", "olora", "orthogonal"])
def test_it_begins_as_the_base_and_ends_as_plain_lora_over_it(
    name: str, options: dict[str, Any], tiny_model_folder: Path, tmp_path: Path
) -> None:
    base = halfbyte.load(tiny_model_folder, **FP32)
    model = started(tiny_model_folder, name, **options)
    torch.testing.assert_close(logits(model), logits(base), rtol=1e-4, atol=1e-4)
    for path, layer in layers(model).items():
        assert layer.lora_A["default"].weight.any() and layer.lora_B["default"].weight.any(), path
    step(model)
    step(model)
    assert (logits(model) - logits(base)).norm() > 0.05 * logits(base).norm()
    model.save_pretrained(tmp_path)

    dense = copy.deepcopy(base).dequantize(torch.float32).float()
    opened = PeftModel.from_pretrained(dense, tmp_path)
    torch.testing.assert_close(logits(opened), logits(model), rtol=1e-3, atol=1e-3)
    torch.testing.assert_close(logits(halfbyte.load(tmp_path, **FP32)), logits(model), rtol=1e-3, atol=1e-3)
    for path, layer in layers(opened).items():
        doubled = 1 if name == "orthogonal" else 2
        assert layer.r["default"] == doubled * layers(model)[path].r["default"]
        assert layer.scaling["default"] == pytest.approx(layers(model)[path].scaling["default"])


@pytest.mark.parametrize("name", ["pissa", "olora"])
def test_gradients_are_those_of_a_base_without_its_principal_part(name: str, tiny_model_folder: Path) -> None:
    """PEFT's own initialisation over the dense base, which it changes, is the oracle: same A, B, outputs, gradients."""
    alpha = 12 if name == "pissa" else 4  # PEFT's olora begins elsewhere where the scale is not 1
    model = started(tiny_model_folder, name, lora_alpha=alpha)
    dense = halfbyte.load(tiny_model_folder, **FP32).dequantize(torch.float32).float()
    theirs = get_peft_model(dense, lora(init_lora_weights=name, lora_alpha=alpha))
    torch.testing.assert_close(logits(model), logits(theirs), rtol=1e-3, atol=1e-3)
    for path, layer in layers(model).items():
        ours = layer.lora_B["default"].weight @ layer.lora_A["default"].weight
        other = layers(theirs)[path]
        expected = other.lora_B["default"].weight @ other.lora_A["default"].weight
        torch.testing.assert_close(ours, expected, rtol=1e-3, atol=1e-4)
    theirs.load_state_dict({k: v for k, v in model.state_dict().items() if "lora_" in k}, strict=False)
    for either in (model, theirs):
        either.zero_grad()
        either.train()(input_ids=IDS, labels=IDS).loss.backward()
    for key, parameter in model.named_parameters():
        if parameter.requires_grad:
            wanted = theirs.get_parameter(key).grad
            assert wanted is not None and parameter.grad is not None
            assert (parameter.grad - wanted).norm() < 1e-2 * wanted.norm(), key


def test_a_base_in_4_bits_will_do(tiny_model_folder: Path, tmp_path: Path) -> None:
    halfbyte.hf.quantize_checkpoint(tiny_model_folder, tmp_path / "four")
    model = halfbyte.prepare(
        hf.initialize(get_peft_model(halfbyte.load(tmp_path / "four", **FP32), lora()), "pissa_niter_2")
    )
    torch.testing.assert_close(logits(model), logits(halfbyte.load(tmp_path / "four", **FP32)), rtol=1e-4, atol=1e-4)


def test_loftq_is_the_nearest_sum_to_the_dense_weight_and_changes_no_byte(tiny_model_folder: Path) -> None:
    config = lora()
    loftq = hf.LoftQ(config)
    with loftq.watching():
        base = halfbyte.load(tiny_model_folder, **FP32)
    plain = halfbyte.load(tiny_model_folder, **FP32)
    for name, parameter in plain.named_parameters():
        assert torch.equal(base.get_parameter(name), parameter)
    dense = AutoModelForCausalLM.from_pretrained(tiny_model_folder, dtype=torch.float32)
    model = halfbyte.prepare(loftq.apply(get_peft_model(base, config)))
    assert len(layers(model)) == 14
    for path, layer in layers(model).items():
        weight = dense.get_parameter(f"{path.removeprefix('base_model.model.')}.weight").detach()
        rest = weight - layer.base_layer.quantized_weight.dequantize(torch.float32)
        error = rest - layer.scaling["default"] * layer.lora_B["default"].weight @ layer.lora_A["default"].weight
        least = torch.linalg.svdvals(rest)[4:].square().sum().sqrt()
        assert error.norm() <= 1.01 * least, path
    # so the model begins nearer to the dense one than without an adapter
    wanted = logits(dense)
    assert (logits(model) - wanted).norm() < 0.95 * (logits(plain) - wanted).norm()


def test_weights_that_lie_transposed_begin_alike(tmp_path: Path) -> None:
    """GPT-2's ``Conv1D`` holds ``[in, out]``."""
    torch.manual_seed(0)
    GPT2LMHeadModel(GPT2Config(n_layer=1, n_embd=32, n_head=2, vocab_size=260, n_positions=32)).save_pretrained(
        tmp_path
    )
    config = lora(target_modules=["c_attn", "c_proj"], fan_in_fan_out=False)
    loftq = hf.LoftQ(config)
    with loftq.watching():
        base = halfbyte.load(tmp_path, **FP32)
    wanted = logits(base)
    model = loftq.apply(get_peft_model(base, config))
    dense = GPT2LMHeadModel.from_pretrained(tmp_path, dtype=torch.float32)
    for path, layer in layers(model).items():
        weight = dense.get_parameter(f"{path.removeprefix('base_model.model.')}.weight").detach().T
        rest = weight - layer.base_layer.quantized_weight.dequantize(torch.float32)
        left = rest - layer.scaling["default"] * layer.lora_B["default"].weight @ layer.lora_A["default"].weight
        assert left.norm() <= 1.01 * torch.linalg.svdvals(rest)[4:].square().sum().sqrt(), path
    assert len(layers(model)) == 3
    begun = halfbyte.prepare(hf.initialize(get_peft_model(halfbyte.load(tmp_path, **FP32), config), "pissa"))
    torch.testing.assert_close(logits(begun), wanted, rtol=1e-4, atol=1e-4)


def test_loftq_finds_weights_that_were_quantized_before_missing(tiny_model_folder: Path, tmp_path: Path) -> None:
    halfbyte.hf.quantize_checkpoint(tiny_model_folder, tmp_path / "four")
    loftq = hf.LoftQ(lora())
    with loftq.watching():
        base = halfbyte.load(tmp_path / "four")
    with pytest.raises(InputError, match=r"'loftq' needs the weights before they are quantized.*name the 16-bit model"):
        loftq.apply(get_peft_model(base, lora()))


def test_loftq_refuses_a_rank_that_a_layer_does_not_have(tiny_model_folder: Path) -> None:
    config = lora(r=500)
    loftq = hf.LoftQ(config)
    with loftq.watching():
        base = halfbyte.load(tiny_model_folder)
    with pytest.raises(InputError, match="rank 500 is larger than the layer"):
        loftq.apply(get_peft_model(base, config))


def test_length_of_dora_is_that_of_the_start(tiny_model_folder: Path) -> None:
    config = lora(use_dora=True)
    loftq = hf.LoftQ(config)
    with loftq.watching():
        base = halfbyte.load(tiny_model_folder, **FP32)
    model = loftq.apply(get_peft_model(base, config))
    for layer in layers(model).values():
        product = layer.lora_B["default"].weight @ layer.lora_A["default"].weight
        whole = layer.base_layer.dequantize().float() + layer.scaling["default"] * product
        torch.testing.assert_close(
            layer.lora_magnitude_vector["default"].weight, whole.norm(dim=1), rtol=1e-3, atol=1e-3
        )


def test_layers_that_are_called_apart_subtract_too(tiny_model_folder: Path) -> None:
    model = started(tiny_model_folder, "pissa")
    step(model)
    together = logits(model)
    for layer in layers(model).values():
        layer.base_layer.register_forward_hook(lambda *_: None)  # sends the layer off our way
    torch.testing.assert_close(logits(model), together, rtol=1e-4, atol=1e-4)
    with model.disable_adapter():
        torch.testing.assert_close(
            logits(model), logits(halfbyte.load(tiny_model_folder, **FP32)), rtol=1e-4, atol=1e-4
        )


def test_another_adapter_of_the_same_name_subtracts_nothing(tiny_model_folder: Path) -> None:
    model = started(tiny_model_folder, "pissa")
    step(model)
    copied = copy.deepcopy(model)
    torch.testing.assert_close(logits(copied), logits(model), rtol=0, atol=0)
    model.add_adapter("other", lora())
    model.set_adapter("other")
    model.delete_adapter("default")
    model.add_adapter("default", lora())
    model.set_adapter("default")
    base = halfbyte.load(tiny_model_folder, **FP32)
    torch.testing.assert_close(logits(halfbyte.prepare(model)), logits(base), rtol=1e-4, atol=1e-4)
    assert (logits(copied) - logits(base)).norm() > 0.01 * logits(base).norm()


def test_what_would_forget_the_start_is_refused(tiny_model_folder: Path) -> None:
    model = started(tiny_model_folder, "pissa")
    with pytest.raises(InputError, match=r"save it with save_pretrained"):
        halfbyte.unprepare(model)
    other = copy.deepcopy(model)
    for parameter in other.parameters():
        parameter.data = torch.zeros_like(parameter)
    assert torch.isfinite(logits(model)).all() and other.save_pretrained.model is other


@pytest.mark.filterwarnings("ignore:Model has `tie_word_embeddings=True`:UserWarning")
@pytest.mark.parametrize(
    ("name", "options", "words"),
    [
        ("pisa", {}, r"no init_lora_weights 'pisa' .did you mean 'pissa'"),
        ("corda", {}, r"'corda' does not run over 4-bit weights.*eva"),
        ("lora_ga", {}, r"'lora_ga' does not run over 4-bit weights"),
        ("pissa", {"r": 40}, r"rank 40 is larger than .*take a lower rank"),
        ("pissa", {"use_dora": True}, r"does not go with use_dora"),
        ("orthogonal", {"r": 3}, r"needs an even rank.*rank 3"),
        ("pissa", {"target_modules": ["q_proj", "embed_tokens"]}, r"embed_tokens \(Embedding\) is none"),
        ("eva", {}, r"initialize is for orthogonal, pissa, olora"),
    ],
)
def test_what_does_not_go_together_is_one_sentence(
    name: str, options: dict[str, Any], words: str, tiny_model_folder: Path
) -> None:
    model = get_peft_model(halfbyte.load(tiny_model_folder), lora(**options))
    with pytest.raises(InputError, match=words):
        hf.initialize(model, name)


@pytest.mark.parametrize("name", ["loftq", "pissa_niter_2"])
def test_one_layer_is_dense_at_a_time(name: str, tiny_model_folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[weakref.ref[Tensor]] = []

    def watched(matrix: Tensor, *args: Any) -> Any:
        assert not any(ref() is not None for ref in seen), "an earlier layer is still there"
        seen.append(weakref.ref(matrix))
        return principal(matrix, *args)

    monkeypatch.setattr("halfbyte.hf.models.loftq.principal", watched)
    monkeypatch.setattr("halfbyte.hf.layers.starts.principal", watched)
    if name == "loftq":
        loftq = hf.LoftQ(lora())
        with loftq.watching():
            base = halfbyte.load(tiny_model_folder)
        loftq.apply(get_peft_model(base, lora()))
    else:
        started(tiny_model_folder, name)
    assert len(seen) == 14

"""Scripts that name PEFT's initialisations over a 4-bit base: what they begin with, train, save and get back."""

import copy
import importlib.util
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from datasets import Dataset
from peft import (
    EvaConfig,
    LoftQConfig,
    LoraConfig,
    LoraGAConfig,
    PeftModel,
    get_peft_model,
    initialize_lora_eva_weights,
    replace_lora_weights_loftq,
)
from peft.tuners.lora import Linear as LoraLinear
from peft.tuners.lora import preprocess_loraga
from peft.tuners.lora.config import CordaConfig
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoTokenizer, BitsAndBytesConfig, Trainer, TrainingArguments
from trl import DPOConfig, DPOTrainer

import halfbyte
from halfbyte.hf.layers.adapters import LoraLinear4bit
from halfbyte.hf.layers.starts import starts_of

IDS = torch.randint(0, 250, (2, 12), generator=torch.Generator().manual_seed(1))
FOUR = BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_use_double_quant=True)


def four(folder: Path, **more: Any) -> Any:
    torch.manual_seed(0)
    return AutoModelForCausalLM.from_pretrained(folder, **{"quantization_config": FOUR, "dtype": torch.float32} | more)


def config(**more: Any) -> LoraConfig:
    return LoraConfig(**{"r": 4, "lora_alpha": 2, "target_modules": "all-linear", "task_type": "CAUSAL_LM"} | more)


def dense(folder: Path) -> Any:
    """The base as plain transformers and PEFT have it: the dequantized weights."""
    return four(folder).dequantize(torch.float32).float()


def logits(model: Any) -> Tensor:
    with torch.no_grad():
        result: Tensor = model.eval()(input_ids=IDS).logits
    return result


def step(model: Any) -> None:
    model.train()(input_ids=IDS, labels=IDS).loss.backward()
    for parameter in model.parameters():
        if parameter.grad is not None:
            parameter.data -= 0.05 * parameter.grad
            parameter.grad = None


def layers(model: Any) -> dict[str, LoraLinear]:
    return {path: layer for path, layer in model.named_modules() if isinstance(layer, LoraLinear)}


@pytest.mark.parametrize("name", ["pissa", "pissa_niter_4", "olora", "orthogonal"])
def test_an_adapter_begins_as_the_base_trains_as_peft_s_and_opens_in_plain_peft(
    installed: None, name: str, tiny_model_folder: Path, tmp_path: Path
) -> None:
    begun = logits(four(tiny_model_folder))
    model = get_peft_model(four(tiny_model_folder), config(init_lora_weights=name))
    assert all(type(layer) is LoraLinear4bit for layer in layers(model).values())
    torch.testing.assert_close(logits(model), begun, rtol=1e-4, atol=1e-4)
    for path, layer in layers(model).items():
        assert layer.lora_A["default"].weight.any() and layer.lora_B["default"].weight.any(), path
    theirs = get_peft_model(dense(tiny_model_folder), config(init_lora_weights=name))
    if name in ("pissa", "olora"):  # the others are drawn at random
        for path, layer in layers(model).items():
            other = layers(theirs)[path]
            for ours, wanted in ((layer.lora_A, other.lora_A), (layer.lora_B, other.lora_B)):
                a, b = ours["default"].weight, wanted["default"].weight
                signs = torch.sign((a * b).sum(dim=int(a.shape[0] == 4), keepdim=True))  # of singular vectors
                torch.testing.assert_close(a * (signs if name == "pissa" else 1), b, rtol=1e-3, atol=1e-3)
        theirs.load_state_dict({k: v for k, v in model.state_dict().items() if "lora_" in k}, strict=False)
        step(theirs)
    step(model)
    assert (logits(model) - begun).norm() > 0.005 * begun.norm()
    if name in ("pissa", "olora"):
        torch.testing.assert_close(logits(model), logits(theirs), rtol=1e-3, atol=2e-3)
    model.save_pretrained(tmp_path)
    halfbyte.undo()  # from here on plain transformers and PEFT
    opened = PeftModel.from_pretrained(plain(tiny_model_folder), tmp_path)
    torch.testing.assert_close(logits(opened), logits(model), rtol=1e-3, atol=2e-3)


def plain(folder: Path) -> Any:
    """The dequantized base, by :func:`halfbyte.load`, with nothing installed."""
    base = halfbyte.load(folder, quantization_config=halfbyte.HalfbyteConfig(compute_dtype="float32"))
    return base.dequantize(torch.float32).float()


@pytest.mark.parametrize("name", ["pissa", "olora"])
def test_dropout_is_of_the_adapter_alone_as_peft_s_base_drops_nothing(
    installed: None, name: str, tiny_model_folder: Path
) -> None:
    """With p near 1 the adapter is gone: what is left is PEFT's residual base."""
    model = get_peft_model(four(tiny_model_folder), config(init_lora_weights=name, lora_dropout=0.999999)).train()
    theirs = get_peft_model(dense(tiny_model_folder), config(init_lora_weights=name))
    with torch.no_grad(), theirs.disable_adapter():
        wanted = theirs.eval()(input_ids=IDS).logits
    with torch.no_grad():
        torch.testing.assert_close(model(input_ids=IDS).logits, wanted, rtol=1e-3, atol=2e-3)
    for layer in layers(model).values():  # and apart
        x = torch.randn(3, layer.in_features)
        wanted = layer.base_layer(x) - starts_product(layer, x)
        torch.testing.assert_close(layer(x), wanted, rtol=1e-3, atol=1e-3)


def starts_product(layer: LoraLinear, x: Tensor) -> Tensor:
    (term,) = starts_of(layer, ["default"])
    return -term.scaling * (x @ term.a.T) @ term.b.T


def test_gradients_through_what_is_subtracted_under_dropout(installed: None, tiny_model_folder: Path) -> None:
    """The input's gradient passes the residual base, whose product is dense here."""
    model = get_peft_model(four(tiny_model_folder), config(init_lora_weights="olora", lora_dropout=0.999999)).train()
    for layer in layers(model).values():
        x = torch.randn(3, layer.in_features, requires_grad=True)
        layer(x).square().sum().backward()
        (term,) = starts_of(layer, ["default"])
        weight = layer.base_layer.dequantize(torch.float32) + term.scaling * term.b @ term.a
        y = x.detach() @ weight.T
        torch.testing.assert_close(x.grad, 2 * y @ weight, rtol=1e-3, atol=1e-3)


def test_loftq_reads_the_16_bit_weights_again(installed: None, tiny_model_folder: Path, tmp_path: Path) -> None:
    wanted = logits(AutoModelForCausalLM.from_pretrained(tiny_model_folder, dtype=torch.float32))
    base = four(tiny_model_folder)
    packed = {name: weight.clone() for name, weight in base.named_parameters()}
    before = (logits(base) - wanted).norm()
    model = get_peft_model(base, config(init_lora_weights="loftq", loftq_config=LoftQConfig(loftq_bits=4)))
    assert (logits(model) - wanted).norm() < 0.95 * before
    reference = AutoModelForCausalLM.from_pretrained(tiny_model_folder, dtype=torch.float32)
    for path, layer in layers(model).items():
        name = f"{path.removeprefix('base_model.model.')}.weight"
        assert torch.equal(layer.base_layer.weight, packed[name])
        rest = reference.get_parameter(name).detach() - layer.base_layer.dequantize(torch.float32)
        left = rest - layer.scaling["default"] * layer.lora_B["default"].weight @ layer.lora_A["default"].weight
        assert left.norm() <= 1.01 * torch.linalg.svdvals(rest)[4:].square().sum().sqrt(), path
    model.save_pretrained(tmp_path)
    halfbyte.undo()
    opened = PeftModel.from_pretrained(plain(tiny_model_folder), tmp_path)
    torch.testing.assert_close(logits(opened), logits(model), rtol=1e-3, atol=2e-3)


def test_replace_lora_weights_loftq_asks_its_callback(installed: None, tiny_model_folder: Path) -> None:
    model = get_peft_model(four(tiny_model_folder), config())
    asked = []

    def keep(peft_model: Any, name: str) -> bool:
        asked.append(name)
        return "q_proj" in name

    replace_lora_weights_loftq(model, callback=keep)
    assert len(asked) == 14
    for path, layer in layers(model).items():
        assert bool(layer.lora_B["default"].weight.any()) == ("q_proj" in path)


def test_a_base_that_lies_in_4_bits_has_nothing_for_loftq(
    installed: None, tiny_model_folder: Path, tmp_path: Path
) -> None:
    four(tiny_model_folder).save_pretrained(tmp_path)
    base = AutoModelForCausalLM.from_pretrained(tmp_path)
    with pytest.raises(ValueError, match=r"'loftq' needs the weights before they are quantized.*name the 16-bit model"):
        get_peft_model(base, config(init_lora_weights="loftq", loftq_config=LoftQConfig()))


@pytest.mark.filterwarnings("ignore:lora with eva initialization used with low_cpu_mem_usage=False")
def test_eva_runs_peft_s_own_code_over_ours(installed: None, tiny_model_folder: Path, tmp_path: Path) -> None:
    options = config(r=2, init_lora_weights="eva", eva_config=EvaConfig(rho=1.0, use_label_mask=False))
    batches = [{"input_ids": IDS[:1], "attention_mask": torch.ones(1, 12)}] * 3
    ours, theirs = (get_peft_model(base(tiny_model_folder), copy.deepcopy(options)) for base in (four, dense))
    for model in (ours, theirs):
        initialize_lora_eva_weights(model, batches, show_progress_bar=False)
    for path, layer in layers(ours).items():
        assert type(layer) is LoraLinear4bit and not layer.lora_B["default"].weight.any()
        a, b = layer.lora_A["default"].weight, layers(theirs)[path].lora_A["default"].weight
        torch.testing.assert_close((a * b).sum(dim=1).abs(), torch.ones(2), rtol=1e-2, atol=1e-2)  # up to the sign
    step(ours)
    ours.save_pretrained(tmp_path)
    torch.testing.assert_close(
        logits(PeftModel.from_pretrained(dense(tiny_model_folder), tmp_path)), logits(ours), rtol=1e-3, atol=2e-3
    )


def test_the_best_checkpoint_is_loaded_into_a_model_that_subtracts(
    installed: None, tiny_model_folder: Path, tmp_path: Path
) -> None:
    model = get_peft_model(four(tiny_model_folder), config(init_lora_weights="olora"))
    rows = [{"input_ids": row.tolist(), "labels": row.tolist()} for row in IDS]
    arguments = TrainingArguments(
        tmp_path, max_steps=3, save_steps=1, eval_strategy="steps", eval_steps=1, learning_rate=1.0, use_cpu=True,
        load_best_model_at_end=True, report_to="none", per_device_train_batch_size=2, disable_tqdm=True,
        lr_scheduler_type="constant", optim="sgd",
    )  # fmt: skip
    trainer = Trainer(model, arguments, train_dataset=rows, eval_dataset=rows)
    trainer.train()
    best = trainer.state.best_model_checkpoint
    torch.testing.assert_close(
        logits(PeftModel.from_pretrained(dense(tiny_model_folder), best)), logits(model), rtol=1e-3, atol=2e-3
    )
    other = get_peft_model(four(tiny_model_folder), config(init_lora_weights="olora"))
    other.load_adapter(best, "default")
    torch.testing.assert_close(logits(other), logits(model), rtol=1e-4, atol=1e-4)


def test_the_conversion_that_peft_does_at_the_end_is_done_anyhow(
    installed: None, tiny_model_folder: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """As PEFT's guide of PiSSA has it."""
    model = get_peft_model(four(tiny_model_folder), config(init_lora_weights="pissa_niter_4"))
    model.peft_config["default"].init_lora_weights = True
    model.save_pretrained(tmp_path / "start")
    step(model)
    model.save_pretrained(tmp_path / "end", path_initial_model_for_weight_conversion=str(tmp_path / "start"))
    assert "saved as plain LoRA anyhow" in caplog.text
    opened = PeftModel.from_pretrained(dense(tiny_model_folder), tmp_path / "end")
    torch.testing.assert_close(logits(opened), logits(model), rtol=1e-3, atol=2e-3)


@pytest.mark.parametrize(
    ("options", "error", "words"),
    [
        ({"init_lora_weights": "mica"}, TypeError, "'mica' does not run over 4-bit weights"),
        ({"init_lora_weights": "pisa"}, ValueError, "did you mean 'pissa'"),
        ({"init_lora_weights": "pissa", "use_dora": True}, ValueError, "does not go with use_dora"),
        ({"init_lora_weights": "orthogonal", "r": 3}, ValueError, "needs an even rank"),
        ({"init_lora_weights": "olora", "r": 40}, ValueError, "rank 40 is larger"),
    ],
)
def test_what_there_is_not_is_refused_with_peft_s_kind_of_error(
    installed: None, options: dict[str, Any], error: type[Exception], words: str, tiny_model_folder: Path
) -> None:
    with pytest.raises(error, match=words) as refusal:
        get_peft_model(four(tiny_model_folder), config(**options))
    assert "\n" not in str(refusal.value)


def test_what_needs_the_dense_weights_is_refused_before_it_runs(installed: None, tiny_model_folder: Path) -> None:
    base = four(tiny_model_folder)
    corda = config(init_lora_weights="corda", corda_config=CordaConfig())
    loraga = config(init_lora_weights="lora_ga", lora_ga_config=LoraGAConfig())
    if importlib.util.find_spec("attr"):
        preprocess_corda = importlib.import_module("peft.tuners.lora.corda").preprocess_corda
        with pytest.raises(TypeError, match="'corda' does not run over 4-bit weights"):
            preprocess_corda(base, corda, run_model=lambda: pytest.fail("it ran"))
    with pytest.raises(TypeError, match="'lora_ga' does not run over 4-bit weights"):
        preprocess_loraga(base, loraga, lambda: pytest.fail("it ran"))
    for options in (corda, loraga):
        with pytest.raises(TypeError, match="does not run over 4-bit weights"):
            get_peft_model(base, options)
    with pytest.raises(TypeError, match=r"use peft\.get_peft_model"):
        base.add_adapter(config(init_lora_weights="pissa"))


def test_over_dense_weights_it_is_peft_that_begins(installed: None, tiny_model_folder: Path) -> None:
    model = get_peft_model(dense(tiny_model_folder), config(init_lora_weights="olora"))
    reference = dense(tiny_model_folder)
    layer = layers(model)["base_model.model.model.layers.0.mlp.up_proj"]
    part = layer.scaling["default"] * layer.lora_B["default"].weight @ layer.lora_A["default"].weight
    torch.testing.assert_close(
        layer.base_layer.weight + part, reference.model.layers[0].mlp.up_proj.weight, rtol=1e-4, atol=1e-4
    )


@pytest.mark.parametrize("name", ["pissa_niter_4", "olora"])
def test_the_reference_of_preferences_is_the_base(
    installed: None, name: str, tiny_model_folder: Path, tmp_path: Path
) -> None:
    """At the first step policy and reference are one, so the loss is ln 2; then it is not."""
    pairs = [{"prompt": "What is red?", "chosen": " An apple.", "rejected": " The sea."}] * 4
    arguments = DPOConfig(
        output_dir=str(tmp_path), per_device_train_batch_size=2, max_steps=3, learning_rate=0.05, logging_steps=1,
        report_to="none", disable_tqdm=True, save_strategy="no",
    )  # fmt: skip
    model = get_peft_model(four(tiny_model_folder), config(init_lora_weights=name, lora_alpha=12))
    trainer = DPOTrainer(
        model=model,
        args=arguments,
        train_dataset=Dataset.from_list(pairs),
        processing_class=AutoTokenizer.from_pretrained(tiny_model_folder),
    )
    trainer.train()
    losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    assert losses[0] == pytest.approx(math.log(2), rel=1e-3) and losses[-1] < 0.6
    assert [*model.peft_config] == ["default"]
    with model.disable_adapter():
        torch.testing.assert_close(logits(model), logits(four(tiny_model_folder)), rtol=1e-4, atol=1e-4)

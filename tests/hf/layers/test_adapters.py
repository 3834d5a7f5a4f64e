"""LoRA over 4-bit weights against PEFT over a dense fp32 model that holds the dequantized weights."""

import copy
from pathlib import Path

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model, prepare_model_for_kbit_training
from peft.tuners.lora import Linear as LoraLinear
from torch import Tensor, nn
from transformers import AutoModelForCausalLM

import halfbyte
from halfbyte.errors import InputError
from halfbyte.hf import LoraLinear4bit, count_parameters, project

IDS = torch.randint(0, 250, (2, 12), generator=torch.Generator().manual_seed(1))
# Bound of the relative error of loss-gradients against fp32, per compute dtype.
BOUNDS = {torch.float32: 1e-4, torch.bfloat16: 5e-2}


def lora(**options: object) -> LoraConfig:
    options = {"target_modules": "all-linear", **options}
    return LoraConfig(r=4, lora_alpha=8, task_type="CAUSAL_LM", **options)  # type: ignore[arg-type]


def pair(folder: Path, dtype: torch.dtype, **options: object) -> tuple[PeftModel, PeftModel]:
    """A prepared model over 4-bit weights, and PEFT's own over a dense fp32 copy, with the same random adapters."""
    torch.manual_seed(0)
    base = halfbyte.load(folder, quantization_config=halfbyte.HalfbyteConfig(compute_dtype=dtype))
    dense = copy.deepcopy(base).dequantize(torch.float32).float()
    ours = halfbyte.prepare_for_training(get_peft_model(base, lora(**options)))
    for name, parameter in ours.named_parameters():
        if "lora_B" in name:
            nn.init.normal_(parameter, std=0.1)
    theirs = get_peft_model(dense, lora(**options))
    adapters = {name: value for name, value in ours.state_dict().items() if "lora_" in name}
    assert not theirs.load_state_dict(adapters, strict=False).unexpected_keys
    return ours, theirs


def gradients(model: nn.Module) -> dict[str, Tensor]:
    model.zero_grad()
    model(input_ids=IDS, labels=IDS).loss.backward()
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


@pytest.mark.filterwarnings("ignore:`lora_bias=True` was passed:peft.utils.warning.PeftWarning")  # on merging
@pytest.mark.parametrize("dtype", list(BOUNDS))
@pytest.mark.parametrize("options", [{}, {"use_dora": True}, {"use_rslora": True}, {"lora_bias": True}])
def test_loss_and_gradients_are_those_of_the_dense_model(
    tiny_model_folder: Path, dtype: torch.dtype, options: dict[str, object]
) -> None:
    ours, theirs = pair(tiny_model_folder, dtype, **options)
    got, expected = gradients(ours), gradients(theirs)
    assert got.keys() == expected.keys() and len(got) >= 28
    for name, gradient in expected.items():
        assert got[name].dtype == torch.float32
        error = (got[name] - gradient).norm() / gradient.norm()
        assert error < BOUNDS[dtype], (name, error)


def test_all_linear_layers_but_the_head_get_adapters(tiny_model_folder: Path) -> None:
    model = halfbyte.prepare_for_training(get_peft_model(halfbyte.load(tiny_model_folder), lora()))
    layers = [name for name, module in model.named_modules() if isinstance(module, LoraLinear4bit)]
    assert len(layers) == 2 * 7
    assert not any("head" in name or "embed" in name for name in layers)


def test_parameters_are_counted_truly(tiny_model_folder: Path) -> None:
    dense = AutoModelForCausalLM.from_pretrained(tiny_model_folder)
    model = halfbyte.prepare_for_training(get_peft_model(halfbyte.load(tiny_model_folder), lora()))
    # rank (in + out) for each of the seven projections of two layers of 32 channels, 16 key/value and 80 inner ones.
    adapters = 2 * 4 * ((32 + 32) * 2 + (32 + 16) * 2 + (32 + 80) * 3)
    assert model.get_nb_trainable_parameters() == (adapters, adapters + dense.num_parameters())
    assert count_parameters(model) == model.get_nb_trainable_parameters()


def test_an_adapter_trained_here_opens_in_peft_over_the_dense_base(tiny_model_folder: Path, tmp_path: Path) -> None:
    ours, theirs = pair(tiny_model_folder, torch.float32)
    optimizer = torch.optim.AdamW([p for p in ours.parameters() if p.requires_grad], lr=3e-2)
    first = ours(input_ids=IDS, labels=IDS).loss.item()
    for _ in range(20):
        ours(input_ids=IDS, labels=IDS).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    assert ours(input_ids=IDS, labels=IDS).loss.item() < first - 0.5
    ours.save_pretrained(tmp_path)
    assert {path.name for path in tmp_path.iterdir()} >= {"adapter_config.json", "adapter_model.safetensors"}

    # Over the base that holds the dequantized weights: the same numbers, up to the order of sums.
    dequantized = theirs.unload()
    opened = PeftModel.from_pretrained(dequantized, tmp_path).eval()
    logits = ours.eval()(input_ids=IDS).logits
    assert (opened(input_ids=IDS).logits - logits).norm() / logits.norm() < 1e-4

    # Over the 16-bit base itself: what quantization took away is all that differs, and what was learned is there.
    opened = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(tiny_model_folder), tmp_path).eval()
    assert opened(input_ids=IDS, labels=IDS).loss.item() < first - 0.5

    # And here: from its folder alone, and by the usual script over a 4-bit base, without our classes.
    again = halfbyte.load(tmp_path, quantization_config=halfbyte.HalfbyteConfig(compute_dtype="float32"))
    assert torch.equal(again(input_ids=IDS).logits, logits)
    base = AutoModelForCausalLM.from_pretrained(
        tiny_model_folder, quantization_config=halfbyte.HalfbyteConfig(compute_dtype="float32")
    )
    usual = PeftModel.from_pretrained(base, tmp_path).eval()
    assert (usual(input_ids=IDS).logits - logits).norm() / logits.norm() < 1e-4


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_the_usual_inference_script_works(tiny_model_folder: Path, tmp_path: Path, dtype: str) -> None:
    config = halfbyte.HalfbyteConfig(compute_dtype=dtype)
    base = AutoModelForCausalLM.from_pretrained(tiny_model_folder, quantization_config=config, device_map="auto")
    get_peft_model(base, lora()).save_pretrained(tmp_path)
    base = AutoModelForCausalLM.from_pretrained(tiny_model_folder, quantization_config=config, device_map="auto")
    model = PeftModel.from_pretrained(base, tmp_path).eval()
    inputs = halfbyte.load_tokenizer(tiny_model_folder)("hello", return_tensors="pt").to(model.device)
    assert model.generate(**inputs, max_new_tokens=4, do_sample=False).shape == (1, 9)


def test_disabled_and_several_adapters_are_pefts(tiny_model_folder: Path) -> None:
    ours, theirs = pair(tiny_model_folder, torch.float32)
    for model in (ours, theirs):
        torch.manual_seed(3)
        model.add_adapter("second", lora(init_lora_weights=False))
        model.set_adapter("second")
        halfbyte.prepare_for_training(model) if model is ours else None
    for name in ("second", "default"):
        ours.set_adapter(name)
        theirs.set_adapter(name)
        torch.testing.assert_close(ours(input_ids=IDS).logits, theirs(input_ids=IDS).logits, rtol=1e-4, atol=1e-4)
    with ours.disable_adapter(), theirs.disable_adapter():
        torch.testing.assert_close(ours(input_ids=IDS).logits, theirs(input_ids=IDS).logits, rtol=1e-4, atol=1e-4)


def test_dropout_is_applied_in_training_only(tiny_model_folder: Path) -> None:
    ours, _ = pair(tiny_model_folder, torch.float32, lora_dropout=0.5)
    ours.train()
    assert not torch.equal(ours(input_ids=IDS).logits, ours(input_ids=IDS).logits)
    ours.eval()
    assert torch.equal(ours(input_ids=IDS).logits, ours(input_ids=IDS).logits)


@pytest.mark.parametrize("options", [{}, {"lora_bias": True}, {"use_dora": True}, {"target_modules": ["q_proj"]}])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.filterwarnings("ignore:`lora_bias=True`")
def test_projections_of_one_input_are_those_of_each_layer(
    tiny_model_folder: Path, options: dict[str, object], dtype: torch.dtype
) -> None:
    """The layers alone are compared with PEFT over dense weights above."""
    ours, _ = pair(tiny_model_folder, dtype, **options)
    attention = ours.get_base_model().model.layers[0].self_attn
    layers = [attention.q_proj, attention.k_proj, attention.v_proj]
    x = torch.randn(3, 5, 32, dtype=torch.float32).requires_grad_()
    of = [x, *(p for layer in layers for p in layer.parameters() if p.requires_grad)]
    weights = [torch.randn(3, 5, n) for n in (32, 16, 16)]
    results = []
    for ys in (project(layers, x), [layer(x) for layer in layers]):
        assert all(y.dtype == x.dtype for y in ys)
        results.append([*ys, *torch.autograd.grad(ys, of, weights)])
    for got, expected in zip(*results, strict=True):
        assert (got - expected).norm() <= (1e-5 if dtype == torch.float32 else 1e-2) * expected.norm()


def test_projections_honour_what_was_done_to_the_layers(tiny_model_folder: Path) -> None:
    ours, _ = pair(tiny_model_folder, torch.float32, lora_dropout=0.5)
    ours.eval()
    mlp = ours.get_base_model().model.layers[0].mlp
    layers = [mlp.gate_proj, mlp.up_proj]
    x = torch.randn(4, 32)
    plain = project(layers, x)

    with ours.disable_adapter():
        for got, layer in zip(project(layers, x), layers, strict=True):
            assert torch.equal(got, layer.base_layer(x))
    for module in (layers[1], layers[1].base_layer):
        handle = module.register_forward_hook(lambda module, args, y: torch.zeros_like(y))
        got = project(layers, x)
        handle.remove()
        torch.testing.assert_close(got[0], plain[0], rtol=1e-4, atol=1e-5)
        assert not torch.equal(got[1], plain[1])
    layers[0].forward = lambda x: x
    assert torch.equal(project(layers, x)[0], x)
    del layers[0].forward
    dense = nn.Linear(32, 7)
    assert torch.equal(project([layers[0], dense], x)[1], dense(x))
    ours.train()
    assert not torch.equal(project(layers, x)[0], plain[0])


def test_merging_is_refused_in_one_sentence(tiny_model_folder: Path) -> None:
    ours, _ = pair(tiny_model_folder, torch.float32)
    before = [module.weight.clone() for module in ours.modules() if isinstance(module, halfbyte.Linear4bit)]
    with pytest.raises(InputError, match="cannot be merged into 4-bit weights"):
        ours.merge_adapter()
    after = [module.weight for module in ours.modules() if isinstance(module, halfbyte.Linear4bit)]
    assert all(torch.equal(a, b) for a, b in zip(before, after, strict=True))


def test_unprepare_undoes_prepare(tiny_model_folder: Path) -> None:
    base = halfbyte.load(tiny_model_folder)
    model = get_peft_model(base, lora())
    types = [type(module) for module in model.modules()]
    attributes = set(vars(model))
    assert halfbyte.prepare_for_training(model) is model
    assert any(type(module) is LoraLinear4bit for module in model.modules())
    assert halfbyte.unprepare(model) is model
    assert [type(module) for module in model.modules()] == types and LoraLinear in types
    assert set(vars(model)) == attributes


def test_a_model_without_adapters_or_without_4_bits_is_told(tiny_model_folder: Path) -> None:
    dense = AutoModelForCausalLM.from_pretrained(tiny_model_folder)
    with pytest.raises(InputError, match=r"LlamaForCausalLM has no adapter: call peft\.get_peft_model"):
        halfbyte.prepare(halfbyte.load(tiny_model_folder))
    with pytest.raises(InputError, match="has no 4-bit weight: load the model with HalfbyteConfig"):
        halfbyte.prepare(get_peft_model(dense, lora()))
    assert halfbyte.prepare_for_training is halfbyte.prepare


def test_gradient_checkpointing_gives_the_same_gradients(tiny_model_folder: Path) -> None:
    ours, _ = pair(tiny_model_folder, torch.bfloat16)
    plain = gradients(ours.train())
    ours.activation_checkpointing_enable({"use_reentrant": False})
    for name, gradient in gradients(ours).items():
        assert torch.equal(gradient, plain[name])


def same_gradients(ours: nn.Module, theirs: nn.Module, bound: float = BOUNDS[torch.float32]) -> bool:
    got, expected = gradients(ours.train()), gradients(theirs.train())
    assert got.keys() == expected.keys() and expected
    return all((got[name] - gradient).norm() <= bound * gradient.norm() for name, gradient in expected.items())


@pytest.mark.filterwarnings("ignore:Model has `tie_word_embeddings=True`")
@pytest.mark.parametrize(
    "options",
    [
        {"target_modules": ["q_proj", "up_proj"], "layers_to_transform": [1]},
        {"rank_pattern": {"q_proj": 7}, "alpha_pattern": {"up_proj": 3}},
        {"modules_to_save": ["input_layernorm", "norm"]},
        {"modules_to_save": ["lm_head"]},
        {"modules_to_save": ["embed_tokens"]},
        {"trainable_token_indices": [5, 6]},
        {"target_modules": ["q_proj", "lm_head"]},
    ],
    ids=str,
)
def test_what_peft_is_asked_to_train_gets_its_gradients(tiny_model_folder: Path, options: dict[str, object]) -> None:
    ours, theirs = pair(tiny_model_folder, torch.float32, **options)
    assert same_gradients(ours, theirs)


def test_gradients_in_fp16_lie_on_fp32(tiny_model_folder: Path) -> None:
    assert same_gradients(*pair(tiny_model_folder, torch.float16), bound=1e-2)


def test_a_model_that_is_partly_dense_is_trained_too(tiny_model_folder: Path) -> None:
    config = halfbyte.HalfbyteConfig(compute_dtype=torch.float32, skip_modules=["lm_head", "q_proj", "down_proj"])
    base = halfbyte.load(tiny_model_folder, quantization_config=config)
    dense = copy.deepcopy(base).dequantize(torch.float32).float()
    torch.manual_seed(0)
    ours = halfbyte.prepare_for_training(get_peft_model(base, lora(init_lora_weights=False)))
    torch.manual_seed(0)
    assert same_gradients(ours, get_peft_model(dense, lora(init_lora_weights=False)))
    assert sum(isinstance(module, LoraLinear4bit) for module in ours.modules()) == 2 * 5


def test_peft_s_own_preparation_for_quantized_training_may_come_first(tiny_model_folder: Path) -> None:
    """It turns all that is dense into fp32; 4-bit layers go on computing in theirs."""
    config = halfbyte.HalfbyteConfig(compute_dtype=torch.bfloat16)
    base = prepare_model_for_kbit_training(halfbyte.load(tiny_model_folder, quantization_config=config))
    dense = copy.deepcopy(base).dequantize(torch.float32).float()
    torch.manual_seed(0)
    ours = halfbyte.prepare_for_training(get_peft_model(base, lora(init_lora_weights=False)))
    torch.manual_seed(0)
    assert same_gradients(ours, get_peft_model(dense, lora(init_lora_weights=False)), BOUNDS[torch.bfloat16])


def test_adapters_come_go_and_work_together(tiny_model_folder: Path) -> None:
    both = pair(tiny_model_folder, torch.float32)
    for model in both:
        torch.manual_seed(3)
        model.add_adapter("second", lora(init_lora_weights=False))
        model.base_model.set_adapter(["default", "second"])
    assert same_gradients(*both)
    for model in both:
        model.add_weighted_adapter(["default", "second"], [0.3, 0.7], "mixed", combination_type="linear")
        model.set_adapter("mixed")
    assert same_gradients(*both)
    for model in both:
        model.set_adapter("second")
        model.delete_adapter("mixed")
        model.delete_adapter("default")
    assert same_gradients(*both)


def test_rows_of_a_batch_may_each_have_their_adapter(tiny_model_folder: Path) -> None:
    both = pair(tiny_model_folder, torch.float32)
    ids, names = torch.cat([IDS, IDS[:1]]), ["default", "second", "__base__"]
    results = []
    for model in both:
        torch.manual_seed(3)
        model.add_adapter("second", lora(init_lora_weights=False))
        logits = model.eval()(input_ids=ids, adapter_names=names).logits
        text = model.generate(input_ids=ids, adapter_names=names, max_new_tokens=4, do_sample=False)
        results.append((logits, text))
    torch.testing.assert_close(results[0][0], results[1][0], rtol=1e-4, atol=1e-4)
    assert torch.equal(results[0][1], results[1][1])


def test_text_can_be_generated_between_steps(tiny_model_folder: Path) -> None:
    ours, theirs = pair(tiny_model_folder, torch.float32)
    for mode in (False, True):
        assert same_gradients(ours, theirs)
        texts = [m.train(mode).generate(input_ids=IDS, max_new_tokens=6, do_sample=False) for m in (ours, theirs)]
        assert torch.equal(*texts)
    assert same_gradients(ours, theirs)


def test_an_unloaded_base_takes_another_adapter(tiny_model_folder: Path) -> None:
    bases = [model.unload() for model in pair(tiny_model_folder, torch.float32)]
    logits = [base.eval()(input_ids=IDS).logits for base in bases]
    torch.testing.assert_close(*logits, rtol=1e-4, atol=1e-4)
    again = []
    for base in bases:
        torch.manual_seed(4)
        again.append(get_peft_model(base, lora(init_lora_weights=False)))
    assert same_gradients(halfbyte.prepare_for_training(again[0]), again[1])


def test_a_deep_copy_of_a_prepared_model_is_one_of_its_own(tiny_model_folder: Path) -> None:
    ours, theirs = pair(tiny_model_folder, torch.float32)
    copied = copy.deepcopy(ours)
    with torch.no_grad():
        for parameter in ours.parameters():
            if parameter.is_floating_point():
                parameter.zero_()
    assert same_gradients(copied, theirs)
    assert copied.get_nb_trainable_parameters() == ours.get_nb_trainable_parameters()
    assert all(p.grad is None for p in ours.parameters())

"""Experts in 4 bits: their bytes against bitsandbytes, adapters and sums against PEFT over transformers' own stacks."""

import copy
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import bitsandbytes.functional as bnb
import pytest
import torch
import transformers as t
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file, save_file
from torch import nn

import halfbyte
from halfbyte.deploy.folders import write_model
from halfbyte.deploy.merge import merge
from halfbyte.errors import InputError
from halfbyte.hf import not_linear, quantize_checkpoint
from halfbyte.hf.layers.activations import apply, plan
from halfbyte.hf.layers.expert_adapters import LoraExperts, set_dropout
from halfbyte.hf.layers.expert_targets import as_peft_reads, own_words
from halfbyte.hf.layers.experts import Experts, load_of
from halfbyte.hf.layers.lora_config import lora_config
from halfbyte.hf.models.adapter_files import put_adapter
from halfbyte.hf.models.base_files import Source, fingerprint
from halfbyte.hf.models.four_bits import In4Bits
from halfbyte.hf.models.hub import locate
from halfbyte.hf.models.more_adapters import add_adapter
from halfbyte.plan.shape import shape_of
from halfbyte.quant import quantize_4bit

SHAPE: dict[str, Any] = {
    "vocab_size": 96, "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 2, "head_dim": 16, "num_local_experts": 5, "num_experts": 5, "num_experts_per_tok": 2,
    "moe_intermediate_size": 32, "pad_token_id": 0,
}  # fmt: skip
FP32 = halfbyte.HalfbyteConfig(compute_dtype="float32")
IDS = torch.arange(3, 21).view(2, 9)
Give = Callable[[nn.Module, nn.Module], None]


def mixture(kind: str, folder: Path, **more: Any) -> t.PreTrainedModel:
    """Save a model of random weights in ``folder``, and return it."""
    torch.manual_seed(0)
    config = getattr(t, f"{kind}Config")(**SHAPE | {"initializer_range": 0.2} | more)
    model: t.PreTrainedModel = t.AutoModelForCausalLM.from_config(config).float().eval()
    model.save_pretrained(folder)
    return model


@pytest.fixture
def mixtral(tmp_path: Path) -> Path:
    mixture("Mixtral", tmp_path / "mixtral")
    return tmp_path / "mixtral"


def adapted(model: Any, **more: Any) -> PeftModel:
    """Put an adapter on all linear layers, with a B that is not 0."""
    config = lora_config(model, rank=3, lora_alpha=6, never=not_linear(model), **more)
    with own_words():
        wrapped = get_peft_model(model, config)
    as_peft_reads(config)
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for name, parameter in sorted(wrapped.named_parameters()):
            if "lora_" in name:
                parameter.copy_(0.1 * torch.randn(parameter.shape, generator=generator))
    return halfbyte.prepare(wrapped)


@pytest.mark.parametrize("double_quant", [True, False])
def test_each_matrix_has_bitsandbytes_bytes(mixtral: Path, tmp_path: Path, double_quant: bool) -> None:
    config = halfbyte.HalfbyteConfig(compute_dtype="bfloat16", double_quant=double_quant)
    model = halfbyte.load(mixtral, quantization_config=config)
    dense = load_file(mixtral / "model.safetensors")
    model.save_pretrained(tmp_path / "saved")
    saved = load_file(tmp_path / "saved" / "model.safetensors")
    names = [name for name in dense if ".experts." in name]
    assert len(names) == 2 * 5 * 3 and {".w1.", ".w2.", ".w3."} == {f".{name.split('.')[-2]}." for name in names}
    for name in names:
        packed, state = bnb.quantize_4bit(dense[name].bfloat16(), blocksize=64, quant_type="nf4")
        assert torch.equal(saved[name].view(-1), packed.view(-1))
        if not double_quant:
            assert torch.equal(saved[f"{name}.absmax"], state.absmax)
        alone = quantize_4bit(dense[name].bfloat16(), "nf4", 64, double_quant).state_dict(name)
        assert all(torch.equal(saved[key], value) for key, value in alone.items())


@pytest.mark.parametrize(
    "kind",
    [
        "Mixtral", "Qwen2Moe", "GraniteMoe", "GptOss", "Llama4Text", "DeepseekV2", "Glm4Moe", "Qwen3Next",
        "Inkling2Text",
    ],
)  # fmt: skip
def test_peft_opens_the_adapter_over_the_16_bit_model_and_the_sum_is_saved(
    kind: str, tmp_path: Path, give_values: Give
) -> None:
    latent = {
        "num_key_value_heads": 4, "q_lora_rank": None, "kv_lora_rank": 16, "qk_rope_head_dim": 16, "n_group": 1,
        "qk_nope_head_dim": 16, "v_head_dim": 16, "n_routed_experts": 5, "first_k_dense_replace": 1, "topk_group": 1,
        "n_shared_experts": 1,
    }  # fmt: skip
    recurrent = {
        "num_hidden_layers": 4, "linear_num_value_heads": 4, "linear_num_key_heads": 2, "linear_key_head_dim": 16,
        "linear_value_head_dim": 16, "shared_expert_intermediate_size": 32,
    }  # fmt: skip
    more = {"DeepseekV2": latent, "Glm4Moe": latent, "Qwen3Next": recurrent}.get(kind, {})
    dense = mixture(kind, tmp_path / "m", **more)
    model = halfbyte.load(tmp_path / "m", quantization_config=FP32)
    give_values(model, dense)
    with torch.no_grad():
        wanted = dense(IDS).logits
        assert (model(IDS).logits - wanted).norm() <= 1e-5 * wanted.norm()

    ours = adapted(model)
    ours.save_pretrained(tmp_path / "adapter")
    about = json.loads((tmp_path / "adapter" / "adapter_config.json").read_text())
    assert {"experts.down_proj", "experts.gate_up_proj"} <= {*about["target_parameters"]}
    theirs = PeftModel.from_pretrained(copy.deepcopy(dense), tmp_path / "adapter", is_trainable=True)
    losses = [one(input_ids=IDS, labels=IDS).loss for one in (theirs, ours)]
    gradients = [torch.autograd.grad(loss, trained(one)) for loss, one in zip(losses, (theirs, ours), strict=True)]
    assert torch.allclose(*losses, rtol=1e-5)
    for one, other in zip(*gradients, strict=True):
        assert (one - other).norm() <= 1e-4 * one.norm()

    with torch.no_grad():
        expected = theirs.eval()(input_ids=IDS).logits
        again = put_adapter(halfbyte.load(tmp_path / "m", quantization_config=FP32), tmp_path / "adapter")
        assert torch.equal(halfbyte.prepare(again)(input_ids=IDS).logits, ours.eval()(input_ids=IDS).logits)
        merged = ours.merge_and_unload()
        assert not any(isinstance(module, Experts) for module in merged.modules())
        merged.save_pretrained(tmp_path / "merged")
        for one in (merged, type(dense).from_pretrained(tmp_path / "merged")):
            assert (one(IDS).logits - expected).norm() <= 1e-5 * expected.norm()


def trained(model: nn.Module) -> list[nn.Parameter]:
    return [parameter for _, parameter in sorted(model.named_parameters()) if parameter.requires_grad]


def test_dropout_is_there_in_training_alone(mixtral: Path) -> None:
    model = adapted(halfbyte.load(mixtral, quantization_config=FP32))
    set_dropout(model, "default", 0.5)
    experts = next(module for module in model.modules() if isinstance(module, LoraExperts))
    with torch.no_grad():
        plain = model.eval()(input_ids=IDS).logits
        dropped = [model.train()(input_ids=IDS).logits for _ in range(2)]
    assert isinstance(experts.lora_dropout["default"], nn.Dropout)
    assert not torch.equal(*dropped) and torch.equal(model.eval()(input_ids=IDS).logits, plain)


def test_experts_that_bitsandbytes_left_dense_stay_so(mixtral: Path, tmp_path: Path, give_values: Give) -> None:
    config = t.BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_use_double_quant=True)
    theirs = t.AutoModelForCausalLM.from_pretrained(mixtral, quantization_config=config, device_map="cpu")
    theirs.save_pretrained(tmp_path / "theirs")
    ours = halfbyte.load(tmp_path / "theirs", quantization_config=FP32)
    kinds = {type(module).__name__ for name, module in ours.named_modules() if name.endswith(".experts.3.gate_proj")}
    assert kinds == {"DenseLinear"}
    dense = t.AutoModelForCausalLM.from_pretrained(mixtral, dtype=torch.float32)
    give_values(ours, dense)
    with torch.no_grad():
        wanted = dense(IDS).logits
        assert (ours(IDS).logits - wanted).norm() <= 1e-5 * wanted.norm()
    stacks = theirs.model.layers[0].mlp.experts.down_proj
    assert torch.equal(ours.model.layers[0].mlp.experts.get_submodule("3.down_proj").weight, stacks[3].float())


@pytest.mark.parametrize("kind", ["Mixtral", "GptOss", "GraniteMoe", "Llama4Text", "Inkling2Text"])
def test_a_copy_in_files_is_the_model_that_is_saved(kind: str, tmp_path: Path) -> None:
    mixture(kind, tmp_path / "m")
    quantize_checkpoint(tmp_path / "m", tmp_path / "q", FP32)
    model, copied = (halfbyte.load(tmp_path / name, quantization_config=FP32) for name in ("m", "q"))
    with torch.no_grad():
        assert torch.equal(model(IDS).logits, copied(IDS).logits)


@pytest.mark.parametrize("kind", ["GptOss", "GraniteMoe"])
def test_a_stack_of_another_number_of_experts_is_told(kind: str, tmp_path: Path) -> None:
    mixture(kind, tmp_path / "m")
    tensors = load_file(tmp_path / "m" / "model.safetensors")
    name = next(name for name in tensors if name.endswith(("down_proj", "output_linear.weight")))
    tensors[name] = tensors[name][:4].clone()
    save_file(tensors, tmp_path / "m" / "model.safetensors", {"format": "pt"})
    with pytest.raises(InputError, match=r"experts\.down_proj is \[4, .* config.json makes it \[5, "):
        halfbyte.load(tmp_path / "m", quantization_config=FP32)


@pytest.mark.parametrize(
    ("kind", "given", "told"),
    [
        ("Qwen3Moe", {"num_experts_per_tok": 6}, r"each token go to 6 of the 5 experts in \S+0\.mlp\.experts"),
        ("GptOss", {"num_experts_per_tok": 0}, "each token go to 0 of the 5 experts in"),
        ("GraniteMoe", {"num_local_experts": 0}, r"no experts in model\.layers\.0\.block_sparse_moe\.experts"),
        ("Glm4Moe", {"n_group": 2}, r"the 5 experts in \S+1\.mlp\.experts in 2 groups, which do not divide"),
    ],
)
def test_numbers_of_experts_that_nothing_can_compute_with_are_told(
    kind: str, given: dict[str, int], told: str, tmp_path: Path
) -> None:
    mixture(kind, tmp_path / "m", n_routed_experts=5, n_group=1, topk_group=1, first_k_dense_replace=1)
    file = tmp_path / "m" / "config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | given))
    for use in (
        lambda: halfbyte.load(tmp_path / "m", quantization_config=FP32),
        lambda: quantize_checkpoint(tmp_path / "m", tmp_path / "q", FP32),
    ):
        with pytest.raises(InputError, match=f"config.json has {told}.*copy it from the model's source again"):
            use()
    if kind in ("Qwen3Moe", "Glm4Moe"):  # which plans know
        with pytest.raises(InputError, match=r"config.json has .*copy it from the model's source again"):
            shape_of(t.AutoConfig.from_pretrained(tmp_path / "m"))


def test_a_router_whose_weight_is_read_by_hand_stays_dense_and_unknown_stacks_are_told(
    tmp_path: Path, give_values: Give, caplog: pytest.LogCaptureFixture
) -> None:
    shape = {
        "num_layers": 1, "ffn_hidden_size": 96, "expert_ffn_hidden_size": 32, "moe_topk": 2, "zero_expert_num": 2,
        "n_routed_experts": 5, "kv_lora_rank": 16, "q_lora_rank": 16, "qk_rope_head_dim": 16, "qk_nope_head_dim": 16,
        "v_head_dim": 16, "num_key_value_heads": 4,
    }  # fmt: skip
    dense = mixture("LongcatFlash", tmp_path / "m", **shape)
    model = halfbyte.load(tmp_path / "m", quantization_config=FP32)
    assert "mlp.experts.gate_up_proj of" in caplog.text and "(2 in all) holds experts in a form that" in caplog.text
    give_values(model, dense)
    with torch.no_grad():
        wanted = dense(IDS).logits
        assert (model(IDS).logits - wanted).norm() <= 1e-5 * wanted.norm()
    assert not any("classifier" in name for name in adapted(model).state_dict() if "lora_" in name)


def test_a_router_that_gives_nan_is_told(mixtral: Path) -> None:
    model = halfbyte.load(mixtral, quantization_config=FP32)
    model.model.layers[1].mlp.gate.weight.data[0, 0] = torch.nan
    with pytest.raises(InputError, match="A router gives weights that are not finite to the 5 experts"):
        model(IDS)


@pytest.mark.parametrize("wrong", [-1, 6])
def test_a_router_that_chooses_an_expert_that_is_not_there_is_told(mixtral: Path, wrong: int) -> None:
    model = halfbyte.load(mixtral, quantization_config=FP32)
    experts = model.model.layers[0].mlp.experts
    with pytest.raises(InputError, match=f"A router chooses expert {wrong}, and its layer has 5"):
        experts(torch.randn(1, 64), torch.tensor([[0, wrong]]), torch.ones(1, 2))
    nobody = experts(torch.randn(1, 64), torch.tensor([[5, 5]]), torch.ones(1, 2))
    assert torch.equal(nobody, torch.zeros(1, 64))


@pytest.mark.parametrize(
    ("options", "sentence"),
    [
        ({"target_modules": "gate_proj,q_proj"}, "takes gate_proj of .* without up_proj"),
        ({"use_dora": True}, "use_dora does not go with experts"),
        ({"init_lora_weights": "pissa"}, "adapters begin with zeros alone"),
    ],
)
def test_what_experts_do_not_take_is_told(mixtral: Path, options: dict[str, Any], sentence: str) -> None:
    model = halfbyte.load(mixtral, quantization_config=FP32)
    with pytest.raises(InputError, match=sentence):
        lora_config(model, rank=4, lora_alpha=8, **options)


def test_biases_of_experts_are_not_trained_with_all_others(tmp_path: Path) -> None:
    mixture("GptOss", tmp_path / "m")
    model = halfbyte.load(tmp_path / "m", quantization_config=FP32)
    with pytest.raises(InputError, match=r"bias all does not go with biases of experts, .* take lora_only"):
        lora_config(model, rank=4, lora_alpha=8, bias="all")
    names = {name for name, x in adapted(model, bias="lora_only").named_parameters() if x.requires_grad}
    assert any(name.endswith("q_proj.base_layer.bias") for name in names)
    assert not any("bias" in name and ".experts." in name for name in names)


@pytest.mark.parametrize(
    ("kind", "other", "given", "theirs"),
    [
        ("Mixtral", "Mixtral", {"num_local_experts": 3, "num_experts": 3}, r"'s 3 of \[192, 64\]"),
        ("Mixtral", "Mixtral", {"intermediate_size": 80}, r"'s 5 of \[160, 64\]"),
        ("GptOss", "GptOss", {"num_local_experts": 3, "num_experts": 3}, r"'s 3 of \[192, 64\]"),
        ("Llama4Text", "Llama4Text", {"intermediate_size": 80}, r"'s 5 of \[160, 64\]"),
        ("Mixtral", "Llama", {}, " has no experts there"),
    ],
)
def test_an_adapter_of_other_experts_is_told(
    kind: str, other: str, given: dict[str, int], theirs: str, tmp_path: Path
) -> None:
    mixture(kind, tmp_path / "m")
    mixture(other, tmp_path / "other", **given)
    ours = adapted(halfbyte.load(tmp_path / "m", quantization_config=FP32))
    ours.peft_config["default"].base_model_name_or_path = str(tmp_path / "other")
    ours.save_pretrained(tmp_path / "adapter")
    for use in (
        lambda: put_adapter(halfbyte.load(tmp_path / "other", quantization_config=FP32), tmp_path / "adapter"),
        lambda: halfbyte.load(tmp_path / "adapter"),
        lambda: add_adapter(halfbyte.load(tmp_path / "other", quantization_config=FP32), tmp_path / "adapter", "it"),
        lambda: merge(tmp_path / "adapter", tmp_path / "merged"),
        lambda: merge(tmp_path / "adapter", tmp_path / "merged", to="nf4", rounding="random"),
    ):
        with pytest.raises(InputError, match=r"gate_up_proj has 5 experts of \[192, 64\], and the base model" + theirs):
            use()
    assert not (tmp_path / "merged").exists()
    found = fingerprint(Source(locate(tmp_path / "m")), [halfbyte.HalfbyteConfig()])
    assert found
    found.called("m").save(tmp_path / "adapter")
    counts = r"experts has 3 experts and not 5" if "num_local_experts" in given else "is .* and not "
    with pytest.raises(InputError, match=rf"was trained on another base model \(m\).*{counts}"):
        halfbyte.load(tmp_path / "adapter")


def test_some_layers_alone(mixtral: Path) -> None:
    model = halfbyte.load(mixtral, quantization_config=FP32)
    config = lora_config(model, rank=4, lora_alpha=8, layers_to_transform=[1], target_modules="all-linear")
    assert config.target_parameters == [f"model.layers.1.mlp.experts.{name}" for name in ("down_proj", "gate_up_proj")]
    config = lora_config(model, rank=4, lora_alpha=8, target_modules="q_proj,down_proj")
    assert config.target_parameters == ["experts.down_proj"] and config.target_modules == {"q_proj"}


@pytest.mark.parametrize("onto", ["quantized", "original"])
@pytest.mark.parametrize("kind", ["Mixtral", "Qwen2Moe", "GptOss", "GraniteMoe", "Llama4Text", "Inkling2Text"])
def test_merging_files_gives_the_model_that_transformers_opens(
    kind: str, onto: Any, tmp_path: Path, give_values: Give
) -> None:
    dense = mixture(kind, tmp_path / "m")
    model = halfbyte.load(tmp_path / "m", quantization_config=FP32)
    if onto == "quantized":
        give_values(model, dense)
    ours = adapted(model)
    ours.peft_config["default"].base_model_name_or_path = str(tmp_path / "m")
    ours.save_pretrained(tmp_path / "adapter")
    (tmp_path / "adapter" / "base_format.json").write_text('{"quant_type": "nf4", "compute_dtype": "float32"}')
    theirs = PeftModel.from_pretrained(dense, tmp_path / "adapter")
    merge(tmp_path / "adapter", tmp_path / "merged", onto=onto, to="fp32")
    opened = type(dense).from_pretrained(tmp_path / "merged", dtype=torch.float32)
    assert (
        load_file(tmp_path / "m" / "model.safetensors").keys()
        == load_file(tmp_path / "merged" / "model.safetensors").keys()
    )
    with torch.no_grad():
        wanted = theirs(input_ids=IDS).logits
        assert (opened(IDS).logits - wanted).norm() <= 1e-5 * wanted.norm()


@pytest.mark.parametrize("kind", ["Mixtral", "GptOss", "GraniteMoe", "Llama4Text", "Inkling2Text"])
def test_merging_onto_a_copy_in_4_bits_gives_what_merging_onto_its_source_does(kind: str, tmp_path: Path) -> None:
    dense = mixture(kind, tmp_path / "m")
    quantize_checkpoint(tmp_path / "m", tmp_path / "q", FP32)
    ours = adapted(halfbyte.load(tmp_path / "q", quantization_config=FP32))
    states = []
    for base in ("m", "q"):
        ours.peft_config["default"].base_model_name_or_path = str(tmp_path / base)
        ours.save_pretrained(tmp_path / f"{base}-adapter")
        about = tmp_path / f"{base}-adapter" / "base_format.json"
        about.write_text('{"quant_type": "nf4", "compute_dtype": "float32"}')
        merge(tmp_path / f"{base}-adapter", tmp_path / f"{base}-merged", to="fp32")
        states.append(type(dense).from_pretrained(tmp_path / f"{base}-merged", dtype=torch.float32).state_dict())
    assert all(torch.equal(value, states[1][name]) for name, value in states[0].items())


@pytest.mark.parametrize("kind", ["Mixtral", "GptOss"])
def test_merging_into_4_bits_is_opened_here(kind: str, tmp_path: Path) -> None:
    mixture(kind, tmp_path / "m")
    ours = adapted(halfbyte.load(tmp_path / "m", quantization_config=FP32))
    ours.peft_config["default"].base_model_name_or_path = str(tmp_path / "m")
    ours.save_pretrained(tmp_path / "adapter")
    (tmp_path / "adapter" / "base_format.json").write_text('{"quant_type": "nf4", "compute_dtype": "float32"}')
    merge(tmp_path / "adapter", tmp_path / "merged", to="nf4", rounding="nearest")
    merge(tmp_path / "adapter", tmp_path / "dense", to="fp32")
    merged, exact = (halfbyte.load(tmp_path / name, quantization_config=FP32) for name in ("merged", "dense"))
    layers = [name for name, module in merged.named_modules() if isinstance(module, halfbyte.Linear4bit)]
    experts = [name for name in layers if ".experts." in name]
    assert len(experts) == 2 * 5 * (3 if kind == "Mixtral" else 2)
    stacks = load_file(tmp_path / "dense" / "model.safetensors")
    for name in experts:
        path, (number, layer) = name.rpartition(".experts.")[0] + ".experts", name.split(".")[-2:]
        if kind == "GptOss":
            wanted = stacks[f"{path}.{layer}"][int(number)].T
        else:
            theirs = {"gate_proj": "w1", "up_proj": "w3", "down_proj": "w2"}[layer]
            wanted = stacks[f"{path.replace('.mlp.', '.block_sparse_moe.')}.{number}.{theirs}.weight"]
        got = merged.get_submodule(name).dequantize(torch.float32)
        assert (got - wanted).norm() <= 0.12 * wanted.norm()  # NF4 rounds normal values by 9 % of their norm
    with torch.no_grad():
        assert torch.isfinite(merged(IDS).logits).all() and exact(IDS).logits.shape == merged(IDS).logits.shape


@pytest.mark.parametrize("kind", ["Mixtral", "Qwen3Moe", "GptOss", "NemotronH"])
def test_transformers_own_stacks_are_computed_as_by_its_loop(kind: str) -> None:
    torch.manual_seed(0)
    shape = SHAPE | {"initializer_range": 0.2}
    if kind == "NemotronH":  # without a gate
        shape |= {
            "layers_block_type": ["moe", "attention"],
            "n_routed_experts": 5,
            "moe_shared_expert_intermediate_size": 32,
        }
    model = (
        t.AutoModelForCausalLM.from_config(getattr(t, f"{kind}Config")(**shape)).float().eval().requires_grad_(False)
    )
    x = torch.randn(2, 9, 64, requires_grad=True)
    found = []
    for way in ("eager", "halfbyte"):
        model.set_experts_implementation(way)
        assert model.config._experts_implementation == way
        logits = model(inputs_embeds=x).logits
        found.append((logits, *torch.autograd.grad(logits.square().sum(), x)))
    for wanted, got in zip(*found, strict=True):
        assert (got - wanted).norm() <= 1e-5 * wanted.norm()


def test_stacks_that_are_to_be_trained_are_told() -> None:
    model = t.AutoModelForCausalLM.from_config(t.MixtralConfig(**SHAPE), experts_implementation="halfbyte")
    with torch.no_grad():
        assert torch.isfinite(model(IDS).logits).all()
    with pytest.raises(InputError, match=r"MixtralExperts's gate_up_proj is to be trained, but .* frozen experts"):
        model(IDS)


def test_the_model_computes_the_same_when_it_is_not_prepared(mixtral: Path) -> None:
    model = adapted(halfbyte.load(mixtral, quantization_config=FP32)).eval()
    with torch.no_grad():
        wanted = model(input_ids=IDS).logits
        got = halfbyte.hf.unprepare(model)(input_ids=IDS).logits
    assert (got - wanted).norm() <= 1e-5 * wanted.norm()


def test_codes_that_keep_outputs_are_chosen_for_experts_too(mixtral: Path, tmp_path: Path) -> None:
    ours = adapted(halfbyte.load(mixtral, quantization_config=FP32))
    ours.peft_config["default"].base_model_name_or_path = str(mixtral)
    ours.save_pretrained(tmp_path / "adapter")
    (tmp_path / "adapter" / "base_format.json").write_text('{"quant_type": "nf4", "compute_dtype": "float32"}')
    texts = [torch.arange(number, number + 24) for number in range(40)]
    apart = {}
    for rounding in ("nearest", "outputs"):
        model = In4Bits(tmp_path / "adapter", rounding, texts if rounding == "outputs" else [])
        write_model(
            model, tmp_path / rounding, {}, sizes=model.sizes, make=model.make,
            finish=lambda folder, model=model: model.config.save_pretrained(folder),
        )  # fmt: skip
        with torch.no_grad():
            merged = halfbyte.load(tmp_path / rounding, quantization_config=FP32)
            apart[rounding] = (merged(IDS).logits - ours.eval()(input_ids=IDS).logits).norm()
    assert apart["outputs"] < apart["nearest"]


def test_the_load_is_that_of_the_busiest_expert_since_it_was_asked(mixtral: Path) -> None:
    model = halfbyte.load(mixtral, quantization_config=FP32)
    assert load_of(model.train()) is None
    experts = model.model.layers[0].mlp.experts
    x, share = torch.randn(4, 64), torch.ones(4, 1)
    experts(x, torch.tensor([[0], [0], [0], [3]]), share)
    experts.eval()(x, torch.tensor([[4], [4], [4], [4]]), share)
    assert load_of(model) == 3 / (4 / 5) and load_of(model) is None


@pytest.mark.filterwarnings("ignore:The following (rank|alpha)_pattern keys did not match:RuntimeWarning")
@pytest.mark.parametrize(
    "patterns", [{}, {"rank_pattern": {"gate_proj": 5}, "alpha_pattern": {"shared_expert.gate_proj|q_proj": 9}}]
)
def test_peft_opens_an_adapter_of_the_shared_expert_alone(
    patterns: dict[str, Any], tmp_path: Path, give_values: Give
) -> None:
    dense = mixture("Qwen2Moe", tmp_path / "m")
    model = halfbyte.load(tmp_path / "m", quantization_config=FP32)
    give_values(model, dense)
    ours = adapted(model, target_modules=["shared_expert.gate_proj", "q_proj"], **patterns).eval()
    ours.save_pretrained(tmp_path / "adapter")
    theirs = PeftModel.from_pretrained(dense, tmp_path / "adapter")
    again = put_adapter(halfbyte.load(tmp_path / "m", quantization_config=FP32), tmp_path / "adapter")
    with torch.no_grad():
        wanted = theirs(input_ids=IDS).logits
        for one in (ours, halfbyte.prepare(again)):
            assert (one(input_ids=IDS).logits - wanted).norm() <= 1e-5 * wanted.norm()


@pytest.mark.parametrize(
    ("more", "options"),
    [
        ({"mlp_only_layers": [0]}, {"layers_to_transform": [0]}),
        ({}, {"target_modules": r".*shared_expert\.(gate|up|down)_proj"}),
        ({}, {"target_modules": ["shared_expert.down_proj"], "exclude_modules": ["0.mlp.shared_expert.down_proj"]}),
    ],
)
def test_peft_opens_an_adapter_of_some_layers_without_experts_on_these_alone(
    more: dict[str, Any], options: dict[str, Any], tmp_path: Path, give_values: Give
) -> None:
    dense = mixture("Qwen2Moe", tmp_path / "m", shared_expert_intermediate_size=32, **more)
    model = halfbyte.load(tmp_path / "m", quantization_config=FP32)
    give_values(model, dense)
    ours = adapted(model, **options)
    ours.save_pretrained(tmp_path / "adapter")
    theirs = PeftModel.from_pretrained(dense, tmp_path / "adapter", is_trainable=True)
    names = [{name for name, x in one.named_parameters() if x.requires_grad} for one in (ours, theirs)]
    assert names[0] == names[1] and not any(".experts." in name for name in names[0])
    with torch.no_grad():
        wanted = theirs(input_ids=IDS).logits
        assert (ours(input_ids=IDS).logits - wanted).norm() <= 1e-5 * wanted.norm()


def test_gradients_are_the_same_where_activations_are_recomputed(mixtral: Path) -> None:
    found = []
    for recompute in (False, True):
        model = adapted(halfbyte.load(mixtral, quantization_config=FP32))
        set_dropout(model, "default", 0.2)
        apply(model, plan(model, length=9, batch_size=2, free=2**33, recompute=recompute))
        torch.manual_seed(5)
        loss = model.train()(input_ids=IDS, labels=IDS).loss
        found.append([loss, *torch.autograd.grad(loss, trained(model))])
    assert all(torch.equal(one, other) for one, other in zip(*found, strict=True))


def test_a_script_that_adapts_each_matrix_by_itself_is_told(
    tmp_path: Path, give_values: Give, caplog: pytest.LogCaptureFixture
) -> None:
    dense = mixture("GraniteMoe", tmp_path / "m")
    model = halfbyte.load(tmp_path / "m", quantization_config=FP32)
    give_values(model, dense)
    ours = halfbyte.prepare(get_peft_model(model, LoraConfig(r=2, target_modules=["down_proj"])))
    assert "on each matrix of the experts by itself" in caplog.text
    with torch.no_grad():
        wanted = dense(IDS).logits
        assert (ours.eval()(input_ids=IDS).logits - wanted).norm() <= 1e-5 * wanted.norm()
    loss = ours.train()(input_ids=IDS, labels=IDS).loss
    assert any(
        gradient.any()
        for gradient in torch.autograd.grad(loss, trained(ours), allow_unused=True)
        if gradient is not None
    )


def test_a_model_without_experts_is_saved_by_the_names_that_it_was_loaded_by(tiny_model_folder: Path) -> None:
    model = halfbyte.load(tiny_model_folder)
    loaded_by = model._weight_conversions
    assert loaded_by is not None and model.dequantize()._weight_conversions is loaded_by

"""Fused decoder layers against the families' own, in transformers."""

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
import transformers as t
from torch import Tensor, nn
from transformers.models.llama.modeling_llama import LlamaDecoderLayer, LlamaRMSNorm

from halfbyte.hf import describe_layers, fuse, unfuse

SIZES = {
    "hidden_size": 48,
    "intermediate_size": 80,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "vocab_size": 128,
    "max_position_embeddings": 64,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
LAYERS = {"layer_types": ["sliding_attention", "full_attention"], "sliding_window": 4}
EXPERTS = {"num_experts": 6, "num_experts_per_tok": 3, "moe_intermediate_size": 24}
# Lengths beyond the sliding windows, which differ between layers where the family has that.
FAMILIES: dict[str, Any] = {
    "Llama": lambda: t.LlamaConfig(**SIZES, attention_bias=True, mlp_bias=True),
    "Mistral": lambda: t.MistralConfig(**SIZES, sliding_window=5),
    "Qwen2": lambda: t.Qwen2Config(**SIZES, **LAYERS, use_sliding_window=True),
    "Qwen3": lambda: t.Qwen3Config(**SIZES, **LAYERS, use_sliding_window=True, head_dim=16),
    "Gemma2": lambda: t.Gemma2Config(**SIZES, **LAYERS, head_dim=16, query_pre_attn_scalar=20),
    "Gemma3": lambda: t.Gemma3TextConfig(**SIZES, **LAYERS, head_dim=16, query_pre_attn_scalar=20),
    "Phi3": lambda: t.Phi3Config(
        **SIZES,
        resid_pdrop=0.1,
        rope_parameters={"rope_type": "default", "rope_theta": 1e4, "partial_rotary_factor": 0.5},
    ),
    "SmolLM3": lambda: t.SmolLM3Config(**SIZES, no_rope_layers=[1, 0]),
    "Olmo": lambda: t.OlmoConfig(**SIZES),
    "Olmo2": lambda: t.Olmo2Config(**SIZES),
    "Olmo3": lambda: t.Olmo3Config(**SIZES, **LAYERS),
    "Ministral": lambda: t.MinistralConfig(**SIZES, **LAYERS, head_dim=12),
    "Mixtral": lambda: t.MixtralConfig(**SIZES, num_local_experts=4, sliding_window=5),
    "Qwen2Moe": lambda: t.Qwen2MoeConfig(**SIZES, **EXPERTS, mlp_only_layers=[1], shared_expert_intermediate_size=24),
    "Qwen3Moe": lambda: t.Qwen3MoeConfig(**SIZES, **EXPERTS, head_dim=16),
    "Olmoe": lambda: t.OlmoeConfig(**SIZES, num_experts=6, num_experts_per_tok=3),
    "Glm4Moe": lambda: t.Glm4MoeConfig(
        **SIZES,
        moe_intermediate_size=24,
        n_routed_experts=8,
        num_experts_per_tok=3,
        n_group=2,
        topk_group=1,
        first_k_dense_replace=1,
        use_qk_norm=True,
        head_dim=16,
    ),
}
IDS = torch.randint(3, 128, (3, 11), generator=torch.Generator().manual_seed(1))
MASK = torch.ones_like(IDS).index_put((torch.tensor([0, 0, 1]), torch.tensor([0, 1, 0])), torch.tensor(0))


def make(config: Any, attention: str | None = None) -> t.PreTrainedModel:
    torch.manual_seed(0)
    model = t.AutoModelForCausalLM.from_config(config, attn_implementation=attention)
    for parameter in model.parameters():
        nn.init.normal_(parameter, mean=float(parameter.ndim == 1), std=0.2)
    return model


@pytest.fixture(params=FAMILIES)
def family(request: pytest.FixtureRequest) -> str:
    return request.param


def run(model: nn.Module) -> dict[str, Tensor]:
    """Logits of padded rows, the loss and the gradients of all parameters, under one seed for dropout."""
    torch.manual_seed(2)
    model.zero_grad()
    out = model(input_ids=IDS, attention_mask=MASK, labels=IDS, use_cache=False)
    out.loss.backward()
    gradients = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
    return {"logits": out.logits.detach()[MASK.bool()], "loss": out.loss.detach(), **gradients}


def distance(one: dict[str, Tensor], other: dict[str, Tensor]) -> float:
    """The largest relative error of norm."""
    assert one.keys() == other.keys() and len(one) > 10
    norms = ((one[key].double() - other[key].double()).norm() / other[key].double().norm() for key in one)
    return max(float(x) for x in norms)


@pytest.mark.parametrize("attention", [None, "eager"])
def test_numbers_are_the_family_s_in_fp32(family: str, attention: str | None) -> None:
    model = make(FAMILIES[family](), attention).train()
    expected = run(model)
    assert fuse(model) == f"fused: 2 {family} layers"
    assert distance(run(model), expected) < 1e-5
    model.activation_checkpointing_enable({"use_reentrant": False})
    assert distance(run(model), expected) < 1e-5
    model.activation_checkpointing_enable({"use_reentrant": True})
    model.enable_input_require_grads()
    assert distance(run(model), expected) < 1e-5


def test_bf16_is_about_as_far_from_fp32_as_the_family_s_own(family: str) -> None:
    # Mostly the noise of the products between the fused pieces, which differs by some percent either way.
    config = FAMILIES[family]()
    config.resid_pdrop = 0.0
    if hasattr(config, "num_experts_per_tok"):  # all, since a choice that rounding tips makes another model
        config.topk_group = getattr(config, "n_group", 1)
        config.num_experts_per_tok = getattr(config, "num_experts", None) or config.num_local_experts
    model = make(config)
    rounded = copy.deepcopy(model).bfloat16()
    truth = run(copy.deepcopy(rounded).float())
    theirs = run(rounded)
    fuse(rounded)
    ours = run(rounded)
    assert ours.keys() == theirs.keys() == truth.keys()

    def errors(got: dict[str, Tensor]) -> Tensor:
        return torch.stack([(got[key] - truth[key]).norm() / truth[key].norm() for key in truth])

    assert errors(ours).mean() < 1.25 * errors(theirs).mean()
    assert (errors(ours) < 2 * errors(theirs) + 2**-8).all()


def test_generation_with_a_cache_gives_the_same_tokens(family: str) -> None:
    model = make(FAMILIES[family]()).eval()
    options = {"attention_mask": MASK, "max_new_tokens": 8, "do_sample": False, "eos_token_id": None}
    expected = model.generate(IDS, **options)
    fuse(model)
    assert torch.equal(model.generate(IDS, **options), expected)
    assert torch.equal(model.generate(IDS, **options, use_cache=False), expected)


def test_unfuse_gives_every_class_back(family: str) -> None:
    model = make(FAMILIES[family]())
    before = [type(module) for module in model.modules()]
    fuse(model)
    assert [type(module) for module in model.modules()] != before
    assert isinstance(model.model.layers[0], before[[*model.modules()].index(model.model.layers[0])])
    fused = [type(module) for module in model.modules()]
    fuse(model)
    assert [type(module) for module in model.modules()] == fused
    assert [type(module) for module in copy.deepcopy(model).modules()] == fused
    unfuse(model)
    assert [type(module) for module in model.modules()] == before


def test_the_norm_after_the_last_layer_takes_one_pass_too(family: str) -> None:
    model = make(FAMILIES[family]())
    x = torch.randn(2, 3, SIZES["hidden_size"])
    expected = model.model.norm(x)
    fuse(model)
    y = model.model.norm(x.requires_grad_())
    torch.testing.assert_close(y, expected)
    one_pass = type(y.grad_fn).__name__ == "_RmsNormBackward"
    assert one_pass == (family != "Olmo")  # whose norms are LayerNorms


def test_a_family_that_is_not_known_stays_as_it_is() -> None:
    del_config = {key: value for key, value in SIZES.items() if key != "num_key_value_heads"}
    model = make(t.GPTNeoXConfig(**del_config))
    before, expected = [type(module) for module in model.modules()], run(model)
    assert fuse(model) == "unfused: GPTNeoXLayer is not known"
    assert [type(module) for module in model.modules()] == before and distance(run(model), expected) == 0
    assert describe_layers(nn.Linear(1, 1)) == "unfused: there is no decoder layer"


def changed_class(model: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """What Liger and others do."""
    own = LlamaRMSNorm.forward

    def twice(self: LlamaRMSNorm, hidden_states: Tensor) -> Tensor:
        return 2 * own(self, hidden_states)

    monkeypatch.setattr(LlamaRMSNorm, "forward", twice)


def changed_rotation(model: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    def none(q: Tensor, k: Tensor, cos: Tensor, sin: Tensor) -> tuple[Tensor, Tensor]:
        return q, k

    monkeypatch.setattr("transformers.models.llama.modeling_llama.apply_rotary_pos_emb", none)


def changed_instances(model: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    for layer in model.model.layers:
        layer.mlp.forward = torch.clone


def changed_subclass(model: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    class Mine(LlamaDecoderLayer):  # type: ignore[misc]
        def forward(self, hidden_states: Tensor, **kwargs: Any) -> Tensor:
            return -super().forward(hidden_states, **kwargs)

    Mine.__name__ = "LlamaDecoderLayer"
    for layer in model.model.layers:
        layer.__class__ = Mine


def changed_without_source(model: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """What a notebook, a lambda or compiled code leaves."""
    made: dict[str, Any] = {}
    exec("def doubled(self, x): return 2 * x", made)
    monkeypatch.setattr(LlamaRMSNorm, "forward", made["doubled"])


def changed_to_a_lambda(model: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(LlamaRMSNorm, "forward", lambda self, x: 2 * x)


def changed_to_a_builtin(model: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("transformers.models.llama.modeling_llama.LlamaMLP.forward", staticmethod(torch.neg))


CHANGES = [
    changed_class,
    changed_rotation,
    changed_instances,
    changed_subclass,
    changed_without_source,
    changed_to_a_lambda,
    changed_to_a_builtin,
]


@pytest.mark.parametrize("change", CHANGES)
def test_a_changed_layer_is_left_to_who_changed_it(
    change: Callable[[Any, pytest.MonkeyPatch], None], monkeypatch: pytest.MonkeyPatch
) -> None:
    model = make(FAMILIES["Llama"]())
    unchanged = run(model)
    change(model, monkeypatch)
    expected = run(model)
    assert (expected["logits"] - unchanged["logits"]).norm() > 1e-2 * unchanged["logits"].norm()
    assert fuse(model) == "unfused: LlamaDecoderLayer is not the one that is known, or not on a CPU or CUDA GPU"
    assert distance(run(model), expected) == 0


def test_hooks_on_inner_modules_run() -> None:
    model = make(FAMILIES["Llama"]())
    layer = model.model.layers[1]
    hooked = [
        layer.input_layernorm,
        layer.self_attn,
        layer.self_attn.q_proj,
        layer.post_attention_layernorm,
        layer.mlp,
        layer.mlp.act_fn,
        layer.mlp.down_proj,
    ]

    def seen() -> list[Tensor]:
        outputs: list[Tensor] = []

        def keep(module: nn.Module, args: Any, output: Any) -> None:
            outputs.append((output[0] if isinstance(output, tuple) else output).detach())

        handles = [module.register_forward_hook(keep) for module in hooked]
        model(input_ids=IDS)
        for handle in handles:
            handle.remove()
        return outputs

    expected = seen()
    fuse(model)
    got = seen()
    assert len(got) == len(expected) == len(hooked)
    for one, other in zip(got, expected, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-5)


def test_hidden_states_and_attentions_are_recorded() -> None:
    model = make(FAMILIES["Qwen3"](), "eager")
    expected = model(input_ids=IDS, output_hidden_states=True, output_attentions=True)
    fuse(model)
    got = model(input_ids=IDS, output_hidden_states=True, output_attentions=True)
    assert len(got.hidden_states) == 3 and len(got.attentions) == 2
    pairs = zip((*got.hidden_states, *got.attentions), (*expected.hidden_states, *expected.attentions), strict=True)
    for one, other in pairs:
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-5)


def test_autocast_runs_the_family_s_own_code() -> None:
    model = make(FAMILIES["Gemma2"]())
    with torch.autocast("cpu", torch.bfloat16):
        expected = run(model)
        fuse(model)
        assert distance(run(model), expected) == 0


def test_norms_in_another_dtype_run_the_family_s_own_code() -> None:
    model = make(FAMILIES["Qwen3"]()).bfloat16()
    for module in model.modules():
        if "RMSNorm" in type(module).__name__:
            module.float()
    fuse(model)
    with pytest.raises(RuntimeError, match="same dtype"):  # as without us: the norm's result is fp32
        model(input_ids=IDS)

"""The bound head against each family's own forward, and when it stays out of the way."""

import copy
import types
from typing import Any

import pytest
import torch
import transformers as t
from peft import LoraConfig, get_peft_model
from torch import Tensor, nn
from trl.trainer.utils import add_fused_lm_head

import halfbyte
from halfbyte import kernels
from halfbyte.hf.layers.head import bind_head, head_of, unbind_head
from halfbyte.nn import Linear4bit

VOCABULARY = 101
SMALL = {"vocab_size": VOCABULARY, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
LAYERS = SMALL | {"hidden_size": 24, "intermediate_size": 40, "num_hidden_layers": 1, "num_attention_heads": 2}
DECODER = LAYERS | {"num_key_value_heads": 1}
FAMILIES: dict[str, Any] = {
    "llama": t.LlamaConfig(**DECODER),
    "llama, tied": t.LlamaConfig(**DECODER, tie_word_embeddings=True),
    "qwen3": t.Qwen3Config(**DECODER, head_dim=12),
    "gemma2, soft cap": t.Gemma2Config(**DECODER, head_dim=12, final_logit_softcapping=2.0),
    "gemma3": t.Gemma3TextConfig(**DECODER, head_dim=12),
    "cohere, scaled": t.CohereConfig(**DECODER, logit_scale=0.25),
    "granite, divided": t.GraniteConfig(**DECODER, logits_scaling=3.0),
    "phi, biased": t.PhiConfig(**LAYERS),
    "mixtral": t.MixtralConfig(**DECODER, num_local_experts=2),
    "qwen3moe": t.Qwen3MoeConfig(
        **DECODER, head_dim=12, num_experts=4, num_experts_per_tok=2, moe_intermediate_size=20
    ),
    "gptoss": t.GptOssConfig(**DECODER, head_dim=12, num_local_experts=4, num_experts_per_tok=2),
    "llama4, whose base has another name": t.Llama4TextConfig(
        **DECODER, head_dim=12, intermediate_size_mlp=40, num_local_experts=2, interleave_moe_layer_step=2
    ),
    "gpt2": t.GPT2Config(**SMALL, n_embd=24, n_layer=1, n_head=2, resid_pdrop=0, embd_pdrop=0, attn_pdrop=0),
}


OPT: dict[str, Any] = {
    "vocab_size": VOCABULARY, "hidden_size": 24, "ffn_dim": 40, "num_hidden_layers": 1, "num_attention_heads": 2,
    "word_embed_proj_dim": 24, "max_position_embeddings": 32, "dropout": 0.1,
}  # fmt: skip


def small_model(family: str = "llama") -> Any:
    torch.manual_seed(0)
    model = t.AutoModelForCausalLM.from_config(copy.deepcopy(FAMILIES[family]))
    for parameter in model.parameters():
        parameter.data *= 3  # logits that differ from one another
    return model


def some_batch() -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(1)
    ids = torch.randint(3, VOCABULARY, (3, 9), generator=generator)
    mask = torch.ones_like(ids)
    mask[1, 6:] = 0
    labels = ids.masked_fill(torch.rand(ids.shape, generator=generator) < 0.4, -100).masked_fill(mask == 0, -100)
    return {"input_ids": ids, "attention_mask": mask, "labels": labels}


def gradients(model: nn.Module, loss: Tensor) -> dict[str, Tensor]:
    model.zero_grad()
    loss.backward()
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


@pytest.mark.parametrize("family", FAMILIES)
def test_loss_and_gradients_are_those_of_the_family_s_own_forward(family: str) -> None:
    model, batch = small_model(family).train(), some_batch()
    for more in ({}, {"num_items_in_batch": torch.tensor(40)}):
        own = model(**batch, **more)
        expected = gradients(model, own.loss)
        bind_head(model)
        assert head_of(model) is not None
        ours = model(**batch, **more)
        assert ours.logits is None
        torch.testing.assert_close(ours.loss, own.loss, rtol=1e-5, atol=0)
        for name, gradient in gradients(model, ours.loss).items():
            assert (gradient - expected[name]).norm() <= 1e-5 * expected[name].norm() + 1e-8, name
        unbind_head(model)


def test_labels_that_are_shifted_already_are_taken_as_they_are() -> None:
    model, batch = small_model().train(), some_batch()
    shifted = nn.functional.pad(batch["labels"][:, 1:], (0, 1), value=-100)
    bind_head(model)
    assert torch.equal(
        model(**batch).loss,
        model(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"], shift_labels=shifted).loss,
    )


def test_the_head_is_evaluated_at_trained_positions_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    rows = []
    fold = kernels.fold_softmax
    monkeypatch.setattr(
        kernels, "fold_softmax", lambda logits, *a, **kw: rows.append(len(logits)) or fold(logits, *a, **kw)
    )
    model, batch = small_model().train(), some_batch()
    bind_head(model)
    head_of(model)
    rows.clear()
    model(**batch)
    assert rows == [int((batch["labels"][:, 1:] != -100).sum())]


def test_a_batch_without_labels_to_train_costs_nothing_and_moves_nothing() -> None:
    model, batch = small_model().train(), some_batch()
    bind_head(model)
    loss = model(**batch | {"labels": torch.full_like(batch["labels"], -100)}).loss
    assert loss == 0
    assert all(not gradient.any() for gradient in gradients(model, loss).values())


def test_evaluation_and_generation_keep_the_logits() -> None:
    model, batch = small_model().eval(), some_batch()
    own, text = model(**batch), model.generate(batch["input_ids"][:1], max_new_tokens=4, do_sample=False)
    bind_head(model)
    ours = model(**batch)
    assert torch.equal(ours.logits, own.logits) and torch.equal(ours.loss, own.loss)
    assert torch.equal(model.generate(batch["input_ids"][:1], max_new_tokens=4, do_sample=False), text)


@pytest.mark.parametrize("more", [{"return_dict": False}, {"logits_to_keep": 4}, {"labels": None}], ids=str)
def test_calls_for_more_than_the_loss_go_to_the_model(more: dict[str, Any]) -> None:
    model, batch = small_model().train(), some_batch()
    if "logits_to_keep" in more:
        batch["labels"] = batch["labels"][:, -4:]
    own = model(**batch | more)
    bind_head(model)
    ours = model(**batch | more)
    first, second = (own[1], ours[1]) if more.get("return_dict") is False else (own.logits, ours.logits)
    assert torch.equal(first, second)


@pytest.mark.parametrize("padded", [False, True])
@pytest.mark.parametrize("kind", ["mixtral", "qwen3moe", "gptoss"])
def test_a_mixture_of_experts_keeps_its_balancing_loss(kind: str, padded: bool) -> None:
    model, batch = small_model(kind).train(), some_batch()
    model.router_aux_loss_coef = model.config.router_aux_loss_coef = 0.5
    model.config.output_router_logits = True  # as TRL has it in training
    if not padded:
        del batch["attention_mask"]
    ends = (".gate.weight", ".router.weight")
    routers = [parameter for name, parameter in model.named_parameters() if name.endswith(ends)]
    assert routers
    own = model(**batch, output_router_logits=True)
    wanted = torch.autograd.grad(own.loss, routers)
    bind_head(model)
    ours = model(**batch, output_router_logits=True)
    assert ours.logits is None and torch.allclose(ours.loss, own.loss) and torch.equal(ours.aux_loss, own.aux_loss)
    fused = model(**batch, output_router_logits=True, fused_lm_head=True)
    assert torch.allclose(fused.loss, own.loss) and torch.equal(fused.aux_loss, own.aux_loss)
    for loss in (ours.loss, fused.loss):
        for one, other in zip(torch.autograd.grad(loss, routers), wanted, strict=True):
            assert torch.allclose(one, other, rtol=1e-4, atol=1e-6)


class Louder(t.LlamaForCausalLM):
    """Doubles its logits, which no configuration says."""

    def forward(self, input_ids: Tensor, labels: Tensor | None = None, **kwargs: Any) -> Any:
        logits = self.lm_head(self.model(input_ids=input_ids, **kwargs).last_hidden_state) * 2
        loss = None if labels is None else self.loss_function(logits, labels, self.config.vocab_size)
        return t.modeling_outputs.CausalLMOutputWithPast(loss=loss, logits=logits)


class Unmapped(t.LlamaForCausalLM):
    """Does something else to its hidden states before the head."""

    def forward(self, input_ids: Tensor, labels: Tensor | None = None, **kwargs: Any) -> Any:
        hidden = self.model(input_ids=input_ids, **kwargs).last_hidden_state.flip(-1)
        logits = self.lm_head(hidden)
        loss = None if labels is None else self.loss_function(logits, labels, self.config.vocab_size)
        return t.modeling_outputs.CausalLMOutputWithPast(loss=loss, logits=logits)


@pytest.mark.parametrize("cls", [Louder, Unmapped])
def test_a_head_that_is_not_what_its_configuration_says_is_left_alone(cls: Any) -> None:
    torch.manual_seed(0)
    model, batch = cls(t.LlamaConfig(**DECODER)).train(), some_batch()
    own = model(**batch)
    bind_head(model)
    ours = model(**batch)
    assert head_of(model) is None
    assert torch.equal(ours.loss, own.loss) and torch.equal(ours.logits, own.logits)


def test_a_head_in_4_bits_is_served_too() -> None:
    model, batch = small_model().train(), some_batch()
    model.lm_head = Linear4bit.from_linear(model.lm_head)
    own = model(**batch)
    expected = gradients(model, own.loss)
    bind_head(model)
    ours = model(**batch)
    assert ours.logits is None
    torch.testing.assert_close(ours.loss, own.loss, rtol=1e-5, atol=0)
    for name, gradient in gradients(model, ours.loss).items():
        assert (gradient - expected[name]).norm() <= 1e-5 * expected[name].norm() + 1e-8, name


def test_an_adapter_on_the_head_takes_part() -> None:
    model, batch = small_model(), some_batch()
    peft = get_peft_model(model, LoraConfig(r=2, target_modules=["lm_head"], init_lora_weights=False)).train()
    own = peft(**batch)
    bind_head(model)
    assert head_of(model) is None
    assert torch.equal(peft(**batch).loss, own.loss)


def test_a_head_that_is_trained_beside_the_adapters_is_served_too() -> None:
    model, batch = small_model(), some_batch()
    lora = LoraConfig(r=2, target_modules=["q_proj"], modules_to_save=["lm_head"], init_lora_weights=False)
    peft = get_peft_model(model, lora).train()
    with torch.no_grad():
        model.lm_head.modules_to_save["default"].weight *= -1
    own = peft(**batch)
    expected = gradients(peft, own.loss)
    bind_head(model)
    ours = peft(**batch)
    assert ours.logits is None and any("lm_head" in name for name in expected)
    torch.testing.assert_close(ours.loss, own.loss, rtol=1e-5, atol=0)
    for name, gradient in gradients(peft, ours.loss).items():
        assert (gradient - expected[name]).norm() <= 1e-5 * expected[name].norm() + 1e-8, name
    with peft.disable_adapter():
        assert peft(**batch).loss == pytest.approx(peft.eval()(**batch).loss.item()) != pytest.approx(own.loss.item())


def test_binding_twice_is_binding_once_and_unbinding_leaves_nothing() -> None:
    model = small_model()
    bind_head(model)
    bind_head(model)
    unbind_head(model)
    assert "forward" not in vars(model)


def test_a_copy_runs_on_its_own_weights() -> None:
    model, batch = small_model().train(), some_batch()
    bind_head(model)
    copied = copy.deepcopy(model)
    with torch.no_grad():
        copied.lm_head.weight.zero_()
    assert copied(**batch).loss.item() == pytest.approx(torch.tensor(float(VOCABULARY)).log().item())
    assert model(**batch).loss != copied(**batch).loss


def test_a_copy_runs_on_its_own_weights_where_somebody_else_had_bound_a_forward_before() -> None:
    model, batch = small_model().eval(), some_batch()
    model.forward = types.MethodType(type(model).forward, model)
    bind_head(model)
    copied = copy.deepcopy(model)
    with torch.no_grad():
        copied.lm_head.weight.zero_()
        assert not copied(input_ids=batch["input_ids"]).logits.any()
        assert model(input_ids=batch["input_ids"]).logits.any()


def test_binding_again_over_a_forward_that_calls_ours_ends() -> None:
    model, batch = small_model().eval(), some_batch()
    expected = model(input_ids=batch["input_ids"]).logits
    bind_head(model)
    inner = model.forward
    model.forward = lambda *args, **kwargs: inner(*args, **kwargs)  # as TRL's trainers do
    bind_head(model)
    assert torch.equal(model(input_ids=batch["input_ids"]).logits, expected)


@pytest.mark.parametrize("family", ["llama", "opt"])
def test_the_trial_leaves_the_random_numbers_and_the_layers_alone(family: str) -> None:
    """OPT's own forward runs its decoder in the trial, with dropout."""
    model = small_model() if family == "llama" else t.OPTForCausalLM(t.OPTConfig(**OPT)).train()
    before, backbone = torch.get_rng_state(), dict(vars(model.model))
    head_of(model)
    assert torch.equal(torch.get_rng_state(), before) and vars(model.model) == backbone


TIED: dict[str, dict[str, Any]] = {
    "embeddings trained, the head with them": {"modules_to_save": ["embed_tokens"], "ensure_weight_tying": True},
    "embeddings trained, the head not": {"modules_to_save": ["embed_tokens"]},
    "head trained": {"modules_to_save": ["lm_head"]},
    "rows trained": {"trainable_token_indices": [5, 7]},
    "an adapter on both": {"target_modules": ["embed_tokens"], "ensure_weight_tying": True},
}


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("fused", [False, True])
@pytest.mark.parametrize("what", TIED)
def test_tied_embeddings_that_peft_trains_give_its_loss_and_gradients(what: str, fused: bool) -> None:
    options = {"target_modules": ["q_proj"], "init_lora_weights": False, "task_type": "CAUSAL_LM"} | TIED[what]
    torch.manual_seed(3)
    model, batch = get_peft_model(small_model("llama, tied"), LoraConfig(r=4, **options)).train(), some_batch()
    expected_loss = model(**batch).loss
    expected = gradients(model, expected_loss)
    base = model.get_base_model()
    if fused and "adapter" in what:
        return  # TRL's trainers refuse it
    bind_head(base)
    output = model(**batch, fused_lm_head=True) if fused else model(**batch)
    assert (fused or output.logits is None) == ("adapter" not in what)
    torch.testing.assert_close(output.loss, expected_loss, rtol=1e-5, atol=1e-6)
    for name, gradient in gradients(model, output.loss).items():
        torch.testing.assert_close(gradient, expected[name], rtol=1e-4, atol=1e-5)


def test_preparing_for_training_binds_and_unpreparing_unbinds(tiny_model_folder: Any) -> None:
    model = halfbyte.load(tiny_model_folder, quantization_config=halfbyte.HalfbyteConfig())
    peft = halfbyte.prepare_for_training(get_peft_model(model, LoraConfig(target_modules="all-linear"))).train()
    batch = some_batch()
    assert peft(**batch).logits is None
    halfbyte.unprepare(peft)
    assert peft(**batch).logits is not None


def test_trl_answers_where_the_head_is_not_ours() -> None:
    model, batch = small_model(), some_batch()
    add_fused_lm_head(model, outputs=("log_probs", "entropy", "log_sum_sq_probs", "mean_logits", "is_top1"))
    expected = model(**batch, fused_lm_head=True)
    bind_head(model)
    assert torch.allclose(model(**batch, fused_lm_head=True).log_probs, expected.log_probs, atol=1e-5)
    model.lm_head.register_forward_hook(lambda module, args, output: None)
    assert head_of(model) is None
    got = model(**batch, fused_lm_head=True)
    assert got.keys() == expected.keys() and all(torch.equal(got[name], expected[name]) for name in expected)
    assert model(**batch | {"labels": None}).logits is not None


def test_a_temperature_is_left_to_trl() -> None:
    model, batch = small_model(), some_batch()
    add_fused_lm_head(model, temperature=0.5)
    expected = model(**batch, fused_lm_head=True).log_probs
    bind_head(model)
    assert torch.equal(model(**batch, fused_lm_head=True).log_probs, expected)

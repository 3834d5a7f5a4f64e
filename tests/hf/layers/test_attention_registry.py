"""Models of many families attend as with transformers' eager functions: padded, packed, cached, and where we pass."""

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers as t
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint
from transformers.masking_utils import sdpa_mask
from trl.trainer.sft_trainer import DataCollatorForLanguageModeling

import halfbyte
from halfbyte.hf.layers import attention as ours
from halfbyte.hf.layers.attention_choice import choose_attention, describe_attention

DECODER = {
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "vocab_size": 64,
    "bos_token_id": 1,
    "eos_token_id": None,
    "pad_token_id": 0,
}
ENCODER = {key: value for key, value in DECODER.items() if key != "num_key_value_heads"}
MIXED = {"layer_types": ["sliding_attention", "full_attention"], "sliding_window": 6}

# family: class, configuration, whether attention is ours
FAMILIES: dict[str, tuple[Any, Any, bool]] = {
    "llama": (t.LlamaForCausalLM, t.LlamaConfig(**DECODER), True),
    "mistral": (t.MistralForCausalLM, t.MistralConfig(**DECODER, sliding_window=6), True),
    "qwen2": (t.Qwen2ForCausalLM, t.Qwen2Config(**DECODER, use_sliding_window=True, **MIXED), True),
    "qwen3": (t.Qwen3ForCausalLM, t.Qwen3Config(**DECODER, head_dim=12), True),
    "gemma2": (
        t.Gemma2ForCausalLM,
        t.Gemma2Config(**DECODER, head_dim=12, attn_logit_softcapping=1.5, query_pre_attn_scalar=9, **MIXED),
        True,
    ),
    "vaultgemma": (
        t.VaultGemmaForCausalLM,
        t.VaultGemmaConfig(**DECODER, head_dim=12, attn_logit_softcapping=1.5, query_pre_attn_scalar=9, **MIXED),
        True,
    ),
    "gemma3": (t.Gemma3ForCausalLM, t.Gemma3TextConfig(**DECODER, head_dim=12, **MIXED), True),
    "phi3": (t.Phi3ForCausalLM, t.Phi3Config(**DECODER, sliding_window=6), True),
    "olmo2": (t.Olmo2ForCausalLM, t.Olmo2Config(**DECODER), True),
    "smollm3": (t.SmolLM3ForCausalLM, t.SmolLM3Config(**DECODER, no_rope_layers=[1, 0]), True),
    "gpt-neox": (t.GPTNeoXForCausalLM, t.GPTNeoXConfig(**ENCODER), True),
    "bert": (t.BertLMHeadModel, t.BertConfig(**ENCODER, is_decoder=True), True),
    "gpt-oss": (
        t.GptOssForCausalLM,
        t.GptOssConfig(**DECODER, head_dim=8, num_local_experts=2, num_experts_per_tok=1, **MIXED),
        False,  # attention sinks
    ),
    "llama4": (
        t.Llama4ForCausalLM,
        t.Llama4TextConfig(
            **DECODER, head_dim=8, intermediate_size_mlp=48, num_local_experts=2, attention_chunk_size=6,
            layer_types=["chunked_attention", "chunked_attention"],
        ),
        False,  # chunks
    ),
}  # fmt: skip
OURS = [name for name, (_, _, is_ours) in FAMILIES.items() if is_ours]


def make(name: str) -> nn.Module:
    torch.manual_seed(0)
    return FAMILIES[name][0](FAMILIES[name][1]).eval()


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch) -> list[tuple[int, ...]]:
    """The shapes of the queries that our kernel was given."""
    shapes = []
    attention = ours.attention

    def spy(q: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        shapes.append(tuple(q.shape))
        return attention(q, *args, **kwargs)

    monkeypatch.setattr(ours, "attention", spy)
    return shapes


def tokens(rows: int = 3, length: int = 17) -> Tensor:
    return torch.randint(2, 64, (rows, length), generator=torch.Generator().manual_seed(length))


def logits(model: nn.Module, implementation: str, ids: Tensor, **kwargs: Any) -> Tensor:
    model.set_attn_implementation(implementation)
    return model(input_ids=ids, use_cache=False, **kwargs).logits


def run(model: nn.Module, implementation: str, ids: Tensor, real: Tensor, **kwargs: Any) -> list[Tensor]:
    """The logits of real tokens, and the gradients of all parameters."""
    out = logits(model, implementation, ids, **kwargs)[real]
    parameters = [p for p in model.parameters() if p.requires_grad]
    gradients = torch.autograd.grad(out.log_softmax(-1).square().mean(), parameters, allow_unused=True)
    return [out.detach(), *(g for g in gradients if g is not None)]


def close(got: list[Tensor], wanted: list[Tensor], bound: float) -> bool:
    assert len(got) == len(wanted)
    return all((a - b).norm() <= bound * b.norm() + 1e-7 for a, b in zip(got, wanted, strict=True))


@pytest.mark.parametrize("padding", ["none", "right", "left", "gap"])
@pytest.mark.parametrize("name", FAMILIES)
def test_logits_and_gradients_are_those_of_eager_attention(
    name: str, padding: str, calls: list[tuple[int, ...]]
) -> None:
    model, ids = make(name), tokens()
    mask = None if padding == "none" else torch.ones_like(ids)
    if padding == "right":
        mask[0, 5:] = mask[2, 16:] = 0
    if padding == "left":
        mask[0, :5] = mask[2, :1] = 0
    if padding == "gap":
        mask[1, 7] = 0
    real = torch.ones_like(ids).bool() if mask is None else mask.bool()
    wanted = run(model, "eager", ids, real, attention_mask=mask)
    assert not calls
    assert close(run(model, ours.NAME, ids, real, attention_mask=mask), wanted, 1e-5)
    assert len(calls) == (2 if FAMILIES[name][2] and padding != "gap" else 0)


@pytest.mark.parametrize("name", [name for name in OURS if name != "bert"])  # which does not look at positions
def test_packed_samples_are_apart(name: str, calls: list[tuple[int, ...]]) -> None:
    model, ids = make(name), tokens(1)
    lengths = [5, 1, 11]
    positions = torch.cat([torch.arange(n) for n in lengths]).unsqueeze(0)
    bounds = torch.tensor([0, *lengths]).cumsum(0).int()
    alone = torch.cat([logits(model, "eager", part) for part in ids.split(lengths, dim=1)], dim=1)
    packed = logits(model, ours.NAME, ids, position_ids=positions)
    assert torch.allclose(packed, alone, atol=1e-5)
    # the bounds say it even where positions are not looked at, because there is a mask
    kwargs = {"cu_seq_lens_q": bounds, "cu_seq_lens_k": bounds, "max_length_q": 11, "max_length_k": 11}
    masked = logits(model, ours.NAME, ids, position_ids=positions, attention_mask=torch.ones_like(ids), **kwargs)
    assert torch.allclose(masked, alone, atol=1e-5)
    assert len(calls) == 4


def test_trl_s_padding_free_batch_is_its_samples_alone(calls: list[tuple[int, ...]]) -> None:
    model, ids = make("llama"), tokens(1)[0]
    samples = [part.tolist() for part in ids.split([5, 1, 11])]
    batch = DataCollatorForLanguageModeling(pad_token_id=0, padding_free=True)([{"input_ids": x} for x in samples])
    assert "attention_mask" not in batch and batch["input_ids"].shape == (1, 17)
    labels = batch.pop("labels")
    model.set_attn_implementation(ours.NAME)
    packed = model(**batch, use_cache=False).logits
    alone = [logits(model, "eager", torch.tensor([x])) for x in samples]
    assert labels.shape == (1, 17) and len(calls) == 2
    assert torch.allclose(packed, torch.cat(alone, dim=1), atol=1e-5)


@pytest.mark.parametrize("name", [name for name in FAMILIES if name != "bert"])
def test_greedy_generation_with_a_cache_is_eager_s(name: str) -> None:
    model, ids = make(name), tokens()
    mask = torch.ones_like(ids)
    mask[0, :5] = 0
    generated = []
    for implementation in ("eager", ours.NAME):
        model.set_attn_implementation(implementation)
        generated.append(model.generate(ids, attention_mask=mask, max_new_tokens=9, do_sample=False))
    assert generated[0].shape == (3, 26) and torch.equal(*generated)


@pytest.mark.parametrize("static", [False, True])
def test_a_prompt_may_be_read_in_pieces(static: bool, calls: list[tuple[int, ...]]) -> None:
    for name in ("llama", "mistral"):
        model, ids = make(name), tokens(2)
        whole = logits(model, "eager", ids)
        model.set_attn_implementation(ours.NAME)
        cache: Any = t.DynamicCache(config=model.config)
        if static:
            cache = t.StaticCache(config=model.config, max_cache_len=32)
        parts = [model(part, past_key_values=cache).logits for part in ids.split([9, 1, 7], dim=1)]
        assert torch.allclose(torch.cat(parts, dim=1), whole, atol=1e-5)
        assert calls
        calls.clear()


def test_what_the_kernel_does_not_do_goes_to_sdpa(calls: list[tuple[int, ...]]) -> None:
    model, ids = make("llama"), tokens()
    four = torch.rand(3, 1, 17, 17, generator=torch.Generator().manual_seed(0)) < 0.5
    four |= torch.eye(17, dtype=torch.bool)
    wanted = logits(model, "sdpa", ids, attention_mask=four)
    assert torch.equal(logits(model, ours.NAME, ids, attention_mask=four), wanted)
    assert torch.equal(logits(model, ours.NAME, ids, an_argument=1), logits(model, "sdpa", ids))
    model.train()
    for layer in model.model.layers:
        layer.self_attn.attention_dropout = 0.5
    mask = torch.ones_like(ids)
    mask[0, 9:] = 0
    got = []
    for implementation in ("sdpa", ours.NAME):
        torch.manual_seed(3)
        got.append(logits(model, implementation, ids, attention_mask=mask)[mask.bool()])
    assert torch.equal(*got) and not calls


def test_a_mask_of_two_dimensions_is_taken_as_flash_attention_takes_it() -> None:
    generator = torch.Generator().manual_seed(0)
    q, k, v = (torch.randn(2, heads, 9, 8, generator=generator) for heads in (4, 2, 2))
    real = torch.ones(2, 9)
    real[1, 6:] = 0
    layer = nn.Module()
    layer.is_causal, layer.num_key_value_groups = True, 2
    key, query = torch.arange(9), torch.arange(9)[:, None]
    for window in (None, 3):
        mask = (key <= query) & (query - key < (window or 9)) & real[:, None, None, :].bool()
        out, weights = ours.attention_forward(layer, q, k, v, real, sliding_window=window)
        wanted = torch.nn.functional.scaled_dot_product_attention(q, k, v, mask, enable_gqa=True).transpose(1, 2)
        assert weights is None and torch.allclose(out[real.bool()], wanted[real.bool()], atol=1e-6)


def test_the_quantizer_chooses_it_where_the_caller_left_the_choice(tiny_model_folder: Path) -> None:
    def implementation(**kwargs: Any) -> str:
        config = halfbyte.HalfbyteConfig()
        model = t.AutoModelForCausalLM.from_pretrained(tiny_model_folder, quantization_config=config, **kwargs)
        return model.config._attn_implementation

    assert implementation() == implementation(attn_implementation="flash_attention_2") == ours.NAME
    assert implementation(attn_implementation=ours.NAME, device_map="cpu") == ours.NAME
    assert [implementation(attn_implementation=name) for name in ("sdpa", "eager")] == ["sdpa", "eager"]


def test_the_quantizer_chooses_it_for_soft_caps_which_sdpa_does_not_have(tmp_path: Path) -> None:
    make("gemma2").save_pretrained(tmp_path)
    for wish, expected in ((None, ours.NAME), ("flash_attention_2", ours.NAME), ("eager", "eager")):
        config = halfbyte.HalfbyteConfig()
        model = t.AutoModelForCausalLM.from_pretrained(tmp_path, quantization_config=config, attn_implementation=wish)
        assert model.config._attn_implementation == expected


def test_the_quantizer_leaves_models_that_have_their_own_ways(tmp_path: Path) -> None:
    falcon = t.FalconConfig(hidden_size=32, num_hidden_layers=1, num_attention_heads=2, vocab_size=64)
    for name, model in (("gpt-oss", make("gpt-oss")), ("falcon", t.FalconForCausalLM(falcon))):
        model.save_pretrained(tmp_path / name)
        quantized = t.AutoModelForCausalLM.from_pretrained(
            tmp_path / name, quantization_config=halfbyte.HalfbyteConfig()
        )
        assert quantized.config._attn_implementation != ours.NAME


COMPUTING = {
    "doge": lambda: t.DogeForCausalLM(t.DogeConfig(**DECODER)),
    "deepseek_v32": lambda: t.DeepseekV32ForCausalLM(
        t.DeepseekV32Config(
            **DECODER | {"num_key_value_heads": 4}, q_lora_rank=16, kv_lora_rank=16, qk_rope_head_dim=8,
            qk_nope_head_dim=8, v_head_dim=8, index_head_dim=8, index_n_heads=2, index_topk=4, n_routed_experts=4,
            num_experts_per_tok=2, n_group=1, topk_group=1, moe_intermediate_size=16, first_k_dense_replace=2,
        )
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", COMPUTING)
def test_layers_that_compute_with_the_mask_get_one(name: str) -> None:
    torch.manual_seed(0)
    model = COMPUTING[name]().eval()
    ids, real = tokens(), torch.ones(3, 17, dtype=torch.long)
    real[0, :4] = 0
    expected = model(input_ids=ids, attention_mask=real).logits
    choose_attention(model)
    assert torch.equal(model(input_ids=ids, attention_mask=real).logits, expected)


def half_read(attention: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """What tomorrow's family might do: every second key is not read, said in the way of the mask's dtype."""
    mask = kwargs["attention_mask"]
    every_second = torch.arange(mask.shape[-1]) % 2 == 0
    if mask.dtype == torch.bool:
        kwargs["attention_mask"] = mask & every_second
    else:
        kwargs["attention_mask"] = mask.masked_fill(~every_second, torch.finfo(mask.dtype).min)
    return args, kwargs


def test_a_family_that_nobody_knows_may_compute_with_the_mask(calls: list[tuple[int, ...]]) -> None:
    model, ids, real = make("llama"), tokens(), torch.ones(3, 17, dtype=torch.long)
    real[0, 12:] = 0
    plain = logits(model, "eager", ids, attention_mask=real)
    model.model.layers[1].self_attn.register_forward_pre_hook(half_read, with_kwargs=True)
    wanted = run(model, "eager", ids, real.bool(), attention_mask=real)
    assert not torch.allclose(plain[real.bool()], wanted[0], atol=1e-3)
    assert close(run(model, ours.NAME, ids, real.bool(), attention_mask=real), wanted, 1e-5)
    assert len(calls) == 1  # the other layer


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
def test_a_mask_of_ranges_is_a_mask_to_torch(mode: Any) -> None:
    real = torch.ones(2, 9, dtype=torch.bool)
    real[0, :3] = False
    mask, wanted = (
        function(2, 9, 9, attention_mask=real, allow_is_causal_skip=False)
        for function in (ours.attention_mask, sdpa_mask)
    )
    wanted = wanted & real[:, None, :, None]  # ranges leave padding without keys
    assert isinstance(mask, ours.RangedMask) and not isinstance(mask + 0, ours.RangedMask)
    assert (mask.shape, mask.dtype, mask.device, mask.dim()) == (wanted.shape, torch.bool, wanted.device, 4)
    q = torch.randn(2, 2, 9, 8, generator=torch.Generator().manual_seed(0))
    scores = q @ q.mT
    with mode():
        for function in (
            lambda m: m[:, :, -1:, 2:], lambda m: m.float(), lambda m: ~m, lambda m: torch.cat([m, m]), copy.deepcopy,
            lambda m: scores.masked_fill(m, 0), lambda m: torch.where(m, scores, -1.0), lambda m: scores[:, :1] + m,
            lambda m: torch.nn.functional.scaled_dot_product_attention(q, q, q, m)[real[:, None, :].expand(2, 2, 9)],
            lambda m: checkpoint(scores.masked_fill, m, 0, use_reentrant=False), torch.Tensor.tolist,
        ):  # fmt: skip
            assert torch.equal(torch.as_tensor(function(mask)), torch.as_tensor(function(wanted)))


class Choosy(t.LlamaForCausalLM):
    """Asks for SDPA by its name."""

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        assert self.config._attn_implementation in ("eager", "sdpa")
        return super().forward(*args, **kwargs)


def test_how_a_model_attends_is_said_with_the_reason() -> None:
    falcon = t.FalconForCausalLM(t.FalconConfig(hidden_size=32, num_hidden_layers=1, num_attention_heads=2))
    models = [t.LlamaForCausalLM(t.LlamaConfig(**DECODER)), Choosy(t.LlamaConfig(**DECODER)), falcon]
    for model in models:
        choose_attention(model)
    assert [model.config._attn_implementation for model in models] == [ours.NAME, "sdpa", "sdpa"]
    said = [describe_attention(model) for model in models]
    assert said[0] == "over key ranges"
    assert said[1].startswith("sdpa: Choosy does more with the implementation's name than ask for it (")
    assert said[2] == "sdpa: FalconForCausalLM does not take its attention from transformers' registry"

"""Decoding by one native call a token is what transformers computes, for each family, adapter, cache and split."""

import contextlib
from typing import Any

import pytest
import torch
import transformers as t
from peft import LoraConfig, PeftModel, get_peft_model
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from torch import Tensor, nn

from halfbyte.generate.batched import answer_all
from halfbyte.generate.decoder import PAGE
from halfbyte.generate.decoders import decoder_for
from halfbyte.generate.native_decoder import NativeDecoder, NativeSequence
from halfbyte.hf.layers.decoding import NotNative
from halfbyte.hf.layers.expert_targets import own_words
from halfbyte.hf.layers.experts import Experts
from halfbyte.hf.layers.fusion import fuse
from halfbyte.hf.layers.prepare import prepare
from halfbyte.hf.layers.stacks import TakeApart, is_stacked, take_apart
from halfbyte.kernels import can_decode
from halfbyte.nn import DenseLinear, Linear4bit, Linear8bit

pytestmark = pytest.mark.skipif(not can_decode(), reason="no native products")

SIZES: dict[str, Any] = {
    "vocab_size": 200, "hidden_size": 128, "intermediate_size": 192, "num_hidden_layers": 3, "num_attention_heads": 4,
    "num_key_value_heads": 2, "max_position_embeddings": 512, "pad_token_id": 0, "initializer_range": 0.2,
    "attn_implementation": "halfbyte",
}  # fmt: skip
LAYERS = {"layer_types": ["sliding_attention", "full_attention", "sliding_attention"], "sliding_window": 70}
EXPERTS = {"num_experts": 6, "num_experts_per_tok": 1, "moe_intermediate_size": 64}
FAMILIES = {
    "Llama": lambda: t.LlamaConfig(**SIZES, attention_bias=True, mlp_bias=True),
    "Mistral": lambda: t.MistralConfig(**SIZES, sliding_window=70),
    "Qwen2": lambda: t.Qwen2Config(**SIZES, **LAYERS, use_sliding_window=True, tie_word_embeddings=True),
    "Qwen3": lambda: t.Qwen3Config(**SIZES, **LAYERS, use_sliding_window=True, head_dim=48),
    "Gemma2": lambda: t.Gemma2Config(
        **SIZES, **LAYERS, head_dim=48, query_pre_attn_scalar=20, attn_logit_softcapping=2.0,
        final_logit_softcapping=5.0,
    ),
    "Gemma3": lambda: t.Gemma3TextConfig(**SIZES, **LAYERS, head_dim=64, query_pre_attn_scalar=20),
    "Phi3": lambda: t.Phi3Config(
        **SIZES, sliding_window=70,
        rope_parameters={"rope_type": "default", "rope_theta": 1e4, "partial_rotary_factor": 0.75},
    ),
    "SmolLM3": lambda: t.SmolLM3Config(**SIZES, no_rope_layers=[1, 0, 1]),
    "Olmo": lambda: t.OlmoConfig(**SIZES),
    "Olmo2": lambda: t.Olmo2Config(**SIZES),
    "Olmo3": lambda: t.Olmo3Config(**SIZES, **LAYERS),
    "Ministral": lambda: t.MinistralConfig(**SIZES, **LAYERS, head_dim=32),
    "Mixtral": lambda: t.MixtralConfig(**SIZES, sliding_window=70, num_local_experts=4),
    "Qwen2Moe": lambda: t.Qwen2MoeConfig(
        **SIZES, **EXPERTS, mlp_only_layers=[1], shared_expert_intermediate_size=256, qkv_bias=True
    ),
    "Qwen3Moe": lambda: t.Qwen3MoeConfig(**SIZES, **EXPERTS, norm_topk_prob=True, head_dim=48),
    "Olmoe": lambda: t.OlmoeConfig(**SIZES, num_experts=9, num_experts_per_tok=8),
    "Glm4Moe": lambda: t.Glm4MoeConfig(
        **SIZES, moe_intermediate_size=64, n_routed_experts=12, num_experts_per_tok=3, n_group=4, topk_group=2,
        first_k_dense_replace=1, use_qk_norm=True, head_dim=64, routed_scaling_factor=1.5,
    ),
}  # fmt: skip
MIXTURES = ("Mixtral", "Qwen2Moe", "Qwen3Moe", "Olmoe", "Glm4Moe")
KINDS: dict[str, Any] = {
    "nf4": Linear4bit.from_linear,
    "plain nf4": lambda linear: Linear4bit.from_linear(linear, blocksize=128, double_quant=False),
    "int8": Linear8bit.from_linear,
    "dense": DenseLinear.taking,
}


def make(family: str = "Llama", kind: str = "nf4", dtype: torch.dtype = torch.float32) -> t.PreTrainedModel:
    """A random model of a family over frozen weights, fused."""
    torch.manual_seed(7)
    model = t.AutoModelForCausalLM.from_config(FAMILIES[family]()).to(dtype).eval()
    give_layers(model)
    for name, module in list(model.named_modules()):
        if type(module) is nn.Linear and "lm_head" not in name:
            parent = model.get_submodule(name.rpartition(".")[0])
            setattr(parent, name.rpartition(".")[2], KINDS[kind](module))
    for name, parameter in model.named_parameters():
        if parameter.is_floating_point() and ("norm" in name or "bias" in name):
            nn.init.normal_(parameter, 0.0 if "bias" in name else 1.0, 0.3)
    for name, buffer in model.named_buffers():
        if name.endswith("e_score_correction_bias"):
            nn.init.normal_(buffer, std=0.2)
    model.requires_grad_(False)
    fuse(model)
    return model


def give_layers(model: nn.Module) -> None:
    """Take stacks of experts apart."""
    stacks = {path: dict(module.named_parameters()) for path, module in model.named_modules() if is_stacked(module)}
    take_apart(model)
    for path, values in stacks.items():
        for stack, value in values.items():
            first = model.get_submodule(path).layers_of[stack][0]
            matrices = TakeApart(stack).convert({stack: value.detach()}, model, f"{path}.0.{first}.weight")
            model.load_state_dict(matrices, strict=False, assign=True)


def adapted(model: t.PreTrainedModel, *names: str, **options: Any) -> PeftModel:
    """A model with adapters that were trained, as far as anybody can see."""
    given: dict[str, Any] = {"r": 4, "lora_alpha": 8, "target_modules": "all-linear"} | options
    has_experts = any(isinstance(module, Experts) for module in model.modules())
    if has_experts:
        given |= {"target_modules": ["q_proj", "o_proj"], "target_parameters": ["gate_up_proj", "down_proj"]}
    with own_words():
        peft = get_peft_model(model, LoraConfig(**given), adapter_name=names[0])
        for number, name in enumerate(names[1:], start=1):
            peft.add_adapter(name, LoraConfig(**given | {"r": 4 + 3 * number}))
    prepare(peft)
    generator = torch.Generator().manual_seed(3)
    for name, parameter in peft.named_parameters():
        if "lora_" in name:
            scale = 0.3 if "magnitude" not in name else 0.05
            with torch.no_grad():
                parameter += scale * torch.randn(parameter.shape, generator=generator)
    return peft.eval()


def ids_of(length: int, seed: int = 0) -> list[int]:
    return torch.randint(1, 200, (length,), generator=torch.Generator().manual_seed(seed)).tolist()


def read(
    decoder: NativeDecoder, ids: list[int], adapter: str | None = None, piece: int = 256
) -> tuple[NativeSequence, Tensor]:
    sequence = decoder.begin(ids, adapter)
    logits = None
    while sequence.length < len(ids):
        logits = decoder.read(sequence, ids[sequence.length : min(len(ids), (sequence.length // piece + 1) * piece)])
    assert logits is not None
    return sequence, logits


@torch.no_grad()
def whole(model: Any, ids: list[int]) -> Tensor:
    """The logits after each token, by the model's own forward."""
    found: Tensor = model(input_ids=torch.tensor([ids]), use_cache=False).logits[0].float()
    return found


def off(one: Tensor, other: Tensor) -> float:
    """Greatest difference, in standard deviations of the logits."""
    return float((one - other).abs().max() / other.std())


@pytest.mark.parametrize("family", [*FAMILIES])
def test_each_family_s_logits_are_those_of_its_own_forward(family: str) -> None:
    model = make(family)
    decoder = NativeDecoder(model)
    ids = ids_of(150)
    expected = whole(model, ids)
    sequence, logits = read(decoder, ids[:90])
    assert off(logits, expected[89]) < 1e-3
    for place in range(90, 150):  # over the window, and into a further page
        [logits] = decoder.step([sequence], [ids[place]])
        assert off(logits, expected[place]) < 1e-3


@pytest.mark.parametrize("kind", [*KINDS])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_each_kind_of_weight_and_dtype_gives_the_forward_s_logits(kind: str, dtype: torch.dtype) -> None:
    model = make("Qwen2", kind, dtype)
    decoder = NativeDecoder(model)
    ids = ids_of(40)
    sequence, _ = read(decoder, ids[:20])
    rows = torch.cat([decoder.step([sequence], [token]) for token in ids[20:]])
    expected = whole(model, ids)[20:]
    if dtype == torch.float32:
        assert off(rows, expected) < 1e-3
        return
    # as near to the numbers of fp32 arithmetic over the same weights as the forward itself, which rounds more often
    exact = whole(make("Qwen2", kind, dtype).float(), ids)[20:]
    assert (rows - exact).square().mean() < 1.5 * (expected - exact).square().mean()


def test_tokens_are_those_of_generate() -> None:
    model = make("Llama")
    decoder = NativeDecoder(model)
    for length in (1, 5, 63, 64, 65, 200):
        ids = ids_of(length, length)
        expected = model.generate(torch.tensor([ids]), max_new_tokens=20, do_sample=False, eos_token_id=None)
        sequence, logits = read(decoder, ids)
        found = list(ids)
        for _ in range(20):
            found.append(int(logits.argmax()))
            [logits] = decoder.step([sequence], [found[-1]])
        assert found == expected[0].tolist()
        decoder.end(sequence)


def test_a_default_dtype_that_another_thread_sets_changes_nothing() -> None:
    # transformers sets it, for the whole process, while it loads a model
    decoder = NativeDecoder(make())
    ids = ids_of(30)
    expected = [decoder.step([read(decoder, ids)[0]], [7]), read(decoder, ids)[1]]
    torch.set_default_dtype(torch.bfloat16)
    try:
        found = [decoder.step([read(decoder, ids)[0]], [7]), read(decoder, ids)[1]]
    finally:
        torch.set_default_dtype(torch.float32)
    assert [logits.dtype for logits in found] == [torch.float32] * 2
    assert all(torch.equal(one, other) for one, other in zip(found, expected, strict=True))


VARIANTS: dict[str, dict[str, Any]] = {
    "plain": {},
    "rslora with bias": {"use_rslora": True, "lora_bias": True},
    "dora": {"use_dora": True},
    "some": {"target_modules": ["q_proj", "down_proj"], "rank_pattern": {"down_proj": 70}},
}


@pytest.mark.parametrize("options", [*VARIANTS.values()], ids=[*VARIANTS])
@pytest.mark.parametrize("family", ["Llama", "Phi3"])
def test_each_row_has_its_adapter(family: str, options: dict[str, Any]) -> None:
    check_rows(family, options)


@pytest.mark.parametrize("family", MIXTURES)
def test_each_row_s_experts_have_its_adapter(family: str) -> None:
    check_rows(family, {})


def check_rows(family: str, options: dict[str, Any]) -> None:
    if family == "Phi3":  # which has no biases
        options = {"target_modules": ["qkv_proj", "o_proj"]} if "target_modules" in options else dict(options)
        options.pop("lora_bias", None)
    model = adapted(make(family), "one", "two", **options)
    decoder = NativeDecoder(model)
    assert decoder.adapters == ("one", "two")
    ids = ids_of(30)
    order = ["two", None, "one", "two", None]
    sequences = [read(decoder, ids[: 20 + row], name)[0] for row, name in enumerate(order)]
    expected = {}
    for name in ("one", "two"):
        model.set_adapter(name)
        expected[name] = whole(model, ids)
    with model.disable_adapter():
        expected[None] = whole(model, ids)
    assert off(expected["one"][-1], expected[None][-1]) > 0.1
    for step in range(5):
        rows = decoder.step(sequences, [ids[20 + row + step] for row in range(5)])
        for row, name in enumerate(order):
            assert off(rows[row], expected[name][20 + row + step]) < 1e-3


@pytest.mark.parametrize("family", ["Qwen3", "Glm4Moe"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_a_row_is_bitwise_the_same_beside_any_others_and_for_any_number_of_threads(
    family: str, dtype: torch.dtype
) -> None:
    model = adapted(make(family, dtype=dtype), "one", "two")
    decoder = NativeDecoder(model)
    threads = torch.get_num_threads()
    names = [None, "one", "two"]

    def run(rows: list[int], threads: int) -> dict[int, Tensor]:
        torch.set_num_threads(threads)
        begun = {row: read(decoder, ids_of(3 + 5 * row, row), names[row % 3])[0] for row in rows}
        result = {}
        for step in range(3):
            logits = decoder.step(list(begun.values()), [(7 * row + step) % 200 for row in rows])
            result |= {row: logits[place] for place, row in enumerate(rows)}
        for sequence in begun.values():
            decoder.end(sequence)
        return result

    try:
        together = run(list(range(40)), threads)
        for rows, count in (([0], 1), ([17], 2), ([5, 20, 2], 3), ([39, 1, 38, 4, 6, 7], 2)):
            for row, logits in run(rows, count).items():
                assert torch.equal(logits, together[row])
    finally:
        torch.set_num_threads(threads)


@pytest.mark.parametrize("cache", [None, "int8"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_a_prompt_s_numbers_do_not_depend_on_where_it_was_cut_or_what_was_there(
    dtype: torch.dtype, cache: str | None
) -> None:
    model = make("Llama", dtype=dtype)
    decoder = NativeDecoder(model, cache=cache)

    def alone(ids: list[int]) -> Tensor:
        return read(NativeDecoder(model, cache=cache), ids)[1]

    ids = ids_of(300)
    long = ids_of(700)
    assert torch.equal(read(decoder, long, piece=decoder.longest_read)[1], alone(long))
    expected = alone(ids)
    for piece in (64, 128, 256, decoder.longest_read):
        sequence, logits = read(decoder, ids, piece=piece)
        assert torch.equal(logits, expected)
        decoder.end(sequence)
    kept = decoder.begin(ids, None)
    assert kept.length == 256
    for shared in (64, 128, 192):
        other = ids[:shared] + ids_of(300 - shared, 5)
        begun = decoder.begin(other, None)
        assert begun.length == shared
        decoder.end(begun)
        assert torch.equal(read(decoder, other)[1], alone(other))
    for tail in (257, 260, 273):  # few tokens behind what is there
        assert torch.equal(read(decoder, ids[:tail])[1], alone(ids[:tail]))


def test_int8_keys_and_values_give_nearly_the_same_logits_in_half_the_memory() -> None:
    model = make("Gemma2", dtype=torch.bfloat16)
    exact, coded = NativeDecoder(model), NativeDecoder(model, cache="int8")
    assert coded.bytes_of(PAGE) < 0.57 * exact.bytes_of(PAGE)
    ids = ids_of(150)
    one, two = read(exact, ids[:100])[0], read(coded, ids[:100])[0]
    for token in ids[100:]:
        a, b = exact.step([one], [token]), coded.step([two], [token])
        assert float((a - b).abs().mean() / a.std()) < 0.1


@pytest.mark.parametrize("head", ["int8", "nf4"])
def test_the_head_may_be_quantized(head: str) -> None:
    model = make("Llama")
    sequence, _ = read(decoder := NativeDecoder(model, head=head), ids := ids_of(40))
    logits = decoder.step([sequence], [5])[0]
    assert (
        1e-4
        < float((logits - whole(model, [*ids, 5])[-1]).abs().mean() / logits.std())
        < {"int8": 0.02, "nf4": 0.2}[head]
    )


def test_what_is_cut_is_forgotten_and_a_shared_page_stays_as_it_was() -> None:
    model = make("Llama")
    decoder = NativeDecoder(model)
    ids = ids_of(130)
    first, _ = read(decoder, ids)
    second, _ = read(decoder, ids)
    expected = decoder.step([first], [3])
    decoder.cut(second, 100)
    for token in ids_of(40, 9):
        decoder.step([second], [token])
    decoder.cut(first, 130)
    assert torch.equal(decoder.step([first], [3]), expected)
    decoder.cut(second, 100)
    for token in ids[100:]:
        decoder.step([second], [token])
    assert off(decoder.step([second], [3])[0], expected[0]) < 1e-3


def test_the_cache_stays_within_its_budget_and_the_oldest_prefix_goes_first() -> None:
    decoder = NativeDecoder(make("Llama"))
    decoder.budget = decoder.bytes_of(6 * PAGE)
    for seed in range(5):
        sequence, _ = read(decoder, ids_of(2 * PAGE + 10, seed))
        decoder.step([sequence], [1])
        assert decoder.bytes_held <= decoder.budget
        decoder.end(sequence)
    assert [decoder.begin(ids_of(2 * PAGE + 10, seed), None).length // PAGE for seed in range(5)] == [0, 0, 0, 2, 2]


def test_decoded_tokens_are_kept_only_where_that_is_asked_for() -> None:
    model = make("Llama")
    ids = ids_of(200)
    for keep, expected in ((False, 64), (True, 200)):
        decoder = NativeDecoder(model, keep_decoded=keep)
        sequence, _ = read(decoder, ids[:70])
        for token in ids[70:]:
            decoder.step([sequence], [token])
        decoder.end(sequence)
        held = decoder.bytes_held
        begun = decoder.begin([*ids, 1, 2], None)
        assert begun.length == expected
        decoder.end(begun)
        assert decoder.bytes_held == held


@pytest.mark.parametrize("family", ["Llama", "Gemma2"])  # Gemma2 has windows
@pytest.mark.parametrize("cache", [None, "int8"])
def test_a_further_turn_of_few_tokens_is_one_call_with_the_forward_s_logits(family: str, cache: str | None) -> None:
    model = make(family, dtype=torch.float32 if cache is None else torch.bfloat16)
    decoder = NativeDecoder(model, cache=cache, keep_decoded=True)
    ids = ids_of(300)
    expected, near = whole(model, ids), 1e-3 if cache is None else 0.5
    sequence, _ = read(decoder, ids[:100])
    held = 100
    for new in (1, 17, 40, 48, 7):
        assert off(decoder.read(sequence, ids[held : held + new]), expected[held + new - 1]) < near
        held += new
        decoder.end(sequence)
        sequence = decoder.begin(ids, None)  # whole pages, and what lies behind them
        assert sequence.length == held
    other = [*ids[:200], 9, *ids[201:]]  # it parts from what is held behind the last whole page
    begun = decoder.begin(other, None)
    assert begun.length == 200
    assert off(decoder.read(begun, other[200:230]), whole(model, other)[229]) < near
    assert off(decoder.step([sequence], [ids[held]])[0], expected[held]) < near


def test_what_lies_behind_the_last_whole_page_goes_when_memory_is_wanted() -> None:
    decoder = NativeDecoder(make("Llama"), keep_decoded=True)
    decoder.budget = decoder.bytes_of(6 * PAGE)
    for seed in range(5):
        sequence, _ = read(decoder, ids_of(2 * PAGE + 10, seed))
        decoder.step([sequence], [1])
        assert decoder.bytes_held <= decoder.budget
        decoder.end(sequence)
    held = decoder.begin([*ids_of(2 * PAGE + 10, 4), 1, 2], None)
    assert held.length == 2 * PAGE + 11 and decoder.bytes_held <= decoder.budget
    assert decoder.begin([*ids_of(2 * PAGE + 10, 0), 1, 2], None).length == 0


def test_an_adapter_may_come_and_go() -> None:
    model = adapted(make("Llama"), "one")
    decoder = NativeDecoder(model)
    ids = ids_of(70)
    sequence, before = read(decoder, ids, "one")
    decoder.end(sequence)
    model.add_adapter("two", LoraConfig(r=2, target_modules="all-linear", init_lora_weights=False))
    prepare(model)
    decoder.add_adapter("two")
    sequence, other = read(decoder, ids, "two")
    assert off(before, other) > 0.1
    decoder.end(sequence)
    decoder.remove_adapter("two")
    assert decoder.adapters == ("one",)
    with pytest.raises(KeyError):
        decoder.begin(ids, "two")
    assert torch.equal(read(decoder, ids, "one")[1], before)


def test_a_model_in_training_is_left_as_it_was() -> None:
    model = adapted(make("Llama"), "one", "two")
    model.set_adapter("one")
    before = {name: parameter.requires_grad for name, parameter in model.named_parameters()}
    assert any(before.values()) and not all(before.values())
    decoder = NativeDecoder(model)
    for adapter in ("two", None, "one"):
        decoder.end(read(decoder, ids_of(20), adapter)[0])
    assert model.active_adapter == "one"
    assert {name: parameter.requires_grad for name, parameter in model.named_parameters()} == before


@pytest.fixture(scope="module")
def tokenizer() -> t.PreTrainedTokenizerBase:
    words = {f"w{number}": number for number in range(200)}
    return t.PreTrainedTokenizerFast(
        tokenizer_object=Tokenizer(WordLevel(words, unk_token="w0")), pad_token="w0", eos_token="w2"
    )


def test_answers_of_a_run_are_those_of_generate_whatever_goes_together(tokenizer: t.PreTrainedTokenizerBase) -> None:
    model = adapted(make("Qwen2"), "one", "two")
    prompts = [ids_of(length, length) for length in (3, 80, 1, 17, 300)]
    for adapter in ("one", "two", None):
        with model.disable_adapter() if adapter is None else contextlib.nullcontext():
            if adapter is not None:
                model.set_adapter(adapter)
            before = {name: parameter.requires_grad for name, parameter in model.named_parameters()}
            for together, tokens in ((1, None), (16, None), (16, 200)):
                answers = answer_all(
                    model, tokenizer, prompts, max_new_tokens=9, batch_size=together, most_tokens=tokens
                )
                for prompt, answer in zip(prompts, answers, strict=True):
                    expected = model.generate(torch.tensor([prompt]), max_new_tokens=9, do_sample=False, eos_token_id=2)
                    assert list(answer.ids) == expected[0, len(prompt) :].tolist() and answer.is_number
            assert {name: parameter.requires_grad for name, parameter in model.named_parameters()} == before


def test_adapters_that_are_off_have_no_part_in_an_answer(tokenizer: t.PreTrainedTokenizerBase) -> None:
    model = adapted(make("Llama"), "one")
    decoder = decoder_for(model)
    assert isinstance(decoder, NativeDecoder) and decoder.active == "one"
    ids = ids_of(70)
    with_adapter = read(decoder, ids, "one")[1]
    with model.disable_adapter():
        assert decoder.active is None
        base = read(decoder, ids, None)[1]
        assert off(with_adapter, base) > 0.1 and off(base, whole(model, ids)[-1]) < 1e-3
        assert torch.equal(read(NativeDecoder(model), ids, "one")[1], with_adapter)
        assert off(base, whole(model, ids)[-1]) < 1e-3  # they are off still


def test_what_is_not_known_is_refused_with_the_reason() -> None:
    with pytest.raises(NotNative, match="decoder layers that are not known"):
        NativeDecoder(t.GPTNeoXForCausalLM(t.GPTNeoXConfig(hidden_size=64, num_hidden_layers=1, num_attention_heads=1)))
    model = make("Llama")
    model.model.layers[1].mlp.register_forward_hook(lambda *_: None)
    with pytest.raises(NotNative, match="not known"):
        NativeDecoder(model)
    with pytest.raises(NotNative, match="embedding"):
        NativeDecoder(adapted(make("Llama"), "one", trainable_token_indices=[3, 4]))
    with pytest.raises(NotNative, match="head"):
        NativeDecoder(adapted(make("Llama"), "one", target_modules=["lm_head", "q_proj"]))
    with pytest.raises(NotNative, match="multiple of 64"):
        torch.manual_seed(0)
        odd = t.LlamaForCausalLM(
            t.LlamaConfig(**SIZES | {"hidden_size": 96, "num_attention_heads": 3, "num_key_value_heads": 1})
        )
        for name, module in list(odd.named_modules()):
            if type(module) is nn.Linear and "lm_head" not in name:
                setattr(odd.get_submodule(name.rpartition(".")[0]), name.rpartition(".")[2], DenseLinear.taking(module))
        odd.requires_grad_(False)
        fuse(odd)
        NativeDecoder(odd)


def test_a_model_that_computes_something_else_is_found_out() -> None:
    model = make("Llama")
    plain = type(model.model).forward

    def forward(self: Any, *args: Any, **kwargs: Any) -> Any:
        result = plain(self, *args, **kwargs)
        result.last_hidden_state = 2 * result.last_hidden_state.flip(-1)
        return result

    model.model.forward = forward.__get__(model.model)
    with pytest.raises(NotNative, match="other logits"):
        NativeDecoder(model)

"""A whole plan: the policy that a run chooses, what fits, and options that do what they promise."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import transformers as t
from peft import get_peft_model

from halfbyte import hf
from halfbyte.errors import InputError
from halfbyte.hf.layers import activations
from halfbyte.hf.layers.attention_choice import choose_attention
from halfbyte.hf.layers.expert_targets import own_words
from halfbyte.hf.layers.lora_config import lora_config
from halfbyte.hf.models import paging
from halfbyte.nn import Linear4bit
from halfbyte.plan import advice, words
from halfbyte.plan.estimate import Model, look_at, plan_run
from halfbyte.plan.layer_overhead import adapted
from halfbyte.plan.published import llama
from halfbyte.plan.rows import RowFacts, full_rows, work_of
from halfbyte.plan.shape import shape_of
from halfbyte.runs.config import TrainConfig

SIZES = {
    "hidden_size": 256, "intermediate_size": 512, "num_hidden_layers": 4, "num_attention_heads": 4,
    "num_key_value_heads": 2, "vocab_size": 512, "tie_word_embeddings": True, "max_position_embeddings": 4096,
}  # fmt: skip
EXPERTS = {
    "num_experts": 6, "num_local_experts": 6, "num_experts_per_tok": 2, "moe_intermediate_size": 96,
    "shared_expert_intermediate_size": 192, "pad_token_id": 0,
}  # fmt: skip
GIB = 2**30


def config_of(**options: Any) -> TrainConfig:
    given = {"model": "m", "data": "-", "output": Path("runs/x"), "rank": 8, "lora_dropout": 0.0, **options}
    return TrainConfig(**given)


@pytest.fixture(scope="module")
def model() -> Model:
    return Model("m", shape_of(t.LlamaConfig(**SIZES)), "nf4", 64, True, True, True)


@pytest.mark.parametrize("dense", [[], [1]], ids=["all layers mix", "the second is dense"])
def test_the_policy_of_a_mixture_is_the_one_that_a_run_chooses(tmp_path: Path, dense: list[int]) -> None:
    config = t.Qwen3MoeConfig(**SIZES | EXPERTS | {"norm_topk_prob": True, "head_dim": 64, "mlp_only_layers": dense})
    t.AutoModelForCausalLM.from_config(config).bfloat16().save_pretrained(tmp_path / "a")
    hf.quantize_checkpoint(tmp_path / "a", tmp_path / "b")
    loaded = hf.load(tmp_path / "b")
    choose_attention(loaded)
    with own_words():
        wrapped = get_peft_model(loaded, lora_config(loaded, rank=8, lora_alpha=16))
    wrapped = hf.prepare(wrapped).train()
    trained = sum(p.numel() for p in wrapped.parameters() if p.requires_grad)
    options = config_of(model=str(tmp_path / "b"), batch_size=4, max_length=512, optimizer="paged_adamw_8bit")
    found, kept = look_at(options), set()
    for free in (240 * 2**20, 254 * 2**20, 290 * 2**20, 64 * GIB):
        plan = plan_run(options, model=found, free=free + 4 * trained)
        assert plan.trained == trained
        expected = activations.plan(wrapped, length=512, batch_size=4, free=free, base=found.pageable(2), state=0)
        assert plan.policy == expected
        kept.add(plan.policy.kept)
    assert len(kept) > 1


@pytest.mark.parametrize("optimizer", ["paged_adamw_8bit", "adamw_torch"])
@pytest.mark.parametrize("free", [64 * GIB, 300 * 2**20, 245 * 2**20])
def test_the_policy_is_the_one_that_a_run_chooses(model: Model, free: int, optimizer: str) -> None:
    loaded = adapted(t.LlamaForCausalLM(t.LlamaConfig(**SIZES)), rank=8)
    trained = sum(p.numel() for p in loaded.parameters() if p.requires_grad)
    config = config_of(batch_size=4, max_length=512, optimizer=optimizer)
    plan = plan_run(config, model=model, free=free + 4 * trained)
    assert plan.trained == trained
    base, together = model.pageable(2), config.gradient_accumulation_steps
    state = 0 if optimizer.startswith("paged") else None  # two moments in fp32
    expected = activations.plan(loaded, length=512, batch_size=4, free=free, base=base, passes=together, state=state)
    assert plan.policy == expected


@pytest.mark.parametrize(
    ("kind", "more"),
    [
        (t.LlamaConfig, {}),
        (t.Qwen2MoeConfig, EXPERTS),
        (t.MixtralConfig, EXPERTS),
        (t.Qwen2MoeConfig, EXPERTS | {"mlp_only_layers": [0, 1]}),
        (t.Glm4MoeConfig, EXPERTS | {"n_routed_experts": 6, "head_dim": 64, "first_k_dense_replace": 1}),
    ],
    ids=["Llama", "Qwen2Moe", "Mixtral", "Qwen2Moe, two dense layers", "Glm4Moe, one dense layer"],
)
@pytest.mark.parametrize("tied", [True, False])
def test_what_of_a_folder_can_be_paged_is_what_the_loaded_model_maps(
    tmp_path: Path, tied: bool, kind: Any, more: dict[str, Any]
) -> None:
    config = kind(**SIZES | more | {"tie_word_embeddings": tied})
    t.AutoModelForCausalLM.from_config(config).bfloat16().save_pretrained(tmp_path / "a")
    hf.quantize_checkpoint(tmp_path / "a", tmp_path / "b")
    loaded = hf.load(tmp_path / "b")
    found = look_at(config_of(model=str(tmp_path / "b")))
    assert found.mapped_linears and found.mapped_dense
    found_all, found_least, found_beside = found.pageable(2)
    matrices = max(sum(linear.matrices[0] for linear in layer.linears) for layer in found.shape.layers)
    pages = max(3 * 4096, 2 * 4096 + 1536 * matrices)  # of each unit, whole ones; its matrices' tables lie in between
    for mixture in found.shape.mixtures[:1]:  # those that two experts, or one and others, lie on
        pages += 4096 * (mixture.experts + 1)
    assert 0 <= paging.mapped_bytes(loaded) - found_all <= (SIZES["num_hidden_layers"] + 1) * pages
    assert 0 <= paging.least_bytes(loaded) - found_least <= 2 * pages
    assert found_beside == (loaded.get_input_embeddings().weight.nbytes if tied else 0)
    assert 0 <= paging.beside_bytes(loaded) - found_beside <= pages
    held = {id(p): p.nbytes for p in loaded.parameters()}
    statistics = [m.quantized_weight.statistics for m in loaded.modules() if isinstance(m, Linear4bit)]
    constants = sum(s.absmax.nbytes + s.nested.absmax.nbytes for s in statistics)
    assert found.base(2).all == sum(held.values()) + constants
    dense = look_at(config_of(model=str(tmp_path / "a")))
    assert dense.base(2).anonymous == dense.base(2).quantized and dense.base(2).all == found.base(2).all


def test_a_base_beyond_memory_is_paged_and_waits_for_the_disk() -> None:
    model = Model("m", llama("7B"), "nf4", 64, True, True, True)
    config = config_of(batch_size=1, max_length=64, gradient_accumulation_steps=2)
    whole = plan_run(config, model=model, free=16 * GIB)
    paged = plan_run(config, model=model, free=5 * GIB // 2)
    assert whole.policy.paged is None and whole.step.disk == 0
    assert paged.policy.paged is not None and paged.policy.paged < model.pageable(2).all
    assert paged.memory.base < model.base(2).all
    slow = paged.machine.model_copy(update={"rates": paged.machine.rates.model_copy(update={"disk": 1e8})})
    waiting = plan_run(config, model=model, free=5 * GIB // 2, machine=slow)
    assert waiting.policy.paged is not None and waiting.policy.together  # so that a step reads it twice
    read = 2 * (model.pageable(2).all - waiting.policy.paged) / 1e8
    assert waiting.step.seconds == pytest.approx(read)


def test_rows_without_data_are_full(model: Model) -> None:
    plan = plan_run(config_of(batch_size=2, gradient_accumulation_steps=3, max_length=100), model=model, free=GIB)
    assert (plan.passes, plan.work.tokens, plan.work.trained, plan.steps) == (3, 200, 198, None)
    assert plan.seconds is None


def test_rows_of_data_are_packed_or_padded_as_the_run_would(model: Model) -> None:
    lengths = np.array([20, 400] * 40)
    facts = RowFacts(lengths, len(lengths), int(lengths.sum()) // 2)
    config = config_of(batch_size=4, gradient_accumulation_steps=4, epochs=2, group_by_length=False)
    packed = plan_run(config, facts=facts, model=model, free=8 * GIB)
    padded = plan_run(config.model_copy(update={"packing": False}), facts=facts, model=model, free=8 * GIB)
    assert packed.packed and not padded.packed
    assert packed.steps == padded.steps == 10
    assert packed.step.seconds < padded.step.seconds
    work, passes = work_of(config, facts, None, 1)
    assert passes == 4 and work.trained == 16 * 105 / 4


def test_auto_takes_as_many_rows_as_are_kept(model: Model) -> None:
    config = config_of(batch_size="auto", gradient_accumulation_steps=4, max_length=512)
    assert plan_run(config, model=model, free=8 * GIB).config.batch_size == 16
    few = plan_run(config, model=model, free=270 * 2**20)
    assert few.config.batch_size < 16 and few.config.rows_a_step == 16


def test_what_does_not_fit_is_refused_with_options_that_do(model: Model) -> None:
    config = config_of(batch_size=64, max_length=4096, memory=2 * GIB)
    options = {"model": model, "free": 260 * 2**20}
    with pytest.raises(InputError) as error:
        plan_run(config, **options)
    told = advice.refusal(config, error.value, **options)
    assert "it would fit with --batch-size" in str(told)
    ways = advice.that_fit(config, **options)
    assert ways and all(way.plan.policy.bytes <= way.plan.policy.free for way in ways)


def test_limits_are_the_largest_that_fit(model: Model) -> None:
    config = config_of(batch_size=1, max_length=512)
    options = {"model": model, "free": 400 * 2**20}
    found = advice.limits(config, **options)
    assert 0 < found.batch_kept < found.batch
    plan_run(config.model_copy(update={"batch_size": found.batch}), **options)
    if found.batch < advice.MOST_ROWS:
        with pytest.raises(InputError):
            plan_run(config.model_copy(update={"batch_size": found.batch + 1}), **options)
    assert found.length == found.positions == 4096


def test_faster_options_are_faster(model: Model) -> None:
    config = config_of(batch_size=1, gradient_accumulation_steps=16, max_length=64, lora_dropout=0.1, rank=64)
    plan = plan_run(config, model=model, free=8 * GIB)
    found = advice.faster(plan, model=model, free=8 * GIB)
    assert {"--lora-dropout 0", "--rank 16"} <= {way.flags for way in found}
    assert all(way.plan.step.seconds < plan.step.seconds for way in found)


def test_where_evaluations_take_most_of_the_time_fewer_are_advised(model: Model) -> None:
    config = config_of(batch_size=1, max_length=64, eval_share=0.1, rank=8, lora_dropout=0.0)
    facts = RowFacts(np.full(20_000, 64), 20_000, 20_000 * 30, evaluated=2_000 * 64)
    options = {"model": model, "facts": facts, "free": 8 * GIB, "packs": False}
    plan = plan_run(config, **options)
    assert plan.evaluations > 0.2 * plan.seconds
    [fewer] = [way for way in advice.faster(plan, **options) if "eval" in way.flags]
    assert fewer.flags == f"--eval-steps {plan.steps // 10}"
    assert fewer.plan.step == plan.step and fewer.plan.evaluations < plan.evaluations / 5
    assert fewer.gain(plan) == pytest.approx(plan.seconds / fewer.plan.seconds)
    small = plan_run(config.model_copy(update={"eval_steps": plan.steps // 2}), **options)
    assert not [way for way in advice.faster(small, **options) if "eval" in way.flags]


def test_a_plan_in_words_has_its_numbers(model: Model) -> None:
    plan = plan_run(config_of(max_steps=10), facts=full_rows(64), model=model, free=8 * GIB)
    text = "\n".join(words.lines(plan))
    assert "4 Llama layers" in text and "Peak memory" in text and "10 steps take" in text
    assert "not measured" in text or "measured 2" in text


@pytest.mark.parametrize(("text", "seconds"), [("2h", 7200), ("90min", 5400), ("1h30m", 5400), ("45 s", 45)])
def test_times_are_read(text: str, seconds: float) -> None:
    assert words.seconds_of(text) == seconds


@pytest.mark.parametrize("text", ["soon", "2", "h2", "2h and"])
def test_other_times_are_refused(text: str) -> None:
    with pytest.raises(InputError, match="give a time such as 2h"):
        words.seconds_of(text)


def test_a_limit_below_a_step_is_refused(model: Model) -> None:
    plan = plan_run(config_of(), model=model, free=8 * GIB)
    with pytest.raises(InputError, match="One step takes"):
        words.time_lines(plan, plan.step.seconds / 2)
    assert "--max-steps" in words.time_lines(plan, 100 * plan.step.seconds)[0]

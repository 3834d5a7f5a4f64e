"""Which layers LoRA goes on without a model, against what PEFT trains of a loaded mixture."""

from pathlib import Path
from typing import Any

import pytest
import transformers as t
from peft import get_peft_model

from halfbyte import hf
from halfbyte.errors import InputError
from halfbyte.hf.layers.expert_targets import as_peft_reads, own_words
from halfbyte.hf.layers.lora_config import lora_config
from halfbyte.plan.memory import adapter_sizes
from halfbyte.plan.ranks import active_adapter, adapter_parameters, adapter_tensors, ranks_of
from halfbyte.plan.shape import shape_of
from halfbyte.runs.config import TrainConfig

CONFIG = t.Qwen2MoeConfig(
    hidden_size=64, intermediate_size=160, num_hidden_layers=3, num_attention_heads=4, num_key_value_heads=2,
    vocab_size=96, num_experts=5, num_experts_per_tok=2, moe_intermediate_size=32, shared_expert_intermediate_size=96,
    mlp_only_layers=[2], pad_token_id=0,
)  # fmt: skip
SHAPE = shape_of(CONFIG)
OPTIONS: list[dict[str, Any]] = [
    {},
    {"target_modules": "q_proj,down_proj"},
    {"target_modules": r".*\.experts\..*\.(gate|up)_proj"},
    {"rank_pattern": {"gate_proj": 2}},
    {"rank_pattern": {"gate_up_proj": 3}},
    {"target_modules": "gate_proj,up_proj,o_proj", "layers_to_transform": [1]},
    {"target_modules": "gate_proj,up_proj,down_proj", "layers_to_transform": [1, 2]},
    {"exclude_modules": ["shared_expert.down_proj", "v_proj"], "rank_pattern": {"down_proj": 2}},
]


def config_of(**options: Any) -> TrainConfig:
    given = {"model": "m", "data": "-", "output": Path("runs/x"), "rank": 4, "lora_dropout": 0.0, **options}
    return TrainConfig(**given)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("mixture")
    t.AutoModelForCausalLM.from_config(CONFIG).bfloat16().save_pretrained(folder)
    return folder


def put(folder: Path, **options: Any) -> Any:
    model = hf.load(folder)
    config = lora_config(model, rank=4, lora_alpha=8, never=hf.not_linear(model), **options)
    with own_words():
        wrapped = get_peft_model(model, config)
    as_peft_reads(config)
    return wrapped


# PEFT (0.21) looks for a pattern's layers among modules alone, and tells of those that only stacks have
@pytest.mark.filterwarnings("ignore:The following rank_pattern keys did not match:RuntimeWarning")
@pytest.mark.parametrize("options", OPTIONS)
def test_adapters_of_a_mixture_are_those_that_peft_trains(
    folder: Path, tmp_path: Path, options: dict[str, Any]
) -> None:
    wrapped = put(folder, **options)
    trained = sorted(parameter.numel() for parameter in wrapped.parameters() if parameter.requires_grad)
    ranks = ranks_of(config_of(**options), SHAPE)
    assert sorted(adapter_sizes(SHAPE, ranks)) == trained
    assert (adapter_parameters(SHAPE, ranks), adapter_tensors(ranks)) == (sum(trained), len(trained))
    wrapped.save_pretrained(tmp_path)
    assert ranks_of(config_of(adapter=tmp_path), SHAPE) == ranks


def test_a_token_passes_the_adapters_of_its_experts_alone() -> None:
    (one, _, last) = ranks = ranks_of(config_of(target_modules="gate_proj,up_proj"), SHAPE)
    stack, shared, dense = 64 + 2 * 32, 2 * (64 + 96), 2 * (64 + 160)
    assert set(one) == {"mlp.experts.gate_up_proj", "mlp.shared_expert.gate_proj", "mlp.shared_expert.up_proj"}
    assert set(last) == {"mlp.gate_proj", "mlp.up_proj"}
    assert active_adapter(SHAPE, ranks) == 2 * 4 * (2 * stack + shared) + 4 * dense
    assert adapter_parameters(SHAPE, ranks) == 2 * 4 * (5 * stack + shared) + 4 * dense


@pytest.mark.parametrize(
    "options",
    [
        {"target_modules": "gate_proj,q_proj"},
        {"use_dora": True},
        {"init_lora_weights": "pissa"},
        {"rank_pattern": {"experts.gate_proj": 2}},
        {"rank_pattern": {"query": 2}},
    ],
)
def test_what_experts_do_not_take_is_told_as_a_run_tells_it(folder: Path, options: dict[str, Any]) -> None:
    with pytest.raises(InputError) as theirs:
        put(folder, **options)
    with pytest.raises(InputError) as ours:
        ranks_of(config_of(**options), SHAPE)
    assert str(ours.value) == str(theirs.value)


def test_a_name_that_matches_nothing_is_told_with_the_layers_that_there_are() -> None:
    told = "has q_proj, k_proj, v_proj, o_proj, gate_proj, up_proj, down_proj"
    with pytest.raises(InputError, match=rf"matches no layer .*{told}\."):
        ranks_of(config_of(target_modules="query"), SHAPE)

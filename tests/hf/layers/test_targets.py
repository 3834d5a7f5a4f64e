"""Words for layers: what PEFT takes of them, and what is said of those that match nothing."""

from pathlib import Path
from typing import Any

import pytest
from peft import LoraConfig, get_peft_model
from transformers import AutoModelForCausalLM, GPT2Config, GPT2LMHeadModel, LlamaConfig

import halfbyte
from halfbyte.errors import InputError
from halfbyte.hf.layers.adapters import LoraLinear4bit
from halfbyte.hf.layers.targets import check_targets


@pytest.mark.parametrize(
    ("words", "taken", "layers"),
    [
        ("all-linear", "all-linear", 14),
        (["all-linear"], "all-linear", 14),
        ("q_proj", ["q_proj"], 2),
        ("q_proj,v_proj", ["q_proj", "v_proj"], 4),
        (" q_proj, v_proj ,q_proj,", ["q_proj", "v_proj"], 4),
        (["q_proj", "layers.1.mlp.down_proj"], ["q_proj", "layers.1.mlp.down_proj"], 3),
        ("model.layers.0.self_attn.q_proj", ["model.layers.0.self_attn.q_proj"], 1),
        (r".*\.(q|v)_proj", r".*\.(q|v)_proj", 4),
        (r"model.layers.\d.mlp.up_proj", r"model.layers.\d.mlp.up_proj", 2),
        ("model.layers...mlp.up_proj", "model.layers...mlp.up_proj", 2),  # an expression that could be a name
        ("embed_tokens,k_proj", ["embed_tokens", "k_proj"], 2),
    ],
)
@pytest.mark.filterwarnings("ignore:Model has `tie_word_embeddings")
def test_words_for_layers_become_what_peft_takes(words: Any, taken: Any, layers: int, tiny_model_folder: Path) -> None:
    base = halfbyte.load(tiny_model_folder)
    assert check_targets(base, words) == taken
    model = halfbyte.prepare(get_peft_model(base, LoraConfig(target_modules=check_targets(base, words))))
    assert sum(isinstance(module, LoraLinear4bit) for module in model.modules()) == layers


HAS = r", which has q_proj, k_proj, v_proj, o_proj, gate_proj, up_proj, down_proj\."
REFUSED = {
    "v_porj": rf"'v_porj' matches no layer of the model \(did you mean 'v_proj'\?\){HAS}",
    "q_proj,v_porj": r"'v_porj' matches no layer of the model \(did you mean 'v_proj'\?\)",
    "all_linear": r"'all_linear' matches no layer of the model \(did you mean 'all-linear'\?\)",
    "": r"target_modules names no layer; name some of the model's, which has q_proj, .*, or 'all-linear'",
    " , ": r"target_modules names no layer",
    "*": r"'\*' is neither a list of names nor a regular expression \(nothing to repeat .*\); .* say 'all-linear'",
    "(q_proj": r"'\(q_proj' is neither a list of names nor a regular expression \(missing \)",
    r".*\.qq_proj": rf"'\.\*\\\\\.qq_proj' matches no layer of the model{HAS}",
    "mlp": r"'mlp' matches model\.layers\.0\.mlp \(LlamaMLP\), which is no layer that LoRA goes on",
    ".*mlp.*": r"'\.\*mlp\.\*' matches model\.layers\.0\.mlp \(LlamaMLP\)",
    "norm": r"'norm' matches model\.norm \(LlamaRMSNorm\)",
    "lm_head": r"'lm_head' matches the output head lm_head.*modules_to_save 'lm_head'",
    ".*(proj|head)": r"matches the output head lm_head",
}


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("words", REFUSED)
def test_words_that_match_nothing_to_adapt_are_refused(words: str, tied: bool, tiny_model_folder: Path) -> None:
    config = LlamaConfig.from_pretrained(tiny_model_folder, tie_word_embeddings=tied)
    model = AutoModelForCausalLM.from_config(config)
    with pytest.raises(InputError, match=REFUSED[words]):
        check_targets(model, words)
    if words and "," not in words:
        with pytest.raises(InputError, match=r"target_modules '"):
            check_targets(model, ["q_proj", words])


def test_other_families_have_other_names() -> None:
    model = GPT2LMHeadModel(GPT2Config(n_embd=16, n_layer=1, n_head=2, vocab_size=20))
    assert check_targets(model, "c_attn, c_fc") == ["c_attn", "c_fc"]
    with pytest.raises(InputError, match=r"'q_proj' matches no layer of the model.*, which has c_attn, c_proj, c_fc"):
        check_targets(model, "q_proj")

"""Stop tokens that a model never learned, and where other programs find those it did learn."""

from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, GenerationConfig

from halfbyte.hf.models.stops import check_stop_token, save_stops, untrained


@pytest.fixture
def model(tiny_model_folder: Path) -> Any:
    model = AutoModelForCausalLM.from_pretrained(tiny_model_folder)
    with torch.no_grad():  # its stop token is its pad token, whose row torch makes of zeros
        model.get_input_embeddings().weight[model.config.eos_token_id] = 0.2 * torch.randn(model.config.hidden_size)
    return model


@pytest.fixture
def tokenizer(tiny_model_folder: Path) -> Any:
    return AutoTokenizer.from_pretrained(tiny_model_folder)


ROW = 7
CASES = {
    "is all zeros": lambda weight: torch.zeros_like(weight[0]),
    "is the same as that of 1 other token": lambda weight: weight[3],
    "is far smaller than those of other tokens": lambda weight: weight[ROW] / 50,
    "is the mean of the others": lambda weight: weight.mean(0) + weight[ROW] / 50,
}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("reason", CASES)
def test_rows_that_were_never_trained_are_found(reason: str, dtype: torch.dtype) -> None:
    weight = (torch.randn(10_000, 24, generator=torch.Generator().manual_seed(0)) + 0.5).to(dtype)
    assert [untrained(weight, row) for row in (0, ROW, 9_999)] == [None] * 3
    weight[ROW] = CASES[reason](weight.float()).to(dtype)
    assert untrained(weight, ROW) == reason
    assert untrained(weight, 0) is None


def test_what_transformers_gives_to_new_tokens_is_found(model: Any, tokenizer: Any) -> None:
    stop = len(tokenizer)
    tokenizer.add_tokens(["<|new|>"], special_tokens=True)
    assert check_stop_token(model, tokenizer, [tokenizer.eos_token_id]) == []
    model.resize_token_embeddings(stop + 1)
    [said] = check_stop_token(model, tokenizer, [tokenizer.eos_token_id, stop])
    assert "never seen '<|new|>'" in said and "embedding is " in said and "modules_to_save" in said


def test_the_head_is_looked_at_by_itself(model: Any, tokenizer: Any) -> None:
    stop = tokenizer.eos_token_id
    model.lm_head.weight = torch.nn.Parameter(model.lm_head.weight.detach().clone())  # tied before
    with torch.no_grad():
        model.lm_head.weight[stop] = 0
    [said] = check_stop_token(model, tokenizer, [stop])
    assert "its output embedding is all zeros" in said


def test_the_stop_is_written_beside_the_adapter_for_those_who_look(model: Any, tokenizer: Any, tmp_path: Path) -> None:
    model.generation_config.temperature = 0.3
    model.generation_config.do_sample = True
    own = model.generation_config.eos_token_id
    save_stops(model, tokenizer, [5, own], tmp_path)
    saved = GenerationConfig.from_pretrained(tmp_path)
    assert saved.eos_token_id == [own, 5]
    assert (saved.temperature, saved.pad_token_id) == (0.3, tokenizer.pad_token_id)
    assert model.generation_config.eos_token_id == own

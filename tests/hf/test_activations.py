"""The memory of a step's activations: what is predicted is what autograd saves, and choices change no number."""

import copy
from typing import Any

import pytest
import torch
import transformers as t
from peft import LoraConfig, get_peft_model
from torch import Tensor, nn

from halfbyte import InputError
from halfbyte.hf.activations import Activations, fit_activations, measure_activations, recompute_first

SIZE = {"vocab_size": 90, "hidden_size": 24, "intermediate_size": 40, "num_attention_heads": 2, "pad_token_id": 0}
FAMILIES = {
    "llama": t.LlamaConfig(**SIZE, num_hidden_layers=4),
    "gpt2": t.GPT2Config(vocab_size=90, n_embd=24, n_layer=4, n_head=2),
}
IDS = list(range(3, 20))


def small_model(family: str = "llama") -> Any:
    torch.manual_seed(0)
    model = t.AutoModelForCausalLM.from_config(copy.deepcopy(FAMILIES[family]))
    lora = LoraConfig(
        r=2, target_modules="all-linear", task_type="CAUSAL_LM", lora_dropout=0.1, init_lora_weights=False
    )
    return get_peft_model(model, lora)


def saved_bytes(model: nn.Module, ids: Tensor) -> int:
    """What the backbone keeps for the backward pass, weights apart."""
    known = {x.untyped_storage().data_ptr() for x in (*model.parameters(), *model.buffers())}
    total = 0

    def pack(x: Tensor) -> Tensor:
        nonlocal total
        storage = x.untyped_storage()
        total += 0 if storage.data_ptr() in known else storage.nbytes()
        known.add(storage.data_ptr())
        return x

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda x: x):
        output = model.base_model.model.base_model(input_ids=ids, use_cache=False)
    assert output.last_hidden_state.requires_grad
    return total


@pytest.mark.filterwarnings("ignore:.*fan_in_fan_out")
@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("kept", [0, 1, 3, 4])
def test_the_forecast_from_one_sequence_is_what_a_batch_saves(family: str, kept: int) -> None:
    model = small_model(family).train()
    measured = measure_activations(model, IDS)
    recompute_first(model, 4 - kept)
    forecast = 5 * (sum(measured.layers[4 - kept :]) + (4 - kept) * measured.inputs + measured.rest)
    # masks and random states do not grow with the batch
    assert saved_bytes(model, torch.tensor([IDS] * 5)) == pytest.approx(forecast, rel=0.06)


def test_measuring_leaves_no_trace() -> None:
    model = small_model()
    model.base_model.model.model.layers[1].eval()
    recompute_first(model, 1)
    states = [
        (module.training, len(module._forward_hooks), len(module._forward_pre_hooks)) for module in model.modules()
    ]
    before = torch.get_rng_state()
    measure_activations(model, IDS)
    after = [
        (module.training, len(module._forward_hooks), len(module._forward_pre_hooks)) for module in model.modules()
    ]
    assert after == states and torch.equal(torch.get_rng_state(), before)
    assert [layer.gradient_checkpointing for layer in model.base_model.model.model.layers] == [
        True,
        False,
        False,
        False,
    ]
    assert all(p.grad is None for p in model.parameters())


def test_loss_and_gradients_are_bitwise_the_same_for_every_choice() -> None:
    results = []
    for again in range(5):
        model = small_model().train()
        recompute_first(model, again)
        torch.manual_seed(7)
        loss = model(input_ids=torch.tensor([IDS]), labels=torch.tensor([IDS])).loss
        loss.backward()
        results.append([loss, *(p.grad for p in model.parameters() if p.requires_grad)])
    for result in results[1:]:
        assert all(torch.equal(one, other) for one, other in zip(result, results[0], strict=True))


def test_as_many_layers_keep_their_activations_as_fit() -> None:
    memory = Activations(layers=(100, 100, 100), inputs=10, rest=5, fixed=50)
    # 2 sequences: 2 * (kept * 100 + (3 - kept) * 10 + 100 + 5) + 50
    assert [memory.needed(2, kept) for kept in range(4)] == [320, 500, 680, 860]
    assert [memory.fitting(2, free, 3) for free in (319, 320, 499, 500, 859, 860, 10**9)] == [None, 0, 0, 1, 2, 3, 3]
    assert memory.fitting(2, 10**9, 0) == 0


def test_the_choice_is_made_and_told() -> None:
    model = small_model()
    measured = measure_activations(model, IDS)
    layers = model.base_model.model.model.layers
    told = fit_activations(model, IDS, 17, 3, measured.needed(3, 3))
    assert [layer.gradient_checkpointing for layer in layers] == [True, False, False, False]
    assert (
        "activations of 3 of 4 layers" in told and "3 x 17 tokens; 25 % of the forward pass is computed twice" in told
    )
    told = fit_activations(model, IDS, 17, 3, measured.needed(3, 4))
    assert not any(layer.gradient_checkpointing for layer in layers)
    assert told.startswith("Keeping the activations of all layers")


def test_a_budget_that_nothing_fits_in_is_refused_with_what_would() -> None:
    model = small_model()
    measured = measure_activations(model, IDS)
    with pytest.raises(InputError, match=r"A step of 8 x 17 tokens needs about .*; a batch_size of 3 would fit\."):
        fit_activations(model, IDS, 17, 8, measured.needed(4, 0) - 1)
    with pytest.raises(InputError, match=r"one sequence alone needs .*: allow more memory or lower max_length"):
        fit_activations(model, IDS, 17, 8, 1000)

"""The activation policy: what it chooses by arithmetic, what a layer holds by autograd's own count, and equal bits."""

import gc
import weakref
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch.multiprocessing.reductions import StorageWeakRef
from transformers import AutoModelForCausalLM

import halfbyte
from halfbyte.errors import InputError
from halfbyte.hf.layers import activations
from halfbyte.hf.layers.activations import Costs, Policy

LAYERS = 4 * [Costs(kept=100, input=10)]
BUSY = 2 * 100


def model_of(folder: Path) -> Any:
    torch.manual_seed(0)
    config = halfbyte.HalfbyteConfig(compute_dtype=torch.float32)
    model = AutoModelForCausalLM.from_pretrained(folder, quantization_config=config)
    lora = LoraConfig(r=4, target_modules="all-linear", lora_dropout=0.1, init_lora_weights=False)
    return halfbyte.prepare_for_training(get_peft_model(model, lora)).train()


def gradients(model: Any) -> dict[str, torch.Tensor]:
    model.zero_grad()
    torch.manual_seed(1)
    ids = torch.randint(5, 200, (2, 24))
    model(input_ids=ids, labels=ids, use_cache=False).loss.backward()
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.requires_grad}


@pytest.mark.parametrize(
    ("free", "offloaded", "recomputed", "needed"),
    [
        (7 + BUSY + 400, 0, 0, 7 + BUSY + 400),
        (7 + BUSY + 399, 0, 1, 7 + BUSY + 310),
        (7 + BUSY + 220, 0, 2, 7 + BUSY + 220),
        (7 + BUSY + 40, 0, 4, 7 + BUSY + 40),
        (7 + BUSY + 39, 1, 3, 7 + BUSY + 30),
        (7 + BUSY, 4, 0, 7 + BUSY),
    ],
)
def test_as_few_layers_as_possible_are_recomputed_and_then_as_few_offloaded(
    free: int, offloaded: int, recomputed: int, needed: int
) -> None:
    policy = activations.choose(LAYERS, 7, free)
    assert policy == Policy(offloaded, recomputed, 4 - offloaded - recomputed, needed, free)


@pytest.mark.parametrize(("free", "remedy"), [(5 * 2**30, "lower batch_size from 4 to 2"), (2**31, "lower max_length")])
def test_a_budget_that_nothing_fits_in_is_refused_with_what_would(free: int, remedy: str) -> None:
    layers = 4 * [Costs(kept=4 * 2**30, input=2**20)]  # of four sequences: 2 GiB each while one layer is at work
    with pytest.raises(InputError, match=rf"needs 9\.00 GiB .*: {remedy}, or raise memory by [47]\.00 GiB\."):
        activations.choose(layers, 2**30, free, batch_size=4)


def test_on_a_gpu_nothing_waits_on_the_disk() -> None:
    assert activations.choose(LAYERS, 7, 7 + BUSY + 40, disk=False) == Policy(0, 4, 0, 7 + BUSY + 40, 7 + BUSY + 40)
    with pytest.raises(InputError, match=r"every activation recomputed, but"):
        activations.choose(LAYERS, 7, 7 + BUSY + 39, disk=False)


def test_the_cost_of_recomputing_is_stated() -> None:
    text = str(activations.choose(LAYERS, 0, BUSY + 220))
    assert "2 of 4 layers are recomputed" in text and "25% more matrix work" in text


def test_what_a_layer_is_said_to_keep_is_what_autograd_saves_in_it(tiny_model_folder: Path) -> None:
    model = model_of(tiny_model_folder)
    layers = activations.measure(model, length=24, batch_size=2)
    own = {p.untyped_storage().data_ptr() for p in model.parameters()}
    storages: dict[int, torch.UntypedStorage] = {}

    def pack(tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in own:
            storages[storage.data_ptr()] = storage
        return tensor

    ids = torch.zeros(2, 24, dtype=torch.long)
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        model.get_base_model().model(input_ids=ids, use_cache=False)
    counted = sum(storage.nbytes() for storage in storages.values())
    assert len(layers) == 2 and layers[0].input == 2 * 24 * 32 * 4
    # the final norm and tensors that several layers share are the difference
    assert sum(layer.kept for layer in layers) == pytest.approx(counted, rel=0.1)


def test_measuring_leaves_the_model_and_the_random_numbers_as_they_were(tiny_model_folder: Path) -> None:
    model = model_of(tiny_model_folder).eval()
    before = [vars(layer).copy() for layer in activations.recomputable_layers(model)]
    state = torch.get_rng_state()
    activations.measure(model, length=7, batch_size=1)
    assert torch.equal(torch.get_rng_state(), state) and not model.training
    assert [vars(layer) for layer in activations.recomputable_layers(model)] == before


@pytest.mark.parametrize("policy", [(0, 1, 1), (0, 2, 0), (1, 1, 0), (2, 0, 0), (1, 0, 1)])
def test_no_policy_changes_a_bit_of_the_gradients(
    policy: tuple[int, int, int], tiny_model_folder: Path, tmp_path: Path
) -> None:
    model = model_of(tiny_model_folder)
    kept = gradients(model)
    activations.apply(model, Policy(*policy, bytes=0, free=0), tmp_path)
    again = gradients(model)
    assert all(torch.equal(again[name], kept[name]) for name in kept)
    assert any(gradient.any() for gradient in kept.values())


@pytest.mark.parametrize("offloaded", [False, True])
def test_the_input_of_a_layer_leaves_memory_when_it_is_offloaded(
    offloaded: bool, tiny_model_folder: Path, tmp_path: Path
) -> None:
    model = model_of(tiny_model_folder)
    activations.apply(model, Policy(2, 0, 0, 0, 0) if offloaded else Policy(0, 2, 0, 0, 0), tmp_path)
    inputs: list[weakref.ref[torch.Tensor]] = []
    second = activations.recomputable_layers(model)[1]
    second.register_forward_pre_hook(lambda layer, args: inputs.append(weakref.ref(args[0])))
    output = model.get_base_model().model(input_ids=torch.zeros(1, 5, dtype=torch.long), use_cache=False)
    gc.collect()
    assert (inputs[0]() is None) == offloaded
    assert output.last_hidden_state.requires_grad


def test_measuring_holds_one_layer_at_a_time(tiny_model_folder: Path) -> None:
    model = model_of(tiny_model_folder)
    first, second = activations.recomputable_layers(model)
    saved: list[StorageWeakRef] = []
    gone: list[bool] = []
    first.mlp.gate_proj.register_forward_hook(lambda _, __, y: saved.append(StorageWeakRef(y.untyped_storage())))
    second.register_forward_pre_hook(lambda *_: gone.append(saved[0].expired()))
    activations.measure(model, length=24, batch_size=1)
    assert gone == [True]


def paged_policy(
    free: int, forward: float, reading: float, draws: int | None = 0, beside: int = 0
) -> activations.Policy:
    """Return what is chosen for 8 micro-batches over 10 layers of 100 MB each, of which 100 MB are kept for each."""
    layers = [activations.Costs(100 * 10**6, 10**6, draws)] * 10
    base, pace = activations.Base(10**9, 2 * 10**8, beside), activations.Pace(forward, reading)
    return activations.decide(layers, 0, activations.WORKSPACE + free, 1, base=base, passes=8, state=0, pace=pace)


def test_a_base_is_paged_for_each_pass_where_computing_hides_that_and_for_the_step_where_not() -> None:
    room = 700 * 10**6  # less than the base, and than two layers of it with all that is kept
    hidden = paged_policy(room, forward=10.0, reading=1.0)
    assert hidden.paged is not None and not hidden.together
    assert hidden.recomputed == 8  # as few as possible: 200 MB at work, 200 of the base, 2 × 100 kept, 8 inputs
    shown = paged_policy(room, forward=0.1, reading=10.0)
    assert shown.paged is not None and shown.together and shown.recomputed == 10
    assert not paged_policy(room, forward=0.1, reading=10.0, draws=None).together  # it could not draw as it would


def test_a_base_that_would_fit_with_all_recomputed_is_paged_where_that_is_faster() -> None:
    room = 1500 * 10**6
    resident = paged_policy(room, forward=0.1, reading=10.0)
    assert resident.paged is None and resident.recomputed == 8
    paged = paged_policy(room, forward=10.0, reading=1.0)
    assert paged.paged is not None and paged.recomputed == 0
    assert paged_policy(2500 * 10**6, forward=10.0, reading=1.0).paged is None


def test_an_embedding_that_is_the_head_too_is_counted_beside_what_is_paged() -> None:
    """Without that a base with 300 MB of it was taken to fit into 2,300 MB, and thrashed."""
    room = 2300 * 10**6
    assert paged_policy(room, forward=10.0, reading=1.0).paged is None
    paged = paged_policy(room, forward=10.0, reading=1.0, beside=300 * 10**6)
    assert paged.paged == room - 1200 * 10**6 - 300 * 10**6 - activations.CACHED


def test_a_policy_never_takes_more_than_there_is() -> None:
    for free in range(450 * 10**6, 2500 * 10**6, 50 * 10**6):
        for forward, reading in ((10.0, 1.0), (0.1, 10.0)):
            policy = paged_policy(free, forward, reading)
            inputs = policy.recomputed * (8 if policy.together else 1) * 10**6
            kept = policy.kept * 10**8
            assert inputs + kept + (policy.paged or 10**9) + activations.WORKSPACE <= policy.free

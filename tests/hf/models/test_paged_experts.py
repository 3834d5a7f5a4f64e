"""Of a mixture that is paged, decoding reads the experts that routers choose; the bits are those of one in memory."""

import gc
import os
from collections import defaultdict
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers as t
from peft import get_peft_model
from torch import Tensor, nn

from halfbyte import hf, mapped
from halfbyte.generate.native_decoder import NativeDecoder
from halfbyte.hf import not_linear, quantize_checkpoint
from halfbyte.hf.layers import activations
from halfbyte.hf.layers.activations import Policy, recomputable_layers
from halfbyte.hf.layers.expert_targets import own_words
from halfbyte.hf.layers.experts import Experts
from halfbyte.hf.layers.lora_config import lora_config
from halfbyte.hf.models import paging
from halfbyte.hf.models.pager import Pager
from halfbyte.kernels import can_decode
from halfbyte.optim.paged import IN_MEMORY, filesystem

from .pages import resident

pytestmark = pytest.mark.skipif(not mapped.available(), reason="what is mapped is told on Linux alone")
EXPERTS, LAYERS = 8, 4
SHAPE: dict[str, Any] = {
    "vocab_size": 128, "hidden_size": 256, "intermediate_size": 2048, "moe_intermediate_size": 2048, "head_dim": 64,
    "num_hidden_layers": LAYERS, "num_attention_heads": 4, "num_key_value_heads": 2, "num_local_experts": EXPERTS,
    "num_experts": EXPERTS, "num_experts_per_tok": 2, "mlp_only_layers": [0], "pad_token_id": 0,
    "tie_word_embeddings": False,
}  # fmt: skip
"""Experts of 0.8 MB in 4 bits, so that pages can be told. Qwen's first layer has none."""
CHOSEN = range(EXPERTS // 2)
"""Experts that the routers of ``folder`` choose: whatever a token is, the first two of them or the others."""


@pytest.fixture(scope="module", params=["Mixtral", "Qwen3Moe"])
def folder(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    made = tmp_path_factory.mktemp("mixture")
    torch.manual_seed(0)
    config = getattr(t, f"{request.param}Config")(**SHAPE)
    model = t.AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16)
    for name, router in model.named_parameters():
        if name.endswith("mlp.gate.weight"):
            with torch.no_grad():
                direction = torch.randn(SHAPE["hidden_size"])
                for expert, sign in zip(CHOSEN, (4, 5, -4, -5), strict=True):
                    router[expert] = sign * direction
                router[len(CHOSEN) :] = 0
    model.save_pretrained(made / "16-bit")
    quantize_checkpoint(made / "16-bit", made / "4-bit")
    os.sync()  # what has not been written cannot be dropped
    return made / "4-bit"


def experts_of(model: nn.Module) -> dict[int, Experts]:
    """Return the experts of each layer that has any."""
    found = enumerate(map(paging._experts, recomputable_layers(model)))
    return {number: experts for number, experts in found if experts is not None}


def attached(model: nn.Module, experts: int = 0) -> Pager:
    """Page a model in what has to have room and ``experts`` more, far less than its experts take."""
    units = paging.units_of(model)
    pager = paging.attach(model, paging.least_bytes(model) + experts * units[-2].experts[0].nbytes)
    assert pager is not None
    assert pager.budget < sum(part.nbytes for unit in units for part in unit.experts)
    return pager


def watched(model: nn.Module) -> dict[int, set[int]]:
    """Return what fills with the experts that are asked for, by their layer."""
    chosen: dict[int, set[int]] = defaultdict(set)

    def noting(number: int, before_use: Callable[[Sequence[int]], None]) -> Callable[[Sequence[int]], None]:
        def note(experts: Sequence[int]) -> None:
            chosen[number].update(experts)
            before_use(experts)

        return note

    for number, experts in experts_of(model).items():
        assert experts.before_use is not None
        experts.before_use = noting(number, experts.before_use)
    return chosen


def emptied(model: nn.Module, pager: Pager) -> None:
    """Have nothing of a model in memory; models before it may have its pages mapped."""
    gc.collect()
    pager._files.drop(mapped.pieces_of(paging._tensors(model)))


def there(pager: Pager, layer: int, expert: int) -> float:
    """Return the share of an expert's pages that is in memory, those apart that others lie on too."""
    return resident(mapped.inner(pager._parts[layer, 1 + expert].pieces))


@torch.no_grad()
def decoded(model: Any, ids: Tensor, read: int) -> list[Tensor]:
    """Return the logits of a prompt of so many tokens, and of each that follows."""
    found = model(input_ids=ids[:, :read], use_cache=True)
    logits = [found.logits]
    for place in range(read, ids.shape[1]):
        found = model(input_ids=ids[:, place : place + 1], past_key_values=found.past_key_values, use_cache=True)
        logits.append(found.logits)
    return logits


@pytest.mark.parametrize("more", [0, 5])
def test_logits_are_those_of_a_base_in_memory(folder: Path, more: int) -> None:
    model = hf.load(folder, device="cpu").eval()
    ids = torch.randint(0, 128, (1, 24), generator=torch.Generator().manual_seed(3))
    exact = decoded(model, ids, 12)
    pager = attached(model, more)
    for _ in range(2):
        assert all(map(torch.equal, decoded(model, ids, 12), exact))
    assert pager.traffic.read > 0
    paging.detach(model)
    assert all(experts.before_use is None for experts in experts_of(model).values())
    assert all(map(torch.equal, decoded(model, ids, 12), exact))


@pytest.mark.parametrize("recomputed", [0, LAYERS])
def test_losses_and_gradients_are_those_of_a_base_in_memory(folder: Path, recomputed: int) -> None:
    model = hf.load(folder, device="cpu")
    config = lora_config(model, rank=3, lora_alpha=6, never=not_linear(model), lora_dropout=0.1)
    torch.manual_seed(0)
    with own_words():
        wrapped: Any = hf.prepare_for_training(get_peft_model(model, config)).train()
    ids = torch.randint(0, 128, (2, 7))
    activations.apply(wrapped, Policy(0, recomputed, LAYERS - recomputed, 0, 0))

    def gradients() -> list[Tensor]:
        torch.manual_seed(1)
        wrapped.zero_grad()
        loss = wrapped(input_ids=ids, labels=ids).loss
        loss.backward()
        return [loss.detach(), *(p.grad.clone() for p in wrapped.parameters() if p.grad is not None)]

    exact = gradients()
    attached(wrapped)
    for _ in range(2):
        found = gradients()
        assert len(found) == len(exact) > 1 and all(map(torch.equal, found, exact))


def test_experts_that_no_router_chooses_are_not_read(folder: Path) -> None:
    if filesystem(folder) in IN_MEMORY:
        pytest.skip("files of a tmpfs are memory")
    model = hf.load(folder, device="cpu").eval()
    pager = attached(model, 3)  # so that those that are chosen have room
    chosen = watched(model)
    emptied(model, pager)
    for token in range(1, 13):  # the first one's embedding is zero, and so are its router's scores
        with torch.no_grad():
            model(input_ids=torch.tensor([[token]]))
    for layer in experts_of(model):
        assert chosen[layer] <= set(CHOSEN)
        for expert in set(range(EXPERTS)) - chosen[layer]:
            assert there(pager, layer, expert) == 0
    always = sum(unit.always.nbytes for unit in pager._units)
    assert pager.traffic.read <= always + sum(pager._parts[n, 1 + e].nbytes for n in chosen for e in chosen[n])


def test_a_prompt_of_many_tokens_reads_whole_layers(folder: Path) -> None:
    model = hf.load(folder, device="cpu").eval()
    pager = attached(model)
    with torch.no_grad():
        model(input_ids=torch.zeros(1, paging.MANY * EXPERTS // 2, dtype=torch.long))
    pager.enter(LAYERS - 1, backward=False, training=False)  # reading of the last one has ended
    assert pager.traffic.read >= sum(piece.nbytes for unit in pager._units[:LAYERS] for piece in unit.pieces)


def test_hot_experts_stay_and_cold_ones_go(folder: Path) -> None:
    if filesystem(folder) in IN_MEMORY:
        pytest.skip("files of a tmpfs are memory")
    model = hf.load(folder, device="cpu")
    pager = attached(model)
    emptied(model, pager)
    room = pager.budget - sum(unit.always.nbytes for unit in pager._units)
    size = pager._parts[LAYERS - 1, 1].nbytes
    layers, hot = list(experts_of(model)), (0, 1)
    assert len(layers) * len(hot) * size < room < len(layers) * EXPERTS * size
    for turn in range(30):
        for layer in layers:
            pager.enter(layer, backward=False, training=False, few=True)
            cold = 2 + turn % (EXPERTS - 2)
            pager.choose(layer, [*hot, cold])
            assert all(there(pager, layer, expert) == 1 for expert in (*hot, cold))
            assert pager._held <= pager.budget
    held = {(layer, expert): there(pager, layer, expert) for layer in layers for expert in range(EXPERTS)}
    assert all(share in (0, 1) for share in held.values()), held
    assert all(resident(pager._parts[layer, 1 + expert].pieces) == 1 for layer in layers for expert in hot)
    assert sum(held.values()) * size <= room
    before = pager.traffic.read
    for layer in layers:
        pager.enter(layer, backward=False, training=False, few=True)
        pager.choose(layer, hot)
    assert pager.traffic.read == before


@pytest.mark.skipif(not can_decode(), reason="no native products")
def test_native_calls_read_the_experts_that_they_choose(folder: Path) -> None:
    if filesystem(folder) in IN_MEMORY:
        pytest.skip("files of a tmpfs are memory")
    model = hf.load(folder, device="cpu").eval()
    hf.fuse(model)
    decoder = NativeDecoder(model)
    layers = list(experts_of(model))
    used: dict[int, set[int]] = defaultdict(set)

    def stepped() -> list[Tensor]:
        sequence = decoder.begin([1], None)
        found = [decoder.read(sequence, [1])]
        for token in range(2, 20):
            found.append(decoder.step([sequence], [token])[0].clone())
            for layer, experts in enumerate(decoder.paged.decoder.chosen()):
                assert (layer in layers) == bool(experts)
                used[layer].update(experts)
        decoder.end(sequence)
        return found

    exact = stepped()
    assert all(0 < len(used[layer]) <= len(CHOSEN) for layer in layers)
    pager = attached(model, 3)
    emptied(model, pager)
    chosen = watched(model)  # by the prompt
    assert all(map(torch.equal, stepped(), exact))
    for layer in layers:
        for expert in set(range(EXPERTS)) - used[layer] - chosen[layer]:
            assert there(pager, layer, expert) == 0
    last = decoder.paged.decoder.chosen()
    assert all((layer, 1 + expert) in pager._uses for layer in layers for expert in last[layer])


class Calls:
    """What :func:`paging.following` asks of a decoder."""

    def __init__(self) -> None:
        self.place = torch.zeros(1, dtype=torch.int64)
        self.at = self.place.data_ptr()
        self.used: list[list[int]] = [[] for _ in range(LAYERS)]

    def advise(self, on: bool) -> None: ...

    def chosen(self) -> list[list[int]]:
        return self.used


def test_what_a_native_call_says_it_used_keeps_to_the_budget(folder: Path) -> None:
    if filesystem(folder) in IN_MEMORY:
        pytest.skip("files of a tmpfs are memory")
    model = hf.load(folder, device="cpu")
    calls = Calls()
    with paging.following(model, calls):
        pass  # nothing is paged
    pager = attached(model)
    emptied(model, pager)
    layers = list(experts_of(model))
    for turn in range(20):
        with paging.following(model, calls):
            for layer in layers:
                calls.place[0] = layer
                calls.used[layer] = [0, 1 + turn % (EXPERTS - 1)]
                for expert in calls.used[layer]:  # as the call would
                    list(pager._files.read(pager._parts[layer, 1 + expert].pieces, True))
        assert pager._held <= pager.budget
    always = sum(unit.always.nbytes for unit in pager._units)
    assert pager.traffic.read <= always  # of its own accord the pager reads no expert
    held = {(layer, expert): there(pager, layer, expert) for layer in layers for expert in range(EXPERTS)}
    assert all(held[layer, 0] == 1 for layer in layers) and 0 in held.values()
    assert sum(held.values()) * pager._parts[LAYERS - 1, 1].nbytes <= pager.budget

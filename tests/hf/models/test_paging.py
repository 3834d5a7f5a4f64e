"""A base that is paged computes what one in memory computes, to the last bit, within its budget."""

import mmap
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch import Tensor
from transformers import GPT2Config, GPT2LMHeadModel

from halfbyte import hf, mapped
from halfbyte.errors import InputError
from halfbyte.generate.native_decoder import NativeDecoder
from halfbyte.hf.layers import activations
from halfbyte.hf.layers.activations import Policy, recomputable_layers
from halfbyte.hf.models import pager as pager_module
from halfbyte.hf.models import paging
from halfbyte.hf.trainers.layer_major import LayerMajor
from halfbyte.optim.paged import IN_MEMORY, filesystem

from .pages import resident

pytestmark = pytest.mark.skipif(not mapped.available(), reason="what is mapped is told on Linux alone")
LAYERS = 5
"""Of ``mapped_folder``."""


@pytest.fixture
def folder(mapped_folder: Path) -> Path:
    return mapped_folder


def opened(folder: Path, dropout: float = 0.1) -> Any:
    model = hf.load(folder, device="cpu")
    torch.manual_seed(0)
    config = LoraConfig(r=4, target_modules="all-linear", lora_dropout=dropout, init_lora_weights=False)
    return hf.prepare_for_training(get_peft_model(model, config)).train()


def test_pieces_are_the_bytes_of_the_file_that_tensors_are(folder: Path) -> None:
    model = hf.load(folder, device="cpu")
    layer = recomputable_layers(model)[3]
    weights = [layer.mlp.down_proj.weight, layer.self_attn.q_proj.weight]  # type: ignore[union-attr]
    pieces = mapped.pieces_of([*weights, torch.zeros(9)])  # the last lies in no file
    assert pieces and sum(piece.nbytes for piece in pieces) >= sum(weight.nbytes for weight in weights)
    for weight in weights:
        [piece] = [p for p in pieces if p.address <= weight.data_ptr() < p.address + p.nbytes]
        place = piece.offset + weight.data_ptr() - piece.address
        assert Path(piece.file).read_bytes()[place : place + weight.nbytes] == bytes(weight.numpy().tobytes())
        assert piece.address % mmap.PAGESIZE == piece.offset % mmap.PAGESIZE == 0


def test_all_of_a_layer_and_of_the_head_is_paged(folder: Path) -> None:
    units = paging.units_of(hf.load(folder, device="cpu"))
    assert len(units) == LAYERS + 1
    inner = 256 * (256 + 128 + 128 + 256) + 3 * 256 * 3072
    for unit in units[:-1]:  # codes and block constants, what lies between them, and pages that are cut
        assert inner // 2 + inner // 64 <= unit.nbytes <= inner // 2 + inner // 64 + 2**17
    assert 512 * 256 * 2 <= units[-1].nbytes <= 512 * 256 * 2 + 2**13


def gradients(model: Any, ids: Tensor, policy: Policy) -> tuple[Tensor, list[Tensor]]:
    activations.apply(model, policy)
    torch.manual_seed(1)
    model.zero_grad()
    loss = model(input_ids=ids, labels=ids).loss
    loss.backward()
    return loss.detach(), [p.grad.clone() for p in model.parameters() if p.requires_grad]


@pytest.mark.parametrize("recomputed", [0, 2, LAYERS])
@pytest.mark.parametrize("stay", [0, 2])
def test_losses_and_gradients_are_those_of_a_base_in_memory(folder: Path, recomputed: int, stay: int) -> None:
    model = opened(folder)
    ids = torch.randint(0, 256, (2, 33))
    policy = Policy(0, recomputed, LAYERS - recomputed, 0, 0)
    units = paging.units_of(model)
    exact, sums = gradients(model, ids, policy)
    pager = paging.attach(model, paging.least_bytes(model) + sum(unit.nbytes for unit in units[:stay]))
    assert pager and pager.pinned == set(range(stay))
    for _ in range(2):
        loss, found = gradients(model, ids, policy)
        assert torch.equal(loss, exact) and all(map(torch.equal, found, sums))
    paging.detach(model)
    assert paging.pager_of(model) is None and torch.equal(gradients(model, ids, policy)[0], exact)


def test_a_step_reads_twice_what_does_not_stay(folder: Path) -> None:
    model = opened(folder)
    ids, policy = torch.randint(0, 256, (1, 16)), Policy(0, LAYERS, 0, 0, 0)
    sizes = [unit.nbytes for unit in paging.units_of(model)]
    pager = paging.attach(model, paging.least_bytes(model) + sizes[0])
    assert pager
    gradients(model, ids, policy)
    before = pager.traffic.read
    for _ in range(3):
        gradients(model, ids, policy)
    # each way all but the one that stays, and but for those that the turn finds in memory
    most = 2 * sum(sizes[1:])
    assert 3 * (most - 2 * sum(sizes[1:3]) - 2 * sizes[-1]) <= pager.traffic.read - before <= 3 * most


def test_what_is_read_is_in_memory_and_what_is_dropped_is_not(tmp_path: Path) -> None:
    if filesystem(tmp_path) in IN_MEMORY:
        pytest.skip("files of a tmpfs are memory")
    nbytes = 2**26
    (tmp_path / "file").write_bytes(os.urandom(nbytes))
    os.sync()  # what has not been written cannot be dropped
    tensor = torch.from_file(str(tmp_path / "file"), shared=False, size=nbytes, dtype=torch.uint8)
    [whole] = mapped.pieces_of([tensor])
    first, last = (mapped.pieces_of([tensor[part]]) for part in (slice(2**22), slice(2**25, None)))
    files = mapped.Files([whole])
    files.drop([whole])
    assert resident((whole,)) == 0
    assert sum(files.read(last)) == 2**25 and resident(tuple(last)) == 1 and resident(tuple(first)) == 0
    assert sum(files.read(first)) == 2**22 and resident(tuple(first)) == 1
    files.drop(last)
    assert resident(tuple(last)) == 0 and resident(tuple(first)) == 1
    assert bytes(tensor.numpy().tobytes()) == (tmp_path / "file").read_bytes()


def test_what_was_read_of_the_embedding_is_given_back(folder: Path, tmp_path: Path) -> None:
    if filesystem(tmp_path) in IN_MEMORY:
        pytest.skip("files of a tmpfs are memory")
    model = opened(Path(shutil.copytree(folder, tmp_path / "model")))  # a file that no other model has mapped
    os.sync()
    embedding = model.get_base_model().get_input_embeddings()
    table = mapped.inner(mapped.pieces_of([embedding.weight]))
    embedding.weight.sum()  # as whoever looks at all rows reads it
    assert resident(table) == 1
    assert paging.attach(model, paging.least_bytes(model))
    assert resident(table) < 0.5  # pages that the cache holds together with others' stay


def test_an_embedding_that_is_trained_stays_as_it_is(folder: Path) -> None:
    model = hf.load(folder, device="cpu")
    weight = model.get_input_embeddings().weight.requires_grad_()
    with torch.no_grad():
        changed = weight.add_(1).clone()  # in memory alone
    assert paging.attach(model, paging.least_bytes(model))
    assert torch.equal(weight, changed)


def test_no_more_is_in_memory_than_the_budget(folder: Path) -> None:
    model = opened(folder)
    pager = paging.attach(model, paging.least_bytes(model))
    assert pager
    most = []
    enter = pager.enter

    def watched(number: int, **kinds: bool) -> None:
        enter(number, **kinds)
        with pager._changed:
            most.append(sum(pager._units[unit].nbytes for unit, _ in pager._here))
            assert (number, 0) in pager._here

    pager.enter = watched  # type: ignore[method-assign]
    gradients(model, torch.randint(0, 256, (1, 16)), Policy(0, 3, LAYERS - 3, 0, 0))
    assert len(most) > 2 * LAYERS and max(most) <= pager.budget


def orders(number: int, backward: bool, training: bool) -> list[int]:
    return list(dict.fromkeys(pager_module._order(number, 6, backward, training)))


def test_the_order_turns_where_the_pass_does() -> None:
    assert orders(3, False, True) == [3, 4, 5, 2, 1, 0]
    assert orders(3, True, True) == [3, 2, 1, 0, 4, 5]
    assert orders(3, False, False) == [3, 4, 5, 0, 1, 2]


def test_too_little_memory_is_told_and_a_file_that_goes_too(folder: Path, tmp_path: Path) -> None:
    model = opened(folder)
    with pytest.raises(InputError, match=r"must be in memory at a time \(2 layers\), but .* left for it: raise memory"):
        paging.attach(model, 1000)
    with pytest.raises(InputError, match="must be in memory"):
        paging.attach(model, -5)
    copy = Path(shutil.copytree(folder, tmp_path / "copy"))
    model = opened(copy)
    pager = paging.attach(model, paging.least_bytes(model))
    assert pager
    pager.enter(0, backward=False, training=False)
    [file] = {piece.file for unit in pager._units for piece in unit.pieces}
    with open(file, "r+b") as shorter:
        shorter.truncate(2**20)
    with pytest.raises(InputError, match=r"can no longer be read \(it has 1,048,576 bytes now\)"):
        pager.enter(4, backward=False, training=False)


def step(model: Any, batches: list[Tensor], losses_of: Callable[[list[Any]], list[Tensor]]) -> tuple[Any, ...]:
    torch.manual_seed(7)
    model.zero_grad()
    losses = losses_of([lambda ids=ids: model(input_ids=ids, labels=ids).loss for ids in batches])
    return [loss.detach() for loss in losses], [p.grad for p in model.parameters() if p.requires_grad]


@pytest.mark.parametrize("dropout", [0.0, 0.1])
@pytest.mark.parametrize("offloaded", [0, 2])
def test_micro_batches_together_give_what_they_give_one_by_one(folder: Path, dropout: float, offloaded: int) -> None:
    model = opened(folder, dropout)
    batches = [torch.randint(0, 256, (2, length)) for length in (17, 33, 5, 33)]
    costs = activations.measure(model, 8, 1)
    draws = sum(cost.draws or 0 for cost in costs)
    assert {cost.draws for cost in costs} == ({4} if dropout else {0})  # q k v, o, gate up, down
    activations.apply(model, Policy(offloaded, LAYERS - offloaded, 0, 0, 0))

    def one_by_one(losses: list[Any]) -> list[Tensor]:
        made = []
        for loss in losses:
            made.append(loss())
            made[-1].backward()
        return made

    def together(losses: list[Any]) -> list[Tensor]:
        made = LayerMajor(model, draws).losses(losses)
        total = made[0]
        for loss in made[1:]:
            total = total + loss
        total.backward()
        return made

    exact = step(model, batches, one_by_one)
    state = torch.get_rng_state()
    pager = paging.attach(model, paging.least_bytes(model))
    assert pager
    found = step(model, batches, together)
    assert all(map(torch.equal, found[0], exact[0])) and all(map(torch.equal, found[1], exact[1]))
    assert torch.equal(torch.get_rng_state(), state)
    assert pager.traffic.read < 2.5 * sum(unit.nbytes for unit in pager._units)


def test_tokens_that_one_native_call_decodes_are_those_of_a_base_in_memory(folder: Path) -> None:
    model = opened(folder, 0.0).eval()
    decoder = NativeDecoder(model)
    ids = torch.randint(0, 256, (20,)).tolist()

    def decoded() -> list[Tensor]:
        sequence = decoder.begin(ids, "default")
        found = [decoder.read(sequence, ids)]
        found += [decoder.step([sequence], [token])[0].clone() for token in range(40)]
        decoder.end(sequence)
        decoder.kept.forget("default")
        return found

    exact = decoded()
    pager = paging.attach(model, paging.least_bytes(model))
    assert pager
    decoder = NativeDecoder(model)  # as where a model is opened that does not fit
    assert all(map(torch.equal, decoded(), exact))
    assert pager.traffic.read > 0
    before = pager.traffic.read
    assert all(map(torch.equal, decoded(), exact)) and pager.traffic.read > before


def test_a_file_that_is_cut_while_it_is_used_ends_the_process_with_a_sentence(folder: Path, tmp_path: Path) -> None:
    copy = Path(shutil.copytree(folder, tmp_path / "copy"))
    program = (
        "import os, sys, torch; from halfbyte import hf\n"
        f"model = hf.load({str(copy)!r}, device='cpu')\n"
        f"os.truncate({str(copy / 'model.safetensors')!r}, 4096)\n"
        "model(input_ids=torch.zeros(1, 3, dtype=torch.long))\n"
    )
    ended = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
    assert ended.returncode == 2
    assert ended.stderr.splitlines()[-1] == (
        f"Error: The weights of {copy} can no longer be read: a file was changed while it was in use, or its disk "
        "fails. Restore it and start again; a run goes on from its last checkpoint."
    )


def test_a_16_bit_model_beyond_memory_is_opened_from_a_quantized_copy(
    tiny_model_folder: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    ids = torch.arange(9)[None]
    model = hf.load(tiny_model_folder, device="cpu")
    exact = model(input_ids=ids).logits
    assert not mapped.pieces_of([model.model.layers[1].mlp.up_proj.weight])
    monkeypatch.setattr("halfbyte.hf.models.loader.free_memory", lambda: 10_000)
    model = hf.load(tiny_model_folder, device="cpu")
    assert "would not fit into memory, so it is mapped from its copy in" in caplog.text
    assert mapped.pieces_of([model.model.layers[1].mlp.up_proj.weight]) and model.name_or_path == str(tiny_model_folder)
    assert torch.equal(model(input_ids=ids).logits, exact)


def test_a_disk_that_stalls_is_told_and_waited_for(
    folder: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    model = opened(folder)
    read = mapped.Files.read

    def late(files: mapped.Files, *args: Any) -> Any:
        time.sleep(1.5)
        return read(files, *args)

    monkeypatch.setattr(mapped.Files, "read", late)
    monkeypatch.setattr(pager_module, "PATIENCE", 0.2)
    pager = paging.attach(model, paging.least_bytes(model))
    assert pager
    pager.enter(0, backward=False, training=False)
    assert "Waiting for the disk: layer 0 does not come" in caplog.text and pager.traffic.waited > 1


def test_random_numbers_outside_of_the_layers_are_noticed() -> None:
    config = GPT2Config(n_embd=32, n_layer=2, n_head=2, vocab_size=64, n_positions=32)
    outside = GPT2LMHeadModel(config).train()
    assert {cost.draws for cost in activations.measure(outside, 8, 1)} == {None}  # its embedding has dropout
    config.embd_pdrop = config.attn_pdrop = config.resid_pdrop = 0.0
    assert {cost.draws for cost in activations.measure(GPT2LMHeadModel(config).train(), 8, 1)} == {0}

"""The bytes of a plan, against tensors as they are: quantized weights, optimizer state, the pool's blocks."""

import pytest
import torch

from halfbyte.hf.layers.activations import Policy
from halfbyte.kernels import pool
from halfbyte.optim import AdamW
from halfbyte.plan import memory
from halfbyte.plan.gpus import GB
from halfbyte.plan.memory import Base, memory_of, pooled, state_bytes, weight_bytes
from halfbyte.plan.published import everywhere, llama
from halfbyte.quant import quantize_4bit


@pytest.mark.parametrize("double_quant", [True, False])
@pytest.mark.parametrize(("rows", "columns", "blocksize"), [(96, 160, 64), (33, 65, 32), (128, 4096, 4096)])
def test_a_weight_takes_what_its_codes_and_constants_do(
    rows: int, columns: int, blocksize: int, double_quant: bool
) -> None:
    weight = quantize_4bit(torch.randn(rows, columns), "nf4", blocksize, double_quant)
    tensors = [weight.packed, weight.statistics.absmax]
    tensors += [weight.statistics.nested.absmax] if weight.statistics.nested else []
    assert weight_bytes(rows, columns, "nf4", blocksize, double_quant) == sum(tensor.nbytes for tensor in tensors)


def test_other_formats() -> None:
    assert weight_bytes(8, 64, "none", None, False) == 1024
    assert weight_bytes(8, 64, "int8", "row", False) == 512 + 32
    assert weight_bytes(8, 64, "int8", 64, False) == 512 + 32


@pytest.mark.parametrize("bits", [8, 32])
def test_optimizer_state_is_what_the_optimizer_says(bits: int) -> None:
    sizes = [5000, 4095, 4096, 300_001]
    parameters = [torch.zeros(size, requires_grad=True) for size in sizes]
    for parameter in parameters:
        parameter.grad = torch.ones_like(parameter)
    optimizer = AdamW(parameters, state_bits=bits)
    optimizer.step()
    assert state_bytes(sizes, f"adamw_{bits}bit") == optimizer.state_bytes()


@pytest.mark.parametrize("count", [10, 2**20 - 1, 2**20, 2**20 + 1, 2_359_296, 6_291_456, 17_000_000])
def test_a_tensor_takes_what_the_pool_gives_it(count: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(memory, "huge_pages", lambda: False)
    own = pool.Pool()
    if count >= pool.SMALLEST:
        block = own.take(count)
        assert pooled(count) == own.used
        del block
    else:
        assert pooled(count) == count
    monkeypatch.setattr(memory, "huge_pages", lambda: True)
    assert pooled(count) % pool.HUGE_PAGE == 0 or count < pool.SMALLEST
    assert pooled(count) >= count


def test_a_recomputed_layer_leaves_its_input_alone() -> None:
    shape = llama("1B")
    ranks, base = everywhere(shape, 16), Base(10, 10, 20)
    kept = memory_of(shape, ranks, base, Policy(0, 0, 16, 0, 0), 2048, 2047, "adamw_8bit")
    again = memory_of(shape, ranks, base, Policy(0, 16, 0, 0, 0), 2048, 2047, "adamw_8bit")
    disk = memory_of(shape, ranks, base, Policy(16, 0, 0, 0, 0), 2048, 2047, "paged_adamw_8bit")
    assert again.kept == 0 and again.inputs == 16 * 2048 * 2048 * 2
    assert kept.peak > again.peak > disk.peak
    assert kept.anonymous == kept.peak - 20
    assert disk.state == 0 and disk.paged_state == again.state


def test_untied_embeddings_are_there_as_far_as_they_are_read() -> None:
    shape = llama("7B")
    whole, some = (memory.base_bytes(shape, "nf4", 64, True, distinct=count) for count in (None, 1000))
    assert whole[1] - some[1] == 2 * 4096 * 31_000
    assert sum(whole) == pytest.approx(3.87 * GB, rel=0.01)

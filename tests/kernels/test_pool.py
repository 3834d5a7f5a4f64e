"""The pool of a step's large tensors: whose memory a tensor has, for how long, and how much is held in all."""

import gc
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch

from halfbyte.kernels import pool
from halfbyte.kernels.pool import HUGE_PAGE, SLACK, SMALLEST, Pool
from halfbyte.memory import anonymous_memory

MIB = 2**20


@pytest.fixture
def own(monkeypatch: pytest.MonkeyPatch) -> Iterator[Pool]:
    """A pool of the test's own."""
    own = Pool()
    monkeypatch.setattr(pool, "_pool", own)
    yield own
    own.release()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32, torch.int32, torch.uint8])
@pytest.mark.parametrize("shape", [(), (0, 7), (3, 5), (1024, 1031), (2, 3, 700, 1001)])
def test_a_tensor_is_what_torch_would_give(own: Pool, shape: tuple[int, ...], dtype: torch.dtype) -> None:
    ours, theirs = pool.empty(shape, dtype), torch.empty(shape, dtype=dtype)
    assert (ours.shape, ours.stride(), ours.dtype, ours.device) == (
        theirs.shape,
        theirs.stride(),
        theirs.dtype,
        theirs.device,
    )
    assert not ours._is_view()  # what a function with a gradient returns may be changed in place
    assert (own.used > 0) == (ours.nbytes >= SMALLEST)
    assert torch.equal(ours.fill_(3), torch.full(shape, 3, dtype=dtype))


def test_tensors_on_other_devices_are_torchs(own: Pool) -> None:
    assert pool.empty((2 * MIB,), torch.uint8, "meta").device.type == "meta"
    assert own.used == 0


def test_memory_is_handed_out_again_once_the_last_tensor_over_it_is_gone(own: Pool) -> None:
    x = pool.empty((3 * MIB,), torch.uint8)
    address = x.data_ptr()
    assert address % HUGE_PAGE == 0
    part = x.view(3, MIB)[1].fill_(7)
    del x
    assert pool.empty((3 * MIB,), torch.uint8).data_ptr() != address
    assert bool((part == 7).all())
    del part
    gc.collect()
    assert pool.empty((3 * MIB - 1000,), torch.uint8).data_ptr() == address  # nearly as large


def test_the_graph_of_a_function_holds_what_it_saved(own: Pool) -> None:
    x = pool.empty((MIB,), torch.float32).fill_(2).requires_grad_()
    y = (x * pool.empty((MIB,), torch.float32).fill_(3)).sum()
    others = [pool.empty((MIB,), torch.float32).fill_(-1) for _ in range(3)]
    assert torch.autograd.grad(y, x)[0].unique().tolist() == [3.0]
    assert all(bool((other == -1).all()) for other in others)


def test_no_more_is_held_than_was_once_in_use_and_the_slack(own: Pool) -> None:
    most = 0
    for size in (40, 9, 100, 33, 80, 21, 64):  # never two of a size
        held = [pool.empty((size * MIB,), torch.uint8) for _ in range(3)]
        most = max(most, 3 * size * MIB)
        assert own.used >= 3 * size * MIB
        assert own.used + own.unused <= 1.125 * most + SLACK
        del held
    assert own.unused > 0
    pool.release()
    assert (own.used, own.unused) == (0, 0)


def test_what_is_released_goes_back_to_the_system(own: Pool) -> None:
    held = pool.empty((200 * MIB,), torch.uint8).fill_(1)
    taken = anonymous_memory()
    del held
    pool.release()
    assert anonymous_memory() < taken - 150 * MIB


def test_threads_never_share_a_block(own: Pool) -> None:
    def work(value: int) -> bool:
        for turn in range(40):
            x = pool.empty((MIB + 4096 * (turn % 3),), torch.uint8).fill_(value)
            if not bool((x == value).all()):
                return False
        return True

    with ThreadPoolExecutor(4) as threads:
        assert all(threads.map(work, range(4)))

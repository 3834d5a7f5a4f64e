"""Key ranges against the masks they stand for, and attention's gradients through autograd."""

import pytest
import torch
from torch import Tensor

from halfbyte.nn.attention import attention, key_ranges, mask_of, within_segments


@pytest.mark.parametrize("offset", [0, 3, None])
@pytest.mark.parametrize("behind, ahead", [(None, None), (None, 0), (2, 0), (2, 2), (0, 0)])
def test_ranges_say_what_the_mask_says(behind: int | None, ahead: int | None, offset: int | None) -> None:
    shape = (2, 5, 9)
    real = torch.ones(2, 9, dtype=torch.bool)
    real[0, :3] = real[1, 7:] = False
    first = 4 if offset is None else offset
    for padding in (None, real):
        ranges = key_ranges(shape, offset=offset, behind=behind, ahead=ahead, real=padding)
        mask = torch.zeros(2, 1, 5, 9, dtype=torch.bool)
        for b in range(2):
            for i in range(5):
                for j in range(9):
                    query = i + first
                    near = (behind is None or query - j <= behind) and (ahead is None or j - query <= ahead)
                    mask[b, 0, i, j] = near and (padding is None or bool(padding[b, j] and padding[b, query]))
        assert ranges.dtype == torch.int32 and ranges.shape == (2, 5, 2)
        assert torch.equal(mask_of(ranges, 9), mask)


def test_another_sequence_s_padding_says_nothing_of_queries() -> None:
    real = torch.tensor([[True, True, False]])
    ranges = key_ranges((1, 4, 3), offset=0, real=real, cross=True)
    assert torch.equal(ranges, torch.tensor([[[0, 2]] * 4], dtype=torch.int32))


def test_a_padding_mask_with_a_gap_has_no_ranges() -> None:
    assert key_ranges((1, 4, 4), ahead=0, real=torch.tensor([[True, False, True, True]])) is None
    assert key_ranges((1, 4, 4), ahead=0, real=torch.tensor([[False] * 4])).eq(0).all()


def test_segments_are_kept_apart() -> None:
    segments = torch.tensor([[0, 0, 1, 1, 1, 2], [0, 0, 0, 0, 0, 0]])
    ranges = key_ranges((2, 6, 6), ahead=0, segments=segments)
    same = segments[:, None, :, None] == segments[:, None, None, :]
    causal = torch.ones(6, 6, dtype=torch.bool).tril()
    assert torch.equal(mask_of(ranges, 6), same & causal)
    # the same from the bounds of the flattened batch
    plain = key_ranges((2, 6, 6), ahead=0)
    assert torch.equal(within_segments(plain, torch.tensor([0, 2, 5, 6, 12], dtype=torch.int32)), ranges)


def test_tokens_outside_all_segments_read_nothing() -> None:
    ranges = within_segments(key_ranges((1, 6, 6)), torch.tensor([1, 3, 5]))
    assert ranges.tolist() == [[[0, 0], [1, 3], [1, 3], [3, 5], [3, 5], [0, 0]]]


@pytest.mark.parametrize("dtype, bound", [(torch.float32, 1e-6), (torch.bfloat16, 1e-2)])
def test_gradients_are_those_of_torch_s_attention(dtype: torch.dtype, bound: float) -> None:
    generator = torch.Generator().manual_seed(0)
    q, k, v, dout = (
        torch.randn(2, 40, heads, 24, generator=generator).to(dtype).transpose(1, 2).requires_grad_()
        for heads in (6, 2, 2, 6)
    )
    ranges = key_ranges((2, 40, 40), behind=12, ahead=0)
    out = attention(q, k, v, ranges)
    got = [out, *torch.autograd.grad(out, (q, k, v), dout)]
    dense = torch.nn.functional.scaled_dot_product_attention(
        q.double(), k.double(), v.double(), mask_of(ranges, 40), enable_gqa=True
    )
    want = [dense, *torch.autograd.grad(dense, (q, k, v), dout.double())]
    for one, two in zip(got, want, strict=True):
        assert (one.double() - two.double()).norm() <= bound * two.double().norm()


def test_a_packed_row_is_its_samples_alone() -> None:
    generator = torch.Generator().manual_seed(1)
    lengths = [5, 70, 1, 64, 33]
    q, k, v, dout = (torch.randn(1, heads, sum(lengths), 32, generator=generator) for heads in (4, 2, 2, 4))
    bounds = torch.tensor([0, *lengths]).cumsum(0)
    packed = [x.clone().requires_grad_() for x in (q, k, v)]
    ranges = within_segments(key_ranges((1, sum(lengths), sum(lengths)), ahead=0), bounds)
    out = attention(*packed, ranges)
    out.backward(dout)
    for begin, end in zip(bounds[:-1].tolist(), bounds[1:].tolist(), strict=True):
        alone = [x[:, :, begin:end].clone().requires_grad_() for x in (q, k, v)]
        part = attention(*alone, key_ranges((1, end - begin, end - begin), ahead=0))
        part.backward(dout[:, :, begin:end])
        assert torch.allclose(out[:, :, begin:end], part, atol=1e-6)
        for one, two in zip(packed, alone, strict=True):
            assert torch.allclose(one.grad[:, :, begin:end], two.grad, atol=2e-6)


def test_only_one_number_a_query_is_kept_besides_the_arguments_and_the_output() -> None:
    q, k, v = (torch.randn(1, heads, 300, 8, requires_grad=True) for heads in (4, 2, 2))
    kept: list[Tensor] = []

    def keep(x: Tensor) -> Tensor:
        kept.append(x)
        return x

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda x: x):
        out = attention(q, k, v, key_ranges((1, 300, 300), ahead=0))
    assert sum(x.numel() for x in kept) == q.numel() + k.numel() + v.numel() + out.numel() + 4 * 300 + 2 * 300

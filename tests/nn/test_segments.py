"""Attention over segments by torch's own kernels, against attention over key ranges by the formula."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers import MistralConfig, Qwen2Config
from transformers.masking_utils import and_masks, causal_mask_function, packed_sequence_mask_function

from halfbyte import kernels
from halfbyte.hf.layers.attention import RangedMask, attention_forward, attention_mask
from halfbyte.hf.layers.separation import needs_mask
from halfbyte.nn.attention import attention, key_ranges
from halfbyte.nn.segments import Segment, attention_over_segments, segments_of

LENGTH = 13


def packed(*lengths: int) -> Tensor:
    return torch.cat([torch.full((length,), i) for i, length in enumerate(lengths)]).unsqueeze(0)


def padded(*spans: tuple[int, int]) -> Tensor:
    place = torch.arange(LENGTH)
    return torch.stack([(place >= first) & (place < last) for first, last in spans])


# batch, what key_ranges is told, and the segments that it means
CASES: dict[str, tuple[int, dict[str, Any], list[Segment]]] = {
    "causal": (2, {"ahead": 0}, [Segment(13, "causal")] * 2),
    "both ways": (2, {}, [Segment(13, "all")] * 2),
    "packed": (
        1,
        {"ahead": 0, "segments": packed(5, 1, 7)},
        [Segment(5, "causal"), Segment(1, "causal"), Segment(7, "causal")],
    ),
    "packed alike": (1, {"ahead": 0, "segments": packed(*[1] * 13)}, [Segment(1, "causal")] * 13),
    "padded right": (
        2,
        {"ahead": 0, "real": padded((0, 9), (0, 13))},
        [Segment(9, "causal"), Segment(4, "nothing"), Segment(13, "causal")],
    ),
    "padded left": (1, {"ahead": 0, "real": padded((4, 13))}, [Segment(4, "nothing"), Segment(9, "causal")]),
    "both ways, padded at both ends": (
        1,
        {"real": padded((2, 11))},
        [Segment(2, "nothing"), Segment(9, "all"), Segment(2, "nothing")],
    ),
    "a window wider than the segments": (
        1,
        {"ahead": 0, "behind": 7, "segments": packed(8, 5)},
        [Segment(8, "causal"), Segment(5, "causal")],
    ),
}


def ranges_of(batch: int, options: dict[str, Any]) -> Tensor:
    ranges = key_ranges((batch, LENGTH, LENGTH), **options)
    assert ranges is not None
    return ranges


def leaves(batch: int, groups: int) -> list[Tensor]:
    generator = torch.Generator().manual_seed(0)
    shapes = [(batch, LENGTH, heads, 16) for heads in (4, groups, groups)]
    return [torch.randn(shape, generator=generator).transpose(1, 2).requires_grad_() for shape in shapes]


def run(attend: Callable[..., Tensor], tensors: list[Tensor]) -> list[Tensor]:
    """The result ``[B, L, H, D]`` and the gradients of ``tensors``."""
    copies = [x.detach().clone().requires_grad_() for x in tensors]
    y = attend(*copies)
    dy = torch.randn(y.shape, generator=torch.Generator().manual_seed(1))
    return [y.detach(), *torch.autograd.grad(y, copies, dy, allow_unused=True, materialize_grads=True)]


@pytest.mark.parametrize("name", CASES)
@pytest.mark.parametrize("groups", [4, 2, 1])
def test_segments_give_what_their_ranges_give(name: str, groups: int) -> None:
    batch, options, segments = CASES[name]
    ranges = ranges_of(batch, options)
    assert segments_of(ranges) == segments
    tensors = leaves(batch, groups)
    with kernels.use_provider("reference"):
        expected = run(lambda q, k, v: attention(q, k, v, ranges, scale=0.3).transpose(1, 2), tensors)
    got = run(lambda q, k, v: attention_over_segments(q, k, v, segments, 0.3), tensors)
    for one, other in zip(got, expected, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(
    "options",
    [{"ahead": 0, "behind": 4}, {"ahead": 0, "behind": 6, "segments": packed(8, 5)}, {"ahead": 2}, {"behind": 3}],
)
def test_what_is_no_segment_is_not_taken_for_one(options: dict[str, Any]) -> None:
    assert segments_of(ranges_of(1, options)) is None


@pytest.mark.parametrize("name", CASES)
def test_transformers_interface_goes_over_a_masks_segments(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    batch, options, segments = CASES[name]
    ranges = ranges_of(batch, options)
    mask = RangedMask(ranges, LENGTH)
    assert mask.segments is None  # the CPU follows the ranges
    tensors = leaves(batch, 2)
    layer = nn.Module()
    expected = run(lambda *x: attention_forward(layer, *x, mask, scaling=0.3)[0], tensors)
    mask.segments = segments
    called = []
    monkeypatch.setattr(
        "halfbyte.hf.layers.attention.attention_over_segments",
        lambda *args: called.append(args) or attention_over_segments(*args),
    )
    got = run(lambda *x: attention_forward(layer, *x, mask, scaling=0.3)[0], tensors)
    assert len(called) == 1
    for one, other in zip(got, expected, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-4)


def test_bounds_of_segments_narrow_what_a_mask_says() -> None:
    whole = RangedMask(ranges_of(1, {"ahead": 0}), LENGTH)
    whole.segments = segments_of(whole.ranges)
    bounds = torch.tensor([0, 5, 6, 13])
    q, k, v = (x.detach() for x in leaves(1, 2))
    got, _ = attention_forward(nn.Module(), q, k, v, whole, cu_seq_lens_q=bounds, cu_seq_lens_k=bounds)
    expected = attention_over_segments(q, k, v, CASES["packed"][2], None)
    torch.testing.assert_close(got, expected)


def test_a_mask_on_a_gpu_knows_its_segments_when_it_is_made() -> None:
    # "meta" stands for a device that is not the CPU: nothing is computed on it
    ranges = ranges_of(*CASES["packed"][:2])
    assert RangedMask(ranges, LENGTH, "meta").segments == CASES["packed"][2]
    longer = key_ranges((1, 3, 13), ahead=0)
    assert longer is not None and RangedMask(longer, 13, "meta").segments is None


def test_the_mask_for_a_gpu_is_segments_made_on_the_cpu() -> None:
    # which needs no GPU, since nothing is computed there
    causal = {"device": "cuda", "mask_function": causal_mask_function}
    real = padded((0, 9), (0, 13))
    made = attention_mask(2, LENGTH, LENGTH, attention_mask=real, **causal)
    assert isinstance(made, RangedMask) and made.device.type == "cuda"
    assert made.segments == CASES["padded right"][2]
    together = and_masks(causal_mask_function, packed_sequence_mask_function(packed(5, 1, 7)))
    made = attention_mask(1, LENGTH, LENGTH, device="cuda", mask_function=together)
    assert isinstance(made, RangedMask) and made.segments == CASES["packed"][2]


@pytest.mark.parametrize(
    ("device", "options", "longest", "expected"),
    [
        ("cuda", {"sliding_window": 512}, 513, True),
        ("cuda", {"sliding_window": 512}, 512, False),
        ("cuda", {"sliding_window": None}, 10**6, False),
        ("cpu", {"sliding_window": 512}, 513, False),
        ("mps", {"sliding_window": None}, 5, True),
    ],
)
def test_packing_on_a_gpu_needs_windows_that_no_row_exceeds(
    device: str, options: dict[str, Any], longest: int, expected: bool
) -> None:
    assert needs_mask(device, MistralConfig(**options), longest) is expected


def test_a_window_that_is_not_used_is_none() -> None:
    config = Qwen2Config(sliding_window=512, use_sliding_window=False)
    assert not needs_mask("cuda", config, 5000)

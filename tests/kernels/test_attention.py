"""Each native tier's attention, and the reference, against torch's in fp64 with an explicit mask."""

from collections.abc import Callable, Iterator

import pytest
import torch
from torch import Tensor

from halfbyte import kernels
from halfbyte.kernels import native, provider_for

# The largest error in parts of the largest value: results are rounded once, and in bf16 so are the weights before.
BOUNDS = {torch.float32: 2e-6, torch.bfloat16: 1.2e-2, torch.float16: 1.5e-3}


@pytest.fixture(params=native.tiers())  # `scalar` is the reference
def tier(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HALFBYTE_ISA", request.param)


@pytest.fixture(params=[tier for tier in native.tiers() if tier != "scalar"])
def vector_tier(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HALFBYTE_ISA", request.param)


@pytest.fixture(autouse=True)
def poisoned(monkeypatch: pytest.MonkeyPatch) -> None:
    """What the kernels are to fill is full of NaN before."""
    empty = torch.empty

    def filled(*size: int, dtype: torch.dtype, device: str) -> Tensor:
        return empty(*size, dtype=dtype, device=device).fill_(torch.nan)

    monkeypatch.setattr(torch, "empty", filled)


@pytest.fixture
def threads() -> Iterator[Callable[[int], None]]:
    before = torch.get_num_threads()
    yield torch.set_num_threads
    torch.set_num_threads(before)


def ranges_of(kind: str, batches: int, queries: int, keys: int) -> Tensor:
    """int32 [B, L, 2] of one of several kinds of mask."""
    position = torch.arange(keys - queries, keys)
    begin, end = torch.zeros(batches, queries), torch.full((batches, queries), keys)
    if kind in ("causal", "window", "segments", "padded"):
        end = (position + 1).expand(batches, queries)
    if kind == "window":
        begin = (position - 20).expand(batches, queries)
    if kind == "segments":
        begin = (position // 17 * 17).expand(batches, queries)
    if kind == "padded":  # on the left in even rows, on the right in odd ones
        left = torch.tensor([keys // 3 if row % 2 == 0 else 0 for row in range(batches)])[:, None]
        right = torch.tensor([keys if row % 2 == 0 else keys // 2 for row in range(batches)])[:, None]
        begin, end = left.expand(batches, queries), end.minimum(right)
    if kind == "any":
        two = torch.randint(keys + 1, (2, batches, queries), generator=torch.Generator().manual_seed(queries))
        begin, end = two.amin(0), two.amax(0)
    return torch.stack([begin.clamp(0, keys), end.clamp(0, keys)], dim=-1).int()


def inputs(batches: int, heads: tuple[int, int], rows: tuple[int, int], size: int, dtype: torch.dtype) -> list[Tensor]:
    """q, k, v and dout as a model has them: views of [B, L, H, D]."""
    generator = torch.Generator().manual_seed(size)
    shapes = [(rows[0], heads[0]), (rows[1], heads[1]), (rows[1], heads[1]), (rows[0], heads[0])]
    return [torch.randn(batches, *shape, size, generator=generator).to(dtype).transpose(1, 2) for shape in shapes]


def expected(
    q: Tensor, k: Tensor, v: Tensor, dout: Tensor, ranges: Tensor, scale: float, softcap: float
) -> list[Tensor]:
    """out, dq, dk, dv in fp64; a query without keys takes no part."""
    q, k, v = (x.double().requires_grad_() for x in (q, k, v))
    key = torch.arange(k.shape[2])
    mask = (key >= ranges[:, None, :, :1]) & (key < ranges[:, None, :, 1:])
    if softcap == 0:
        out = torch.nn.functional.scaled_dot_product_attention(q, k, v, mask, scale=scale, enable_gqa=True)
    else:
        group = q.shape[1] // k.shape[1]
        logits = torch.tanh(scale * q @ k.repeat_interleave(group, 1).mT / softcap) * softcap
        weights = logits.masked_fill(~mask, torch.finfo(torch.float64).min).softmax(-1) * mask
        out = weights @ v.repeat_interleave(group, 1)
    return [out.detach(), *torch.autograd.grad(out, (q, k, v), dout.double())]


def results(
    q: Tensor, k: Tensor, v: Tensor, dout: Tensor, ranges: Tensor, scale: float, softcap: float = 0.0
) -> list[Tensor]:
    out, lse = kernels.attention(q, k, v, ranges, scale=scale, softcap=softcap)
    return [out, *kernels.attention_backward(dout, q, k, v, out, lse, ranges, scale=scale, softcap=softcap)]


def check(tensors: list[Tensor], ranges: Tensor, scale: float, softcap: float = 0.0) -> None:
    wanted = expected(*tensors, ranges, scale, softcap)
    for name, got, want in zip(
        ("out", "dq", "dk", "dv"), results(*tensors, ranges, scale, softcap), wanted, strict=True
    ):
        assert got.dtype == tensors[0].dtype and got.shape == want.shape
        error = (got.double() - want).abs().max()
        assert error <= BOUNDS[got.dtype] * max(want.abs().max(), 1e-2), (name, error, want.abs().max())


@pytest.mark.parametrize("dtype", BOUNDS)
@pytest.mark.parametrize(
    ["kind", "batches", "heads", "rows", "size"],
    [
        ("all", 1, (1, 1), (1, 1), 1),
        ("causal", 1, (2, 2), (65, 65), 64),
        ("causal", 2, (6, 2), (130, 130), 16),
        ("causal", 1, (9, 3), (101, 101), 33),
        ("window", 2, (4, 1), (100, 100), 80),
        ("segments", 2, (3, 3), (97, 97), 96),
        ("padded", 2, (4, 2), (70, 70), 7),
        ("any", 2, (2, 1), (67, 201), 128),
        ("causal", 2, (8, 2), (1, 77), 64),  # cached keys
        ("causal", 1, (4, 2), (5, 133), 24),
        ("all", 1, (2, 1), (66, 31), 256),
    ],
)
def test_attention_and_its_gradients_are_torch_s(
    tier: None, kind: str, batches: int, heads: tuple[int, int], rows: tuple[int, int], size: int, dtype: torch.dtype
) -> None:
    check(inputs(batches, heads, rows, size, dtype), ranges_of(kind, batches, *rows), size**-0.5)


@pytest.mark.parametrize("dtype", BOUNDS)
@pytest.mark.parametrize("kind", ["causal", "window", "any"])
def test_logits_are_capped_softly(tier: None, kind: str, dtype: torch.dtype) -> None:
    check(inputs(1, (4, 2), (75, 75), 40, dtype), ranges_of(kind, 1, 75, 75), 0.3, softcap=1.5)


def test_logits_may_be_large(tier: None) -> None:
    q, k, v, dout = inputs(1, (2, 1), (70, 70), 32, torch.float32)
    ranges = ranges_of("causal", 1, 70, 70)
    out, dq, dk, dv = results(q, k, v, dout, ranges, 300.0)
    for got, want in zip((out, dv), expected(q, k, v, dout, ranges, 300.0, 0.0)[::3], strict=True):
        assert torch.allclose(got.double(), want, atol=2e-3)
    assert dq.isfinite().all() and dk.isfinite().all()


def test_what_only_leads_to_the_gradients_may_leave_the_range_of_fp16(tier: None) -> None:
    q, k, v, dout = inputs(1, (2, 1), (70, 70), 64, torch.float16)
    ranges = ranges_of("causal", 1, 70, 70)
    large = [q * 2**-8, k * 2**-10, v * 2**7, dout * 2**8]
    assert torch.inf in (large[3] @ large[2].repeat_interleave(2, 1).mT)  # in fp16, and ds is no smaller
    check(large, ranges, 4.0)
    check([q * 2**-12, k * 2**12, v * 2**-10, dout * 2**-10], ranges, 0.125)  # ds is below the smallest number of fp16


@pytest.mark.parametrize("shape", [(0, 2, 5, 7), (2, 2, 0, 7), (2, 2, 5, 0)])
def test_nothing_to_do_is_no_work(tier: None, shape: tuple[int, int, int, int]) -> None:
    batches, heads, queries, keys = shape
    tensors = inputs(batches, (heads, 1), (queries, keys), 8, torch.float32)
    ranges = torch.zeros(batches, queries, 2, dtype=torch.int32)
    for got, like in zip(results(*tensors, ranges, 0.2), (tensors[0], *tensors[:3]), strict=True):
        assert got.shape == like.shape and (got == 0).all()


@pytest.mark.parametrize("dtype", BOUNDS)
def test_queries_without_keys_and_keys_without_queries_are_zero(tier: None, dtype: torch.dtype) -> None:
    tensors = inputs(3, (4, 2), (70, 150), 32, dtype)
    ranges = ranges_of("any", 3, 70, 150)
    ranges[0] = 0
    ranges[1, 3:68] = torch.tensor([40, 40])
    ranges[2] = ranges[2].clamp(60, 80)
    out, lse = kernels.attention(*tensors[:3], ranges, scale=0.2)
    assert (out[0] == 0).all() and (out[1, :, 3:68] == 0).all() and (lse[0] == -torch.inf).all()
    _, dq, dk, dv = results(*tensors, ranges, 0.2)
    assert (dq[0] == 0).all() and (dq[1, :, 3:68] == 0).all()
    for gradient in (dk, dv):
        assert (gradient[0] == 0).all() and (gradient[2, :, :60] == 0).all() and (gradient[2, :, 80:] == 0).all()
        assert (gradient[2, :, 60:80] != 0).any()


@pytest.mark.parametrize("dtype", BOUNDS)
@pytest.mark.parametrize("size", [64, 20])
def test_strides_do_not_matter(tier: None, size: int, dtype: torch.dtype) -> None:
    q, k, v, dout = inputs(2, (4, 2), (70, 70), size, dtype)
    ranges = ranges_of("causal", 2, 70, 70)
    plain = results(*(x.contiguous() for x in (q, k, v, dout)), ranges, 0.2)
    fused = torch.cat([q, k, v], dim=1).transpose(1, 2).contiguous().transpose(1, 2)  # as one projection gives them
    odd = torch.cat([dout, dout[..., :1]], dim=-1)[..., :-1]
    apart = k.repeat_interleave(2, dim=-1)[..., ::2]
    other = results(fused[:, :4], apart, fused[:, 6:], odd, ranges.repeat_interleave(2, -1)[..., ::2], 0.2)
    for one, two in zip(plain, other, strict=True):
        assert torch.equal(one, two)


@pytest.mark.parametrize("dtype", BOUNDS)
def test_neither_threads_nor_repetition_change_a_bit(
    vector_tier: None, dtype: torch.dtype, threads: Callable[[int], None]
) -> None:
    for kind in ("causal", "segments", "any"):
        tensors = inputs(2, (4, 2), (300, 300), 32, dtype)
        ranges = ranges_of(kind, 2, 300, 300)
        threads(1)
        first = results(*tensors, ranges, 0.2)
        for count in (2, 3, 2):
            threads(count)
            for one, two in zip(first, results(*tensors, ranges, 0.2), strict=True):
                assert torch.equal(one, two), kind


@pytest.mark.parametrize("kind", ["causal", "window", "padded"])
def test_long_rows_are_cut_into_pieces(vector_tier: None, kind: str, threads: Callable[[int], None]) -> None:
    for dtype in (torch.float32, torch.bfloat16):
        tensors = inputs(1, (2, 1), (1250, 1300), 20, dtype)
        ranges = ranges_of(kind, 1, 1250, 1300)
        ranges[0, 600:640] = 0
        threads(1)
        alone = results(*tensors, ranges, 0.2)
        check(tensors, ranges, 0.2)
        threads(3)
        for one, two in zip(alone, results(*tensors, ranges, 0.2), strict=True):
            assert torch.equal(one, two)


def test_a_wrong_argument_is_named() -> None:
    q, k, v, dout = inputs(2, (4, 2), (5, 7), 8, torch.float32)
    ranges = ranges_of("causal", 2, 5, 7)
    for error, words, arguments in [
        (TypeError, "q is torch.int64", (q.long(), k, v, ranges)),
        (TypeError, "k is torch.bfloat16 on cpu, but q is torch.float32", (q, k.bfloat16(), v, ranges)),
        (ValueError, "multiple of G", (q[:, :3], k, v, ranges)),
        (ValueError, "multiple of G", (q[:, :0], k, v, ranges)),
        (ValueError, "multiple of G", (q[0], k, v, ranges)),
        (ValueError, "v has shape", (q, k, v[:, :, :3], ranges)),
        (ValueError, "k has shape", (q, k[..., :3], v[..., :3], ranges)),
        (ValueError, "ranges is torch.int64", (q, k, v, ranges.long())),
        (ValueError, "ranges is torch.int32", (q, k, v, ranges[:1])),
        (ValueError, "ranges holds 0 to 8; the keys are 0 to 7", (q, k, v, ranges + (ranges == 7).int())),
        (ValueError, "the head size is 600", (*(torch.zeros(2, n, 5, 600) for n in (2, 1, 1)), ranges)),
    ]:
        with pytest.raises(error, match=words):
            kernels.attention(*arguments, scale=1.0)
    with pytest.raises(ValueError, match="softcap is -1"):
        kernels.attention(q, k, v, ranges, scale=1.0, softcap=-1.0)
    out, lse = provider_for(q.device).attention(q, k, v, ranges, 1.0, 0.0)
    with pytest.raises(ValueError, match="dout has shape"):
        kernels.attention_backward(dout[:1], q, k, v, out, lse, ranges, scale=1.0)
    with pytest.raises(ValueError, match=r"lse is torch\.float64"):
        kernels.attention_backward(dout, q, k, v, out, lse.double(), ranges, scale=1.0)

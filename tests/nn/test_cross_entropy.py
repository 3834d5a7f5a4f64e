"""The head and its loss in chunks against a dense cross entropy in fp64."""

import itertools
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from halfbyte import kernels
from halfbyte.nn import Scores, cross_entropy, linear_cross_entropy
from halfbyte.quant import quantize_4bit


@pytest.fixture(params=kernels.providers())
def provider(request: pytest.FixtureRequest) -> Any:
    with kernels.use_provider(request.param):
        yield


@pytest.fixture
def small_chunks(monkeypatch: pytest.MonkeyPatch) -> None:
    """Several chunks of rows and of the vocabulary, the last ones short."""
    monkeypatch.setattr(cross_entropy, "ROWS", 5)
    monkeypatch.setattr(cross_entropy, "WIDTH", 64)


def some_head(n: int, vocabulary: int, width: int, seed: int = 0) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Hidden states, weight, bias and labels; the logits go from about -20 to 20, a few labels are near certain."""
    generator = torch.Generator().manual_seed(seed)
    hidden = torch.randn(n, width, generator=generator)
    weight = torch.randn(vocabulary, width, generator=generator) * 5 / width**0.5
    bias = torch.randn(vocabulary, generator=generator)
    labels = torch.randint(vocabulary, (n,), generator=generator)
    certain = slice(0, n, 3)
    labels[certain] = (hidden @ weight.T + bias)[certain].argmax(1)
    hidden[certain] *= 2
    return hidden, weight, bias, labels


def dense(
    hidden: Tensor, weight: Tensor, bias: Tensor | None, labels: Tensor, scale: float, cap: float | None
) -> Scores:
    z = scale * nn.functional.linear(hidden, weight, bias)
    z = z if cap is None else cap * torch.tanh(z / cap)
    logs = z.log_softmax(1)
    return Scores(
        -nn.functional.cross_entropy(z, labels, reduction="none"),
        -(logs.exp() * logs).sum(1),
        (2 * logs).logsumexp(1),
        z.mean(1),
        z.argmax(1),
    )


@pytest.mark.parametrize(("scale", "cap"), [(1.0, None), (0.0625, None), (3.0, None), (1.0, 5.0), (0.5, 30.0)])
@pytest.mark.parametrize(
    ("n", "vocabulary", "width", "biased"), [(1, 1, 3, True), (13, 97, 7, True), (11, 257, 24, False)]
)
def test_scores_and_gradients_are_those_of_the_dense_logits(
    provider: None,
    small_chunks: None,
    n: int,
    vocabulary: int,
    width: int,
    biased: bool,
    scale: float,
    cap: float | None,
) -> None:
    hidden, weight, bias, labels = some_head(n, vocabulary, width)
    given = torch.randn(n, generator=torch.Generator().manual_seed(1))
    trained = [hidden, weight, bias] if biased else [hidden, weight]
    ours = [x.clone().requires_grad_() for x in trained]
    theirs = [x.double().requires_grad_() for x in trained]

    got = linear_cross_entropy(ours[0], ours[1], labels, ours[2] if biased else None, scale=scale, cap=cap)
    expected = dense(theirs[0], theirs[1], theirs[2] if biased else None, labels, scale, cap)
    (got.log_prob * given).sum().backward()
    (expected.log_prob * given.double()).sum().backward()

    assert torch.equal(got.top, expected.top)
    for name in ("log_prob", "entropy", "log_sum_squares", "mean_logit"):
        # fp32 over logits of up to 120, whose differences lose as much
        torch.testing.assert_close(getattr(got, name).double(), getattr(expected, name), rtol=1e-5, atol=2e-5, msg=name)
    for one, other in zip(ours, theirs, strict=True):
        assert one.grad is not None and other.grad is not None
        # a vocabulary of one has no gradient, but for what two roundings of one logit differ
        assert (one.grad - other.grad).norm() <= 1e-5 * other.grad.norm() + (1e-5 if vocabulary == 1 else 0)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_the_gradient_of_a_certain_label_keeps_its_digits_in_16_bits(
    provider: None, small_chunks: None, dtype: torch.dtype
) -> None:
    """With p = 0.999 the gradient is a thousandth of W[label], less than bf16 can tell from 1 - p rounded."""
    width, vocabulary = 64, 300
    generator = torch.Generator().manual_seed(2)
    weight = 8 * nn.functional.normalize(torch.randn(vocabulary, width, generator=generator)).to(dtype)
    labels = torch.arange(0, 300, 30)
    hidden = (weight[labels] * 0.22).to(dtype).requires_grad_()
    exact = hidden.detach().double().requires_grad_()
    linear_cross_entropy(hidden, weight, labels).log_prob.sum().backward()
    expected = dense(exact, weight.double(), None, labels, 1.0, None)
    expected.log_prob.sum().backward()
    assert (expected.log_prob > -0.02).all()
    assert hidden.grad is not None and exact.grad is not None and hidden.grad.dtype == dtype
    # the logits, rounded to 8 bits, move each probability by up to 2 % here; with the label's own share among them
    # the error would be above 30 %
    assert (hidden.grad - exact.grad).norm() <= 0.05 * exact.grad.norm()


def test_one_chunk_and_many_agree(provider: None, monkeypatch: pytest.MonkeyPatch) -> None:
    hidden, weight, bias, labels = some_head(17, 300, 12)
    results = []
    for rows, chunk in itertools.product([1, 4, 17], [1, 64, 300]):
        monkeypatch.setattr(cross_entropy, "ROWS", rows)
        monkeypatch.setattr(cross_entropy, "WIDTH", chunk)
        leaf = hidden.clone().requires_grad_()
        scores = linear_cross_entropy(leaf, weight, labels, bias)
        scores.log_prob.sum().backward()
        results.append((*scores, leaf.grad))
    for result in results[1:]:
        for one, other in zip(result, results[0], strict=True):
            torch.testing.assert_close(one, other, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("rows", [0, 1, 511, 512, 2048])
def test_chunks_on_a_gpu_are_as_large_as_their_bound_lets_them_be(rows: int) -> None:
    width = cross_entropy.chunk_width(rows, "cuda")
    assert width % cross_entropy.WIDTH == 0  # rows of 4-bit heads begin with a block
    assert max(rows, 1) * width <= cross_entropy.GPU_CHUNK < 2 * max(rows, 1) * width
    assert cross_entropy.chunk_width(rows, "cpu") == cross_entropy.WIDTH


def test_no_position_gives_no_scores_and_zero_gradients(provider: None) -> None:
    hidden = torch.zeros(0, 8, requires_grad=True)
    weight = torch.ones(20, 8, requires_grad=True)
    scores = linear_cross_entropy(hidden, weight, torch.zeros(0, dtype=torch.int64))
    scores.log_prob.sum().backward()
    assert scores.log_prob.shape == (0,) and hidden.grad is not None and hidden.grad.shape == (0, 8)
    assert torch.equal(weight.grad, torch.zeros(20, 8))


def test_a_tied_weight_gets_the_gradients_of_both_its_uses(provider: None, small_chunks: None) -> None:
    generator = torch.Generator().manual_seed(3)
    ids, labels = torch.randint(90, (2, 8), generator=generator)
    ours = torch.randn(90, 6, generator=generator).requires_grad_()
    theirs = ours.detach().double().requires_grad_()
    linear_cross_entropy(ours[ids].tanh(), ours, labels).log_prob.sum().backward()
    dense(theirs[ids].tanh(), theirs, None, labels, 1.0, None).log_prob.sum().backward()
    assert ours.grad is not None and theirs.grad is not None
    assert (ours.grad - theirs.grad).norm() <= 1e-5 * theirs.grad.norm()


@pytest.mark.parametrize(("width", "double_quant"), [(24, False), (256, True)])
def test_a_head_in_4_bits_is_its_dense_self(provider: None, small_chunks: None, width: int, double_quant: bool) -> None:
    hidden, weight, bias, labels = some_head(7, 150, width)
    quantized = quantize_4bit(weight, "nf4", 64, double_quant)
    results = []
    for head in (quantized, quantized.dequantize()):
        leaves = [hidden.clone().requires_grad_(), bias.clone().requires_grad_()]
        scores = linear_cross_entropy(leaves[0], head, labels, leaves[1])
        scores.log_prob.sum().backward()
        results.append([*scores, *(leaf.grad for leaf in leaves)])
    for one, other in zip(*results, strict=True):
        assert torch.equal(one, other)


def test_nothing_is_computed_for_a_gradient_that_nobody_asks_for(
    provider: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen = []
    fold = kernels.fold_softmax
    monkeypatch.setattr(kernels, "fold_softmax", lambda *args, **kw: seen.append(kw["gradient"]) or fold(*args, **kw))
    hidden, weight, bias, labels = some_head(3, 70, 4)
    linear_cross_entropy(hidden, weight, labels, bias)
    with torch.no_grad():
        linear_cross_entropy(hidden.requires_grad_(), weight, labels, bias)
    assert seen == [False, False]


class Largest(TorchDispatchMode):
    """The largest tensor that any operation returned, in elements, views of what there was before left out."""

    elements = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        for x in result if isinstance(result, (tuple, list)) else [result]:
            if isinstance(x, Tensor) and not x._is_view():
                self.elements = max(self.elements, x.numel())
        return result


def test_no_tensor_grows_with_the_vocabulary() -> None:
    largest = []
    for vocabulary in (20_000, 40_000):
        hidden, weight, _, labels = some_head(160, vocabulary, 4)
        with Largest() as seen:
            linear_cross_entropy(hidden.requires_grad_(), weight, labels).log_prob.sum().backward()
        largest.append(seen.elements)
    assert largest == [160 * cross_entropy.WIDTH] * 2


def test_autocast_decides_the_dtype_of_the_products(provider: None) -> None:
    hidden, weight, _, labels = some_head(9, 80, 16)
    hidden.requires_grad_()
    with torch.autocast("cpu", torch.bfloat16):
        cast = linear_cross_entropy(hidden, weight, labels).log_prob
        cast.sum().backward()
    inner = linear_cross_entropy(hidden.bfloat16(), weight.bfloat16(), labels).log_prob
    assert cast.dtype == torch.float32 and torch.equal(cast, inner)
    assert hidden.grad is not None and hidden.grad.dtype == torch.float32


def test_what_does_not_fit_is_named() -> None:
    hidden, weight, bias, labels = some_head(4, 50, 8)
    with pytest.raises(ValueError, match=r"hidden \(4, 7\) and weight \(50, 8\)"):
        linear_cross_entropy(hidden[:, :7], weight, labels)
    with pytest.raises(ValueError, match=r"bias has shape \(49,\).*needs \(50,\)"):
        linear_cross_entropy(hidden, weight, labels, bias[1:])
    with pytest.raises(ValueError, match=r"labels have shape \(3,\); 4 positions"):
        linear_cross_entropy(hidden, weight, labels[1:])
    with pytest.raises(ValueError, match=r"labels go from -100 to .*vocabulary from 0 to 49"):
        linear_cross_entropy(hidden, weight, torch.tensor([3, -100, 2, 7]))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_where_the_processor_multiplies_no_halves_their_values_are_multiplied_in_fp32(
    small_chunks: None, monkeypatch: pytest.MonkeyPatch, dtype: torch.dtype
) -> None:
    monkeypatch.setattr(kernels.dense, "_lacks_halves", lambda: True)
    hidden, weight, bias, labels = (x.to(dtype) if x.is_floating_point() else x for x in some_head(13, 97, 8))
    weight.requires_grad_()
    results = []
    for one, other in ((hidden, weight), (hidden.float(), weight.detach().float().requires_grad_())):
        given = one.requires_grad_()
        log_prob = linear_cross_entropy(given, other, labels, bias).log_prob
        log_prob.sum().backward()
        results.append((log_prob, given.grad, other.grad))
    (half, *gradients), (single, *wanted) = results
    assert torch.equal(half, single)
    for gradient, exact in zip(gradients, wanted, strict=True):
        assert gradient is not None and gradient.dtype == dtype and exact is not None
        assert torch.equal(gradient, exact.to(dtype))


def test_other_dtypes_and_devices_keep_theirs(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(kernels.dense, "_lacks_halves", lambda: True)
    assert kernels.product_dtype(torch.float64, "cpu") == torch.float64
    assert kernels.product_dtype(torch.bfloat16, "cuda") == torch.bfloat16
    monkeypatch.setattr(kernels.dense, "_lacks_halves", lambda: False)
    assert kernels.product_dtype(torch.float16, "cpu") == torch.float16

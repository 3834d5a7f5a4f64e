"""Decoding: all layers of a decoder, whose next tokens one call of the native kernels computes (csrc/decode.h).

What a layer computes stands there; here are its parts as torch tensors, and the checks. There is no reference in torch
beside it: the oracle is the model's own forward in transformers, token by token (tests/generate). Where there are no
native products (no compiler, the tier ``scalar``, another device), :func:`can_decode` says no, and the model decodes
through transformers.

A page of the cache is a piece of memory, at any address, for ``PAGE`` positions of all layers and heads.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from halfbyte.errors import InputError
from halfbyte.kernels import native
from halfbyte.kernels.checks import FLOATING
from halfbyte.kernels.weights import Weight4bit, WeightInt8

PAGE = 64
"""Positions of a page; ``kPage`` in csrc/decode_rows.h."""
MOST_ROWS = 64
"""Rows of one step."""
LARGEST_HEAD = 512
CACHES = ("float32", "bfloat16", "float16", "int8")
"""What keys and values are kept in, as the extension counts them."""
Name = Literal["qkv", "o", "gate_up", "down"]
Place = Name | tuple[int, Literal["gate_up", "down"]]
"""Of a layer's products; those of an expert with its number."""
MLP: tuple[Literal["gate_up", "down"], ...] = ("gate_up", "down")
PHASES = (
    "embedding", "qkv", "heads", "attention", "gather", "o", "after attention", "router", "choice", "gate_up",
    "activation", "down", "after the MLP", "last norm", "head",
)  # fmt: skip
"""What a step does one after the other, those in the middle in each layer; csrc/decode.cpp."""
ACTIVATIONS = ("silu", "gelu_tanh")


@dataclass(frozen=True)
class DecodeNorm:
    """``y = (x - mean) / sqrt(variance + eps) weight``; not ``centered``: ``x / sqrt(mean(x²) + eps) weight``.

    Attributes:
        weight: fp32 ``[width]``, what the normalized value is multiplied by, or None.
        eps: in the root.
        rounded: whether the normalized value is rounded to the decoder's dtype before the weight.
        centered: LayerNorm rather than RMSNorm.
    """

    weight: Tensor | None
    eps: float
    rounded: bool
    centered: bool = False


@dataclass(frozen=True)
class Products:
    """Products of one input, ``[x W₁ᵀ, x W₂ᵀ, ...] + bias``.

    Attributes:
        weights: ``[width, depth]`` each; a dense one has the decoder's dtype and is contiguous.
        bias: fp32 ``[sum of widths]``, or None.
    """

    weights: Sequence[Weight4bit | WeightInt8 | Tensor]
    bias: Tensor | None = None

    @property
    def depth(self) -> int:
        """Values of the input."""
        return self.weights[0].shape[1]

    @property
    def width(self) -> int:
        """Values of all results."""
        return sum(weight.shape[0] for weight in self.weights)


@dataclass(frozen=True)
class LowRankPart:
    """What an adapter adds to the columns ``[first, first + width)`` of a place: ``rescale (y + s x Aᵀ Bᵀ) + bias``.

    Attributes:
        first: the first column.
        a: ``s A``, ``[rank, depth]`` of the decoder's dtype.
        b: ``Bᵀ``, ``[rank, width]`` of the decoder's dtype.
        rescale: DoRA's fp32 ``[width]``, or None; the base's bias is added after it.
        bias: fp32 ``[width]``, or None.
    """

    first: int
    a: Tensor
    b: Tensor
    rescale: Tensor | None = None
    bias: Tensor | None = None


@dataclass(frozen=True)
class DecodeMLP:
    """An MLP: ``(f(g) u) Wdᵀ``.

    Attributes:
        gate_up: gate, then up.
        down: of their product.
    """

    gate_up: Products
    down: Products


@dataclass(frozen=True)
class DecodeMixture:
    """A mixture of experts: for each row the sum of what its experts give, each times its share.

    A row takes the ``chosen`` experts of the highest scores, which are softmax or sigmoid of the router's logits.

    Attributes:
        router: a logit for each routed expert; with ``shared_gate`` one more, of the shared one.
        chosen: experts of a row, the shared one aside.
        experts: those that are routed, then the shared one.
        sigmoid: whether scores are that.
        normalized: whether shares are divided by their sum.
        factor: of shares.
        bias: fp32 ``[routed]``, added to scores for choosing, or None.
        groups: of as many experts each, of which ``groups_kept`` take part: those whose two highest sum to the most.
        groups_kept: likewise.
        shared: whether the last expert is one that all rows take.
        shared_gate: whether for the sigmoid of its logit, otherwise for 1.
    """

    router: Products
    chosen: int
    experts: Sequence[DecodeMLP]
    sigmoid: bool = False
    normalized: bool = True
    factor: float = 1.0
    bias: Tensor | None = None
    groups: int = 1
    groups_kept: int = 1
    shared: bool = False
    shared_gate: bool = False


@dataclass(frozen=True)
class DecodeLayer:
    """A decoder layer; norms that a family lacks are None.

    Attributes:
        qkv: of queries, keys and values, in this order, heads of ``size`` values.
        o: of what was attended to.
        mlp: or None where there is a mixture.
        mixture: or None.
        whole_norms: whether ``q_norm`` and ``k_norm`` go over all heads together.
        window: keys that a query reads, itself included, or None for all.
        angles: index of the layer's table of cosines and sines, or None for no rotation.
    """

    qkv: Products
    o: Products
    mlp: DecodeMLP | None = None
    mixture: DecodeMixture | None = None
    before_attention: DecodeNorm | None = None
    after_attention: DecodeNorm | None = None
    before_mlp: DecodeNorm | None = None
    after_mlp: DecodeNorm | None = None
    q_norm: DecodeNorm | None = None
    k_norm: DecodeNorm | None = None
    whole_norms: bool = False
    window: int | None = None
    angles: int | None = None

    @property
    def places(self) -> Sequence[Place]:
        """The places of its products."""
        if self.mixture is None:
            return ("qkv", "o", "gate_up", "down")
        return ("qkv", "o", *((e, name) for e in range(len(self.mixture.experts)) for name in MLP))

    def of(self, place: Place) -> Products:
        """Return the products of a place."""
        if isinstance(place, tuple):
            assert self.mixture is not None
            found: Products = getattr(self.mixture.experts[place[0]], place[1])
        else:
            found = getattr(self.mlp if place in MLP else self, place)
        return found


@dataclass(frozen=True)
class DecoderParts:
    """A decoder.

    Attributes:
        dtype: what products read: fp32, bf16 or fp16.
        embedding: ``[vocabulary, width]``, fp32, bf16 or fp16, contiguous.
        layers: in order.
        last_norm: before the head.
        head: logits.
        heads: query heads, a multiple of ``kv_heads``.
        kv_heads: key/value heads.
        size: values of a head.
        activation: of the gate.
        scale: of scores.
        cap: soft cap of scores, or None.
        embedding_factor: of embeddings.
        logit_factor: of logits, before their soft cap.
        logit_cap: of logits, or None.
    """

    dtype: torch.dtype
    embedding: Tensor
    layers: Sequence[DecodeLayer]
    last_norm: DecodeNorm | None
    head: Products
    heads: int
    kv_heads: int
    size: int
    activation: str
    scale: float
    cap: float | None = None
    embedding_factor: float = 1.0
    logit_factor: float = 1.0
    logit_cap: float | None = None


def can_decode() -> bool:
    """Return whether the native kernels can decode here, by the tier in force."""
    return native.available() and native.multiplies()


class Decoder:
    """A decoder's parts as the kernels take them; it keeps their tensors alive.

    Args:
        parts: on the CPU.
        cache: what keys and values are kept in: ``float32``, ``bfloat16``, ``float16`` or ``int8``.

    Raises:
        InputError: a shape or dtype that the kernels do not take.
    """

    def __init__(self, parts: DecoderParts, cache: str) -> None:
        _check(parts, cache)
        self.parts = parts
        self.cache = cache
        self._handle = native.Decoder(parts, CACHES.index(cache))

    @property
    def page_bytes(self) -> int:
        """Bytes of a page."""
        return self._handle.page_bytes

    @property
    def at(self) -> int:
        """Address of an int64: the number of the layer that a step is at, and for the head how many there are."""
        return self._handle.at

    def advise(self, on: bool) -> None:
        """Tell the system of all experts of a layer as soon as they are chosen, from now on, or no more: if mapped."""
        self._handle.advise(on)

    def chosen(self) -> list[list[int]]:
        """Return of each layer the experts that any row of the last step was given; of one without a mixture none."""
        return self._handle.chosen()

    def profile(self, on: bool) -> None:
        """Take the processor time of each phase of a step from now on, or no more; it costs some time itself."""
        self._handle.profile(on)

    def phase_times(self) -> dict[str, tuple[float, float]]:
        """Return the processor seconds of all threads in each of ``PHASES`` since it was asked for.

        Returns:
            in the phase's work, and in waiting for the work of other threads.
        """
        times = self._handle.phase_times()
        return {name: (work / 1e9, wait / 1e9) for name, (work, wait) in zip(PHASES, times, strict=True)}

    def add_adapter(self, places: Mapping[tuple[int, Place], Sequence[LowRankPart]]) -> int:
        """Add an adapter, whose parts are given by layer and place; return its number."""
        for (layer, place), parts in places.items():
            products = self.parts.layers[layer].of(place)
            end = 0
            for part in parts:
                rank, width = part.b.shape
                good = part.a.shape == (rank, products.depth) and end <= part.first <= products.width - width
                if not good or {part.a.dtype, part.b.dtype} != {self.parts.dtype}:
                    raise InputError(
                        f"Layer {layer}, {place}: A {tuple(part.a.shape)} and Bᵀ {tuple(part.b.shape)} of "
                        f"{part.a.dtype} do not fit {products.depth} values in, {products.width} out, "
                        f"{self.parts.dtype}."
                    )
                end = part.first + width
        return self._handle.add_adapter(places)

    def remove_adapter(self, number: int) -> None:
        """Forget an adapter; another one may get its number."""
        self._handle.remove_adapter(number)

    def step(
        self,
        tokens: Sequence[int],
        positions: Sequence[int],
        pages: Sequence[Tensor],
        adapters: Sequence[int],
        tables: Sequence[tuple[Tensor, Tensor]],
        out: Tensor | None = None,
    ) -> Tensor:
        """Go on by one token in each row: its key and value go to the cache, the next token's logits come back.

        Each row of the result is bitwise the same whatever the other rows are, and for any number of threads.

        Args:
            tokens: one a row, at most ``MOST_ROWS`` rows.
            positions: of the tokens; what lies before is in the cache.
            pages: of each row int64 ``[pages]``: their addresses, for its positions up to this one.
            adapters: of each row the number of its adapter, or -1; rows of one adapter follow each other.
            tables: cosines and sines, fp32 ``[positions, turned]`` each, of each kind of layer.
            out: fp32 ``[rows, vocabulary]`` to write to, or None.

        Returns:
            ``out``.
        """
        assert 0 < len(tokens) <= MOST_ROWS
        shape = len(tokens), self.parts.head.width
        if out is None:
            out = torch.empty(shape, dtype=torch.float32, device="cpu")  # the defaults are the whole process's
        assert out.dtype == torch.float32 and out.shape == shape and out.is_contiguous()
        self._handle.step(tokens, positions, pages, adapters, tables, out)
        return out


def _products_of(layer: DecodeLayer) -> Sequence[Products]:
    """Return all products of a layer, the router's too."""
    return [*(layer.of(place) for place in layer.places), *([layer.mixture.router] if layer.mixture else [])]


def _check(parts: DecoderParts, cache: str) -> None:
    def need(true: bool, what: str) -> None:
        if not true:
            raise InputError(f"The native decoder does not take {what}.")

    need(cache in CACHES, f"a cache of {cache}; it keeps {', '.join(CACHES)}")
    need(parts.dtype in FLOATING and parts.embedding.dtype in FLOATING, f"{parts.dtype}")
    need(parts.embedding.is_contiguous(), "an embedding with gaps")
    need(parts.heads % parts.kv_heads == 0, f"{parts.heads} query heads over {parts.kv_heads}")
    need(parts.size % 16 == 0 and parts.size <= LARGEST_HEAD, f"heads of {parts.size} values")
    need(parts.activation in ACTIVATIONS, f"the activation {parts.activation}")
    width = parts.embedding.shape[1]
    for layer in [*parts.layers, None]:
        for products in _products_of(layer) if layer else [parts.head]:
            for weight in products.weights:
                depth = weight.shape[1]
                need(depth == products.depth and depth % 64 == 0, f"a weight over {depth} values; a multiple of 64")
                if isinstance(weight, Weight4bit):
                    blocksize = weight.statistics.blocksize
                    need(blocksize % 64 == 0, f"4-bit blocks of {blocksize} values; a multiple of 64")
                elif isinstance(weight, WeightInt8):
                    need(weight.blocksize % 32 == 0, f"int8 blocks of {weight.blocksize} values; a multiple of 32")
                else:
                    need(weight.dtype == parts.dtype and weight.is_contiguous(), f"a dense weight of {weight.dtype}")
        if layer:
            of_heads = (parts.heads + 2 * parts.kv_heads) * parts.size
            need(layer.qkv.width == of_heads and layer.o.depth == parts.heads * parts.size, "such projections")
            mlps = [layer.mlp] if layer.mlp else layer.mixture.experts if layer.mixture else []
            depths = {layer.qkv.depth, layer.o.width, *(size for m in mlps for size in (m.gate_up.depth, m.down.width))}
            need(depths == {width}, "such widths")
            need(bool(mlps) and all(m.gate_up.width == 2 * m.down.depth for m in mlps), "such an MLP")
            if (mixture := layer.mixture) is not None:
                routed = len(mixture.experts) - mixture.shared
                fits = mixture.router.depth == width and mixture.router.width == routed + mixture.shared_gate
                need(fits, f"a router of {mixture.router.width} experts for {routed}")
                need(routed % mixture.groups == 0, f"{mixture.groups} groups of {routed} experts")
                need(0 < mixture.chosen <= routed // mixture.groups * mixture.groups_kept, "so many experts of a row")

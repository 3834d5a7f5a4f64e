"""A decoder's step (csrc/decode.h): its parts handed to the extension once, then one call a token."""

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from halfbyte.kernels.native.quantize import code_tables, scale_arguments
from halfbyte.kernels.native.runtime import TYPES, extension, threads, tier_index
from halfbyte.kernels.weights import Weight4bit, WeightInt8

if TYPE_CHECKING:
    from halfbyte.kernels.decode import (
        DecodeLayer,
        DecodeMixture,
        DecodeNorm,
        DecoderParts,
        LowRankPart,
        Place,
        Products,
    )  # fmt: skip

PLACES = ("qkv", "o", "gate_up", "down")
HEAD, ROUTER = -1, -2
ACTIVATIONS = ("silu", "gelu_tanh")


def multiplies() -> bool:
    """Return whether the tier in force has products."""
    return bool(extension.multiplies(tier_index()))


class Decoder:
    """See :class:`halfbyte.kernels.decode.Decoder`, which checks what comes here."""

    def __init__(self, parts: "DecoderParts", cache: int) -> None:
        self._kept: list[Any] = [parts]
        self._adapters: dict[int, list[Any]] = {}
        self._free: list[int] = []
        embedding = parts.embedding
        widths = embedding.shape[1], parts.heads, parts.kv_heads, parts.size, parts.head.width
        self._handle: Any = extension.Decoder(
            tier_index(), TYPES[parts.dtype], cache, widths, ACTIVATIONS.index(parts.activation), parts.scale,
            parts.cap or 0.0, parts.embedding_factor, parts.logit_factor, parts.logit_cap or 0.0,
        )  # fmt: skip
        self._handle.set_embedding(embedding.data_ptr(), TYPES[embedding.dtype], *embedding.shape)
        for layer in parts.layers:
            self._add_layer(layer)
        self._handle.set_last_norm(_norm(parts.last_norm))
        self._add_products(HEAD, parts.head)

    @property
    def page_bytes(self) -> int:
        """Bytes of a page."""
        return int(self._handle.page_bytes())

    @property
    def at(self) -> int:
        """Address of the number of the layer that a step is at, int64."""
        return int(self._handle.at())

    def advise(self, on: bool) -> None:
        """Tell the system of chosen experts, or no more."""
        self._handle.advise(on)

    def chosen(self) -> list[list[int]]:
        """Return the experts of the last step, by layer."""
        found: list[list[int]] = self._handle.chosen()
        return found

    def profile(self, on: bool) -> None:
        """Take the processor time of phases from now on, or no more."""
        self._handle.profile(on)

    def phase_times(self) -> list[tuple[int, int]]:
        """Return it, in nanoseconds."""
        found: list[tuple[int, int]] = self._handle.phase_times()
        return found

    def add_adapter(self, places: "Mapping[tuple[int, Place], Sequence[LowRankPart]]") -> int:
        """Add an adapter; return its number."""
        number = self._free.pop() if self._free else int(self._handle.add_adapter())
        kept = self._adapters[number] = []
        for (layer, place), parts in places.items():
            if not parts:
                continue
            a = torch.cat([part.a for part in parts]).contiguous()
            kept.append((a, parts))
            at = number, layer, _number(place)
            self._handle.set_factor_a(*at, a.data_ptr(), a.shape[0])
            for part in parts:
                rank, width = part.b.shape
                addresses = part.b.data_ptr(), _address(part.rescale), _address(part.bias)
                self._handle.add_factor_b(*at, part.first, width, rank, *addresses)
        return number

    def remove_adapter(self, number: int) -> None:
        """Forget an adapter."""
        self._handle.clear_adapter(number)
        del self._adapters[number]
        self._free.append(number)

    def step(
        self,
        tokens: Sequence[int],
        positions: Sequence[int],
        pages: Sequence[Tensor],
        adapters: Sequence[int],
        tables: Sequence[tuple[Tensor, Tensor]],
        out: Tensor,
    ) -> None:
        """Write the logits of the tokens that follow."""
        angles = [(cos.data_ptr(), sin.data_ptr(), cos.shape[1]) for cos, sin in tables]
        addresses = [table.data_ptr() for table in pages]
        self._handle.step(threads(), tokens, positions, addresses, adapters, angles, out.data_ptr())

    def _add_layer(self, layer: "DecodeLayer") -> None:
        norms = (
            layer.before_attention, layer.after_attention, layer.before_mlp, layer.after_mlp, layer.q_norm,
            layer.k_norm,
        )  # fmt: skip
        angles = -1 if layer.angles is None else layer.angles
        self._handle.add_layer([_norm(norm) for norm in norms], layer.whole_norms, layer.window or 0, angles)
        if layer.mixture is not None:
            self._set_mixture(layer.mixture)
        for place in layer.places:
            self._add_products(_number(place), layer.of(place))

    def _set_mixture(self, mixture: "DecodeMixture") -> None:
        self._handle.set_mixture(
            len(mixture.experts), mixture.chosen, mixture.sigmoid, mixture.normalized, mixture.factor,
            _address(mixture.bias), mixture.groups, mixture.groups_kept, mixture.shared, mixture.shared_gate,
        )  # fmt: skip
        self._add_products(ROUTER, mixture.router)

    def _add_products(self, place: int, products: "Products") -> None:
        for weight in products.weights:
            rows, columns = weight.shape
            if isinstance(weight, Weight4bit):
                code, nested_code = code_tables(weight.statistics)
                self._kept.append((code, nested_code))
                scales = scale_arguments(weight.statistics, nested_code)
                addresses = weight.packed.data_ptr(), code.data_ptr()
                self._handle.add_weight(place, *addresses, *scales, weight.statistics.blocksize, rows, columns)
            elif isinstance(weight, WeightInt8):
                addresses = weight.codes.data_ptr(), weight.absmax.data_ptr()
                self._handle.add_bytes(place, *addresses, weight.blocksize, rows, columns)
            else:
                self._handle.add_dense(place, weight.data_ptr(), rows, columns)
        if products.bias is not None:
            self._handle.set_bias(place, products.bias.data_ptr())


def _number(place: "Place") -> int:
    """Return what a place is in csrc/decode.h."""
    if isinstance(place, str):
        return PLACES.index(place)
    expert, name = place
    return len(PLACES) + 2 * expert + (name == "down")


def _norm(norm: "DecodeNorm | None") -> tuple[int, float, bool, bool] | None:
    return None if norm is None else (_address(norm.weight), norm.eps, norm.rounded, norm.centered)


def _address(tensor: Tensor | None) -> int:
    return 0 if tensor is None else tensor.data_ptr()

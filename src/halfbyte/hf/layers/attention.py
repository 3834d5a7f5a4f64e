"""transformers' attention and attention masks (5.23) over key ranges: the implementation ``halfbyte``.

transformers builds one mask a kind of layer and step, and hands it to each layer's attention function. Both come from
registries, by the name in ``config._attn_implementation``. Ours hands over a :class:`RangedMask`: to whoever looks at
it SDPA's mask, bool ``[B, 1, L, S]``, but only the ranges of :mod:`halfbyte.nn.attention` are there, and the mask is
built if a family's layers compute with it, of which nothing has to be known. So the whole of what a layer may read is
decided where transformers decides it: causality, sliding windows, padding, cached keys, segments found from
``position_ids``. Which models attend this way says :mod:`halfbyte.hf.layers.attention_choice`.

What ranges cannot say, and what the kernel does not do, goes the usual way, with the mask built: to SDPA, or where SDPA
would leave something out (soft caps, attention sinks) to the model's own eager function.

On a CUDA GPU ranges that are segments go to SDPA without a mask (:mod:`halfbyte.nn.segments`). They are made on the
CPU, once for all layers of a pass, for which the CPU waits for padding and positions.
"""

import contextlib
import inspect
import sys
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_map
from transformers import AttentionInterface
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import (
    AttentionMaskInterface,
    bidirectional_mask_function,
    causal_mask_function,
    sdpa_mask,
)
from transformers.utils.import_utils import is_tracing

from halfbyte.kernels.attention import LARGEST_HEAD, MOST_KEYS
from halfbyte.kernels.checks import FLOATING
from halfbyte.nn.attention import attention, key_ranges, mask_of, within_segments
from halfbyte.nn.segments import Segment, attention_over_segments, segments_of

NAME = "halfbyte"

# Arguments of attention functions that say nothing about what is read, or nothing that the mask does not.
NEUTRAL = {
    "cache_position", "cu_seq_lens_k", "cu_seq_lens_q", "deterministic", "is_causal", "labels", "layer_idx",
    "logits_to_keep", "max_length_k", "max_length_q", "num_items_in_batch", "output_hidden_states",
    "output_router_logits", "position_ids", "return_dict", "seq_idx", "shift_labels", "sliding_window", "use_cache",
}  # fmt: skip


_BUILT: list[list[tuple[int, ...]]] = []
"""Lists that hear of each mask that is built from ranges."""


@contextlib.contextmanager
def masks_built() -> Iterator[list[tuple[int, ...]]]:
    """Yield a list that gets the shape of each whole mask that is built meanwhile because a layer cannot do without."""
    built: list[tuple[int, ...]] = []
    _BUILT.append(built)
    try:
        yield built
    finally:
        _BUILT.remove(built)


def _whole_mask(ranges: Tensor, keys: int) -> Tensor:
    mask = mask_of(ranges, keys)
    for built in _BUILT:
        built.append(tuple(mask.shape))
    return mask


class RangedMask(Tensor):
    """The mask ``[B, 1, L, S]`` that says the same as ``ranges``, bool, built when something is computed with it.

    Attributes:
        ranges: int32 ``[B, L, 2]``, on the CPU wherever the mask is.
        segments: what they mean, if the mask is on a GPU and they are segments.
    """

    ranges: Tensor
    segments: list[Segment] | None
    _built: Tensor | None

    @staticmethod
    def __new__(cls, ranges: Tensor, keys: int, device: torch.device | str = "cpu") -> "RangedMask":
        batches, queries, _ = ranges.shape
        self: RangedMask = Tensor._make_wrapper_subclass(
            cls, (batches, 1, queries, keys), dtype=torch.bool, device=torch.device(device)
        )
        self.ranges = ranges
        on_gpu = torch.device(device).type != "cpu"
        self.segments = segments_of(ranges) if on_gpu and queries == keys else None
        self._built = None
        return self

    def built(self) -> Tensor:
        """Return the mask as an ordinary tensor."""
        if self._built is None:
            self._built = _whole_mask(self.ranges.to(self.device), self.shape[-1])
        return self._built

    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Answer what is asked about the form; anything else gets the mask."""
        if func in _OF_FORM:
            return super().__torch_function__(func, types, args, kwargs)  # type: ignore[no-untyped-call]
        return cls.__torch_dispatch__(func, types, args, kwargs)

    @classmethod
    def __torch_dispatch__(  # type: ignore[override]
        cls, func: Any, types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        """Give the mask to what torch calls within itself too."""
        return func(*tree_map(_ordinary, args), **tree_map(_ordinary, kwargs or {}))


_OF_FORM = {
    Tensor.dim, Tensor.size,
    *(getattr(Tensor, name).__get__ for name in ("shape", "ndim", "dtype", "device", "layout", "requires_grad")),
}  # fmt: skip


def _ordinary(value: Any) -> Any:
    return value.built() if isinstance(value, RangedMask) else value


def attention_mask(
    batch_size: int,
    q_length: int,
    kv_length: int,
    q_offset: int = 0,
    kv_offset: int = 0,
    mask_function: Callable[..., Any] = causal_mask_function,
    attention_mask: Tensor | None = None,
    device: torch.device | str = "cpu",
    **kwargs: Any,
) -> Tensor | None:
    """Return the mask for :func:`attention_forward`, as ranges; SDPA's mask where they cannot say it.

    Args:
        batch_size: ``B``.
        q_length: ``L``.
        kv_length: ``S``.
        q_offset: the position of the first query.
        kv_offset: that of the first key.
        mask_function: of indices, from transformers' factories.
        attention_mask: bool ``[B, seen]``, False for padding, or None.
        device: where the model is.
        kwargs: for SDPA's mask.
    """
    rule = None
    kind = torch.device(device).type
    if (kind == "cpu" or (kind == "cuda" and q_length > 1)) and not is_tracing(attention_mask):
        rule = _rule(mask_function)
    if rule is not None:
        real = None if attention_mask is None else attention_mask.cpu()
        rule = {name: value.cpu() if isinstance(value, Tensor) else value for name, value in rule.items()}
        if real is not None:
            missing = kv_offset + kv_length - real.shape[-1]
            real = nn.functional.pad(real, (0, max(missing, 0)))[:, kv_offset : kv_offset + kv_length]
        shape = (batch_size, q_length, kv_length)
        ranges = key_ranges(shape, offset=int(q_offset) - int(kv_offset), real=real, cross="ahead" not in rule, **rule)
        if ranges is not None:
            return RangedMask(ranges, kv_length, device)
    mask: Tensor | None = sdpa_mask(
        batch_size=batch_size, q_length=q_length, kv_length=kv_length, q_offset=q_offset, kv_offset=kv_offset,
        mask_function=mask_function, attention_mask=attention_mask, device=device, **kwargs,
    )  # fmt: skip
    return mask


def attention_forward(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    dropout: float = 0.0,
    scaling: float | None = None,
    softcap: float | None = None,
    **kwargs: Any,
) -> tuple[Tensor, Tensor | None]:
    """An attention function of transformers: ``query`` ``[B, H, L, D]``, ``key`` and ``value`` ``[B, G, S, D]``.

    Args:
        module: the attention layer.
        query: of any strides, as the next two.
        key: cached ones first.
        value: as ``key``.
        attention_mask: what :func:`attention_mask` returned; also a mask of two dimensions (False or 0 for padding) or
            an ordinary one of four, which goes to SDPA. None as for SDPA: causal if the module is.
        dropout: of the attention weights; goes to SDPA if not 0.
        scaling: factor of the products.
        softcap: bound of the logits.
        kwargs: ``cu_seq_lens_q`` and ``cu_seq_lens_k``, the bounds of a packed row's segments, narrow the ranges.

    Returns:
        ``[B, L, H, D]``, and None for the weights.
    """
    bounds = _bounds(kwargs)
    if isinstance(attention_mask, RangedMask) and attention_mask.segments and softcap is None and not dropout:
        segments: list[Segment] | None = attention_mask.segments
        if bounds is not None:
            segments = segments_of(within_segments(attention_mask.ranges, bounds.cpu()))
        fits = attention_mask.shape == _mask_shape(query, key)
        if fits and segments and _supported(query, key, value, kwargs):
            return attention_over_segments(query, key, value, segments, scaling), None
    ranges = _ranges(module, query, key, attention_mask, kwargs)
    if ranges is not None and bounds is not None and query.shape[2] == key.shape[2]:
        ranges = within_segments(ranges, bounds)
    if ranges is not None and not dropout and _supported(query, key, value, kwargs):
        return attention(query, key, value, ranges, scale=scaling, softcap=softcap).transpose(1, 2), None
    mask = _ordinary(attention_mask) if ranges is None else _whole_mask(ranges, key.shape[2])
    if softcap is None and kwargs.get("s_aux") is None:
        out: tuple[Tensor, None] = sdpa_attention_forward(
            module, query, key, value, mask, dropout=dropout, scaling=scaling, **kwargs
        )
        return out
    if mask is None and (unmasked := _unmasked(module, query, key, kwargs)) is not None:
        mask = _whole_mask(unmasked, key.shape[2]).to(query.device)
    if mask is not None and mask.dtype == torch.bool:
        mask = torch.zeros_like(mask, dtype=query.dtype).masked_fill(~mask, torch.finfo(query.dtype).min)
    eager = _eager(module)
    weighted: tuple[Tensor, Tensor | None] = eager(
        module, query, key, value, mask, dropout=dropout, scaling=scaling, softcap=softcap, **kwargs
    )
    return weighted


def _rule(mask_function: Callable[..., Any]) -> dict[str, Any] | None:
    """Return what a mask function of transformers (5.23) says, as arguments of :func:`key_ranges`; None if unknown.

    The functions are closures without any other description: ``masking_utils`` makes them, and they are known by their
    place in it. A conjunction's terms may each say something else.
    """
    if mask_function is bidirectional_mask_function:
        return {}
    if mask_function is causal_mask_function:
        return {"ahead": 0}
    if getattr(mask_function, "__module__", None) != causal_mask_function.__module__:
        return None
    inside = inspect.getclosurevars(mask_function).nonlocals
    match mask_function.__qualname__.split(".")[0]:
        case "sliding_window_overlay":  # key > query - window
            return {"behind": inside["sliding_window"] - 1}
        case "sliding_window_bidirectional_overlay":
            return {"behind": inside["sliding_window"], "ahead": inside["sliding_window"]}
        case "packed_sequence_mask_function":
            return {"segments": inside["packed_sequence_mask"].contiguous()}
        case "remap_positions_for_packed_sequence":  # positions within a segment are as far apart as indices
            return _rule(inside["mask_function"])
        case "and_masks":
            rules = [_rule(term) for term in inside["mask_functions"]]
            merged: dict[str, Any] = {}
            for rule in rules:
                if rule is None or merged.keys() & rule.keys():
                    return None
                merged |= rule
            return merged
    return None


def _ranges(
    module: nn.Module, query: Tensor, key: Tensor, mask: Tensor | None, kwargs: dict[str, Any]
) -> Tensor | None:
    """Return the ranges int32 ``[B, L, 2]`` that a mask means, or None if it has another form."""
    if query.device.type != "cpu" or is_tracing(query):
        return None
    if isinstance(mask, RangedMask):
        return mask.ranges if mask.shape == _mask_shape(query, key) else None
    if mask is None:
        return _unmasked(module, query, key, kwargs)
    window, keys = kwargs.get("sliding_window"), key.shape[2]
    is_causal = _is_causal(module, kwargs)
    if mask.ndim != 2 or mask.shape[-1] != keys or (window is not None and not is_causal):
        return None
    shape = (query.shape[0], query.shape[2], keys)
    behind, ahead = None if window is None else window - 1, 0 if is_causal else None
    return key_ranges(shape, behind=behind, ahead=ahead, real=mask.bool(), cross=not is_causal)


def _mask_shape(query: Tensor, key: Tensor) -> tuple[int, int, int, int]:
    return query.shape[0], 1, query.shape[2], key.shape[2]


def _unmasked(module: nn.Module, query: Tensor, key: Tensor, kwargs: dict[str, Any]) -> Tensor | None:
    """Return the ranges that no mask means to SDPA: a single query reads all keys, causal ones are the first keys'."""
    queries = query.shape[2]
    ahead = 0 if queries > 1 and _is_causal(module, kwargs) else None
    return key_ranges((query.shape[0], queries, key.shape[2]), offset=0, ahead=ahead)


def _is_causal(module: nn.Module, kwargs: dict[str, Any]) -> bool:
    asked = kwargs.get("is_causal")
    return bool(getattr(module, "is_causal", True) if asked is None else asked)


def _bounds(kwargs: dict[str, Any]) -> Tensor | None:
    """Return the segments' bounds, if the arguments have them and those of queries and keys are the same."""
    bounds, of_keys = kwargs.get("cu_seq_lens_q"), kwargs.get("cu_seq_lens_k")
    if bounds is None or of_keys is None or (bounds is not of_keys and not torch.equal(bounds, of_keys)):
        return None
    found: Tensor = bounds
    return found


def _supported(query: Tensor, key: Tensor, value: Tensor, kwargs: dict[str, Any]) -> bool:
    """Whether the kernel takes these tensors and knows every argument that is set."""
    return (
        query.dtype in FLOATING
        and query.dtype == key.dtype == value.dtype
        and key.shape == value.shape
        and query.shape[-1] == key.shape[-1] <= LARGEST_HEAD
        and query.shape[0] == key.shape[0]
        and query.shape[1] % key.shape[1] == 0
        and key.shape[2] < MOST_KEYS
        and not any(value is not None and value is not False for name, value in kwargs.items() if name not in NEUTRAL)
    )


def _eager(module: nn.Module) -> Callable[..., Any]:
    """Return the eager attention function of a layer's family: by convention of transformers (5.23) in its file."""
    for cls in type(module).__mro__:
        function: Callable[..., Any] | None = getattr(sys.modules.get(cls.__module__), "eager_attention_forward", None)
        if function is not None:
            return function
    raise NotImplementedError(f"{type(module).__name__} needs eager attention, which its file does not define")


AttentionInterface.register(NAME, attention_forward)
AttentionMaskInterface.register(NAME, attention_mask)

"""A cache of transformers (5.23) through which the training forward reads a prompt whose cache lies in pages.

The layers of a pass append to one buffer each, which holds the text so far in the order that attention reads; what is
new goes to the pages too, and is attended to as it is held there: so a prompt whose beginning was read before gives the
same numbers. The buffers live as long as the prompt is being read.
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from transformers.cache_utils import Cache, CacheLayerMixin

Sink = Callable[[int, Tensor, Tensor], tuple[Tensor, Tensor]]
"""Takes the new keys and values of a layer, ``[kv_heads, tokens, size]``, and returns them as they are held."""


class _Layer(CacheLayerMixin):
    """A layer's keys and values, ``[1, kv_heads, capacity, size]``, of which the first ``length`` are there."""

    is_sliding = False

    def __init__(self, number: int, owner: "ReadingCache") -> None:
        super().__init__()
        self.number = number
        self.owner = owner
        self.is_initialized = True

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None:
        """Nothing: the owner has made the buffers."""

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        """Append, and return all keys and values so far, which may be views."""
        return self.owner.append(self.number, key_states, value_states)

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        """Return how many keys a query of the pass sees, and where they begin."""
        return self.owner.length + query_length, 0

    def get_seq_length(self) -> int:
        """Return the tokens that were read before this pass."""
        return self.owner.length

    def get_max_length(self) -> int:
        """Return that there is no limit."""
        return -1


class ReadingCache(Cache):
    """Keys and values of a prompt that is being read.

    Attributes:
        length: tokens read before the pass at hand; whoever drives the passes brings it up to date.
        sink: gets what is new in a pass.
    """

    def __init__(
        self,
        layers: int,
        shape: tuple[int, int, int],
        dtype: torch.dtype,
        length: int,
        copy_held: Callable[[Tensor, Tensor], None] | None,
    ) -> None:
        """Begin with ``length`` tokens, whose keys and values ``copy_held`` copies.

        Args:
            layers: how many there are.
            shape: heads of keys and values, tokens to expect, values of a head.
            dtype: of keys and values in the pass.
            length: tokens that are there.
            copy_held: to ``[layers, kv_heads, length, size]`` each; None where there are none.
        """
        heads, capacity, size = shape
        keys, values = (torch.empty(layers, 1, heads, capacity, size, dtype=dtype) for _ in range(2))
        self.length = length
        if copy_held:
            copy_held(keys[:, 0, :, :length], values[:, 0, :, :length])
        self._keys, self._values = list(keys.unbind(0)), list(values.unbind(0))
        self.sink: Sink | None = None
        super().__init__(layers=[_Layer(number, self) for number in range(layers)])

    def append(self, number: int, keys: Tensor, values: Tensor) -> tuple[Tensor, Tensor]:
        """Append what is new of a layer; return all of it."""
        end = self.length + keys.shape[2]
        if self.sink is not None:
            keys, values = (held[None].to(keys.dtype) for held in self.sink(number, keys[0], values[0]))
        for buffers, new in ((self._keys, keys), (self._values, values)):
            if end > buffers[number].shape[2]:
                grown = new.new_empty(1, new.shape[1], 2 * end, new.shape[3])
                grown[:, :, : self.length] = buffers[number][:, :, : self.length]
                buffers[number] = grown
            buffers[number][:, :, self.length : end] = new
        return self._keys[number][:, :, :end], self._values[number][:, :, :end]

"""The decoder that serves every model: transformers' own forward and caches, one row after the other.

It is correct before it is fast. Each sequence has a cache of its own, as the model's configuration asks for it, and is
computed alone, so its numbers are bitwise those that it has without neighbours. Prefixes are shared in whole pieces,
for the same reason: a prompt whose first pieces are there goes on with the very operations that would have followed.
Only caches that hold every token can be shared; those of sliding windows and of states that are overwritten are not.

Adapters are PEFT's, over one base; rows with the same one are computed one after the other, since switching takes time.
"""

import inspect
from collections import abc
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, cast

import torch
from peft import PeftModel
from torch import Tensor
from transformers import DynamicCache, EncoderDecoderCache, PreTrainedModel
from transformers.cache_utils import DynamicLayer

from halfbyte.errors import InputError
from halfbyte.generate.decoder import PIECE, Sequence
from halfbyte.hf.layers.adapters import active_adapter
from halfbyte.hf.layers.head import base_of
from halfbyte.hf.models.limits import most_positions

MOST_ROWS = 64
MOST_KEPT = 8
"""Prefixes that stay for others."""


@dataclass(eq=False)
class _Sequence:
    """One sequence, or a prefix that stayed.

    Attributes:
        ids: the prompt of it that was read; of an encoder-decoder the source.
        length: tokens held.
        source: the encoder's states [1, source, width] of an encoder-decoder.
        taken: bytes.
    """

    ids: list[int]
    adapter: str | None
    cache: Any
    length: int = 0
    source: Tensor | None = None
    taken: int = 0

    def whole_pieces(self, ids: abc.Sequence[int]) -> int:
        """Return how many tokens of a prompt are held here, as whole pieces, its last token never among them."""
        most = min(len(self.ids), len(ids) - 1) // PIECE * PIECE
        same = range(0, most, PIECE)
        return next((at for at in same if self.ids[at : at + PIECE] != list(ids[at : at + PIECE])), most)


@dataclass
class _Cost:
    """Bytes of a sequence: so many and so many a token."""

    fixed: int
    per_token: int


class TransformersDecoder:
    """A decoder over a model of transformers, with PEFT's adapters or without.

    The model must be in evaluation mode. While there are sequences, its active adapter is theirs; afterwards it is the
    one of before.
    """

    def __init__(self, model: PreTrainedModel | PeftModel, *, rows: int = MOST_ROWS) -> None:
        """
        Args:
            model: one that generates text.
            rows: the most sequences in a step.

        Raises:
            InputError: it has adapters that are prompts, which have no place beside others in a cache.
        """
        self._base = cast(Any, base_of(model))
        self._peft = model if isinstance(model, PeftModel) else None
        configs = {} if self._peft is None else self._peft.peft_config
        for name, config in configs.items():
            if config.is_prompt_learning:
                kind = config.peft_type.value
                raise InputError(f"Adapter {name!r} is a {kind}, which has no cache of its own; adapters of layers do.")
        self.reason: str | None = None
        """Why the model decodes this way and not natively, if somebody has found out."""
        self.rows = rows
        self.longest_read = PIECE
        self.budget: int | None = None
        self.reads_apart = bool(self._base.config.is_encoder_decoder)
        self.positions = most_positions(model)
        self.vocab_size = int(self._base.get_output_embeddings().weight.shape[0])
        self._device = self._base.device
        takes = inspect.signature(self._base.forward).parameters
        self._last_only = {"logits_to_keep": 1} if "logits_to_keep" in takes else {}
        self._before = self._active = None if self._peft is None else active_adapter(self._peft)
        self._under_way: list[_Sequence] = []
        self._kept: list[_Sequence] = []
        self._cost: _Cost | None = None

    @property
    def adapters(self) -> tuple[str, ...]:
        """Names of the adapters over the base."""
        return () if self._peft is None else tuple(self._peft.peft_config)

    @property
    def active(self) -> str | None:
        """The adapter that the model came with, or None."""
        return self._before

    @property
    def bytes_held(self) -> int:
        """Bytes that keys and values take now, kept prefixes included."""
        return sum(sequence.taken for sequence in [*self._under_way, *self._kept])

    def begin(self, ids: abc.Sequence[int], adapter: str | None) -> _Sequence:
        """Return a sequence for a prompt; pieces of it may be held already."""
        sequence = _Sequence([], adapter, self._new_cache())
        if self.reads_apart:
            sequence.ids, sequence.length = list(ids), len(ids) - 1
        else:
            self._share(sequence, ids)
        self._under_way.append(sequence)
        return sequence

    @torch.no_grad()  # not inference mode: what a layer remembers of a pass must do for training too
    def read(self, sequence: Sequence, ids: abc.Sequence[int]) -> Tensor:
        """Append one piece of the prompt, and return the fp32 logits [vocab_size] after its last token."""
        own = self._own(sequence)
        self._make_room(len(ids) if not self.reads_apart else len(own.ids) + 1)
        self._use(own.adapter)
        if not self.reads_apart:
            logits = self._forward(own, ids)
            own.ids += ids
        else:
            encoder = self._base.get_encoder()
            own.source = encoder(input_ids=self._tensor(own.ids)).last_hidden_state
            logits = self._forward(own, self._starts())
            own.length = len(own.ids)
        return logits

    @torch.no_grad()
    def step(self, sequences: abc.Sequence[Sequence], tokens: abc.Sequence[int]) -> Tensor:
        """Append one token to each sequence, and return fp32 logits [len(sequences), vocab_size]."""
        owns = [self._own(sequence) for sequence in sequences]
        self._make_room(len(owns))
        logits = torch.empty(len(owns), self.vocab_size, dtype=torch.float32)
        names = [self._active, *(name for name in (None, *self.adapters) if name != self._active)]
        for row in sorted(range(len(owns)), key=lambda row: names.index(owns[row].adapter)):
            self._use(owns[row].adapter)
            logits[row] = self._forward(owns[row], [tokens[row]])
        return logits

    def cut(self, sequence: Sequence, length: int) -> None:
        """Forget all tokens of a sequence behind the first ``length``.

        Raises:
            ValueError: what lies before is no longer held (sliding windows), or it is the source of an encoder-decoder.
        """
        own = self._own(sequence)
        least = len(own.ids) if self.reads_apart else 0
        if not least <= length <= own.length:
            raise ValueError(f"A sequence of {own.length} tokens cannot be cut to {length}; {least} are the least.")
        if length < own.length and not _is_whole(own.cache):
            raise ValueError("A cache that does not hold every token cannot be cut.")
        if length < own.length:
            own.cache.crop(length - own.length)
            own.length = length
            del own.ids[length:]

    def end(self, sequence: Sequence) -> None:
        """Free what a sequence takes; the whole pieces of its prompt may stay for others."""
        own = self._own(sequence)
        self._under_way.remove(own)
        if not self.reads_apart:
            self._keep(own)
        own.cache = own.source = None
        if not self._under_way:
            self._use(self._before)

    def forget(self, adapter: str | None) -> None:
        """Drop the prefixes that were kept for an adapter, because it is replaced or taken away."""
        self._kept = [one for one in self._kept if one.adapter != adapter]

    @property
    def model(self) -> PreTrainedModel | PeftModel:
        """What it decodes with."""
        return self._base if self._peft is None else self._peft

    def take(self, model: PeftModel, name: str) -> None:
        """Take an adapter that was put on the model by now."""
        del name
        self._peft = model
        model.base_model.enable_adapter_layers()  # those that it has wrapped anew are, whatever the others
        self._active = str(model.active_adapter)
        self._use(self._before)

    def let_go(self, model: PreTrainedModel | PeftModel, name: str) -> None:
        """Forget an adapter that the model has no more, of which there is no sequence, and what was kept of it."""
        self.forget(name)
        self._peft = model if isinstance(model, PeftModel) else None
        self._before = None if self._before == name else self._before
        self._active = None
        if self._peft is not None:
            self._peft.base_model.enable_adapter_layers()
            self._active = str(self._peft.active_adapter)
            self._use(self._before)

    def bytes_of(self, tokens: int) -> int:
        """Return the bytes that a sequence of so many tokens takes, at most; the first call computes two tokens."""
        if self._cost is None:
            self._cost = self._measured()
        return self._cost.fixed + self._cost.per_token * tokens

    # Passes.

    def _own(self, sequence: Sequence) -> _Sequence:
        if not isinstance(sequence, _Sequence):
            raise TypeError(f"{type(sequence).__name__} is not a sequence of this decoder.")
        return sequence

    def _tensor(self, ids: abc.Sequence[int]) -> Tensor:
        return torch.tensor([list(ids)], device=self._device)

    def _new_cache(self) -> Any:
        config = self._base.config.get_text_config(decoder=True)
        if self.reads_apart:
            return EncoderDecoderCache(DynamicCache(config=config), DynamicCache(config=config))
        return DynamicCache(config=config)

    def _starts(self) -> list[int]:
        """Return what an encoder-decoder's answers begin with, before what is chosen."""
        own = self._base.generation_config
        start = own.decoder_start_token_id if own.decoder_start_token_id is not None else own.bos_token_id
        return [token for token in (start, own.forced_bos_token_id) if token is not None]

    def _forward(self, sequence: _Sequence, ids: abc.Sequence[int]) -> Tensor:
        if self.reads_apart:
            encoded = (sequence.source,)
            output = self._base(
                encoder_outputs=encoded,
                decoder_input_ids=self._tensor(ids),
                past_key_values=sequence.cache,
                use_cache=True,
            )
        else:
            output = self._base(
                input_ids=self._tensor(ids), past_key_values=sequence.cache, use_cache=True, **self._last_only
            )
        sequence.length += len(ids)
        sequence.taken = _bytes_of(sequence)
        logits: Tensor = output.logits[0, -1]
        return logits.to("cpu", torch.float32)

    def _use(self, adapter: str | None) -> None:
        """Make an adapter the active one, or none."""
        if self._peft is None or adapter == self._active:
            return
        if adapter is None:
            self._peft.base_model.disable_adapter_layers()
        else:
            if self._active is None:
                self._peft.base_model.enable_adapter_layers()
            self._peft.set_adapter(adapter)
        self._active = adapter

    # Memory and what is shared.

    def _share(self, sequence: _Sequence, ids: abc.Sequence[int]) -> None:
        """Give a new sequence the longest prefix of its prompt that is held."""
        same = [one for one in [*self._under_way, *self._kept] if one.adapter == sequence.adapter]
        best = max(same, key=lambda one: one.whole_pieces(ids), default=None)
        length = best.whole_pieces(ids) if best is not None and _is_whole(best.cache) else 0
        if best is None or not length:
            return
        self._make_room(length)
        for number, layer in enumerate(best.cache.layers):
            sequence.cache.update(layer.keys[..., :length, :], layer.values[..., :length, :], number)
        sequence.ids, sequence.length = list(ids[:length]), length
        sequence.taken = _bytes_of(sequence)
        if best in self._kept:
            self._kept.remove(best)
            self._kept.append(best)

    def _keep(self, ended: _Sequence) -> None:
        """Keep the whole pieces that were read, where they are new and there is room."""
        length = len(ended.ids) // PIECE * PIECE
        if not length or not _is_whole(ended.cache):
            return
        ids = ended.ids[:length]
        if any(one.adapter == ended.adapter and one.ids[:length] == ids for one in self._kept):
            return
        self._kept = [
            one for one in self._kept if one.adapter != ended.adapter or one.ids != ids[: len(one.ids)]
        ]  # prefixes of it
        cache = self._new_cache()
        for number, layer in enumerate(ended.cache.layers):
            cache.update(layer.keys[..., :length, :].clone(), layer.values[..., :length, :].clone(), number)
        kept = _Sequence(ids, ended.adapter, cache, length)
        kept.taken = _bytes_of(kept)
        self._kept = [*self._kept, kept][-MOST_KEPT:]
        self._make_room(0)

    def _make_room(self, tokens: int) -> None:
        """Drop prefixes, those that were used longest ago first, until so many more tokens can be held."""
        if self.budget is None:
            return
        needed = self.bytes_of(tokens) if tokens else 0
        while self._kept and self.bytes_held + needed > self.budget:
            del self._kept[0]

    @torch.no_grad()
    def _measured(self) -> _Cost:
        """Return what sequences take, from two short ones."""
        taken = []
        for length in (1, 2):
            sequence = _Sequence([0] * length, self._active, self._new_cache())
            if self.reads_apart:
                sequence.source = self._base.get_encoder()(input_ids=self._tensor(sequence.ids)).last_hidden_state
            self._forward(sequence, sequence.ids)
            taken.append(_bytes_of(sequence))
        return _Cost(max(0, 2 * taken[0] - taken[1]), taken[1] - taken[0])


def _is_whole(cache: Any) -> bool:
    """Return whether a cache holds every token that it has been given, in one tensor of keys and one of values."""
    caches = [cache.self_attention_cache] if isinstance(cache, EncoderDecoderCache) else [cache]
    return all(type(layer) is DynamicLayer and layer.is_initialized for cache in caches for layer in cache.layers)


def _bytes_of(sequence: _Sequence) -> int:
    """Return the bytes of all tensors that a sequence holds."""
    storages = {tensor.untyped_storage().data_ptr(): tensor.untyped_storage().nbytes() for tensor in _tensors(sequence)}
    return sum(storages.values())


def _tensors(sequence: _Sequence) -> Iterator[Tensor]:
    cache = sequence.cache
    caches = [cache]
    if isinstance(cache, EncoderDecoderCache):
        caches = [cache.self_attention_cache, cache.cross_attention_cache]
    values = [value for cache in caches for layer in cache.layers for value in vars(layer).values()]
    for value in [*values, sequence.source]:
        if isinstance(value, Tensor) and value.ndim > 0:
            yield value
        elif isinstance(value, list | dict):
            nested = value.values() if isinstance(value, dict) else value
            yield from (one for one in nested if isinstance(one, Tensor))

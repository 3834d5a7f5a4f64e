"""A decoder (:mod:`halfbyte.generate.decoder`) whose prompts go through the training forward and whose tokens are one
native call each (:mod:`halfbyte.nn.decode`).

Row by row the numbers of a sequence are bitwise those of the same sequence alone: a step's rows do not depend on each
other, and neither does what the training forward gives for a token on what else is read with it, but that few rows are
summed in another order than more (csrc/matmul.h). So a piece of few tokens that goes on with a text is read again from
somewhat before it.

Whole pages of prompts that were read stay for others that begin alike, with the same adapter, the oldest going first
when memory is wanted. With ``keep_decoded``, as a chat wants it, decoded tokens stay too, those behind the last whole
page as well, and the few tokens of a further turn are taken by one native call: all this is as good as what is read,
but not bitwise the same.
"""

import contextlib
import functools
from collections import abc
from collections.abc import Iterator
from typing import Any

import torch
from peft import PeftModel
from torch import Tensor
from transformers import PreTrainedModel

from halfbyte.errors import InputError
from halfbyte.generate.decoder import PAGE, PIECE, Sequence
from halfbyte.generate.kept_pages import KeptPages
from halfbyte.hf.layers.adapters import active_adapter
from halfbyte.hf.layers.decoding import NotNative, adapter_parts, agrees, linears_of, read
from halfbyte.hf.layers.head import base_of
from halfbyte.hf.layers.paged import ReadingCache
from halfbyte.hf.models.limits import most_positions
from halfbyte.hf.models.paging import following
from halfbyte.kernels import Decoder as Kernels
from halfbyte.kernels.decode import MOST_ROWS
from halfbyte.kernels.terms import FEW
from halfbyte.nn.decode import PagedDecoder, Text

TURN = 48
"""Tokens behind others up to which a native call takes less time than the training forward; its attention reads the
cache once for each of them (measured on the 135M model at 1,000 held tokens; about equal at 8,000)."""
TRIAL = 12
"""Tokens by which the native way is tried before it is used."""


class NativeSequence:
    """A sequence of a :class:`NativeDecoder`.

    Attributes:
        adapter: its name, or None.
        ids: the tokens whose keys and values are held.
        read: how many of them were read as a prompt.
        prompt: how many tokens the prompt has.
    """

    def __init__(self, adapter: str | None, prompt: int) -> None:
        self.adapter = adapter
        self.text = Text()
        self.ids: list[int] = []
        self.read = 0
        self.prompt = prompt
        self.reading: ReadingCache | None = None

    @property
    def length(self) -> int:
        """Tokens whose keys and values are held."""
        return self.text.length


class NativeDecoder:
    """See :class:`halfbyte.generate.decoder.Decoder`.

    Args:
        model: a model of a known family on the CPU, with adapters or without, prepared or fused, in evaluation mode.
        cache: what keys and values are kept in: ``bf16`` (the model's own dtype where that is another), or ``int8``.
        head: the output head as trained (``None``), or quantized: ``int8`` or ``nf4``.
        keep_decoded: whether pages of decoded tokens may be shared.
        adapters: what is to be decoded with: names, None for the base; without it the base and all adapters there are.

    Raises:
        NotNative: the model or one of its adapters is not known, or the native way gives other numbers.
    """

    reason: str | None = None
    """Why the model decodes through transformers; here it does not."""
    rows = MOST_ROWS
    longest_read = 4 * PIECE
    reads_apart = False

    def __init__(
        self, model: PreTrainedModel | PeftModel, *, cache: str | None = None, head: str | None = None,
        keep_decoded: bool = False, adapters: abc.Sequence[str | None] | None = None,
    ) -> None:  # fmt: skip
        self.model = model
        self.reading = read(model, head=head)
        parts = self.reading.parts
        own = str(parts.dtype).removeprefix("torch.")
        try:
            self.paged = PagedDecoder(Kernels(parts, cache if cache == "int8" else own), self.reading.angles)
        except InputError as error:
            raise NotNative(str(error)) from None
        self._exact = head is None and cache is None
        self.keep_decoded = keep_decoded
        self.positions = most_positions(model)
        self.vocab_size = parts.head.width
        self._numbers: dict[str | None, int] = {None: -1}
        self.kept = KeptPages(self.paged)
        there = list(model.peft_config) if isinstance(model, PeftModel) else []
        for name in [None, *there] if adapters is None else adapters:
            if name is not None:
                self.add_adapter(name)
            self._try(name)

    @property
    def active(self) -> str | None:
        """The adapter that the model has active, or None."""
        return active_adapter(self.model) if isinstance(self.model, PeftModel) else None

    @property
    def adapters(self) -> tuple[str, ...]:
        """Names of the adapters."""
        return tuple(name for name in self._numbers if name is not None)

    @property
    def bytes_held(self) -> int:
        """Bytes that keys and values take now, those kept for others included."""
        return self.kept.bytes_held

    @property
    def budget(self) -> int | None:
        """Bytes that they may take, or None."""
        return self.kept.budget

    @budget.setter
    def budget(self, most: int | None) -> None:
        self.kept.budget = most

    def bytes_of(self, tokens: int) -> int:
        """Return the bytes that a sequence of so many tokens takes, at most."""
        return self.kept.bytes_of(tokens)

    def add_adapter(self, name: str) -> None:
        """Take an adapter that the model has by now, or take it again as it is now.

        Raises:
            NotNative: it is not known.
        """
        parts = adapter_parts(self.reading, self.model, name)
        self.remove_adapter(name)
        self._numbers[name] = self.paged.decoder.add_adapter(parts)

    def take(self, model: PreTrainedModel | PeftModel, name: str) -> None:
        """Take an adapter that was put on the model by now, and try it.

        Raises:
            NotNative: it is not known, or gives other numbers natively; it is not there then.
        """
        self.model = model
        self.reading.linears = linears_of(model)
        self.add_adapter(name)
        try:
            self._try(name)
        except BaseException:
            self.remove_adapter(name)
            raise

    def let_go(self, model: PreTrainedModel | PeftModel, name: str) -> None:
        """Forget an adapter that the model has no more."""
        self.remove_adapter(name)
        self.model = model
        self.reading.linears = linears_of(model)

    def remove_adapter(self, name: str) -> None:
        """Forget an adapter, of which there is no sequence any more, and what was kept of it."""
        if name in self._numbers:
            self.paged.decoder.remove_adapter(self._numbers.pop(name))
        self.kept.forget(name)

    def begin(self, ids: abc.Sequence[int], adapter: str | None) -> NativeSequence:
        """Return a sequence for a prompt, with what is kept of its beginning."""
        if adapter not in self._numbers:
            raise KeyError(adapter)
        sequence = NativeSequence(adapter, len(ids))
        self.kept.begin(sequence.text, ids, adapter)
        sequence.ids = list(ids[: sequence.length])
        sequence.read = sequence.length
        return sequence

    @torch.no_grad()
    def read(self, sequence: Sequence, ids: abc.Sequence[int]) -> Tensor:
        """Append one piece of the prompt; return the logits after its last token."""
        sequence = _own(sequence)
        text = sequence.text
        if self.keep_decoded and text.length and len(ids) <= TURN:
            return self._extend(sequence, ids)
        again = min(text.length, max(0, FEW + 1 - len(ids))) if len(ids) <= FEW else 0
        start, end = text.length - again, text.length + len(ids)
        self.kept.make_room(end - len(text.pages) * PAGE)
        if sequence.reading is None:
            parts = self.reading.parts
            shape = parts.kv_heads, max(end, sequence.prompt), parts.size
            held = functools.partial(self.paged.copy_held, text) if text.length else None
            dtype: Any = base_of(self.model).dtype
            sequence.reading = ReadingCache(len(parts.layers), shape, dtype, text.length, held)
        cache = sequence.reading
        cache.length = start
        cache.sink = lambda layer, keys, values: self.paged.append(text, layer, keys, values, again)
        given = [*sequence.ids[start:], *ids]
        try:
            with self._adapter(sequence.adapter):
                logits: Tensor = self.model(
                    input_ids=torch.tensor([given]),
                    position_ids=torch.arange(start, end)[None],
                    past_key_values=cache,
                    use_cache=True,
                    logits_to_keep=1,
                ).logits[0, -1]
        except BaseException:
            sequence.reading = None
            raise
        text.length = cache.length = end
        sequence.ids += ids
        if sequence.read == start + again:
            sequence.read = end
        if end >= sequence.prompt:
            sequence.reading = None
        self.kept.keep(text, sequence.ids[: sequence.read], sequence.adapter)
        return logits.float()

    def _extend(self, sequence: NativeSequence, ids: abc.Sequence[int]) -> Tensor:
        text = sequence.text
        self.kept.make_room(text.length + len(ids) - len(text.pages) * PAGE)
        with self._read_ahead():
            logits = self.paged.extend(text, ids, self._numbers[sequence.adapter])
        sequence.ids += ids
        sequence.read = text.length
        sequence.reading = None
        self.kept.keep(text, sequence.ids[: sequence.read], sequence.adapter)
        return logits

    def step(self, sequences: abc.Sequence[Sequence], tokens: abc.Sequence[int]) -> Tensor:
        """Append one token to each sequence; return the logits after it."""
        rows = [_own(sequence) for sequence in sequences]
        self.kept.make_room(PAGE * sum(one.length % PAGE == 0 for one in rows))
        numbers = [self._numbers[one.adapter] for one in rows]
        with self._read_ahead():
            logits = self.paged.step([one.text for one in rows], tokens, numbers)
        for one, token in zip(rows, tokens, strict=True):
            one.ids.append(token)
            one.reading = None
        return logits

    def cut(self, sequence: Sequence, length: int) -> None:
        """Forget all tokens behind the first ``length``."""
        sequence = _own(sequence)
        self.paged.cut(sequence.text, length)
        del sequence.ids[length:]
        sequence.read = min(sequence.read, length)
        sequence.reading = None

    def end(self, sequence: Sequence) -> None:
        """Free what a sequence takes; whole pages may stay for others."""
        sequence = _own(sequence)
        if self.keep_decoded:
            self.kept.keep(sequence.text, sequence.ids, sequence.adapter)
            self.kept.keep_tail(sequence.text, sequence.ids, sequence.adapter)
        self.cut(sequence, 0)
        self.kept.make_room(0)

    def _read_ahead(self) -> contextlib.AbstractContextManager[None]:
        """Where the base does not fit into memory, have it read ahead of a native call."""
        return following(self.model, self.paged.decoder)

    @contextlib.contextmanager
    def _adapter(self, name: str | None) -> Iterator[None]:
        """Let the model's forward compute with one adapter, or with none; what is trained stays what it is."""
        model = self.model
        if not isinstance(model, PeftModel) or (before := active_adapter(model)) == name:
            yield
            return
        trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
        try:
            _activate(model, name)
            yield
        finally:
            _activate(model, before)
            # PEFT makes trainable what becomes active, all of it, and nothing else
            now = {id(parameter) for parameter in trained}
            for parameter in model.parameters():
                if parameter.requires_grad != (id(parameter) in now):
                    parameter.requires_grad_(id(parameter) in now)

    @torch.no_grad()
    def _try(self, name: str | None) -> None:
        """Compare the native way with the model's own, of the base or an adapter.

        Raises:
            NotNative: they differ.
        """
        generator = torch.Generator().manual_seed(0)
        ids = torch.randint(self.reading.parts.embedding.shape[0], (TRIAL,), generator=generator).tolist()
        text = Text()
        rows = [self.paged.step([text], [token], [self._numbers[name]]) for token in ids]
        self.paged.cut(text, 0)
        with self._adapter(name):
            if not agrees(self.model, torch.cat(rows), ids, exact=self._exact):
                raise NotNative(f"it gives other logits natively{'' if name is None else f' with {name}'}")


def _own(sequence: Sequence) -> NativeSequence:
    assert isinstance(sequence, NativeSequence)
    return sequence


def _activate(model: PeftModel, name: str | None) -> None:
    """Let a model be computed with one of its adapters, or with none."""
    if name is None:
        model.base_model.disable_adapter_layers()
    else:
        model.base_model.enable_adapter_layers()
        model.set_adapter(name, inference_mode=True)

"""What the engine asks of a model: sequences that are begun, read in pieces, continued by a token each, and ended.

A sequence holds the keys and values of the tokens so far, computed with one adapter or none. The engine
(:mod:`halfbyte.generate.engine`) is written against this protocol alone; a decoder knows nothing of requests, sampling
or text. Prompts are read in pieces that end at the same places whatever else goes on, so that a sequence's numbers need
not depend on its neighbours.
"""

from collections import abc
from typing import Protocol

from torch import Tensor

PAGE = 64
"""Tokens of a page of keys and values: prefixes that several sequences share are whole pages."""

PIECE = 256
"""Tokens of a prompt that are read at once, at most, while others are decoded; pieces end at multiples of it, and at
the prompt's end."""


class Sequence(Protocol):
    """One sequence under way; made by :meth:`Decoder.begin`, and of use to its decoder alone."""

    @property
    def length(self) -> int:
        """Tokens whose keys and values are held."""

    @property
    def adapter(self) -> str | None:
        """The adapter that it is computed with, or None for the base."""


class Decoder(Protocol):
    """A model that goes on with several sequences at once.

    All methods but :meth:`bytes_of` are called from one thread. An exception in a method leaves every other sequence as
    it was; those that the call named can still be ended.
    """

    @property
    def vocab_size(self) -> int:
        """Logits of a token: rows of the output head."""

    @property
    def positions(self) -> int | None:
        """The most tokens of a sequence that the model attends to, or None where it sets no limit."""

    @property
    def reads_apart(self) -> bool:
        """Whether prompts take none of the positions, as in an encoder-decoder."""

    @property
    def adapters(self) -> tuple[str, ...]:
        """Names of the adapters over the base; a sequence has one of them, or None."""

    @property
    def rows(self) -> int:
        """The most sequences in one step."""

    @property
    def longest_read(self) -> int:
        """Tokens of a prompt that are read at once while nothing else goes on: a multiple of ``PIECE``, and ``PIECE``
        itself where the numbers depend on where a prompt is cut."""

    @property
    def bytes_held(self) -> int:
        """Bytes that keys and values take now, kept prefixes included."""

    budget: int | None
    """Bytes that keys and values may take, kept prefixes included, or None for no limit; whoever owns the decoder sets
    it. Prefixes are kept only where this leaves room beside the sequences under way."""

    def begin(self, ids: abc.Sequence[int], adapter: str | None) -> Sequence:
        """Return a sequence for a prompt.

        It may hold a prefix of ``ids`` already: whole pages that were read for another sequence with the same adapter.
        Its ``length`` says how many tokens; the last one is never among them.

        Args:
            ids: the whole prompt, one token at least.
            adapter: one of ``adapters``, or None.
        """

    def read(self, sequence: Sequence, ids: abc.Sequence[int]) -> Tensor:
        """Append one piece of the prompt, and return the fp32 logits [vocab_size] after its last token.

        Args:
            sequence: to append to.
            ids: its next tokens, ``longest_read`` at most.
        """

    def step(self, sequences: abc.Sequence[Sequence], tokens: abc.Sequence[int]) -> Tensor:
        """Append one token to each sequence, and return fp32 logits [len(sequences), vocab_size].

        Args:
            sequences: ``rows`` of them at most, of any lengths and adapters; prompts that are read whole.
            tokens: one for each.
        """

    def cut(self, sequence: Sequence, length: int) -> None:
        """Forget all tokens of a sequence behind the first ``length``."""

    def end(self, sequence: Sequence) -> None:
        """Free what a sequence takes. Pages that were read, not decoded, may stay for others while memory allows."""

    def bytes_of(self, tokens: int) -> int:
        """Return the bytes that a sequence of so many tokens takes, at most; from any thread."""

"""One request under way in an engine, and which requests can be answered at all."""

import secrets

from halfbyte.errors import InputError, nearest, size_text
from halfbyte.generate.answers import Request, Stream, Usage
from halfbyte.generate.decoder import Decoder, Sequence
from halfbyte.generate.sampling import Sampler
from halfbyte.generate.text import TextStream


def most_tokens(decoder: Decoder, memory: int | None, request: Request) -> int:
    """Check that a request can be answered, and return the most tokens that its answer can have.

    Args:
        decoder: that is to answer it.
        memory: bytes for keys and values, or None for no limit.
        request: what is asked.

    Raises:
        InputError: it can never be answered: the prompt is empty, as long as the model attends to, or takes more memory
            than there is; there is no such adapter; a token does not exist.
    """
    ids, sampling = request.ids, request.sampling
    if not ids:
        raise InputError("The prompt is empty, so there is nothing to go on from; give at least one token.")
    if not 0 <= min(ids) <= max(ids) < decoder.vocab_size:
        wrong = next(token for token in ids if not 0 <= token < decoder.vocab_size)
        raise InputError(f"The prompt holds token {wrong}, but the model has {decoder.vocab_size}.")
    sampling.check_vocabulary(decoder.vocab_size)
    if request.adapter is not None and request.adapter not in decoder.adapters:
        known = ", ".join(decoder.adapters) or "none"
        guess = nearest(request.adapter, decoder.adapters)
        raise InputError(f"There is no adapter {request.adapter!r}{guess}; there is {known}.")
    if request.constraint and request.constraint.vocab_size != decoder.vocab_size:
        raise InputError(
            f"The constraint is for {request.constraint.vocab_size} tokens, but the model has {decoder.vocab_size}; "
            "make it for this model."
        )
    most, limit = sampling.max_new_tokens, decoder.positions
    if limit is not None:
        if len(ids) >= limit:
            raise InputError(f"The prompt is {len(ids)} tokens long, but the model attends to {limit}: shorten it.")
        most = min(most, limit - (0 if decoder.reads_apart else len(ids)))
    if memory is not None and (needed := decoder.bytes_of(len(ids) + most)) > memory:
        raise InputError(
            f"The prompt of {len(ids)} tokens and an answer of up to {most} take {size_text(needed)} of keys and "
            f"values, and there are {size_text(memory)}: shorten it, or lower max_new_tokens."
        )
    return most


class Row:
    """A request under way.

    Attributes:
        request: what is asked.
        stream: where its answer goes.
        most: the most tokens of the answer.
        reserved: bytes that it may come to take.
        text: of the answer.
        sampler: what chooses its tokens.
        following: where it stands in its grammar.
        held: its sequence, once it is begun.
        cached: tokens of the prompt that had been read.
    """

    def __init__(self, request: Request, stream: Stream, most: int, reserved: int, text: TextStream) -> None:
        self.request, self.stream, self.text = request, stream, text
        self.most, self.reserved = most, reserved
        self.sampler = Sampler(request.sampling, request.ids, secrets.randbits(64))
        grammar = request.constraint
        self.following = None if grammar is None else grammar.begin(request.sampling.stop_ids)
        self.held: Sequence | None = None
        self.cached = 0
        self.is_cancelled = self.has_ended = False

    @property
    def is_read(self) -> bool:
        """Whether the whole prompt has been read, and the first token chosen."""
        return bool(self.sampler.written)

    @property
    def usage(self) -> Usage:
        return Usage(len(self.request.ids), self.cached, len(self.sampler.written))

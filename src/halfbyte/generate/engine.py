"""The engine: one thread that decodes many requests at once over one decoder.

Between two steps, each of which gives every answer under way one more token, the engine reads one piece of one prompt
at most, so that answers go on while prompts are read; a prompt that is read joins the next step. A request is admitted
when the keys and values of its prompt and its longest answer have a place in memory beside those that are reserved
already, and a row is free; until then it waits, first come first served, so that a large one is not passed by for ever.
What is admitted therefore never has to be taken back.

An answer depends on nothing beside it: sampling knows nothing of other rows, and prompts are read in pieces that end at
fixed places. An exception ends the requests that took part in it and no other.
"""

import contextlib
import contextvars
import secrets
import threading
import time
from bisect import bisect_left
from collections import Counter, deque
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import Future
from dataclasses import dataclass
from typing import Any, TypeVar

from torch import Tensor
from transformers import PreTrainedTokenizerBase

from halfbyte.errors import InputError, nearest, size_text
from halfbyte.generate.answers import Busy, Closed, DecodingError, Finish, Piece, Request, Stream, Usage
from halfbyte.generate.decoder import PIECE, Decoder
from halfbyte.generate.decoder import Sequence as Held
from halfbyte.generate.sampling import Chosen, Sampler, sample
from halfbyte.generate.text import TextStream

Result = TypeVar("Result")
BOUNDS = (0.001, 0.002, 0.005, 0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1.0, 2.0, 5.0)
"""Seconds: upper bounds of the classes that steps are counted in."""


@dataclass(frozen=True)
class Figures:
    """What an engine has done, and does now.

    Attributes:
        ended: requests by the reason of their end.
        refused: requests that found the queue full.
        tokens_read: tokens of prompts that were read.
        tokens_cached: tokens of prompts that had been read before.
        tokens_written: tokens of answers.
        waiting: requests that wait for memory or a row.
        rows: requests admitted, those whose prompt is being read included.
        bytes_held: that keys and values take, kept prefixes included.
        bytes_reserved: that the requests admitted may come to take.
        steps: of decoding.
        step_seconds: they took together.
        step_counts: steps of at most ``BOUNDS`` seconds each, not cumulated; the last number: of more.
        read_seconds: that reading prompts took.
    """

    ended: dict[Finish, int]
    refused: int
    tokens_read: int
    tokens_cached: int
    tokens_written: int
    waiting: int
    rows: int
    bytes_held: int
    bytes_reserved: int
    steps: int
    step_seconds: float
    step_counts: tuple[int, ...]
    read_seconds: float


class _Row:
    """A request under way."""

    def __init__(self, request: Request, stream: Stream, most: int, reserved: int, text: TextStream) -> None:
        self.request, self.stream, self.text = request, stream, text
        self.most, self.reserved = most, reserved  # tokens of the answer, bytes
        self.sampler = Sampler(request.sampling, request.ids, secrets.randbits(64))
        self.following = request.constraint and request.constraint.begin(request.sampling.stop_ids)
        self.held: Held | None = None
        self.cached = 0
        self.is_cancelled = self.has_ended = False

    @property
    def is_read(self) -> bool:
        """Whether the whole prompt has been read, and the first token chosen."""
        return bool(self.sampler.written)

    @property
    def usage(self) -> Usage:
        return Usage(len(self.request.ids), self.cached, len(self.sampler.written))


class Engine:
    """Answers requests, as many at once as rows and memory allow. Its methods may be called from any thread.

    As a context manager it is closed when it is left.
    """

    def __init__(
        self,
        decoder: Decoder,
        tokenizer: PreTrainedTokenizerBase,
        *,
        stops: Iterable[int] = (),
        memory: int | None = None,
        most_waiting: int = 64,
    ) -> None:
        """
        Args:
            decoder: the model; nobody else may use it until the engine is closed.
            tokenizer: the model's.
            stops: tokens that end any answer (:func:`halfbyte.generate.conversation.stop_tokens`).
            memory: bytes for keys and values; None: the decoder's own budget, if it has one.
            most_waiting: requests that may wait, at least one.

        Raises:
            InputError: the options allow nothing.
        """
        if most_waiting < 1:
            raise InputError(f"most_waiting is {most_waiting}; at least one request must be able to wait.")
        self.decoder, self.tokenizer, self.stops = decoder, tokenizer, frozenset(stops)
        if memory is not None:
            decoder.budget = memory if decoder.budget is None else min(memory, decoder.budget)
        self.memory = decoder.budget
        if self.memory is not None and decoder.bytes_of(2) > self.memory:
            raise InputError(
                f"{size_text(self.memory)} for keys and values do not hold two tokens, which take "
                f"{size_text(decoder.bytes_of(2))}; give more."
            )
        self.most_waiting = most_waiting
        self._changed = threading.Condition(threading.RLock())
        self._waiting: deque[_Row] = deque()
        self._rows: list[_Row] = []
        self._between: deque[tuple[Future[Any], Callable[[], Any]]] = deque()
        self._reserved = 0
        self._is_closed = False
        self._ended: Counter[Finish] = Counter()
        self._refused = self._read = self._cached = self._written = self._steps = 0
        self._step_seconds = self._read_seconds = 0.0
        self._step_counts = [0] * (len(BOUNDS) + 1)
        run = contextvars.copy_context().run  # the provider in force here is in force there
        self._thread = threading.Thread(target=run, args=(self._run,), name="halfbyte-engine", daemon=True)
        self._thread.start()

    def __enter__(self) -> "Engine":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def submit(self, request: Request) -> Stream:
        """Begin to answer a request, or have it wait, and return its answer's stream.

        Raises:
            InputError: it can never be answered: the prompt is empty, as long as the model attends to, or takes more
                memory than there is; there is no such adapter; a token does not exist.
            Busy: the queue is full.
            Closed: the engine is closed.
        """
        most = self.check(request)
        reserved = self._bytes_of(request, most)
        row = _Row(
            request,
            Stream(len(request.ids), lambda: self._cancel(row)),
            most,
            reserved,
            TextStream(self.tokenizer, request.sampling.stop),
        )
        with self._changed:
            if self._is_closed:
                raise Closed("The engine has been closed.")
            if not self._waiting and self._fits(row):
                self._admit(row)
            elif len(self._waiting) < self.most_waiting:
                self._waiting.append(row)
            else:
                self._refused += 1
                raise Busy(f"{self.most_waiting} requests wait already.")
        return row.stream

    def check(self, request: Request) -> int:
        """Check that a request can be answered, and return the most tokens that its answer can have.

        Raises:
            InputError: it can never be.
        """
        decoder, ids, sampling = self.decoder, request.ids, request.sampling
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
        most, limit = sampling.max_new_tokens, decoder.positions
        if limit is not None:
            if len(ids) >= limit:
                raise InputError(f"The prompt is {len(ids)} tokens long, but the model attends to {limit}: shorten it.")
            most = min(most, limit - (0 if decoder.reads_apart else len(ids)))
        if self.memory is not None and (needed := self._bytes_of(request, most)) > self.memory:
            raise InputError(
                f"The prompt of {len(ids)} tokens and an answer of up to {most} take {size_text(needed)} of keys and "
                f"values, and there are {size_text(self.memory)}: shorten it, or lower max_new_tokens."
            )
        return most

    def figures(self) -> Figures:
        """Return what has been done so far, and what is done now."""
        with self._changed:
            return Figures(
                ended=dict(self._ended),
                refused=self._refused,
                tokens_read=self._read,
                tokens_cached=self._cached,
                tokens_written=self._written,
                waiting=len(self._waiting),
                rows=len(self._rows),
                bytes_held=self.decoder.bytes_held,
                bytes_reserved=self._reserved,
                steps=self._steps,
                step_seconds=self._step_seconds,
                step_counts=tuple(self._step_counts),
                read_seconds=self._read_seconds,
            )

    def between(self, work: Callable[[], Result]) -> Future[Result]:
        """Have the engine's thread do something between two steps, when nobody else uses the decoder.

        Raises:
            Closed: the engine is closed; what waits when it is closed is cancelled.
        """
        done: Future[Result] = Future()
        with self._changed:
            if self._is_closed:
                raise Closed("The engine has been closed.")
            self._between.append((done, work))
            self._changed.notify_all()
        return done

    def close(self) -> None:
        """End all requests as cancelled, and the engine; waits for the token in work."""
        with self._changed:
            self._is_closed = True
            for row in list(self._waiting):
                self._cancel(row)
            self._changed.notify_all()
        if threading.current_thread() is not self._thread:
            self._thread.join()

    def _bytes_of(self, request: Request, most: int) -> int:
        """Return what a request may come to take; nobody asks where memory is unbounded."""
        return 0 if self.memory is None else self.decoder.bytes_of(len(request.ids) + most)

    # Rows and memory; the lock is held.

    def _fits(self, row: _Row) -> bool:
        enough = self.memory is None or self._reserved + row.reserved <= self.memory
        return enough and len(self._rows) < self.decoder.rows

    def _admit(self, row: _Row) -> None:
        self._reserved += row.reserved
        self._rows.append(row)
        self._changed.notify_all()

    def _cancel(self, row: _Row) -> None:
        with self._changed:
            row.is_cancelled = True
            if row in self._waiting:
                self._waiting.remove(row)
                self._tell_end(row, "cancelled", None)
            self._changed.notify_all()

    def _tell_end(self, row: _Row, finish: Finish, error: BaseException | None, last: Piece | None = None) -> None:
        row.has_ended = True
        self._ended[finish] += 1
        row.stream.put(None if error else last or Piece((), row.text.end(), finish), row.usage, error)

    # What follows runs in the engine's thread.

    def _run(self) -> None:
        try:
            self._go_on()
        except BaseException as error:  # a fault of ours: nobody may wait for ever
            with self._changed:
                self._is_closed = True
                for row in [*self._rows, *self._waiting]:
                    self._tell_end(row, "error", error)
                self._rows, self._waiting = [], deque()
                for done, _ in self._between:
                    done.cancel()
            raise

    def _go_on(self) -> None:
        while True:
            with self._changed:
                self._changed.wait_for(lambda: self._rows or self._between or self._is_closed)
                is_closed, rows = self._is_closed, list(self._rows)
                between, self._between = self._between, deque()
            for done, work in between:
                _do(done, work, is_closed)
            for row in rows:
                if row.is_cancelled or is_closed:
                    self._end(row, "cancelled")
            if is_closed:
                return
            rows = [row for row in rows if not row.has_ended]
            if unread := next((row for row in rows if not row.is_read), None):
                self._read_piece(unread)
            if going := [row for row in rows if row.is_read and not row.has_ended]:
                self._step(going)

    def _read_piece(self, row: _Row) -> None:
        """Read the next piece of a prompt; after its last one, choose the answer's first token."""
        ids, began = row.request.ids, time.perf_counter()
        try:
            if row.held is None:
                row.held = self.decoder.begin(ids, row.request.adapter)
                row.cached = row.held.length
                with self._changed:
                    self._cached += row.cached
            done = row.held.length
            piece = ids[done : (done // PIECE + 1) * PIECE]
            logits = self.decoder.read(row.held, piece)
        except Exception as error:
            self._end(row, "error", error)
            return
        with self._changed:
            self._read += len(piece)
            self._read_seconds += time.perf_counter() - began
        if done + len(piece) == len(ids):
            self._choose([row], logits[None])

    def _step(self, rows: Sequence[_Row]) -> None:
        """Give each answer one more token."""
        began = time.perf_counter()
        held = [row.held for row in rows if row.held is not None]
        try:
            logits = self.decoder.step(held, [row.sampler.written[-1] for row in rows])
        except Exception as error:
            for row in rows:
                self._end(row, "error", error)
            return
        self._choose(rows, logits)
        seconds = time.perf_counter() - began
        with self._changed:
            self._steps += 1
            self._step_seconds += seconds
            self._step_counts[bisect_left(BOUNDS, seconds)] += 1

    def _choose(self, rows: Sequence[_Row], logits: Tensor) -> None:
        """Choose the next token of each row, and hand it on."""
        masks: list[Tensor | None] = []
        able: list[int] = []
        for place, row in enumerate(rows):
            try:
                masks.append(row.following.mask() if row.following else None)
                able.append(place)
            except Exception as error:
                self._end(row, "error", error)
        if len(able) < len(rows):
            rows, logits = [rows[place] for place in able], logits[able]
        try:
            choices = sample(logits, [row.sampler for row in rows], masks)
        except Exception as error:
            for row in rows:
                self._end(row, "error", error)
            return
        for row, chosen in zip(rows, choices, strict=True):
            try:
                if chosen is None:
                    raise DecodingError("The model's logits are not numbers here, so no token can be chosen.")
                self._hand_on(row, chosen)
            except Exception as error:
                self._end(row, "error", error)

    def _hand_on(self, row: _Row, chosen: Chosen) -> None:
        finish: Finish | None = None
        token = chosen.token
        row.sampler.add(token)
        with self._changed:
            self._written += 1
        text = ""
        if token in self.stops or token in row.request.sampling.stop_ids:
            finish = "stop"
        else:
            if row.following:
                row.following.add(token)
            text = row.text.add(token)
            if row.text.is_stopped or (row.following and row.following.is_finished):
                finish = "stop"
            elif len(row.sampler.written) >= row.most:
                finish = "length"
        if finish is None:
            row.stream.put(Piece((chosen,), text), row.usage)
        else:
            self._end(row, finish, last=Piece((chosen,), text + row.text.end(), finish))

    def _end(self, row: _Row, finish: Finish, error: BaseException | None = None, last: Piece | None = None) -> None:
        """Free a row, tell its reader, and admit those that fit now."""
        if row.has_ended:
            return
        with contextlib.suppress(Exception):  # what ended it may have left it broken
            if row.held is not None:
                self.decoder.end(row.held)
        with self._changed:
            self._rows.remove(row)
            self._reserved -= row.reserved
            while self._waiting and self._fits(self._waiting[0]):
                self._admit(self._waiting.popleft())
            self._tell_end(row, finish, error, last)


def _do(done: "Future[Any]", work: Callable[[], Any], is_closed: bool) -> None:
    """Do what was asked for between two steps, unless it has been cancelled."""
    if is_closed:
        done.cancel()
    if not done.set_running_or_notify_cancel():
        return
    try:
        done.set_result(work())
    except BaseException as error:
        done.set_exception(error)

"""The engine: one thread that decodes many requests at once over one decoder.

Between two steps, each of which gives every answer under way one more token, the engine reads one piece of one prompt
at most, so that answers go on while prompts are read; a prompt that is read joins the next step. A prompt that is alone
is read in longer pieces, where that changes no number. A request is admitted
when the keys and values of its prompt and its longest answer have a place in memory beside those that are reserved
already, and a row is free; until then it waits, first come first served, so that a large one is not passed by for ever.
What is admitted therefore never has to be taken back.

An answer depends on nothing beside it: sampling knows nothing of other rows, and prompts are read in pieces that end at
fixed places. An exception ends the requests that took part in it and no other.
"""

import contextlib
import contextvars
import threading
import time
from collections import deque
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import Future
from typing import TypeVar

from torch import Tensor
from transformers import PreTrainedTokenizerBase

from halfbyte.errors import DecodingError, InputError, size_text
from halfbyte.generate.answers import Busy, Closed, Finish, Piece, Request, Stream
from halfbyte.generate.decoder import PIECE, Decoder
from halfbyte.generate.figures import Counts, Figures
from halfbyte.generate.row import Row, most_tokens
from halfbyte.generate.sampling import Chosen, sample
from halfbyte.generate.text import TextStream

Result = TypeVar("Result")


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
        self._waiting: deque[Row] = deque()
        self._rows: list[Row] = []
        self._reserved = 0
        self._calls: deque[Callable[[], None]] = deque()
        self._is_closed = False
        self._counts = Counts()
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
            InputError: it can never be answered (:func:`halfbyte.generate.row.most_tokens`).
            Busy: the queue is full.
            Closed: the engine is closed.
        """
        most = self.check(request)
        reserved = self._bytes_of(request, most)
        row = Row(
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
                self._counts.refused += 1
                raise Busy(f"{self.most_waiting} requests wait already.")
        return row.stream

    def check(self, request: Request) -> int:
        """Check that a request can be answered, and return the most tokens that its answer can have.

        Raises:
            InputError: it can never be (:func:`halfbyte.generate.row.most_tokens`).
        """
        return most_tokens(self.decoder, self.memory, request)

    def figures(self) -> Figures:
        """Return what has been done so far, and what is done now."""
        with self._changed:
            return self._counts.figures(
                waiting=len(self._waiting),
                rows=len(self._rows),
                bytes_held=self.decoder.bytes_held,
                bytes_reserved=self._reserved,
            )

    def call(self, function: Callable[[], Result]) -> Result:
        """Run a function in the engine's thread between two tokens, such as one that loads an adapter; wait for it.

        Raises:
            Closed: the engine is closed.
            Exception: what the function raises.
        """
        if threading.current_thread() is self._thread:
            return function()
        return self.between(function).result()

    def between(self, function: Callable[[], Result]) -> Future[Result]:
        """Have the engine's thread run a function between two tokens, and return its result as it will be.

        Raises:
            Closed: the engine is closed.
        """
        future: Future[Result] = Future()

        def run() -> None:
            try:
                future.set_result(function())
            except BaseException as error:
                future.set_exception(error)

        with self._changed:
            if self._is_closed:
                raise Closed("The engine has been closed.")
            self._calls.append(run)
            self._changed.notify_all()
        return future

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

    def _fits(self, row: Row) -> bool:
        enough = self.memory is None or self._reserved + row.reserved <= self.memory
        return enough and len(self._rows) < self.decoder.rows

    def _admit(self, row: Row) -> None:
        self._reserved += row.reserved
        self._rows.append(row)
        self._changed.notify_all()

    def _cancel(self, row: Row) -> None:
        with self._changed:
            row.is_cancelled = True
            if row in self._waiting:
                self._waiting.remove(row)
                self._tell_end(row, "cancelled", None)
            self._changed.notify_all()

    def _tell_end(self, row: Row, finish: Finish, error: BaseException | None, last: Piece | None = None) -> None:
        row.has_ended = True
        self._counts.ended[finish] += 1
        row.stream.put(None if error else last or Piece((), "", finish), row.usage, error)

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
                while self._calls:
                    self._calls.popleft()()
            raise

    def _go_on(self) -> None:
        while True:
            with self._changed:
                self._changed.wait_for(lambda: self._rows or self._calls or self._is_closed)
                is_closed, rows, calls = self._is_closed, list(self._rows), list(self._calls)
                self._calls.clear()
            for call in calls:
                call()
            for row in rows:
                if row.is_cancelled or is_closed:
                    self._end(row, "cancelled")
            if is_closed:
                return
            rows = [row for row in rows if not row.has_ended]
            if unread := next((row for row in rows if not row.is_read), None):
                self._read_piece(unread, PIECE if len(rows) > 1 else self.decoder.longest_read)
            if going := [row for row in rows if row.is_read and not row.has_ended]:
                self._step(going)

    def _read_piece(self, row: Row, size: int) -> None:
        """Read the next piece of a prompt; after its last one, choose the answer's first token.

        Args:
            row: whose.
            size: the piece ends at a multiple of it.
        """
        ids, began = row.request.ids, time.perf_counter()
        try:
            if row.held is None:
                row.held = self.decoder.begin(ids, row.request.adapter)
                row.cached = row.held.length
                with self._changed:
                    self._counts.tokens_cached += row.cached
            done = row.held.length
            piece = ids[done : (done // size + 1) * size]
            logits = self.decoder.read(row.held, piece)
        except Exception as error:
            self._end(row, "error", error)
            return
        with self._changed:
            self._counts.tokens_read += len(piece)
            self._counts.read_seconds += time.perf_counter() - began
        if done + len(piece) == len(ids):
            self._choose([row], logits[None])

    def _step(self, rows: Sequence[Row]) -> None:
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
        with self._changed:
            self._counts.step(time.perf_counter() - began)

    def _choose(self, rows: Sequence[Row], logits: Tensor) -> None:
        """Choose the next token of each row, and hand it on."""
        for row, own in zip(rows, logits, strict=True):
            try:
                mask = row.following.mask() if row.following else None
                [chosen] = sample(own[None], [row.sampler], [mask])
                if chosen is None:
                    raise DecodingError("The model's logits are not numbers here, so no token can be chosen.")
                self._hand_on(row, chosen)
            except Exception as error:
                self._end(row, "error", error)

    def _hand_on(self, row: Row, chosen: Chosen) -> None:
        finish: Finish | None = None
        token = chosen.token
        row.sampler.add(token)
        with self._changed:
            self._counts.tokens_written += 1
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

    def _end(self, row: Row, finish: Finish, error: BaseException | None = None, last: Piece | None = None) -> None:
        """Free a row, tell its reader, and admit those that fit now."""
        if row.has_ended:
            return
        with contextlib.suppress(Exception):  # what ended it may have left it broken
            if row.held is not None:
                self.decoder.end(row.held)
        row.held = None  # readers may keep their stream, and with it the row
        with self._changed:
            self._rows.remove(row)
            self._reserved -= row.reserved
            while self._waiting and self._fits(self._waiting[0]):
                self._admit(self._waiting.popleft())
            self._tell_end(row, finish, error, last)

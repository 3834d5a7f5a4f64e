"""What the engine is asked and what it gives: a request, and its answer as a stream of pieces.

A stream may be read from another thread (``for piece in stream``) or from asyncio (``async for piece in stream``, which
is woken and does not poll), by one reader.
"""

import asyncio
import contextlib
import threading
from collections import deque
from collections.abc import AsyncIterator, Callable, Iterator
from dataclasses import dataclass, field
from typing import Literal

from halfbyte.generate.constraint import Constraint
from halfbyte.generate.sampling import Chosen, Sampling

Finish = Literal["stop", "length", "cancelled", "error"]
"""Why an answer ended: a stop token, a stop string or the end of its grammar; its greatest length, or that of the
context; by its reader; an error."""


class Busy(Exception):
    """As many requests wait already as may wait: ask again later."""


class Closed(Exception):
    """The engine has been closed."""


@dataclass(frozen=True)
class Request:
    """One prompt to be answered.

    Attributes:
        ids: its tokens, one at least.
        sampling: how the answer's tokens are chosen, and where it ends.
        adapter: the name of an adapter of the decoder, or None for the base.
        constraint: a grammar that the answer follows.
    """

    ids: tuple[int, ...]
    sampling: Sampling = field(default_factory=Sampling)
    adapter: str | None = None
    constraint: Constraint | None = None


@dataclass(frozen=True)
class Piece:
    """What came at once.

    Attributes:
        chosen: tokens, with their log-probabilities if asked for. One, or none in a piece that only ends the answer.
        text: what became certain of the text; it may come later than its tokens, since unfinished characters and what
            may begin a stop string are held back. Stop strings and stop tokens give no text.
        finish: why the answer ends here, in its last piece.
    """

    chosen: tuple[Chosen, ...]
    text: str
    finish: Finish | None = None


@dataclass(frozen=True)
class Usage:
    """Tokens of a request.

    Attributes:
        prompt: of the prompt.
        cached: of these, those that another request had read already.
        written: of the answer, the token that ended it included.
    """

    prompt: int
    cached: int
    written: int


class Stream:
    """The answer to one request: an iterator of pieces, of which the last says why it ended.

    An error in the decoding is raised where the next piece would come. As a context manager it cancels what is still
    under way when it is left.
    """

    def __init__(self, prompt: int, cancel: Callable[[], None]) -> None:
        """
        Args:
            prompt: tokens of the prompt.
            cancel: called to end the answer.
        """
        self.finish: Finish | None = None
        """Why the answer has ended, or None while it is under way."""
        self.error: BaseException | None = None
        """The error that ended it."""
        self.usage = Usage(prompt, 0, 0)
        """Tokens so far."""
        self._cancel = cancel
        self._changed = threading.Condition()
        self._pieces: deque[Piece] = deque()
        self._is_raised = False
        self._wake: Callable[[], None] | None = None

    def cancel(self) -> None:
        """End the answer; its place is free within a token. Does nothing where it has ended. From any thread."""
        self._cancel()

    def text(self) -> str:
        """Wait for the end and return the text of the pieces that have not been read."""
        return "".join(piece.text for piece in self)

    def __enter__(self) -> "Stream":
        return self

    def __exit__(self, *_: object) -> None:
        self.cancel()

    def __iter__(self) -> Iterator[Piece]:
        return self

    def __next__(self) -> Piece:
        with self._changed:
            self._changed.wait_for(lambda: self._pieces or self.finish)
            if (piece := self._taken()) is None:
                raise StopIteration
            return piece

    def __aiter__(self) -> AsyncIterator[Piece]:
        return self

    async def __anext__(self) -> Piece:
        loop = asyncio.get_running_loop()
        while True:
            woken = loop.create_future()
            with self._changed:
                if self._pieces or self.finish:
                    if (piece := self._taken()) is None:
                        raise StopAsyncIteration
                    return piece

                def wake(woken: asyncio.Future[None] = woken) -> None:
                    loop.call_soon_threadsafe(lambda: None if woken.done() else woken.set_result(None))

                self._wake = wake
            await woken

    def _taken(self) -> Piece | None:
        """Return the next piece, or None after the last; the lock is held."""
        if self._pieces:
            return self._pieces.popleft()
        if self.error is not None and not self._is_raised:
            self._is_raised = True
            raise self.error
        return None

    def put(self, piece: Piece | None, usage: Usage, error: BaseException | None = None) -> None:
        """Hand on a piece, or an error; for the engine."""
        with self._changed:
            self.usage = usage
            if piece is not None:
                self._pieces.append(piece)
                self.finish = piece.finish
            if error is not None:
                self.error, self.finish = error, "error"
            self._changed.notify_all()
            wake, self._wake = self._wake, None
        if wake is not None:
            with contextlib.suppress(RuntimeError):  # the reader's event loop is closed
                wake()

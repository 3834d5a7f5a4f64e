"""From a request to the engine and back: answers that are read together, and ended when nobody reads them any more."""

import asyncio
import contextlib
import json
import secrets
import time
from collections.abc import AsyncGenerator, Awaitable, Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any, TypeVar

from fastapi import Request
from fastapi.responses import StreamingResponse
from starlette.types import Receive, Scope, Send

from halfbyte.deploy.serve.errors import FAILED, ApiError, shutting_down, told
from halfbyte.deploy.serve.log import Record
from halfbyte.deploy.serve.options import HEARTBEAT, STALLED
from halfbyte.deploy.serve.service import Service
from halfbyte.deploy.serve.wire import ClientGone
from halfbyte.generate.answers import Piece, Stream, Usage
from halfbyte.generate.sampling import Chosen

Result = TypeVar("Result")


@dataclass
class Answer:
    """One answer, read to its end.

    Attributes:
        text: of it.
        chosen: its tokens, those that only end it left away.
        finish: why it ended.
    """

    text: str = ""
    chosen: list[Chosen] = field(default_factory=list)
    finish: str = ""


def shown(piece: Piece, stops: Iterable[int]) -> list[Chosen]:
    """Return the tokens of a piece that are part of the answer: not the stop token that ends it."""
    if piece.finish == "stop":
        return [one for one in piece.chosen if one.token not in stops]
    return list(piece.chosen)


def usage_of(streams: Sequence[Stream], prompts: int) -> dict[str, Any]:
    """Return what a request took, as OpenAI has it: each of ``prompts`` prompts counts once, whatever ``n``."""
    per_prompt = max(1, len(streams) // max(1, prompts))
    usages: list[Usage] = [stream.usage for stream in streams]
    read = sum(usage.prompt for usage in usages[::per_prompt])
    cached = sum(usage.cached for usage in usages[::per_prompt])
    written = sum(usage.written for usage in usages)
    return {
        "prompt_tokens": read,
        "completion_tokens": written,
        "total_tokens": read + written,
        "prompt_tokens_details": {"cached_tokens": cached},
    }


async def collect(
    service: Service, request: Request, streams: Sequence[Stream], record: Record, stops: Iterable[int]
) -> list[Answer]:
    """Read answers to their ends, all at once.

    Raises:
        ClientGone: nobody waits for them any more.
        ApiError, Exception: one ended by an error.
    """
    answers = [Answer() for _ in streams]
    async with contextlib.aclosing(merged(service, streams, record)) as pieces:

        async def read() -> None:
            async for number, piece in pieces:
                if piece is None:
                    continue
                answer = answers[number]
                answer.text += piece.text
                answer.chosen += shown(piece, stops)
                answer.finish = piece.finish or answer.finish

        await unless_gone(request, read())
    if any(answer.finish == "cancelled" for answer in answers):
        raise shutting_down()
    return answers


async def unless_gone(request: Request, work: Awaitable[Result]) -> Result:
    """Wait for work, as long as the client waits too.

    Raises:
        ClientGone: it has hung up; the work has been cancelled.
    """

    async def hung_up() -> None:
        while (await request.receive())["type"] != "http.disconnect":
            pass

    task: asyncio.Future[Result] = asyncio.ensure_future(work)
    gone = asyncio.ensure_future(hung_up())
    both: set[asyncio.Future[Any]] = {task, gone}
    try:
        await asyncio.wait(both, return_when=asyncio.FIRST_COMPLETED)
        if not task.done():
            raise ClientGone
        return task.result()
    finally:
        for one in both:
            one.cancel()
        await asyncio.gather(*both, return_exceptions=True)


async def merged(
    service: Service, streams: Sequence[Stream], record: Record
) -> AsyncGenerator[tuple[int, Piece | None], None]:
    """Yield the pieces of several answers with their numbers as they come, and None for a while in which none came.

    When it is closed, answers that have not ended are ended.
    """
    pieces: asyncio.Queue[tuple[int, Piece | BaseException | None]] = asyncio.Queue(64)

    async def pump(number: int, stream: Stream) -> None:
        try:
            async for piece in stream:
                await pieces.put((number, piece))
            await pieces.put((number, None))
        except Exception as error:
            await pieces.put((number, error))

    pumps = [asyncio.ensure_future(pump(number, stream)) for number, stream in enumerate(streams)]
    left = len(pumps)
    try:
        while left:
            try:
                # Python 3.11's wait_for loses a cancellation that comes with a piece
                async with asyncio.timeout(HEARTBEAT):
                    number, piece = await pieces.get()
            except TimeoutError:
                yield 0, None
                continue
            if piece is None:
                left -= 1
            elif isinstance(piece, BaseException):
                raise piece
            else:
                if piece.chosen and record.first_token is None:
                    record.first_token = time.perf_counter()
                yield number, piece
    finally:
        for task in pumps:
            task.cancel()
        service.end(streams)
        record.took([stream.usage for stream in streams])


class EventStream(StreamingResponse):
    """Server-sent events; a client that takes nothing for a long time is let go.

    Args:
        events: what to send, as JSON texts; None sends a comment.
        streams: whose answers they are, which end when nobody reads them any more.
        kept: what is let go then.
    """

    media_type = "text/event-stream"

    def __init__(
        self,
        events: AsyncGenerator[str | None, None],
        service: Service,
        record: Record,
        streams: Sequence[Stream],
        kept: contextlib.ExitStack,
    ) -> None:
        headers = {"cache-control": "no-cache", "x-accel-buffering": "no"}
        self._lines = _lines(events, service, record)
        super().__init__(self._lines, headers=headers)
        self._service, self._record, self._streams, self._kept = service, record, streams, kept

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Send the events, and let go of what they were made with, however it ends."""
        try:
            await super().__call__(scope, receive, send)
        finally:
            self._service.end(self._streams)
            self._record.took([stream.usage for stream in self._streams])
            self._kept.close()

    async def stream_response(self, send: Send) -> None:
        """Send the events."""

        async def patiently(message: Any) -> None:
            async with asyncio.timeout(STALLED):
                await send(message)

        try:
            await super().stream_response(patiently)
        finally:
            await self._lines.aclose()


async def _lines(
    events: AsyncGenerator[str | None, None], service: Service, record: Record
) -> AsyncGenerator[str, None]:
    try:
        async for event in events:
            yield ": waiting\n\n" if event is None else f"data: {event}\n\n"
    except Exception as error:
        found = told(error)
        if found is None:
            service.log.failure(record, error)
            found = ApiError(500, FAILED)
        record.error = str(found)
        yield f"data: {json_text(found.body)}\n\n"
    finally:
        await events.aclose()
    yield "data: [DONE]\n\n"


def json_text(value: Any) -> str:
    """Return a value as JSON in one line."""
    return json.dumps(value, ensure_ascii=False, allow_nan=False, separators=(",", ":"))


def new_id(kind: str) -> str:
    """Return an id for an answer."""
    return f"{kind}-{secrets.token_hex(12)}"

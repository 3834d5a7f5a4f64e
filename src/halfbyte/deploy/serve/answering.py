"""From a request to the engine and back: answers that are read together, and ended when nobody reads them any more."""

import asyncio
import contextlib
import json
import secrets
import time
from collections.abc import AsyncGenerator, Awaitable, Callable, Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field, replace
from typing import Any, TypeVar

from fastapi import Request
from fastapi.responses import StreamingResponse
from starlette.types import Receive, Scope, Send

from halfbyte.deploy.serve.catalog import Catalog, Served
from halfbyte.deploy.serve.errors import FAILED, ApiError, shutting_down, told, too_many
from halfbyte.deploy.serve.log import Log, Record
from halfbyte.deploy.serve.logprobs import TokenTexts
from halfbyte.deploy.serve.metrics import Metrics
from halfbyte.deploy.serve.options import HEARTBEAT, STALLED, ServeOptions
from halfbyte.deploy.serve.prompts import Prompts
from halfbyte.deploy.serve.schemas import Asked
from halfbyte.deploy.serve.wire import ClientGone
from halfbyte.errors import InputError
from halfbyte.generate.answers import Piece, Stream, Usage
from halfbyte.generate.answers import Request as Wanted
from halfbyte.generate.constraint import Constraint
from halfbyte.generate.engine import Engine
from halfbyte.generate.sampling import Chosen, Sampling

THREADS = 2
"""That make tokens of requests."""

Result = TypeVar("Result")


@dataclass
class Service:
    """What all requests to a model that generates share.

    Attributes:
        engine: decodes.
        prompts: makes tokens.
        catalog: what may be asked for.
        options: the server's.
        defaults: of sampling, by the model's own generation settings.
        texts: of single tokens.
        base: the base's path, which nobody is told.
    """

    engine: Engine
    prompts: Prompts
    catalog: Catalog
    options: ServeOptions
    defaults: dict[str, Any]
    texts: TokenTexts
    base: str
    log: Log
    metrics: Metrics
    threads: ThreadPoolExecutor = field(default_factory=lambda: ThreadPoolExecutor(THREADS, "halfbyte-prompts"))
    under_way: set[Stream] = field(default_factory=set)
    preparing: int = 0
    is_ending: bool = False

    async def apart(self, work: Callable[[], Result]) -> Result:
        """Do what takes a while in a thread.

        Raises:
            ApiError: as many as may wait do already.
        """
        if self.is_ending:
            raise shutting_down()
        if self.preparing >= self.options.max_waiting + THREADS:
            raise too_many("The server is busy: as many requests as may wait do already. Ask again in a moment.")
        self.preparing += 1
        try:
            return await asyncio.get_running_loop().run_in_executor(self.threads, work)
        finally:
            self.preparing -= 1

    def begin(self, wanted: Sequence[Wanted]) -> list[Stream]:
        """Hand requests to the engine, all or none.

        Raises:
            InputError, Busy, Closed: as the engine does.
        """
        if self.is_ending:
            raise shutting_down()
        streams: list[Stream] = []
        try:
            streams.extend(self.engine.submit(one) for one in wanted)
        except BaseException:
            for stream in streams:
                stream.cancel()
            raise
        self.under_way.update(streams)
        return streams

    def end(self, streams: Iterable[Stream]) -> None:
        """End answers that nobody reads any more."""
        for stream in streams:
            stream.cancel()
            self.under_way.discard(stream)

    def stops(self, asked: Asked) -> frozenset[int]:
        """Return the tokens that end an answer and give no text."""
        return self.engine.stops.union(asked.stop_token_ids or ())

    def end_all(self) -> None:
        """End all answers: the server ends."""
        self.is_ending = True
        for stream in list(self.under_way):
            stream.cancel()

    def requests(
        self,
        asked: Asked,
        served: Served,
        prompts: Sequence[tuple[int, ...]],
        most: int,
        logprobs: int | None,
        constraint: Constraint | None = None,
    ) -> list[Wanted]:
        """Return what the engine is asked: ``n`` answers to each prompt, with a seed each.

        Raises:
            ApiError: more than is allowed.
            InputError: a value is out of its range.
        """
        n, options = asked.n or 1, self.options
        if n * len(prompts) > options.max_choices:
            raise ApiError(
                400, f"The request asks for {n * len(prompts)} answers; {options.max_choices} are the most.", param="n"
            )
        if options.max_tokens is not None and most > options.max_tokens:
            raise ApiError(
                400, f"max_tokens is {most}, and the server gives {options.max_tokens} at most.", param="max_tokens"
            )
        for ids in prompts:
            if options.max_prompt_tokens is not None and len(ids) > options.max_prompt_tokens:
                raise ApiError(
                    400,
                    f"The prompt is {len(ids)} tokens long, and the server takes {options.max_prompt_tokens} at most.",
                    code="context_length_exceeded",
                )
        sampling = _sampling(asked, most, logprobs, self.defaults)
        seeds = [None if asked.seed is None else _seed(asked.seed, number) for number in range(n)]
        wanted = [
            Wanted(ids, replace(sampling, seed=seed), served.adapter, constraint) for ids in prompts for seed in seeds
        ]
        for one in wanted:
            self.engine.check(one)
        return wanted


def _seed(seed: int, number: int) -> int:
    """Return the seed of one of several answers; that of the first is the request's."""
    return (seed + number) % 2**64


def _sampling(asked: Asked, most: int, logprobs: int | None, defaults: dict[str, Any]) -> Sampling:
    given = {
        "temperature": 1.0 if asked.temperature is None else asked.temperature,
        "top_p": asked.top_p,
        "top_k": asked.top_k,
        "min_p": asked.min_p,
        "repetition_penalty": asked.repetition_penalty,
        "frequency_penalty": asked.frequency_penalty,
        "presence_penalty": asked.presence_penalty,
    }
    named = defaults | {name: value for name, value in given.items() if value is not None}
    if named.get("top_k") in (0, -1):  # all, as vLLM has it
        del named["top_k"]
    bias = {int(token): value for token, value in (asked.logit_bias or {}).items()}
    return Sampling(
        **named,
        logit_bias=bias,
        max_new_tokens=most,
        stop=asked.stops,
        stop_ids=tuple(asked.stop_token_ids or ()),
        logprobs=logprobs,
    )


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
                number, piece = await asyncio.wait_for(pieces.get(), HEARTBEAT)
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
            await asyncio.wait_for(send(message), STALLED)

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


def length_of(asked: int | None, default: int, service: Service) -> int:
    """Return how long an answer may become.

    Raises:
        InputError: longer than the model can.
    """
    positions = service.engine.decoder.positions
    if asked is not None and positions is not None and asked > positions:
        raise InputError(f"max_tokens is {asked}, but the model attends to {positions}: lower it.")
    if asked is not None:
        return asked
    return default if service.options.max_tokens is None else min(default, service.options.max_tokens)

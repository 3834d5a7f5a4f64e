"""``/v1/completions``."""

import contextlib
import time
from collections.abc import AsyncGenerator, Sequence
from typing import Any

from fastapi import Request
from fastapi.responses import JSONResponse, Response

from halfbyte.deploy.serve.answering import (
    EventStream,
    collect,
    json_text,
    merged,
    new_id,
    shown,
    usage_of,
)
from halfbyte.deploy.serve.errors import shutting_down
from halfbyte.deploy.serve.log import Record
from halfbyte.deploy.serve.schemas import CompletionRequest
from halfbyte.deploy.serve.service import Service, length_of
from halfbyte.deploy.serve.wire import body
from halfbyte.generate.answers import Stream

DEFAULT_TOKENS = 16
"""Tokens of an answer where none are asked for, as OpenAI has it."""


async def completions(service: Service, request: Request, record: Record) -> Response:
    """Go on with a text, or with several."""
    asked = await body(request, CompletionRequest, service.options.max_body)
    served = service.catalog[asked.model]
    record.model, record.stream = served.name, bool(asked.stream)
    with contextlib.ExitStack() as kept:
        kept.enter_context(service.catalog.using(served.name))
        most = length_of(asked.max_tokens, DEFAULT_TOKENS, service)
        prompts = await service.apart(lambda: service.prompts.completions(asked))
        wanted = service.requests(asked, served, prompts, most, asked.logprobs)
        n = asked.n or 1
        echoed = [""] * len(wanted)
        if asked.echo:
            texts = await service.apart(lambda: [service.prompts.decode(ids) for ids in prompts])
            echoed = [text for text in texts for _ in range(n)]
        streams = service.begin(wanted)
        about = {
            "id": new_id("cmpl"), "object": "text_completion", "created": int(time.time()), "model": served.name,
        }  # fmt: skip
        if asked.stream:
            events = _events(service, asked, streams, record, about, echoed, len(prompts))
            return EventStream(events, service, record, streams, kept.pop_all())
        answers = await collect(service, request, streams, record, service.stops(asked))
        record.finish = answers[0].finish
        choices = []
        for number, (answer, before) in enumerate(zip(answers, echoed, strict=True)):
            logprobs = None if asked.logprobs is None else service.texts.of_completion(answer.chosen, 0)
            choices.append(_choice(number, before + answer.text, logprobs, answer.finish))
        return JSONResponse(about | {"choices": choices, "usage": usage_of(streams, len(prompts))})


def _choice(number: int, text: str, logprobs: Any, finish: str | None) -> dict[str, Any]:
    return {"index": number, "text": text, "logprobs": logprobs, "finish_reason": finish}


async def _events(
    service: Service, asked: CompletionRequest, streams: Sequence[Stream], record: Record, about: dict[str, Any],
    echoed: Sequence[str], prompts: int,
) -> AsyncGenerator[str | None, None]:  # fmt: skip
    usage: dict[str, Any] = {"usage": None} if asked.wants_usage else {}
    stops = service.stops(asked)
    offsets = [0] * len(streams)
    async with contextlib.aclosing(merged(service, streams, record)) as pieces:
        for number, before in enumerate(echoed):
            if before:
                yield json_text(about | {"choices": [_choice(number, before, None, None)]} | usage)
        async for number, piece in pieces:
            if piece is None:
                yield None
                continue
            if piece.finish == "cancelled":
                raise shutting_down()
            logprobs = None
            if asked.logprobs is not None and (chosen := shown(piece, stops)):
                logprobs = service.texts.of_completion(chosen, offsets[number])
                offsets[number] += sum(
                    len(service.texts.bytes_of(one.token).decode("utf-8", "ignore")) for one in chosen
                )
            if piece.text or logprobs or piece.finish:
                record.finish = piece.finish or record.finish
                yield json_text(about | {"choices": [_choice(number, piece.text, logprobs, piece.finish)]} | usage)
    if asked.wants_usage:
        yield json_text(about | {"choices": [], "usage": usage_of(streams, prompts)})

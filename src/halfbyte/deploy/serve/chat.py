"""``/v1/chat/completions``."""

import contextlib
import time
from collections.abc import AsyncGenerator, Sequence
from dataclasses import replace
from typing import Any

from fastapi import Request
from fastapi.responses import JSONResponse, Response

from halfbyte.deploy.serve.answering import (
    Answer,
    EventStream,
    collect,
    json_text,
    merged,
    new_id,
    shown,
    usage_of,
)
from halfbyte.deploy.serve.catalog import Served
from halfbyte.deploy.serve.errors import shutting_down
from halfbyte.deploy.serve.log import Record
from halfbyte.deploy.serve.schemas import ChatRequest
from halfbyte.deploy.serve.service import Service, length_of
from halfbyte.deploy.serve.tools import ToolForm
from halfbyte.deploy.serve.wire import body
from halfbyte.generate.answers import Stream


async def chat(service: Service, request: Request, record: Record) -> Response:
    """Answer a conversation."""
    asked = await body(request, ChatRequest, service.options.max_body)
    served = service.catalog[asked.model]
    record.model, record.stream = served.name, bool(asked.stream)
    with contextlib.ExitStack() as kept:
        kept.enter_context(service.catalog.using(served.name))
        most = length_of(asked.max_completion_tokens or asked.max_tokens, service.options.default_tokens, service)
        logprobs = (asked.top_logprobs or 0) if asked.logprobs else None
        ids = await service.apart(lambda: service.prompts.chat(asked))
        constraint = await service.apart(lambda: service.prompts.constraint(asked)) if _is_held(asked) else None
        streams = service.begin(service.requests(asked, served, [ids], most, logprobs, constraint))
        form = service.prompts.tool_form if asked.tools and asked.tool_choice != "none" else None
        if form and asked.parallel_tool_calls is False:
            form = replace(form, parallel=False)
        reply = _Reply(service, asked, served, form)
        if asked.stream:
            return EventStream(reply.events(streams, record), service, record, streams, kept.pop_all())
        answers = await collect(service, request, streams, record, service.stops(asked))
        record.finish = answers[0].finish
        return JSONResponse(reply.whole(answers, usage_of(streams, 1)))


def _is_held(asked: ChatRequest) -> bool:
    """Whether the answer may have to follow a grammar."""
    return asked.response_format is not None or asked.tool_choice not in (None, "none", "auto")


class _Reply:
    """The forms of one answer."""

    def __init__(self, service: Service, asked: ChatRequest, served: Served, form: ToolForm | None) -> None:
        self._service, self._asked, self._form = service, asked, form
        self._about = {"id": new_id("chatcmpl"), "created": int(time.time()), "model": served.name}

    def whole(self, answers: Sequence[Answer], usage: dict[str, Any]) -> dict[str, Any]:
        """Return the answer as one."""
        choices = []
        for number, answer in enumerate(answers):
            text, calls = (answer.text, []) if self._form is None else self._form.read(answer.text)
            message: dict[str, Any] = {
                "role": "assistant",
                "content": text if text or not calls else None,
                "refusal": None,
            }
            if calls:
                message |= {"tool_calls": calls}
            choices.append(
                {
                    "index": number,
                    "message": message | {"annotations": []},
                    "logprobs": self._logprobs(answer.chosen),
                    "finish_reason": "tool_calls" if calls else answer.finish,
                }
            )
        return self._about | {"object": "chat.completion", "choices": choices, "usage": usage}

    async def events(self, streams: Sequence[Stream], record: Record) -> AsyncGenerator[str | None, None]:
        """Yield the answer piece by piece, as JSON texts."""
        stops = self._service.stops(self._asked)
        texts = [_Text(self._form) for _ in streams]
        async with contextlib.aclosing(merged(self._service, streams, record)) as pieces:
            for number in range(len(streams)):
                yield self._chunk(number, {"role": "assistant", "content": ""})
            async for number, piece in pieces:
                if piece is None:
                    yield None
                    continue
                if piece.finish == "cancelled":
                    raise shutting_down()
                new = texts[number].add(piece.text, is_end=piece.finish is not None)
                chosen = shown(piece, stops)
                if new or (self._asked.logprobs and chosen):
                    yield self._chunk(number, {"content": new}, logprobs=self._logprobs(chosen))
                if piece.finish is not None:
                    rest, calls = texts[number].calls()
                    if rest:
                        yield self._chunk(number, {"content": rest})
                    for place, call in enumerate(calls):
                        yield self._chunk(number, {"tool_calls": [{"index": place, **call}]})
                    record.finish = "tool_calls" if calls else piece.finish
                    yield self._chunk(number, {}, finish=record.finish)
        if self._asked.wants_usage:
            yield json_text(self._head() | {"choices": [], "usage": usage_of(streams, 1)})

    def _head(self) -> dict[str, Any]:
        return self._about | {"object": "chat.completion.chunk"}

    def _chunk(self, number: int, delta: dict[str, Any], logprobs: Any = None, finish: str | None = None) -> str:
        choice = {"index": number, "delta": delta, "logprobs": logprobs, "finish_reason": finish}
        usage = {"usage": None} if self._asked.wants_usage else {}
        return json_text(self._head() | {"choices": [choice]} | usage)

    def _logprobs(self, chosen: Sequence[Any]) -> dict[str, Any] | None:
        if not self._asked.logprobs:
            return None
        return {"content": self._service.texts.of_chat(chosen), "refusal": None}


class _Text:
    """An answer's text as it comes, of which calls are held back."""

    def __init__(self, form: ToolForm | None) -> None:
        self._form = form
        self._text, self._shown = "", 0

    def add(self, text: str, *, is_end: bool) -> str:
        """Return what can be shown now."""
        if self._form is None:
            return text
        self._text += text
        until = max(self._shown, self._form.held(self._text, is_end))
        new, self._shown = self._text[self._shown : until], until
        return new

    def calls(self) -> tuple[str, list[dict[str, Any]]]:
        """Return what is left to be shown at the end, and the calls."""
        if self._form is None:
            return "", []
        text, calls = self._form.read(self._text)
        return text[self._shown :], calls

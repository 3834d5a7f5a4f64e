"""``/v1/embeddings``: texts as vectors, by an encoder (:mod:`halfbyte.generate.embed`)."""

import asyncio
import base64
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import Any

import numpy
from fastapi import Request
from fastapi.responses import JSONResponse, Response
from torch import Tensor

from halfbyte.deploy.serve.answering import unless_gone
from halfbyte.deploy.serve.catalog import Catalog
from halfbyte.deploy.serve.errors import ApiError, shutting_down, too_many
from halfbyte.deploy.serve.log import Log, Record
from halfbyte.deploy.serve.metrics import Metrics
from halfbyte.deploy.serve.options import MOST_INPUTS, ServeOptions
from halfbyte.deploy.serve.schemas import EmbeddingRequest
from halfbyte.deploy.serve.wire import body
from halfbyte.generate.embed import Embedder


@dataclass
class EmbedService:
    """What all requests to an encoder share; one is computed after the other."""

    embedder: Embedder
    catalog: Catalog
    options: ServeOptions
    log: Log
    metrics: Metrics
    thread: ThreadPoolExecutor = field(default_factory=lambda: ThreadPoolExecutor(1, "halfbyte-embed"))
    waiting: int = 0
    is_ending: bool = False

    def end_all(self) -> None:
        """Take no more requests: the server ends."""
        self.is_ending = True
        self.thread.shutdown(wait=False, cancel_futures=True)


async def embeddings(service: EmbedService, request: Request, record: Record) -> Response:
    """Return the vectors of texts."""
    asked = await body(request, EmbeddingRequest, service.options.max_body)
    record.model = service.catalog[asked.model].name
    given: list[Any] = [asked.input] if isinstance(asked.input, str) else list(asked.input)
    if given and isinstance(given[0], int):
        given = [given]
    if not given:
        raise ApiError(400, "The input is empty; give at least one text.", param="input")
    if len(given) > MOST_INPUTS:
        raise ApiError(400, f"The input has {len(given)} texts; {MOST_INPUTS} are the most.", param="input")
    embedder = service.embedder
    if asked.dimensions not in (None, embedder.width):
        raise ApiError(400, f"The vectors have {embedder.width} dimensions, no other number.", param="dimensions")
    if service.is_ending:
        raise shutting_down()
    if service.waiting > service.options.max_waiting:
        raise too_many(
            f"The server is busy: {service.options.max_waiting} requests wait already. Ask again in a moment."
        )

    def work() -> tuple[Tensor, int]:
        texts = [embedder.encode(one) if isinstance(one, str) else one for one in given]
        for ids in texts:
            embedder.check(ids)
        return embedder.embed(texts), sum(map(len, texts))

    service.waiting += 1
    try:
        loop = asyncio.get_running_loop()
        vectors, count = await unless_gone(request, loop.run_in_executor(service.thread, work))
    except asyncio.CancelledError:
        if service.is_ending:
            raise shutting_down() from None
        raise
    finally:
        service.waiting -= 1
    record.prompt_tokens = count
    data = [
        {"object": "embedding", "index": place, "embedding": _written(vector, asked.encoding_format)}
        for place, vector in enumerate(vectors.numpy())
    ]
    usage = {"prompt_tokens": count, "total_tokens": count}
    return JSONResponse({"object": "list", "model": record.model, "data": data, "usage": usage})


def _written(vector: "numpy.ndarray[Any, numpy.dtype[numpy.float32]]", form: str | None) -> Any:
    """Return a vector as numbers, or as base64 of little-endian fp32, which OpenAI's client asks for."""
    if form == "base64":
        return base64.b64encode(vector.astype("<f4").tobytes()).decode()
    return vector.tolist()

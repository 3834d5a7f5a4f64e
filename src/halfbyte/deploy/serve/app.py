"""Which function answers which path."""

import time
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Any

from fastapi import FastAPI, Request
from fastapi.responses import JSONResponse, PlainTextResponse, Response
from prometheus_client import CONTENT_TYPE_LATEST
from starlette.exceptions import HTTPException
from starlette.types import ASGIApp

from halfbyte.deploy.serve.catalog import Served, folder_within
from halfbyte.deploy.serve.chat import chat
from halfbyte.deploy.serve.completions import completions
from halfbyte.deploy.serve.embeddings import EmbedService, embeddings
from halfbyte.deploy.serve.errors import FAILED, ApiError, shutting_down, told
from halfbyte.deploy.serve.guard import GONE, Guard
from halfbyte.deploy.serve.log import Record
from halfbyte.deploy.serve.schemas import LoadAdapter, UnloadAdapter
from halfbyte.deploy.serve.service import Service
from halfbyte.deploy.serve.wire import ClientGone, body
from halfbyte.errors import DecodingError, InputError
from halfbyte.generate.answers import Busy, Closed

CHAT, COMPLETIONS, EMBEDDINGS = "/v1/chat/completions", "/v1/completions", "/v1/embeddings"
MODELS, HEALTH, METRICS = "/v1/models", "/health", "/metrics"
LOAD, UNLOAD = "/v1/load_lora_adapter", "/v1/unload_lora_adapter"
PATHS = frozenset({CHAT, COMPLETIONS, EMBEDDINGS, MODELS, HEALTH, METRICS, LOAD, UNLOAD})


def make_app(service: Service | EmbedService, keys: tuple[str, ...]) -> ASGIApp:
    """Return the ASGI application that serves a model.

    Args:
        service: the model with what belongs to it.
        keys: of which requests must have one; none: no key is asked for.
    """
    app = FastAPI(docs_url=None, redoc_url=None, openapi_url=None, redirect_slashes=False)
    app.add_exception_handler(HTTPException, _http_error)
    for kind in (ApiError, InputError, Busy, Closed, DecodingError, ClientGone, Exception):
        app.add_exception_handler(kind, _tell)

    def answers(path: str, function: Callable[[Any, Request, Record], Awaitable[Response]], works: bool) -> None:
        async def answer(request: Request) -> Response:
            if not works:
                raise _other_kind(service, path)
            return await function(service, request, request.scope["state"]["record"])

        app.add_api_route(path, answer, methods=["POST"], response_model=None)

    generates = isinstance(service, Service)
    answers(CHAT, chat, generates)
    answers(COMPLETIONS, completions, generates)
    answers(EMBEDDINGS, embeddings, not generates)
    answers(LOAD, _load, generates)
    answers(UNLOAD, _unload, generates)
    _add_reading(app, service)
    checks_host = service.options.is_local and not keys
    return Guard(app, keys, checks_host, service.log, service.metrics)


def _add_reading(app: FastAPI, service: Service | EmbedService) -> None:
    """Add what is asked for with GET."""

    async def models(request: Request) -> Response:
        return JSONResponse({"object": "list", "data": [_card(service, one) for one in service.catalog]})

    async def model(request: Request, name: str) -> Response:
        return JSONResponse(_card(service, service.catalog[name]))

    async def health(request: Request) -> Response:
        if service.is_ending:
            raise shutting_down()
        return JSONResponse({"status": "ok"})

    async def metrics(request: Request) -> Response:
        return Response(service.metrics.page(), media_type=CONTENT_TYPE_LATEST)

    for path, function in (
        (MODELS, models), (f"{MODELS}/{{name:path}}", model), (HEALTH, health), (METRICS, metrics),
    ):  # fmt: skip
        app.add_api_route(path, function, methods=["GET"], response_model=None)


def _card(service: Service | EmbedService, served: Served) -> dict[str, Any]:
    longest = service.engine.decoder.positions if isinstance(service, Service) else service.embedder.longest
    return {
        "id": served.name, "object": "model", "created": served.created, "owned_by": "halfbyte",
        "parent": served.parent, "max_model_len": longest,
    }  # fmt: skip


async def _load(service: Service, request: Request, record: Record) -> Response:
    asked = await body(request, LoadAdapter, service.options.max_body)
    record.model = asked.lora_name
    folders = tuple(Path(folder).expanduser().resolve() for folder in service.options.adapter_folder)
    folder = folder_within(asked.lora_path, folders)
    began = time.perf_counter()
    await service.catalog.load(service.engine, asked.lora_name, folder, service.base)
    seconds = round(time.perf_counter() - began, 3)
    service.log.write("adapter loaded", name=asked.lora_name, folder=str(folder), seconds=seconds)
    return PlainTextResponse(f"Success: LoRA adapter '{asked.lora_name}' added successfully.")


async def _unload(service: Service, request: Request, record: Record) -> Response:
    asked = await body(request, UnloadAdapter, service.options.max_body)
    if not service.options.adapter_folder:
        raise ApiError(
            403, "Adapters cannot be unloaded at run time; start the server with --adapter-folder.", code="not_allowed"
        )
    record.model = service.catalog[asked.lora_name].name
    await service.catalog.unload(service.engine, asked.lora_name)
    service.log.write("adapter unloaded", name=asked.lora_name)
    return PlainTextResponse(f"Success: LoRA adapter '{asked.lora_name}' removed successfully.")


def _other_kind(service: Service | EmbedService, path: str) -> ApiError:
    what = "writes text" if isinstance(service, Service) else "makes embeddings"
    there = f"{CHAT} and {COMPLETIONS}" if isinstance(service, Service) else EMBEDDINGS
    return ApiError(
        404, f"The model that is served {what}; {path} is not for it, {there} is.", code="not_for_this_model"
    )


async def _http_error(request: Request, error: Exception) -> Response:
    """Tell an error of Starlette's router in the API's form."""
    assert isinstance(error, HTTPException)
    path = request.url.path[:200]
    if error.status_code == 404:
        found = ApiError(404, f"There is no {path} here.", code="unknown_url")
    elif error.status_code == 405:
        allowed = (error.headers or {}).get("Allow", "another method")
        found = ApiError(405, f"{path} takes {allowed}, not {request.method[:20]}.", headers=error.headers)
    else:
        found = ApiError(error.status_code, str(error.detail), headers=error.headers)
    request.scope["state"]["record"].error = str(found)[:300]
    return found.response()


async def _tell(request: Request, error: Exception) -> Response:
    """Tell any other error; one that is a fault of ours is raised again behind this, and logged by the guard."""
    record: Record = request.scope["state"]["record"]
    if isinstance(error, ClientGone):
        record.finish = "cancelled"
        return Response(status_code=GONE)
    found = told(error) or ApiError(500, FAILED)
    record.error = str(found)[:300]
    return found.response()

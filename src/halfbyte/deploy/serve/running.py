"""From the start to the end: the port, the model, uvicorn, and signals.

The first SIGINT or SIGTERM takes no more requests; answers under way have a time of grace, then they end with an error
that says so. A second one ends them at once.
"""

import asyncio
import contextlib
import copy
import json
import logging
import socket
from collections.abc import Callable, Iterator
from pathlib import Path
from types import FrameType
from typing import Any, TextIO

import h11
import uvicorn
from peft import PeftModel
from uvicorn.protocols.http.h11_impl import H11Protocol

from halfbyte.deploy.address import BACKLOG, bound, listen, url_of
from halfbyte.deploy.serve.app import PATHS, make_app
from halfbyte.deploy.serve.catalog import Catalog, Served
from halfbyte.deploy.serve.embeddings import EmbedService
from halfbyte.deploy.serve.errors import ApiError
from halfbyte.deploy.serve.log import Handler, Log
from halfbyte.deploy.serve.logprobs import TokenTexts
from halfbyte.deploy.serve.metrics import Metrics
from halfbyte.deploy.serve.options import PATIENCE, ServeOptions
from halfbyte.deploy.serve.prompts import Prompts
from halfbyte.deploy.serve.service import Service
from halfbyte.errors import InputError, size_text
from halfbyte.generate.conversation import stop_tokens
from halfbyte.generate.decoders import decoder_for
from halfbyte.generate.embed import Embedder
from halfbyte.generate.engine import Engine
from halfbyte.generate.stream import own_options
from halfbyte.hf import load, load_tokenizer, prepare
from halfbyte.hf.models.adapter_files import put_adapter
from halfbyte.hf.models.heads import is_classifier
from halfbyte.memory import free_memory

KEEP_ALIVE = 75
"""Seconds that a connection may wait for its next request."""
AFTER_GRACE = 5
"""Seconds in which answers that were ended say so; one after a second signal."""


@contextlib.contextmanager
def opened(model: str, options: ServeOptions, log: Log) -> Iterator[Service | EmbedService]:
    """Open a model for requests, and close it at the end.

    Args:
        model: a run's, an adapter's or a model's folder, or a hub id.
        options: the server's.
        log: the server's.

    Raises:
        InputError: it cannot be served.
    """
    adapters = options.adapters()
    tokenizer = load_tokenizer(model, trust_remote_code=options.trust_remote_code)
    loaded: Any = load(model, trust_remote_code=options.trust_remote_code, device=options.device)
    if is_classifier(loaded.get_base_model() if isinstance(loaded, PeftModel) else loaded):
        raise InputError(f"{model} is a classifier, which neither writes text nor makes embeddings; use classify.")
    if not loaded.can_generate():
        if adapters or options.adapter_folder:
            raise InputError(f"{model} is an encoder, which is served without adapters; leave --adapter away.")
        folder = Path(model).expanduser()
        service = EmbedService(
            Embedder(loaded, tokenizer, folder if folder.is_dir() else None), Catalog(Served(_name(model, options))),
            options, log, Metrics(PATHS, None),
        )  # fmt: skip
        try:
            yield service
        finally:
            service.thread.shutdown(wait=False, cancel_futures=True)
        return
    served = [Served(_name(model, options))]
    base = str(loaded.config._name_or_path or model)
    if isinstance(loaded, PeftModel):
        parent = Served(_own_name(base))
        served = [Served(served[0].name, str(loaded.active_adapter), parent.name), parent]
    for number, (name, folder) in enumerate(adapters.items()):
        if not (folder / "adapter_config.json").is_file():
            raise InputError(
                f"There is no adapter in {folder} (--adapter {name}); give the folder of a run or adapter."
            )
        loaded = prepare(put_adapter(loaded, folder, name=f"given_{number}"))
        parent_name = next(one.name for one in served if one.adapter is None)
        served.append(Served(name, f"given_{number}", parent_name, may_go=True))
    decoder = decoder_for(loaded, cache=options.kv, head=options.head)
    stops = stop_tokens(loaded, tokenizer)
    memory = free_memory() // 2 if options.memory is None else int(options.memory)
    prompts = Prompts(tokenizer, decoder.vocab_size, tuple(stops), decoder.reads_apart)
    with Engine(decoder, tokenizer, stops=stops, memory=memory, most_waiting=options.max_waiting) as engine:
        service_ = Service(
            engine, prompts, Catalog(*served), options, own_options(loaded), TokenTexts(copy.deepcopy(tokenizer)), base,
            log, Metrics(PATHS, engine.figures),
        )  # fmt: skip
        try:
            yield service_
        finally:
            service_.threads.shutdown(wait=False, cancel_futures=True)


def about(service: Service | EmbedService) -> str:
    """Return in a line what is served and how."""
    names = ", ".join(one.name for one in service.catalog)
    if isinstance(service, EmbedService):
        return f"Serving {names}: embeddings of {service.embedder.width} numbers."
    decoder: Any = service.engine.decoder
    how = "natively" if decoder.reason is None else f"through transformers ({decoder.reason})"
    memory = size_text(service.engine.memory or 0)
    return f"Serving {names}: decoded {how}, {memory} for keys and values."


def _name(model: str, options: ServeOptions) -> str:
    return _own_name(model) if options.name is None else options.name


def _own_name(path: str) -> str:
    """Return what a model is called: its folder's name, or its hub id."""
    folder = Path(path).expanduser()
    return folder.resolve().name if folder.exists() else path


class Server(uvicorn.Server):
    """uvicorn, with signals as this module says.

    Attributes:
        was_forced: whether a second signal ended it.
    """

    def __init__(self, config: uvicorn.Config, service: Service | EmbedService, grace: float) -> None:
        super().__init__(config)
        self._service, self._grace = service, grace
        self.was_forced = False

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:
        """Take a signal; it is in the main thread, between two steps of the event loop."""
        del sig, frame
        if self.should_exit:
            self.was_forced = True
        self.should_exit = self._service.is_ending = True

    async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
        """Take no more requests, and let answers end."""
        self._service.is_ending = True
        ending = asyncio.ensure_future(self._end_answers())
        try:
            await super().shutdown(sockets)
        finally:
            ending.cancel()

    async def _end_answers(self) -> None:
        loop = asyncio.get_running_loop()
        until = loop.time() + self._grace
        while loop.time() < until and not self.was_forced:
            await asyncio.sleep(0.05)
        self._service.end_all()
        await asyncio.sleep(1 if self.was_forced else AFTER_GRACE)
        self.force_exit = True


class Protocol(H11Protocol):
    """uvicorn's (0.54) HTTP/1.1, with errors in the API's form, and without patience for heads that do not come."""

    def connection_made(self, transport: Any) -> None:
        """Take a connection, and end it if no request comes."""
        super().connection_made(transport)
        self._is_silent = True
        self.loop.call_later(PATIENCE, self._end_if_silent)

    def handle_events(self) -> None:
        """Look at what has come."""
        super().handle_events()
        if self.conn.their_state is not h11.IDLE:
            self._is_silent = False

    def _end_if_silent(self) -> None:
        if self._is_silent and not self.transport.is_closing():
            self.transport.close()

    def send_400_response(self, msg: str) -> None:
        """Answer what is no HTTP."""
        body = json.dumps(ApiError(400, msg, code="invalid_http").body).encode()
        headers = [(b"content-type", b"application/json"), (b"content-length", str(len(body)).encode())]
        event = h11.Response(status_code=400, headers=[*headers, (b"connection", b"close")], reason=b"Bad Request")
        for part in (event, h11.Data(data=body), h11.EndOfMessage()):
            self.transport.write(self.conn.send(part) or b"")
        self.transport.close()


def make_server(service: Service | EmbedService, keys: tuple[str, ...]) -> Server:
    """Return the server of a model that was opened."""
    config = uvicorn.Config(
        make_app(service, keys), http=Protocol, ws="none", lifespan="off", log_config=None, access_log=False,
        server_header=False, timeout_keep_alive=KEEP_ALIVE, backlog=BACKLOG,
        timeout_graceful_shutdown=int(service.options.grace) + 2 * AFTER_GRACE,
    )  # fmt: skip
    logger = logging.getLogger("uvicorn.error")
    logger.handlers = [Handler(service.log)]
    logger.propagate = False
    return Server(config, service, service.options.grace)


def serve(model: str, options: ServeOptions, log_to: TextIO | None, ready: Callable[[str, str], None]) -> bool:
    """Serve a model until a signal comes; in the main thread.

    Args:
        model: a run's, an adapter's or a model's folder, or a hub id.
        options: where, for whom, how much.
        log_to: what the log is written to.
        ready: called with the address and what is served, once requests are taken.

    Returns:
        Whether all answers could end: False after a second signal.

    Raises:
        InputError: the options, the port or the model will not do.
    """
    keys = options.keys()
    for folder in options.adapter_folder:
        if not Path(folder).expanduser().is_dir():
            raise InputError(f"There is no folder {folder} (--adapter-folder).")
    log = Log(log_to)
    with contextlib.closing(bound(options.host, options.port)) as listening, opened(model, options, log) as service:
        server = make_server(service, keys)
        listen(listening, options.host, options.port)
        ready(f"{url_of(listening)}/v1", about(service))
        server.run(sockets=[listening])
        return not server.was_forced

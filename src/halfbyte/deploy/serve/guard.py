"""What stands before every request and behind every answer: host, key, request id, log, metrics, and errors.

A server on this machine without a key is within reach of every web page that its user looks at: a page can send it
requests, and by a name of its own that leads to 127.0.0.1 read the answers. So without a key only the names of this
machine are taken for the host, and bodies must be declared as JSON (:mod:`.wire`), which a page may not do unasked.
"""

import hashlib
import hmac
import secrets
from collections.abc import Callable

from starlette.types import ASGIApp, Message, Receive, Scope, Send

from halfbyte.deploy.address import names_this_machine
from halfbyte.deploy.serve.errors import FAILED, ApiError
from halfbyte.deploy.serve.log import Log, Record
from halfbyte.deploy.serve.metrics import Metrics

OPEN = "/health"
"""The path that needs no key."""
GONE = 499
"""The status of a request whose client has hung up, in the log alone; nginx's number."""


class Guard:
    """An ASGI application around another.

    Args:
        app: the other one.
        keys: of which requests must have one; none: no key is asked for.
        checks_host: whether only this machine's own names are taken.
    """

    def __init__(
        self, app: ASGIApp, keys: tuple[str, ...], checks_host: bool, log: Log, metrics: Metrics,
        new_id: Callable[[], str] = lambda: secrets.token_hex(8),
    ) -> None:  # fmt: skip
        self._app, self._log, self._metrics, self._new_id = app, log, metrics, new_id
        self._checks_host = checks_host
        self._digests = [hashlib.sha256(key.encode()).digest() for key in keys]

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Answer a request."""
        if scope["type"] != "http":
            if scope["type"] == "websocket":
                await send({"type": "websocket.close", "code": 1000})
                return
            await self._app(scope, receive, send)
            return
        client = scope.get("client")
        record = Record(self._new_id(), scope["method"], scope["path"], client[0] if client else "")
        scope.setdefault("state", {})["record"] = record
        has_begun = False

        async def sending(message: Message) -> None:
            nonlocal has_begun
            if message["type"] == "http.response.start":
                has_begun = True
                record.status = message["status"]
                message["headers"] = [*message["headers"], (b"x-request-id", record.id.encode())]
            await send(message)

        try:
            self._check(scope)
            await self._app(scope, receive, sending)
        except ApiError as error:
            record.error = str(error)
            await error.response()(scope, receive, sending)
        except Exception as error:
            self._log.failure(record, error)
            if not has_begun:
                await ApiError(500, FAILED).response()(scope, receive, sending)
        finally:
            self._log.request(record)
            self._metrics.count(record)

    def _check(self, scope: Scope) -> None:
        """Check host and key.

        Raises:
            ApiError: they will not do.
        """
        headers: dict[bytes, bytes] = {}
        for name, value in scope["headers"]:
            headers.setdefault(name, value)
        if self._checks_host and not names_this_machine(headers.get(b"host", b"localhost")):
            raise ApiError(
                403, "Without a key this server answers to localhost and 127.0.0.1 only.", code="host_not_allowed"
            )
        if not self._digests or scope["path"] == OPEN:
            return
        scheme, _, key = headers.get(b"authorization", b"").partition(b" ")
        given = hashlib.sha256(key.strip()).digest()
        found = [hmac.compare_digest(given, digest) for digest in self._digests]  # all of them, however it goes
        if scheme.lower() != b"bearer" or not any(found):
            what = "An API key is needed" if not key else "The API key is wrong"
            raise ApiError(
                401, f"{what}; send it as Authorization: Bearer KEY.", code="invalid_api_key",
                headers={"www-authenticate": "Bearer"},
            )  # fmt: skip

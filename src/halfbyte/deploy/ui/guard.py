"""What stands before the page: who may ask, what a browser may load, and how large a request may be.

A page on this machine is within reach of every other page that its user looks at. So requests must name a host that is
this one's, and those that a browser sends from elsewhere (``Origin``, ``Sec-Fetch-Site``) are refused. Whoever is on
another machine needs a password (HTTP's Basic, compared in constant time). Nothing is loaded from elsewhere, and no
page may show this one in a frame: the policy (Content-Security-Policy) says so to the browser.

gradio opens whatever file a request calls its own, and fetches addresses: so a request may name no file but those that
were sent here, and from elsewhere a link may lead to the page itself, but to nothing behind it. It has many more routes
than the page asks for, under several names some of them: only those that it asks for are there.
"""

import asyncio
import base64
import hashlib
import hmac
import json
import math
import re
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from starlette.types import ASGIApp, Message, Receive, Scope, Send

from halfbyte.deploy.address import names_this_machine
from halfbyte.errors import size_text

POLICY = (
    "default-src 'self'; script-src 'self' 'unsafe-inline' 'unsafe-eval'; style-src 'self' 'unsafe-inline'; "
    "img-src 'self' data: blob:; media-src 'self' data: blob:; font-src 'self' data:; connect-src 'self' data: blob:; "
    "worker-src 'self' blob:; object-src 'none'; base-uri 'self'; form-action 'self'; frame-ancestors 'none'"
)
"""gradio's own page has scripts and styles in it, and compiles templates; all else must come from here."""
HEADERS = (
    (b"content-security-policy", POLICY.encode()),
    (b"x-content-type-options", b"nosniff"),
    (b"referrer-policy", b"no-referrer"),
    (b"x-frame-options", b"DENY"),
    (b"cross-origin-opener-policy", b"same-origin"),
    (b"cross-origin-resource-policy", b"same-origin"),
)
SMALL = 8 << 20
"""Bytes of a request that is no upload."""
ROOM = 16 << 20
"""Bytes of the disk that an upload leaves to others."""
API = "/gradio_api"
UPLOAD, FILE = f"{API}/upload", f"{API}/file="
ROUTES = re.compile(
    rf"/|/(config|theme\.css|favicon\.ico|manifest\.json|robots\.txt|report)|/(assets|static|download)/.+|{API}/"
    r"(info|app_id|startup-events|theme\.css|upload|upload_progress|cancel|reset|queue/join|queue/data|heartbeat/\w+|"
    r"file=.+)"
)
"""What the page asks for."""
PAUSE = 1.0
"""Seconds that a wrong password costs."""


class Guard:
    """An ASGI application around another.

    Args:
        app: the other one.
        users: names and passwords; none: nobody is asked.
        is_local: whether only this machine's own names are taken for the host.
        max_upload: bytes of a file.
        arriving: the folder of files that are sent here.
    """

    def __init__(self, app: ASGIApp, users: Mapping[str, str], is_local: bool, max_upload: int, arriving: Path) -> None:
        self._app, self._is_local, self._max_upload = app, is_local, max_upload
        self._arriving = arriving.resolve()
        self._guessing = asyncio.Lock()
        self._digests = [_digest(f"{name}:{password}".encode()) for name, password in users.items()]

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Answer a request."""
        if scope["type"] == "websocket":
            await send({"type": "websocket.close", "code": 1008})
            return
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        headers = {name.lower(): value for name, value in reversed(scope["headers"])}
        refusal = self._refusal(scope, headers)
        if refusal:
            if refusal[0] == 401 and b"authorization" in headers:
                async with self._guessing:  # one guess a second, however many ask
                    await asyncio.sleep(PAUSE)
            await _answer(send, *refusal)
            return
        is_upload = scope["path"] == UPLOAD
        most = self._max_upload + SMALL if is_upload else SMALL
        length = headers.get(b"content-length", b"0")
        if not length.isdigit() or int(length) > most:
            await _answer(send, 413, f"More than {size_text(most)} are not taken.")
            return
        if is_upload and int(length) > self._room():
            await _answer(send, 507, "The disk is full: there is no room for this file. Free some space.")
            return
        taken = 0

        async def counted() -> Message:
            nonlocal taken
            message = await receive()
            taken += len(message.get("body", b""))
            if taken > most:  # of a length that nobody told
                raise _TooLarge
            return message

        async def sending(message: Message) -> None:
            if message["type"] == "http.response.start":
                own = {name for name, _ in HEADERS}
                kept = [pair for pair in message["headers"] if pair[0].lower() not in own]
                message["headers"] = [*kept, *HEADERS]
            await send(message)

        try:
            receiving: Receive = counted
            if scope["method"] not in ("GET", "HEAD") and not is_upload:
                body = await _body(counted)
                if not self._names_own_files(body):
                    await _answer(send, 403, "A request may name no other files than those that were sent here.")
                    return
                receiving = _again(body, counted)
            await self._app(scope, receiving, sending)
        except _TooLarge:
            await _answer(send, 413, f"More than {size_text(most)} are not taken.")

    def _names_own_files(self, body: bytes) -> bool:
        """Tell whether all that a request calls the path of a file was sent here."""
        named: list[Any] = []

        def note(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
            named.extend(value for key, value in pairs if key == "path" and value is not None)
            return dict(pairs)

        try:
            json.loads(body, object_pairs_hook=note)
        except (ValueError, RecursionError):
            return not body  # the page sends JSON
        return all(isinstance(value, str) and self._is_own(value) for value in named)

    def _room(self) -> float:
        try:
            return shutil.disk_usage(self._arriving).free - ROOM
        except OSError:
            return math.inf

    def _is_own(self, path: str) -> bool:
        try:
            return Path(path).is_absolute() and Path(path).resolve().is_relative_to(self._arriving)
        except (OSError, RuntimeError, ValueError):
            return False

    def _refusal(self, scope: Scope, headers: Mapping[bytes, bytes]) -> tuple[int, str] | None:
        given = headers.get(b"host", b"")
        if self._is_local and not names_this_machine(given):
            return 403, "This page answers to localhost and 127.0.0.1 only."
        origin = headers.get(b"origin")
        if (
            origin is not None
            and origin.decode("latin-1").lower().partition("://")[2] != given.decode("latin-1").strip().lower()
        ):
            return 403, "Another page may not ask this one."
        path = scope["path"]
        if not ROUTES.fullmatch(path):
            return 404, "There is nothing here."
        if path.startswith(FILE) and not self._is_own(path.removeprefix(FILE)):
            return 403, "There is no such file among those that were sent here."
        site = headers.get(b"sec-fetch-site", b"none")
        if site not in (b"same-origin", b"none") and scope["method"] not in ("GET", "HEAD"):
            return 403, "Another page may not ask this one."
        if site not in (b"same-origin", b"none") and (path != "/" or headers.get(b"sec-fetch-mode") != b"navigate"):
            return 403, "Another page may not ask this one."
        if not self._digests:
            return None
        scheme, _, word = headers.get(b"authorization", b"").partition(b" ")
        try:
            known = _digest(base64.b64decode(word.strip(), validate=True))
        except ValueError:
            known = b""
        found = [hmac.compare_digest(known, digest) for digest in self._digests]  # all of them, however it goes
        if scheme.lower() != b"basic" or not any(found):
            return 401, "Name and password are needed."
        return None


class _TooLarge(Exception):
    pass


async def _body(receive: Receive) -> bytes:
    body, is_more = b"", True
    while is_more:
        message = await receive()
        body += message.get("body", b"")
        is_more = message["type"] == "http.request" and message.get("more_body", False)
    return body


def _again(body: bytes, receive: Receive) -> Receive:
    """Return what hands out a body that was read, and then goes on."""
    left: list[Message] = [{"type": "http.request", "body": body, "more_body": False}]

    async def handing() -> Message:
        return left.pop() if left else await receive()

    return handing


def _digest(text: bytes) -> bytes:
    return hashlib.sha256(text).digest()


async def _answer(send: Send, status: int, text: str) -> None:
    body = text.encode()
    headers = [(b"content-type", b"text/plain; charset=utf-8"), (b"content-length", str(len(body)).encode()), *HEADERS]
    if status == 401:
        headers.append((b"www-authenticate", b'Basic realm="halfbyte", charset="UTF-8"'))
    await send({"type": "http.response.start", "status": status, "headers": headers})
    await send({"type": "http.response.body", "body": body})

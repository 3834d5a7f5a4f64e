"""Who may ask for the page, and what a browser may load with it."""

import asyncio
import base64
import json
import shutil
from pathlib import Path
from typing import Any

import pytest

from halfbyte.deploy.ui import guard
from halfbyte.deploy.ui.guard import Guard

HOST = (b"host", b"127.0.0.1:7860")


def ask(
    headers: list[tuple[bytes, bytes]], *, method: str = "GET", path: str = "/", body: bytes = b"", kind: str = "http",
    **options: Any,
) -> tuple[int, dict[bytes, bytes], bytes]:  # fmt: skip
    """Return status, headers and body of the answer; the application behind reads the body and says how long it is."""

    async def app(scope: Any, receive: Any, send: Any) -> None:
        size = 0
        while True:
            message = await receive()
            size += len(message.get("body", b""))
            if not message.get("more_body"):
                break
        await send({"type": "http.response.start", "status": 200, "headers": [(b"x-frame-options", b"ALLOWALL")]})
        await send({"type": "http.response.body", "body": str(size).encode()})

    given = {"users": {}, "is_local": True, "max_upload": 1000, "arriving": Path("/arriving")} | options
    guarded, sent = Guard(app, **given), []
    pieces = [body[at : at + 2**20] for at in range(0, len(body), 2**20)] or [b""]

    async def receive() -> Any:
        piece = pieces.pop(0)
        return {"type": "http.request", "body": piece, "more_body": bool(pieces)}

    async def send(message: Any) -> None:
        sent.append(message)

    scope = {"type": kind, "method": method, "path": path, "headers": headers}
    asyncio.run(guarded(scope, receive, send))
    if kind == "websocket":
        return 0, {}, b""
    return sent[0]["status"], dict(sent[0]["headers"]), b"".join(one.get("body", b"") for one in sent[1:])


@pytest.mark.parametrize("host", [b"127.0.0.1:7860", b"localhost:7860", b"[::1]:7860", b"127.0.0.1"])
def test_this_machine_is_answered_under_its_own_names(host: bytes) -> None:
    assert ask([(b"host", host)])[0] == 200


@pytest.mark.parametrize(
    "host", [b"evil.example", b"evil.example:7860", b"127.0.0.1.evil.example:7860", b"", b"10.0.0.1:7860"]
)
def test_another_name_for_this_machine_is_not_answered(host: bytes) -> None:
    assert ask([(b"host", host)])[0] == 403


@pytest.mark.parametrize(
    ("headers", "method", "status"),
    [
        ([(b"origin", b"http://127.0.0.1:7860")], "POST", 200),
        ([(b"origin", b"http://evil.example")], "POST", 403),
        ([(b"origin", b"null")], "POST", 403),
        ([(b"origin", b"http://127.0.0.1:9999")], "POST", 403),
        ([(b"sec-fetch-site", b"cross-site")], "POST", 403),
        ([(b"sec-fetch-site", b"same-site")], "POST", 403),
        ([(b"sec-fetch-site", b"cross-site"), (b"sec-fetch-mode", b"no-cors")], "GET", 403),
        ([(b"sec-fetch-site", b"cross-site"), (b"sec-fetch-mode", b"navigate")], "GET", 200),
        ([(b"sec-fetch-site", b"same-origin")], "POST", 200),
        ([], "POST", 200),
    ],
)
def test_other_pages_may_not_ask(headers: list[tuple[bytes, bytes]], method: str, status: int) -> None:
    assert ask([HOST, *headers], method=method)[0] == status


def test_a_password_is_asked_for_and_compared(monkeypatch: pytest.MonkeyPatch) -> None:
    slept: list[float] = []

    async def sleep(seconds: float) -> None:
        slept.append(seconds)

    monkeypatch.setattr(asyncio, "sleep", sleep)
    users = {"users": {"halfbyte": "sesame", "zoë": "später"}, "is_local": False}

    def basic(text: str) -> list[tuple[bytes, bytes]]:
        return [(b"host", b"box:80"), (b"authorization", b"Basic " + base64.b64encode(text.encode()))]

    status, headers, _ = ask([(b"host", b"box:80")], **users)
    assert status == 401 and headers[b"www-authenticate"].startswith(b"Basic")
    assert ask(basic("halfbyte:sesame"), **users)[0] == 200 and ask(basic("zoë:später"), **users)[0] == 200
    for wrong in ("halfbyte:", "halfbyte:sesam", "zoë:sesame", "", ":"):
        assert ask(basic(wrong), **users)[0] == 401
    for header in (b"Basic", b"Basic !!!", b"Bearer c2VzYW1l", b"Basic c2Vz YW1l"):
        assert ask([(b"host", b"box"), (b"authorization", header)], **users)[0] == 401
    assert slept == [guard.PAUSE] * 9  # each that was wrong, none that was right or missing


def test_too_much_is_refused_told_or_not() -> None:
    large = b"x" * (9 << 20)
    assert ask([HOST, (b"content-length", str(len(large)).encode())], method="POST", body=large)[0] == 413
    assert ask([HOST], method="POST", body=large)[0] == 413
    assert ask([HOST, (b"content-length", b"-1")], method="POST")[0] == 413
    upload = {"method": "POST", "path": "/gradio_api/upload", "max_upload": 2 << 20}
    status, _, body = ask([HOST, (b"content-length", str(len(large)).encode())], body=large, **upload)
    assert (status, body) == (200, str(len(large)).encode())
    more = b"x" * (11 << 20)
    assert ask([HOST, (b"content-length", str(len(more)).encode())], body=more, **upload)[0] == 413


@pytest.mark.parametrize(
    "path",
    [
        "/etc/passwd",
        "/arriving/../etc/passwd",
        "../arriving/x",
        "x",
        "http://evil.example/x.html",
        "",
        7,
        ["/arriving/x"],
    ],
)
def test_a_request_names_no_file_but_those_that_were_sent(path: Any) -> None:
    def status(body: Any) -> int:
        return ask([HOST], method="POST", path="/gradio_api/queue/join", body=json.dumps(body).encode())[0]

    own = {"path": "/arriving/tmp/0/rows.jsonl", "meta": {"_type": "gradio.FileData"}}
    assert status({"data": ["en", [own], "a path"]}) == 200
    assert status({"data": ["en", [own, {"path": path}]]}) == 403
    assert status({"data": [{"role": "user", "content": [{"type": "file", "file": {"path": path}}]}]}) == 403


def test_of_files_those_that_were_sent_are_given_and_nothing_is_fetched() -> None:
    def status(path: str) -> int:
        return ask([HOST], path=path)[0]

    assert status("/gradio_api/file=/arriving/tmp/x.jsonl") == 200
    for path in ("http://evil.example/x.png", "/etc/passwd", "/arriving/../etc/passwd", "x", "//evil.example/x"):
        assert status(f"/gradio_api/file={path}") == 403


@pytest.mark.parametrize(
    "path",
    [
        "/file=/etc/passwd",
        "/gradio_api/file//etc/passwd",
        "/gradio_api/file/http://evil.example/",
        "//gradio_api/file=/etc/passwd",
        "/gradio_api/proxy=http://evil.example/",
        "/gradio_api/component_server",
        "/gradio_api/vibe-code",
        "/gradio_api/process_recording",
        "/gradio_api/run/predict",
        "/gradio_api/call/x",
        "/gradio_api/deep_link",
        "/gradio_api/openapi.json",
        "/openapi.json",
        "/monitoring",
        "/login",
        "/docs",
        "/x/gradio_api/upload",
    ],
)
def test_of_gradios_routes_those_that_the_page_asks_for_are_there(path: str) -> None:
    for method in ("GET", "POST"):
        assert ask([HOST], path=path, method=method)[0] == 404


def test_a_link_from_elsewhere_leads_to_the_page_alone() -> None:
    linked = [HOST, (b"sec-fetch-site", b"cross-site"), (b"sec-fetch-mode", b"navigate")]
    assert ask(linked, path="/")[0] == 200
    for path in ("/gradio_api/file=/arriving/x", "/report", "/download/x", "/gradio_api/queue/data"):
        assert ask(linked, path=path)[0] == 403


def test_a_file_for_which_there_is_no_room_is_refused_before_it_is_taken(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    usage = shutil.disk_usage(tmp_path)
    monkeypatch.setattr(shutil, "disk_usage", lambda _: usage._replace(free=guard.ROOM + 1000))
    upload = {"method": "POST", "path": "/gradio_api/upload", "max_upload": 2 << 20, "arriving": tmp_path}
    for size, status in ((1000, 200), (1001, 507)):
        assert ask([HOST, (b"content-length", str(size).encode())], body=b"x" * size, **upload)[0] == status


def test_a_request_has_one_reading() -> None:
    post = {"method": "POST", "path": "/gradio_api/queue/join"}
    twice = b'{"data": [{"path": "/etc/passwd", "path": "/arriving/x"}]}'
    escaped = b'{"data": [{"p\\u0061th": "/etc/passwd"}]}'
    for body in (twice, escaped, b'{"data": [', b"[" * 100_000, b"path=/etc/passwd"):
        assert ask([HOST], body=body, **post)[0] == 403
    body = json.dumps({"data": ["x" * 3_000_000]}).encode()
    assert ask([HOST], body=body, **post)[::2] == (200, str(len(body)).encode())
    assert ask([HOST], **post)[0] == 200


def test_a_browser_is_told_to_load_nothing_from_elsewhere_and_to_show_the_page_in_no_frame() -> None:
    _, headers, _ = ask([HOST])
    policy = headers[b"content-security-policy"].decode()
    assert "default-src 'self'" in policy and "frame-ancestors 'none'" in policy and "http" not in policy
    assert headers[b"x-frame-options"] == b"DENY" and headers[b"x-content-type-options"] == b"nosniff"


def test_there_are_no_websockets() -> None:
    ask([HOST], kind="websocket")

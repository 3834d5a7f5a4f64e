"""A small HTTP server that stands in for a judge: it answers as it is told, or fails."""

import contextlib
import json
import threading
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

Answer = Callable[[dict[str, Any]], str | tuple[int, str]]
"""Of a request's body the reply's text, or the status of an error and its sentence."""


@dataclass
class StandIn:
    """The server.

    Attributes:
        answer: what it does; may be changed meanwhile.
        asked: the bodies of all requests.
        keys: the keys that were shown.
    """

    answer: Answer
    url: str = ""
    asked: list[dict[str, Any]] = field(default_factory=list)
    keys: list[str | None] = field(default_factory=list)
    models: list[str] = field(default_factory=lambda: ["wise"])
    lists_models: bool = True


@contextlib.contextmanager
def stand_in(answer: Answer) -> Iterator[StandIn]:
    """Serve meanwhile."""
    state = StandIn(answer)

    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def log_message(self, *_: Any) -> None:
            pass

        def _send(self, status: int, body: Any) -> None:
            data = json.dumps(body).encode()
            self.send_response(status)
            self.send_header("content-type", "application/json")
            self.send_header("content-length", str(len(data)))
            self.end_headers()
            self.wfile.write(data)

        def do_GET(self) -> None:
            state.keys.append(self.headers.get("authorization"))
            if state.lists_models:
                models = [{"id": name, "object": "model", "created": 0, "owned_by": "me"} for name in state.models]
                self._send(200, {"object": "list", "data": models})
            else:
                self._send(404, {"error": {"message": "no such path"}})

        def do_POST(self) -> None:
            body = json.loads(self.rfile.read(int(self.headers["content-length"])))
            state.asked.append(body)
            found = state.answer(body)
            if not isinstance(found, str):
                status, message = found
                self._send(status, {"error": {"message": message, "type": "t", "param": None, "code": None}})
                return
            choice = {"index": 0, "finish_reason": "stop", "message": {"role": "assistant", "content": found}}
            self._send(
                200,
                {"id": "1", "object": "chat.completion", "created": 0, "model": body["model"], "choices": [choice]},
            )

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    state.url = f"http://127.0.0.1:{server.server_address[1]}/v1"
    thread = threading.Thread(target=server.serve_forever)
    thread.start()
    try:
        yield state
    finally:
        server.shutdown()
        thread.join()
        server.server_close()

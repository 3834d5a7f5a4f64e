"""Whatever is wrong with a request, it gets an answer in the API's own form, and the server goes on."""

import json
import random
import socket
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx2 as httpx
import openai
import pytest
from serving import Running, running

CHAT = "/v1/chat/completions"
GOOD: dict[str, Any] = {"model": "tiny", "messages": [{"role": "user", "content": "a"}], "max_tokens": 1}
TOOL = {"type": "function", "function": {"name": "f", "parameters": {"type": 5}}}


def schema(value: Any) -> dict[str, Any]:
    return {"response_format": {"type": "json_schema", "json_schema": {"name": "a", "schema": value}}}


def check(answer: httpx.Response, status: int | None = None) -> dict[str, Any]:
    """Check the form of an error, and return it."""
    assert status is None or answer.status_code == status, (answer.status_code, answer.text)
    assert answer.headers["content-type"] == "application/json" and answer.headers["x-request-id"]
    found = answer.json()
    assert found.keys() == {"error"} and found["error"].keys() == {"message", "type", "param", "code"}
    assert found["error"]["message"] and len(found["error"]["message"]) < 700
    assert "Traceback" not in answer.text and str(Path(__file__).parents[2]) not in answer.text
    return dict(found["error"])


WRONG: list[tuple[Any, int, str | None, str]] = [
    (b"", 400, None, "not JSON"),
    (b"{", 400, None, "not JSON"),
    (b"[1]", 400, None, "must be a JSON object"),
    (b'{"model": "tiny", "messages": [{"role": "user", "content": "\xff"}]}', 400, None, "not UTF-8"),
    (b'{"model": "tiny", "temperature": NaN}', 400, None, "NaN"),
    (b'{"model": "tiny", "temperature": 1e999}', 400, None, "too large"),
    (b'{"model": "tiny", "seed": ' + b"9" * 5000 + b"}", 400, None, "64 bits"),
    (b'{"model": ' + b"[" * 100_000, 400, None, "brackets"),
    (b'{"model": ' + b"[" * 200 + b"]" * 200 + b"}", 400, None, "brackets"),
    (b'{"model": "\\ud800"}', 400, None, "half of a character"),
    ({}, 400, "model", "missing"),
    (GOOD | {"temprature": 1}, 400, "temprature", "did you mean 'temperature'"),
    (GOOD | {"temperature": "1"}, 400, "temperature", "valid number"),
    (GOOD | {"temperature": 3}, 400, "temperature", "less than or equal to 2"),
    (GOOD | {"temperature": True}, 400, "temperature", "valid number"),
    (GOOD | {"max_tokens": 0}, 400, "max_tokens", "greater than or equal to 1"),
    (GOOD | {"max_tokens": 1.5}, 400, "max_tokens", "integer"),
    (GOOD | {"max_tokens": 100_000}, 400, None, "attends to"),
    (GOOD | {"n": 1000}, 400, "n", "the most"),
    (GOOD | {"top_logprobs": 2}, 400, None, "logprobs: true"),
    (GOOD | {"logprobs": True, "top_logprobs": 21}, 400, "top_logprobs", "20"),
    (GOOD | {"logit_bias": {"x": 1}}, 400, "logit_bias", "token ids"),
    (GOOD | {"logit_bias": {"99999": 1}}, 400, None, "99999"),
    (GOOD | {"stop": [""]}, 400, "stop", "at least 1"),
    (GOOD | {"stop": ["a"] * 65}, 400, "stop", "64"),
    (GOOD | {"stream_options": {"include_usage": True}}, 400, None, "stream"),
    (GOOD | {"model": "nobody"}, 404, "model", "tiny, red and blue"),
    (GOOD | {"model": 5}, 400, "model", "string"),
    (GOOD | {"messages": []}, 400, "messages", "at least 1"),
    (GOOD | {"messages": [{"role": "robot", "content": "a"}]}, 400, "messages.0.role", "'user'"),
    (GOOD | {"messages": [{"role": "user"}]}, 400, "messages.0", "content is missing"),
    (
        GOOD | {"messages": [{"role": "user", "content": [{"type": "image_url", "image_url": {"url": "x"}}]}]},
        400, "messages.0.content", "image_url",
    ),
    (GOOD | {"messages": [{"role": "user", "content": "a" * 3000}]}, 400, None, "attends to 1024"),
    (GOOD | schema({"type": "nothing"}), 400, None, "JSON schema"),
    (GOOD | schema({"$ref": "http://127.0.0.1/x"}), 400, None, "JSON schema"),
    (GOOD | {"response_format": {"type": "yaml"}}, 400, "response_format", "json_object"),
    (GOOD | {"tools": [TOOL], "tool_choice": "required"}, 400, None, "cannot be used"),
    (GOOD | {"tool_choice": "required"}, 400, None, "tools"),
    (GOOD | {"seed": -(2**63) - 1}, 400, "seed", "greater"),
    (GOOD | {"reasoning_effort": "high"}, 400, "reasoning_effort", "no parameter"),
]  # fmt: skip


@pytest.mark.parametrize("number", range(len(WRONG)))
def test_a_wrong_body_is_told_in_a_sentence(served: Running, number: int) -> None:
    body, status, param, words = WRONG[number]
    error = check(served.post(CHAT, body), status)
    assert words in error["message"], error
    assert error["type"] == "invalid_request_error"
    if param is not None:
        assert error["param"].startswith(param)
    served.wait_idle()


@pytest.mark.parametrize(
    ("method", "path", "status"),
    [
        ("GET", "/", 404), ("GET", "/v1", 404), ("POST", "/v1/models", 405), ("GET", CHAT, 405), ("PUT", CHAT, 405),
        ("POST", "/v1/embeddings", 404), ("GET", "/v1/models/none", 404), ("GET", "/v1/../../etc/passwd", 404),
        ("GET", "/docs", 404), ("GET", "/openapi.json", 404), ("POST", "/v1/responses", 404),
    ],
)  # fmt: skip
def test_a_wrong_path_or_method_is_told(served: Running, method: str, path: str, status: int) -> None:
    with served.http() as http:
        check(http.request(method, path), status)


def test_a_body_of_another_kind_or_size_is_not_read(served: Running) -> None:
    check(served.post(CHAT, GOOD, **{"content-type": "text/plain"}), 415)
    check(served.post(CHAT, b'{"model": "' + b"a" * (5 << 20)), 413)
    with served.http() as http:  # of no length that was told before

        def parts() -> Iterator[bytes]:
            for _ in range(100):
                yield b" " * 65_536

        answer = http.post(CHAT, content=parts(), headers={"content-type": "application/json"})
        check(answer, 413)


def test_what_is_no_http_is_told_in_the_form_of_the_api(served: Running) -> None:
    address = served.url.removeprefix("http://").removesuffix("/v1").split(":")
    with socket.create_connection((address[0], int(address[1]))) as raw:
        raw.sendall(b"NONSENSE\r\n\r\n")
        head, _, body = raw.makefile("rb").read().partition(b"\r\n\r\n")
    assert b" 400 " in head and json.loads(body)["error"]["code"] == "invalid_http"


@pytest.fixture(scope="module")
def locked(base: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Running]:
    keys = tmp_path_factory.mktemp("keys") / "keys"
    keys.write_text("first-key\nsecond-key\n")
    with running(base, name="tiny", api_key_file=keys, host="0.0.0.0", max_prompt_tokens=40, max_tokens=5) as server:
        server.url = server.url.replace("0.0.0.0", "127.0.0.1")
        yield server


def test_a_key_is_needed_for_all_but_health(locked: Running) -> None:
    with httpx.Client(base_url=locked.url.removesuffix("/v1")) as http:
        assert http.get("/health").json() == {"status": "ok"}
        for path in ("/v1/models", "/metrics", "/nothing"):
            for key in (
                {},
                {"authorization": "Basic first-key"},
                {"authorization": "Bearer first-ke"},
                {"authorization": "first-key"},
            ):
                error = check(http.get(path, headers=key), 401)
                assert error["code"] == "invalid_api_key"
        for key in ("first-key", "second-key"):
            assert http.get("/v1/models", headers={"authorization": f"Bearer {key}"}).status_code == 200
    with locked.client() as client, pytest.raises(openai.AuthenticationError):
        client.with_options(api_key="wrong").models.list()
    assert "first-key" not in locked.written.getvalue()


def test_lengths_have_limits_of_the_server(locked: Running) -> None:
    long = GOOD | {"messages": [{"role": "user", "content": "a" * 60}]}
    assert check(locked.post(CHAT, long), 400)["code"] == "context_length_exceeded"
    assert "5 at most" in check(locked.post(CHAT, GOOD | {"max_tokens": 6}), 400)["message"]


def test_without_a_key_only_names_of_this_machine_are_taken(served: Running) -> None:
    with served.http() as http:
        for host in ("localhost", "127.0.0.1:5", "[::1]:80"):
            assert http.get("/health", headers={"host": host}).status_code == 200
        for host in ("example.org", "127.0.0.1.example.org", "[fe80::1]"):
            assert check(http.get("/v1/models", headers={"host": host}), 403)["code"] == "host_not_allowed"


def bad_request(random_: random.Random) -> tuple[str, str, bytes, dict[str, str]]:
    """Return a request with something wrong, most of the time."""
    body: dict[str, Any] = json.loads(json.dumps(GOOD))
    odd: list[Any] = [
        None, True, -1, 0, 2**63, 1e308, -1.5, "", "a", "\u0000", "\ud83d\ude00", [], [[]], {}, {"a": {}}, [None],
        "x" * 5000,
    ]  # fmt: skip
    names = [
        "model", "messages", "temperature", "top_p", "n", "seed", "stop", "max_tokens", "logprobs", "top_logprobs",
        "logit_bias", "response_format", "tools", "tool_choice", "stream", "stream_options", "user", "prompt", "input",
        "frequency_penalty", "extra", "lora_name", "lora_path", "echo", "suffix", "best_of", "metadata",
    ]  # fmt: skip
    for _ in range(random_.randint(1, 3)):
        place: Any = body
        if random_.random() < 0.3 and isinstance(body.get("messages"), list) and body["messages"]:
            place = body["messages"][0]
        if isinstance(place, dict):
            place[random_.choice([*names, "role", "content", "tool_calls"])] = random_.choice(odd)
    raw = json.dumps(body).encode()
    match random_.randrange(8):
        case 0:
            raw = raw[: random_.randrange(len(raw))]
        case 1:
            at = random_.randrange(len(raw))
            raw = raw[:at] + bytes([random_.randrange(256)]) + raw[at + 1 :]
        case 2:
            raw = raw.replace(b"1", random_.choice([b"NaN", b"1e999", b"-Infinity", b"9" * 400, b"0x1"]))
        case 3:
            raw = random_.choice([b"[", b'{"a":']) * random_.choice([50, 500, 50_000])
        case 4:
            raw = random_.randbytes(random_.randrange(200))
    paths = [CHAT, CHAT, "/v1/completions", "/v1/embeddings", "/v1/load_lora_adapter", "/v1/unload_lora_adapter"]
    path = random_.choice([*paths, "/v1/models", f"/{random_.randbytes(4).hex()}", "/v1/chat/completions/"])
    method = random_.choice(["POST"] * 8 + ["GET", "DELETE", "PATCH"])
    kinds = ["application/json"] * 8 + ["text/plain", "application/json; charset=latin-1", ""]
    return method, path, raw, {"content-type": random_.choice(kinds)}


def throw(server: Running, count: int, seed: int) -> dict[int, int]:
    """Send bad requests; return how many there were of each status."""
    random_ = random.Random(seed)
    statuses: dict[int, int] = {}
    with server.http() as http:
        for number in range(count):
            method, path, raw, headers = bad_request(random_)
            answer = http.request(method, path, content=raw, headers=headers)
            statuses[answer.status_code] = statuses.get(answer.status_code, 0) + 1
            if answer.status_code != 200:
                check(answer)
            assert answer.status_code < 500, (number, method, path, raw, answer.text)
    server.wait_idle()
    assert not [line for line in server.log if line["event"] == "failure"]
    return statuses


def test_bad_requests_leave_the_server_as_it_was(served: Running) -> None:
    before = served.post(CHAT, GOOD | {"temperature": 0, "max_tokens": 8}).json()["choices"]
    statuses = throw(served, 250, seed=1)
    assert statuses[400] > 60 and {400, 404, 405, 415} <= statuses.keys()
    assert served.post(CHAT, GOOD | {"temperature": 0, "max_tokens": 8}).json()["choices"] == before


@pytest.mark.slow
def test_ten_thousand_bad_requests(served: Running) -> None:
    import psutil

    throw(served, 500, seed=2)
    taken = psutil.Process().memory_info().rss
    throw(served, 10_000, seed=3)
    assert psutil.Process().memory_info().rss - taken < 100 << 20

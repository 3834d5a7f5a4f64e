"""A stand-in for the Hugging Face hub: the part of its HTTP API that uploads and downloads need, over a real socket.

As huggingface_hub 2.4 speaks it: who am I, repositories, branches, preupload, git-LFS (one part or several), commits of
newline-delimited JSON, paths-info, trees, files. It holds what arrives, and can be told to fail.
"""

import base64
import hashlib
import json
import re
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any
from urllib.parse import parse_qs, unquote, urlsplit

LARGE = (".safetensors", ".gguf", ".bin")
PART = 100_000
"""Bytes of a part, where files come in several."""


@dataclass
class Repository:
    private: bool
    branches: dict[str, dict[str, bytes]] = field(default_factory=lambda: {"main": {".gitattributes": b""}})
    heads: dict[str, str] = field(default_factory=lambda: {"main": "0" * 40})
    messages: list[str] = field(default_factory=list)
    ignored: set[str] = field(default_factory=set)


@dataclass
class Fault:
    """Answers to be given to requests whose ``METHOD path`` matches, in place of the right ones."""

    pattern: str
    status: int
    times: int = 1
    message: str = ""
    headers: dict[str, str] = field(default_factory=dict)


class Hub:
    """The stand-in.

    Attributes:
        users: by token, what ``whoami`` says; without ``write`` they may only read.
        seen: each request: method, path, body.
        hook: called with method and path before each answer.
    """

    def __init__(self) -> None:
        self.repositories: dict[str, Repository] = {}
        self.cards: dict[str, dict[str, Any]] = {}
        self.objects: dict[str, bytes] = {}
        self.parts: dict[str, dict[int, bytes]] = {}
        self.users = {"good": {"name": "me", "write": True}, "reader": {"name": "me", "write": False}}
        self.faults: list[Fault] = []
        self.seen: list[tuple[str, str, bytes]] = []
        self.in_parts = False
        self.hook: Callable[[str, str], None] = lambda method, path: None
        self.lock = threading.Lock()
        hub = self

        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"

            def answer(self) -> None:
                hub._answer(self)

            do_GET = do_HEAD = do_POST = do_PUT = answer

            def log_message(self, *_: Any) -> None:
                pass

        self.server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.server.daemon_threads = True
        self.url = f"http://127.0.0.1:{self.server.server_port}"

    def requests(self, pattern: str) -> list[tuple[str, str, bytes]]:
        return [one for one in self.seen if re.search(pattern, f"{one[0]} {one[1]}")]

    def files(self, repo_id: str, branch: str = "main") -> dict[str, bytes]:
        """What a branch holds, but for what the hub puts there itself."""
        return {name: data for name, data in self.repositories[repo_id].branches[branch].items() if name[0] != "."}

    def _answer(self, request: BaseHTTPRequestHandler) -> None:
        path = unquote(urlsplit(request.path).path)
        body = _body(request)
        with self.lock:
            self.seen.append((request.command, path, body))
        self.hook(request.command, path)
        with self.lock:
            status, answer, headers = self._fault(request.command, path) or self._route(request, path, body)
        data = answer if isinstance(answer, bytes) else json.dumps(answer).encode()
        request.send_response(status)
        for name, value in {"Content-Type": "application/json", "Content-Length": str(len(data)), **headers}.items():
            request.send_header(name, value)
        request.end_headers()
        if request.command != "HEAD":
            request.wfile.write(data)

    def _fault(self, method: str, path: str) -> tuple[int, Any, dict[str, str]] | None:
        for fault in self.faults:
            if fault.times and re.search(fault.pattern, f"{method} {path}"):
                fault.times -= 1
                return fault.status, {"error": fault.message}, {"X-Error-Message": fault.message} | fault.headers
        return None

    def _route(self, request: BaseHTTPRequestHandler, path: str, body: bytes) -> tuple[int, Any, dict[str, str]]:
        if match := re.fullmatch(r"/lfs/([0-9a-f]{64})(?:/(\d+|done))?", path):
            return self._store(match[1], match[2], body)  # a signed URL: no token
        user = self.users.get(request.headers.get("Authorization", "").removeprefix("Bearer "))
        if user is None:
            return 401, {"error": "Invalid username or password."}, {}
        if path == "/api/whoami-v2":
            return 200, {"name": user["name"], "type": "user"}, {}
        if path == "/api/validate-yaml":
            return 200, {"errors": [], "warnings": []}, {}
        writes = request.command not in ("GET", "HEAD") and "/paths-info/" not in path
        if writes and not user["write"]:
            return _error(403, "You don't have the rights to create a model under this namespace")
        if path == "/api/repos/create":
            about = json.loads(body)
            name = f"{about['organization']}/{about['name']}"
            if name in self.repositories:
                return _error(409, "You already created this model repo")
            self.repositories[name] = Repository(about.get("visibility") == "private")
            return 200, {"url": f"{self.url}/{name}"}, {}
        match = re.fullmatch(r"(?:/api/models)?/([^/]+/[^/]+?)(\.git)?(?:/(.*))?", path)
        if match and match[1] in self.cards:
            return 200, {"id": match[1], "private": False, "siblings": [], "cardData": self.cards[match[1]]}, {}
        if not match or match[1] not in self.repositories:
            return 404, {"error": "Repository not found"}, {"X-Error-Code": "RepoNotFound"}
        return self._of(match[1], match[3] or "", body)

    def _of(self, name: str, rest: str, body: bytes) -> tuple[int, Any, dict[str, str]]:
        repository = self.repositories[name]
        what, _, revision = rest.partition("/")
        branch = revision or "main"
        if rest == "info/lfs/objects/batch":
            return 200, {"transfer": "basic", "objects": [self._wanted(one) for one in json.loads(body)["objects"]]}, {}
        if what == "refs":
            heads = repository.heads.items()
            refs = [{"name": one, "ref": f"refs/heads/{one}", "targetCommit": oid} for one, oid in heads]
            return 200, {"branches": refs, "converts": [], "tags": []}, {}
        if what == "branch":
            repository.branches[branch] = dict(repository.branches["main"])
            repository.heads[branch] = repository.heads["main"]
            return 200, {}, {}
        if what == "resolve":
            branch, _, file = branch.partition("/")
        commits = {oid: one for one, oid in repository.heads.items()}
        branch = commits.get(branch, branch)
        if branch not in repository.branches:
            return 404, {"error": "Revision not found"}, {"X-Error-Code": "RevisionNotFound"}
        files = repository.branches[branch]
        if what in ("", "revision"):
            siblings = [{"rfilename": one} for one in files]
            about = {"id": name, "private": repository.private, "sha": repository.heads[branch], "siblings": siblings}
            return 200, about, {}
        if what == "tree":
            return 200, [_about(path, data) for path, data in files.items()], {}
        if what == "resolve":
            headers = {"X-Repo-Commit": repository.heads[branch]}
            if file not in files:
                return 404, {"error": "Entry not found"}, headers | {"X-Error-Code": "EntryNotFound"}
            return 200, files[file], headers | {"ETag": f'"{_git(files[file])}"'}
        if what == "preupload":
            asked = json.loads(body)["files"]
            return 200, {"files": [self._mode(repository, files, one["path"]) for one in asked]}, {}
        if what == "paths-info":
            paths = parse_qs(body.decode())["paths"]
            return 200, [_about(path, files[path]) for path in paths if path in files], {}
        assert what == "commit"
        header, *operations = [json.loads(line) for line in body.splitlines()]
        made = dict(files)
        for operation in operations:
            value = operation["value"]
            if operation["key"] == "lfsFile":
                if value["oid"] not in self.objects:
                    return _error(400, f"LFS object {value['oid']} is not there")
                made[value["path"]] = self.objects[value["oid"]]
            else:
                made[value["path"]] = base64.b64decode(value["content"])
        repository.branches[branch] = made
        repository.messages.append(header["value"]["summary"])
        oid = hashlib.sha1(body + repository.heads[branch].encode()).hexdigest()
        repository.heads[branch] = oid
        return 200, {"commitUrl": f"{self.url}/{name}/commit/{oid}", "commitOid": oid, "pullRequestUrl": None}, {}

    def _mode(self, repository: Repository, files: dict[str, bytes], path: str) -> dict[str, Any]:
        is_large = path.endswith(LARGE)
        oid = None
        if path in files:
            oid = hashlib.sha256(files[path]).hexdigest() if is_large else _git(files[path])
        mode = "lfs" if is_large else "regular"
        return {"path": path, "uploadMode": mode, "shouldIgnore": path in repository.ignored, "oid": oid}

    def _wanted(self, one: dict[str, Any]) -> dict[str, Any]:
        if one["oid"] in self.objects:
            return dict(one)
        href = f"{self.url}/lfs/{one['oid']}"
        if not self.in_parts:
            return one | {"actions": {"upload": {"href": href}}}
        count = -(-one["size"] // PART)
        header = {"chunk_size": str(PART)} | {f"{n:05}": f"{href}/{n}" for n in range(1, count + 1)}
        return one | {"actions": {"upload": {"href": f"{href}/done", "header": header}}}

    def _store(self, oid: str, part: str | None, body: bytes) -> tuple[int, Any, dict[str, str]]:
        if part and part != "done":
            self.parts.setdefault(oid, {})[int(part)] = body
            return 200, b"", {"etag": hashlib.md5(body).hexdigest()}
        whole = b"".join(data for _, data in sorted(self.parts.pop(oid).items())) if part else body
        if hashlib.sha256(whole).hexdigest() != oid:
            return _error(400, "not the bytes of this name")
        self.objects[oid] = whole
        return 200, b"{}", {}


@contextmanager
def served() -> Iterator[Hub]:
    """A hub that answers meanwhile."""
    hub = Hub()
    thread = threading.Thread(target=hub.server.serve_forever, kwargs={"poll_interval": 0.01}, daemon=True)
    thread.start()
    try:
        yield hub
    finally:
        hub.server.shutdown()
        hub.server.server_close()
        thread.join()


def _body(request: BaseHTTPRequestHandler) -> bytes:
    if request.headers.get("Transfer-Encoding") != "chunked":
        return request.rfile.read(int(request.headers.get("Content-Length", 0)))
    body = b""
    while size := int(request.rfile.readline().strip() or b"0", 16):
        body += request.rfile.read(size)
        request.rfile.readline()
    request.rfile.readline()
    return body


def _error(status: int, message: str) -> tuple[int, Any, dict[str, str]]:
    return status, {"error": message}, {"X-Error-Message": message}


def _git(data: bytes) -> str:
    return hashlib.sha1(b"blob %d\0" % len(data) + data).hexdigest()


def _about(path: str, data: bytes) -> dict[str, Any]:
    about: dict[str, Any] = {"type": "file", "path": path, "size": len(data), "oid": _git(data)}
    if path.endswith(LARGE):
        about["lfs"] = {"oid": hashlib.sha256(data).hexdigest(), "size": len(data), "pointerSize": 130}
    return about

"""Answers for the page: from ``halfbyte serve`` in a process of its own, which gives its memory back when it ends.

One model is open at a time. The server listens on this machine alone, at a free port, and takes requests with a key
that nobody else knows. Judgements of answers become rows to train on.
"""

import contextlib
import json
import os
import queue
import re
import secrets
import signal
import subprocess
import sys
import tempfile
import threading
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from halfbyte.errors import InputError
from halfbyte.files import append

READY = re.compile(r"http://127\.0\.0\.1:(\d+)/v1")
PATIENCE = 600.0
"""Seconds in which a model opens."""
GRACE = 5.0
"""Seconds in which its server ends."""
FEEDBACK = "feedback"


@dataclass(frozen=True)
class Open:
    """A model that is open.

    Attributes:
        path: what it was opened by.
        names: what its server calls it: with an adapter that first, then the base.
        address: of its server.
        key: that its server takes.
        process: its server.
        place: a folder of its own.
    """

    path: str
    names: list[str]
    address: str
    key: str
    process: "subprocess.Popen[str]"
    place: "tempfile.TemporaryDirectory[str]"


class Talk:
    """Opens models, one at a time, and asks them."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._open: Open | None = None

    @property
    def now(self) -> Open | None:
        """What is open."""
        found = self._open
        return found if found and found.process.poll() is None else None

    def open(self, path: str) -> Open:
        """Open a model in the place of the one that is open.

        Raises:
            InputError: it cannot be served.
        """
        with self._lock:
            if self.now and self.now.path == path:
                return self.now
            self._close()
            place = tempfile.TemporaryDirectory(prefix="halfbyte-ui-")
            key = secrets.token_hex(24)
            (Path(place.name) / "key").write_text(key)
            words = [sys.executable, "-m", "halfbyte.deploy.ui.attached", str(os.getpid()), "serve", path]
            words += ["--port", "0", "--grace", "1", "--api-key-file", f"{place.name}/key", "--access-log", "none"]
            environment = os.environ | {"NO_COLOR": "1", "COLUMNS": "1000"}
            process = subprocess.Popen(
                words, stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True,
                errors="replace", start_new_session=True, env=environment,
            )  # fmt: skip
            try:
                port = _port_of(process)
                address = f"http://127.0.0.1:{port}/v1"
                names = _names(address, key)
            except BaseException:
                _end(process)
                place.cleanup()
                raise
            self._open = Open(path, names, address, key, process, place)
            return self._open

    def close(self) -> None:
        """Close what is open."""
        with self._lock:
            self._close()

    def _close(self) -> None:
        if self._open:
            _end(self._open.process)
            self._open.place.cleanup()
            self._open = None

    def answer(self, name: str, messages: Sequence[dict[str, str]], options: dict[str, Any]) -> Iterator[str]:
        """Yield an answer as it grows.

        Args:
            name: of the model.
            messages: the conversation.
            options: as OpenAI's API calls them; those that are None are left to the model.

        Raises:
            InputError: nothing is open, or the server refuses.
        """
        import httpx

        opened = self.now
        if opened is None:
            raise InputError("Nothing is open.")
        body = {"model": name, "messages": list(messages), "stream": True}
        body |= {key: value for key, value in options.items() if value is not None}
        text = ""
        timeout = httpx.Timeout(30, read=PATIENCE)
        headers = {"Authorization": f"Bearer {opened.key}"}
        try:
            with (
                httpx.Client(timeout=timeout, trust_env=False) as client,
                client.stream("POST", f"{opened.address}/chat/completions", json=body, headers=headers) as response,
            ):
                if response.status_code != 200:
                    response.read()
                    raise InputError(_reason(response.text))
                for line in response.iter_lines():
                    if not line.startswith("data: ") or line == "data: [DONE]":
                        continue
                    event = json.loads(line[6:])
                    if "error" in event:
                        raise InputError(event["error"]["message"])
                    for choice in event["choices"]:
                        text += choice.get("delta", {}).get("content") or ""
                    yield text
        except httpx.HTTPError as error:
            raise InputError(f"The model's server does not answer any more ({error}); open it again.") from None

    def side_by_side(
        self, asked: Sequence[tuple[str, Sequence[dict[str, str]]]], options: dict[str, Any]
    ) -> Iterator[list[str]]:
        """Yield several answers as they grow, at the same time.

        Args:
            asked: model and conversation of each.
            options: of all.
        """
        grown: queue.Queue[tuple[int, str | Exception | None]] = queue.Queue()
        ends = threading.Event()

        def follow(number: int, name: str, messages: Sequence[dict[str, str]]) -> None:
            try:
                for text in self.answer(name, messages, options):
                    grown.put((number, text))
                    if ends.is_set():
                        return
            except Exception as error:
                grown.put((number, error))
            finally:
                grown.put((number, None))

        threads = [threading.Thread(target=follow, args=(at, *one), daemon=True) for at, one in enumerate(asked)]
        for thread in threads:
            thread.start()
        texts, going = [""] * len(asked), len(asked)
        try:
            while going:
                number, found = grown.get()
                while True:  # what came meanwhile is shown at once
                    if found is None:
                        going -= 1
                    elif isinstance(found, Exception):
                        raise found
                    else:
                        texts[number] = found
                    if grown.empty():
                        break
                    number, found = grown.get()
                yield list(texts)
        finally:
            ends.set()


def keep_judged(folder: Path, name: str, messages: Sequence[dict[str, str]], answer: str, good: bool) -> Path:
    """Append a judged answer as a row for KTO; return its file."""
    row = {"prompt": list(messages), "completion": [{"role": "assistant", "content": answer}], "label": good}
    return _appended(folder, f"{name}-kto.jsonl", row)


def keep_pair(folder: Path, name: str, messages: Sequence[dict[str, str]], better: str, worse: str) -> Path:
    """Append two answers as a row for DPO; return its file."""
    sides = {"chosen": better, "rejected": worse}
    row = {"prompt": list(messages)} | {key: [{"role": "assistant", "content": x}] for key, x in sides.items()}
    return _appended(folder, f"{name}-dpo.jsonl", row)


def _appended(folder: Path, name: str, row: dict[str, Any]) -> Path:
    file = folder / FEEDBACK / name
    file.parent.mkdir(parents=True, exist_ok=True)
    append(file, json.dumps(row, ensure_ascii=False))
    return file


def _port_of(process: "subprocess.Popen[str]") -> int:
    """Return the port at which a server listens, once it does.

    Raises:
        InputError: it ended, with what it said.
    """
    assert process.stderr
    timer = threading.Timer(PATIENCE, process.kill)
    timer.start()
    said: list[str] = []
    try:
        for line in process.stderr:
            said.append(line.strip())
            if found := READY.search(line):
                threading.Thread(target=_drain, args=(process,), daemon=True).start()
                return int(found[1])
    finally:
        timer.cancel()
    process.wait()
    last = next((line for line in reversed(said) if line), "it ended without a word")
    raise InputError(last.removeprefix("Error: "))


def _drain(process: "subprocess.Popen[str]") -> None:
    """Read what nobody wants, so that the server does not wait for a reader."""
    assert process.stderr
    with contextlib.suppress(ValueError, OSError):
        for _line in process.stderr:
            pass


def _names(address: str, key: str) -> list[str]:
    import httpx

    headers = {"Authorization": f"Bearer {key}"}
    found = httpx.get(f"{address}/models", headers=headers, timeout=30, trust_env=False).json()["data"]
    return [str(one["id"]) for one in found]


def _reason(text: str) -> str:
    try:
        return str(json.loads(text)["error"]["message"])
    except (ValueError, KeyError, TypeError):
        return text[:200]


def _end(process: "subprocess.Popen[str]") -> None:
    if process.poll() is None:
        process.send_signal(signal.SIGTERM)
        try:
            process.wait(GRACE)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()

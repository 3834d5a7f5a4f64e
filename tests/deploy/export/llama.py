"""The real llama.cpp for tests: npm's prebuilt library, kept in the user's cache as ``halfbyte bench decode`` does."""

import base64
import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from halfbyte.bench import llama_cpp
from halfbyte.deploy.export import llama_library
from halfbyte.errors import InputError
from halfbyte.files import cache_folder

CACHE = cache_folder()
"""The user's, before the tests have one of their own."""
BINARIES = "node_modules/@node-llama-cpp/linux-x64/bins/linux-x64"


def library_folder() -> Path:
    """The folder of llama.cpp's libraries, installed unless they are there; without it the test is skipped."""
    before = os.environ.get("HALFBYTE_CACHE")
    os.environ["HALFBYTE_CACHE"] = str(CACHE)
    try:
        llama_cpp.module()
        return llama_library.node_folder() / BINARIES
    except InputError as error:
        pytest.skip(str(error))
    finally:
        if before is None:
            del os.environ["HALFBYTE_CACHE"]
        else:
            os.environ["HALFBYTE_CACHE"] = before


class Llama:
    """A model in llama.cpp."""

    def __init__(self, file: Path, context: int = 256, lora: Path | None = None) -> None:
        command = [sys.executable, str(Path(__file__).with_name("llama_process.py")), str(library_folder()), str(file)]
        self._log = tempfile.TemporaryFile("w+")  # noqa: SIM115
        self._process = subprocess.Popen(
            [*command, str(context), *([str(lora)] if lora else [])],
            stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=self._log, text=True,
        )  # fmt: skip
        self.rows: int = self._receive()["loaded"]

    def logits(self, ids: list[int]) -> Tensor:
        """What comes behind each token: ``[tokens, rows]``."""
        held = base64.b64decode(self._ask({"ids": ids})["logits"])
        return torch.frombuffer(bytearray(held), dtype=torch.float32).view(len(ids), self.rows)

    def greedy(self, ids: list[int], count: int) -> list[int]:
        """The tokens with which it goes on."""
        found: list[int] = []
        for _ in range(count):
            found.append(int(self.logits(ids + found)[-1].argmax()))
        return found

    def ids(self, text: str, *, special: bool = False, parse: bool = True) -> list[int]:
        """The tokens of a text: with those that are put around it, and with special tokens read in it, or not."""
        found: list[int] = self._ask({"text": text, "special": special, "parse": parse})["ids"]
        return found

    def pieces(self, ids: list[int]) -> list[str]:
        """The texts of tokens."""
        found: list[str] = self._ask({"pieces": ids})["pieces"]
        return found

    def template(self) -> str:
        """The chat template in the file."""
        found: str = self._ask({"template": True})["template"]
        return found

    def ends(self) -> set[int]:
        """The tokens that end an answer."""
        return set(self._ask({"ends": True})["ends"])

    def end(self) -> None:
        """End its process."""
        self._process.kill()
        self._process.communicate()
        self._log.close()

    def _ask(self, asked: dict[str, Any]) -> dict[str, Any]:
        assert self._process.stdin is not None
        self._process.stdin.write(json.dumps(asked) + "\n")
        self._process.stdin.flush()
        return self._receive()

    def _receive(self) -> dict[str, Any]:
        assert self._process.stdout is not None
        line = self._process.stdout.readline()
        answer: dict[str, Any] = json.loads(line) if line else {"failed": f"exit code {self._process.wait()}"}
        if "failed" in answer:
            self._log.seek(0)
            said = self._log.read()[-2000:]
            self.end()
            raise RuntimeError(f"{answer['failed']}:\n{said}")
        return answer


@contextmanager
def opened(file: Path, context: int = 256, lora: Path | None = None) -> Iterator[Llama]:
    """Open a file in llama.cpp."""
    llama = Llama(file, context, lora)
    try:
        yield llama
    finally:
        llama.end()

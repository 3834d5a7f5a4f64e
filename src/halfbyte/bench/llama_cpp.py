"""llama.cpp as a side of the decoding benchmark: its prebuilt library for Linux in the npm packages of node-llama-cpp.

The packages are installed when they are first asked for, into ``llama.cpp`` in the cache (``HALFBYTE_CACHE`` moves it),
without any scripts of theirs; ``llama_cpp.mjs`` beside this file is what decodes. The model is written as GGUF
(:mod:`halfbyte.bench.gguf_file`) in three forms: with the layers in Q4_0, which llama.cpp repacks for the processor,
and Q4_1, the head in Q8_0; and with the layers in Q4_0 and the head in bf16, which is about the bytes that halfbyte
reads.
"""

import json
import multiprocessing
import platform
import shutil
import subprocess
import tempfile
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from halfbyte.bench import gguf_file
from halfbyte.bench.decode_sides import Took, made_up
from halfbyte.bench.decode_works import Sizes, Work
from halfbyte.deploy.export.llama_library import PACKAGES, node_folder
from halfbyte.errors import InputError
from halfbyte.files import whole_folder
from halfbyte.quiet import quiet

FORMS = {
    "llama.cpp Q4_0": ("Q4_0", "Q8_0"),
    "llama.cpp Q4_1": ("Q4_1", "Q8_0"),
    "llama.cpp Q4_0, bf16 head": ("Q4_0", "BF16"),
}
"""What the layers and the head are in, by the side's name."""
BITS = {"Q4_0": 4.5, "Q4_1": 5.0, "Q8_0": 8.5, "BF16": 16.0}
SCRIPT = Path(__file__).with_name("llama_cpp.mjs")


def module() -> Path:
    """Return node-llama-cpp's module, installed unless it is there.

    Raises:
        InputError: this is no 64-bit x86 Linux, or node or npm is not there, or npm could not install the packages.
    """
    if (platform.system(), platform.machine()) != ("Linux", "x86_64"):
        raise InputError("llama.cpp can be measured on 64-bit x86 Linux only; leave llama.cpp away.")
    node, npm = shutil.which("node"), shutil.which("npm")
    if node is None or npm is None:
        raise InputError(
            "llama.cpp comes through npm, and there is no node or npm here: install Node.js 20 or newer (on Debian: "
            "apt-get install nodejs npm), or leave llama.cpp away."
        )
    folder = node_folder()
    found = folder / "node_modules" / "node-llama-cpp" / "dist" / "index.js"
    if not found.exists():
        folder.parent.mkdir(parents=True, exist_ok=True)
        with whole_folder(folder) as part:
            (part / "package.json").write_text('{"private": true}\n')
            command = [npm, "install", "--ignore-scripts", "--omit=optional", "--no-audit", "--no-fund", *PACKAGES]
            result = subprocess.run(command, cwd=part, capture_output=True, text=True)
            if result.returncode:
                said = next((line for line in result.stderr.splitlines() if "ERR" in line.upper()), "nothing")
                raise InputError(
                    f"npm could not install {PACKAGES[0]}; check the network and try again. It says: {said}"
                )
    return found


@contextmanager
def written(model: str, names: Iterable[str]) -> Iterator[dict[str, Path]]:
    """Yield temporary GGUF files of ``model``, one for each of the ``names`` of :data:`FORMS`.

    A process of its own writes them, so that the memory that it takes is free again.
    """
    with tempfile.TemporaryDirectory(prefix="halfbyte-gguf-") as folder:
        files = {name: Path(folder) / f"{number}.gguf" for number, name in enumerate(names)}
        wanted = {file: FORMS[name] for name, file in files.items()}
        writer = multiprocessing.get_context("spawn").Process(target=write, args=(model, wanted), daemon=True)
        writer.start()
        writer.join()
        if writer.exitcode:
            raise ChildProcessError(
                f"the process that writes the model for llama.cpp ended with exit code {writer.exitcode}, perhaps for "
                "want of memory or disk space"
            )
        yield files


def write(model: str, wanted: dict[Path, tuple[str, str]]) -> None:
    """Write the files, quietly."""
    with quiet():
        gguf_file.write(model, wanted)


class LlamaCpp:
    """llama.cpp in its process, seen from the one that measures.

    Args:
        file: a model.
        sizes: what it holds.
        threads: that it takes.
        flash: whether attention is its fused one.
    """

    def __init__(self, file: Path, sizes: Sizes, threads: int, flash: bool = False) -> None:
        self.sizes = sizes
        command = ["node", str(SCRIPT), str(module()), str(file), str(threads), "flash" if flash else ""]
        self._process = subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True
        )
        try:
            self._receive()
        except BaseException:
            self.end()
            raise

    def ask(self, work: Work) -> Took:
        """Have it do ``work``."""
        asked: dict[str, Any]
        if work.kind == "decode":
            asked = {"rows": work.rows, "context": work.context, "tokens": work.tokens}
        else:
            ids = made_up(work.counted, 0, 250)
            history = ids[: work.context] if work.kind == "turn" else []
            ids = ids if work.kind != "turn" else ids[: work.tokens]
            asked = {"prompt": ids, "history": history, "room": work.context + work.tokens + 8}
        answer = self._talk(asked)
        return Took(answer["seconds"], answer["processor"])

    def greedy(self, prompt: list[int], tokens: int) -> list[int]:
        """Return the tokens with which it goes on."""
        ids: list[int] = self._talk({"greedy": prompt, "tokens": tokens})["ids"]
        return ids

    def end(self) -> None:
        """End the process."""
        self._process.kill()
        self._process.communicate()

    def _talk(self, asked: dict[str, Any]) -> dict[str, Any]:
        assert self._process.stdin is not None
        try:
            self._process.stdin.write(json.dumps(asked) + "\n")
            self._process.stdin.flush()
        except BrokenPipeError:
            pass  # told by what it does not answer
        return self._receive()

    def _receive(self) -> dict[str, Any]:
        assert self._process.stdout is not None
        line = self._process.stdout.readline()
        if not line:
            raise ChildProcessError(f"llama.cpp's process ended with exit code {self._process.wait()}")
        answer: dict[str, Any] = json.loads(line)
        if "failed" in answer:
            raise ChildProcessError(f"llama.cpp: {answer['failed']}")
        return answer


def sizes_in(form: str, dense: Sizes) -> Sizes:
    """Return what a model that takes ``dense`` in bf16 takes in one of :data:`FORMS`; its cache is fp16."""
    layers, head = FORMS[form]
    return dense._replace(
        layer_bytes=int(dense.layer_values * BITS[layers] / 8), head_bytes=int(dense.head_values * BITS[head] / 8)
    )

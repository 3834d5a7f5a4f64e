"""Weights as safetensors files of about a gigabyte, with an index where there are several.

Which tensor comes into which file is known before the first is made, so a writer that was killed goes on with the first
file that is not there. A tensor goes to the disk as it is made: no more of a file is in memory.
"""

import json
import struct
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, BinaryIO

import torch
from safetensors import safe_open
from torch import Tensor

from halfbyte.files import whole_file
from halfbyte.hf.models.checkpoint import INDEX, SAFETENSORS

SHARD_BYTES = 1 << 30
ROOM = 2048
"""Bytes of a header for each of the names that are made, which may become several tensors."""
DTYPES = {
    torch.float32: "F32", torch.bfloat16: "BF16", torch.float16: "F16", torch.int64: "I64", torch.int32: "I32",
    torch.int8: "I8", torch.uint8: "U8", torch.uint32: "U32", torch.bool: "BOOL",
}  # fmt: skip
"""safetensors' names."""


def write_shards(
    folder: Path,
    sizes: Mapping[str, int],
    make: Callable[[str], Mapping[str, Tensor]],
    progress: Callable[[int, int], None] | None = None,
    beside: Callable[[Path], None] | None = None,
) -> int:
    """Write tensors to a folder as transformers reads them.

    Args:
        folder: it may hold files that an earlier call with the same arguments has left.
        sizes: bytes of what is to be made, about, in the order of the files.
        make: returns what one of the names stands for: a tensor or, quantized, several.
        progress: called with names done and names in all.
        beside: called before a file appears, with its path, to leave what is known of its tensors beside it.

    Returns:
        The bytes of the tensors.
    """
    groups = _grouped(sizes)
    done = 0
    for number, names in enumerate(groups):
        file = folder / f"shard-{number}"
        if not file.is_file():
            with whole_file(file) as part, part.open("wb") as out:
                writer = _Writer(out, ROOM * (1 + len(names)))
                for name in names:
                    for key, tensor in make(name).items():
                        writer.add(key, tensor)
                    done += 1
                    if progress:
                        progress(done, len(sizes))
                writer.close()
                if beside:
                    beside(file)
        else:
            done += len(names)
    return name_shards(folder, len(groups))


class _Writer:
    """A safetensors file whose header is written last, into room that was left for it; the format allows spaces."""

    def __init__(self, out: BinaryIO, room: int) -> None:
        self._out, self._room = out, room
        self._about: dict[str, Any] = {"__metadata__": {"format": "pt"}}
        self._end = 0
        out.seek(8 + room)

    def add(self, name: str, tensor: Tensor) -> None:
        flat = tensor.detach().contiguous().view(-1)
        begin, self._end = self._end, self._end + flat.nbytes
        self._about[name] = {
            "dtype": DTYPES[tensor.dtype], "shape": list(tensor.shape), "data_offsets": [begin, self._end]
        }  # fmt: skip
        self._out.write(flat.view(torch.uint8).numpy().data)

    def close(self) -> None:
        header = json.dumps(self._about, separators=(",", ":")).encode()
        assert len(header) <= self._room
        self._out.seek(0)
        self._out.write(struct.pack("<Q", self._room) + header.ljust(self._room))


def name_shards(folder: Path, count: int) -> int:
    """Give ``shard-0`` and so on their names and, if there are several, an index; return the bytes of the tensors."""
    names = [f"model-{i + 1:05}-of-{count:05}.safetensors" for i in range(count)] if count > 1 else [SAFETENSORS]
    weight_map: dict[str, str] = {}
    total = 0
    for number, name in enumerate(names):
        file = (folder / f"shard-{number}").rename(folder / name)
        with safe_open(file, framework="pt") as tensors:
            weight_map |= dict.fromkeys(tensors.keys(), name)
        with file.open("rb") as header:
            total += file.stat().st_size - 8 - struct.unpack("<Q", header.read(8))[0]
    if count > 1:
        index = {"metadata": {"total_size": total}, "weight_map": weight_map}
        (folder / f"{SAFETENSORS}{INDEX}").write_text(json.dumps(index, indent=2, sort_keys=True), encoding="utf-8")
    return total


def _grouped(sizes: Mapping[str, int]) -> list[list[str]]:
    groups: list[list[str]] = [[]]
    held = 0
    for name, size in sizes.items():
        if groups[-1] and held + size > SHARD_BYTES:
            groups.append([])
            held = 0
        groups[-1].append(name)
        held += size
    return groups

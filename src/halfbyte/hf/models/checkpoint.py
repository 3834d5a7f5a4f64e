"""The weight files of a model: which there are, the names and forms of their tensors, and a tensor when it is wanted.

Files are safetensors or, as older models have them, torch's ``pytorch_model.bin``, of which tensors alone are read
(``weights_only``: no code of the file runs) and mapped. A folder with both is read as transformers reads it.
"""

import functools
import json
import pickle
import warnings
import zipfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Protocol

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from halfbyte.errors import InputError

SAFETENSORS, BIN = "model.safetensors", "pytorch_model.bin"
INDEX = ".index.json"
STATES = (".quant_state.bitsandbytes__", ".quant_state.halfbyte__")
INT8_STATE, INT8_ROWS = ".quant_state.halfbyte__int8", ".SCB"

# What else a folder may hold, and what to do with it.
_CONVERT = {
    ".gguf": "is GGUF; give that file itself as the model, not its folder",
    ".h5": "is of TensorFlow; take a folder with safetensors",
    ".msgpack": "is of Flax; take a folder with safetensors",
    ".pth": "is not in transformers' form; take the folder that transformers reads, with model.safetensors",
    ".pt": "is not in transformers' form; take the folder that transformers reads, with model.safetensors",
}


class Tensors(Protocol):
    """What a model's tensors can be read from.

    Attributes:
        names: all tensors'.
        files: that hold them.
        where: the file, or the folder of several.
        quantized: the weights in 4 or 8 bits, by the shape of each before it was quantized.
    """

    @property
    def names(self) -> list[str]: ...

    @property
    def files(self) -> list[Path]: ...

    @property
    def where(self) -> Path: ...

    @property
    def quantized(self) -> dict[str, torch.Size]: ...

    def form(self, name: str) -> Tensor:
        """Return the tensor ``name`` on the meta device: its shape, and whether it holds floats."""

    def read(self, name: str) -> Tensor:
        """Return the tensor ``name``."""


class Checkpoint:
    """Tensors by their names, in one or several files.

    Args:
        files: all ``.safetensors`` or all ``.bin``.

    Raises:
        InputError: a file is damaged, or is not what its name says.
    """

    def __init__(self, files: Sequence[str | Path]) -> None:
        self.files = [Path(file) for file in files]
        self._homes: dict[str, Any] = {}
        for file in self.files:
            holder = _open(file)
            self._homes |= dict.fromkeys(holder.keys(), holder)

    @property
    def names(self) -> list[str]:
        """All tensors'."""
        return list(self._homes)

    def form(self, name: str) -> Tensor:
        """Return the tensor ``name`` on the meta device: its shape, and whether it holds floats."""
        holder = self._homes[name]
        if isinstance(holder, dict):
            return torch.empty_like(holder[name], device="meta")
        part = holder.get_slice(name)
        floating = part.get_dtype().startswith(("F", "BF"))
        return torch.empty(part.get_shape(), dtype=torch.bfloat16 if floating else torch.int64, device="meta")

    @property
    def where(self) -> Path:
        """The file, or the folder of several."""
        return self.files[0] if len(self.files) == 1 else self.files[0].parent

    def read(self, name: str) -> Tensor:
        """Return the tensor ``name``; one of a ``.bin`` file stays mapped."""
        holder = self._homes[name]
        tensor: Tensor = holder[name] if isinstance(holder, dict) else holder.get_tensor(name)
        return tensor

    def read_row(self, name: str, number: int) -> Tensor:
        """Return ``tensor[number]`` of the tensor ``name``, and read no more."""
        holder = self._homes[name]
        row: Tensor = holder[name][number] if isinstance(holder, dict) else holder.get_slice(name)[number]
        return row

    @functools.cached_property
    def quantized(self) -> dict[str, torch.Size]:
        """The weights in 4 or 8 bits, bitsandbytes' or our own: the shape of each before it was quantized."""
        shapes = {}
        for name in self.names:
            if name.endswith((INT8_ROWS, INT8_STATE)):
                by_row = name.endswith(INT8_ROWS)
                weight = f"{name.removesuffix(INT8_ROWS)}.weight" if by_row else name.removesuffix(INT8_STATE)
                if weight in self._homes:
                    shapes[weight] = self.form(weight).shape
                continue
            if weight := next((name.partition(state)[0] for state in STATES if state in name), ""):
                try:
                    shapes[weight] = torch.Size(json.loads(bytes(self.read(name).view(torch.uint8).tolist()))["shape"])
                except (ValueError, KeyError, TypeError) as error:
                    raise InputError(
                        f"{name} does not describe a 4-bit weight ({error}): the checkpoint is damaged."
                    ) from error
        return shapes


def weight_files(folder: Path, explicit: str | None = None) -> list[Path]:
    """Return the files that hold the weights of the model in ``folder``.

    Args:
        folder: a model's.
        explicit: the file's name, if the configuration gives one (``transformers_weights``).

    Raises:
        InputError: there are none, or one that the index names is not there.
    """
    for name in [explicit] if explicit else [SAFETENSORS, SAFETENSORS + INDEX, BIN, BIN + INDEX]:
        file = folder / name
        if file.is_file() and not name.endswith(INDEX):
            return [file]
        if file.is_file():
            files = [folder / part for part in sorted(set(read_index(file).values()))]
            for part in files:
                if not part.is_file():
                    raise InputError(f"{part} is missing, but {name} names it: copy the model's folder again.")
            return files
    raise InputError(f"The folder {folder} holds no weights of a model: {_what_else(folder)}.")


def read_index(file: Path) -> dict[str, str]:
    """Return which file holds which tensor, of the index ``file``.

    Raises:
        InputError: it is not an index.
    """
    try:
        whole = json.loads(file.read_text(encoding="utf-8"))
        index, _ = whole["weight_map"], whole["metadata"]  # transformers (5.23) asks for both
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise InputError(f"{file} is not an index of weight files ({error!r}): copy it again.") from error
    if not isinstance(index, dict) or not index or not all(isinstance(value, str) for value in index.values()):
        raise InputError(f"{file} is not an index of weight files: its weight_map names no file for a tensor.")
    return index


def _what_else(folder: Path) -> str:
    names = sorted(file.name for file in folder.iterdir() if file.is_file())
    for ending in (".safetensors", ".bin"):
        found = [name for name in names if name.endswith(ending) and not name.startswith("adapter_")]
        if found:
            wanted = SAFETENSORS if ending == ".safetensors" else BIN
            if "-of-" in found[0]:
                return f"{found[0]} is there, but {wanted}{INDEX} is not; copy it too"
            return f"{found[0]} is there, but transformers reads {wanted}; rename it if it is the whole model"
    for ending, remedy in _CONVERT.items():
        for name in names:
            if name.endswith(ending):
                return f"{name} " + remedy.format(name=name)
    return f"neither {SAFETENSORS} nor {BIN} is there; copy them too"


def _open(file: Path) -> Any:
    if file.suffix == ".safetensors":
        try:
            return safe_open(file, framework="pt")
        except (OSError, SafetensorError) as error:
            raise InputError(f"{file} cannot be read ({error}): the file is damaged or incomplete.") from error
    try:
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", message="Detected pickle protocol")  # an old file's, read all the same
            tensors = torch.load(file, map_location="cpu", weights_only=True, mmap=zipfile.is_zipfile(file))
    except pickle.UnpicklingError as error:
        raise InputError(
            f"{file} is damaged, or holds more than tensors, which only running its code would load; take the model's "
            "safetensors."
        ) from error
    except (OSError, EOFError, RuntimeError, ValueError, KeyError) as error:
        first = str(error).strip().split("\n")[0]
        raise InputError(f"{file} cannot be read ({first}): the file is damaged or incomplete.") from error
    if not isinstance(tensors, dict) or not all(isinstance(value, Tensor) for value in tensors.values()):
        inner = [key for key, value in tensors.items() if isinstance(value, dict)] if isinstance(tensors, dict) else []
        where = f"; the weights may be its entry {inner[0]!r}, which has to be saved alone" if inner else ""
        raise InputError(f"{file} is not a dictionary of tensors{where}.")
    return tensors

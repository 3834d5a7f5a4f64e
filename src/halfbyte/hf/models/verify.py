"""Whether a checkpoint is whole: every tensor of a model or an adapter is read, and held against what it must be.

    files       headers and lengths, each tensor's place in its file, an index against the files
    names       the tensors and shapes that config.json's architecture has (:mod:`halfbyte.hf.models.check`)
    values      no NaN, no infinity; block constants that are sizes; tables that are those of the number format
    digests     what ``base_fingerprint.json`` of a folder that halfbyte quantized says of its tensors

Nothing is written and nothing kept in memory. A row that is no multiple of a block is no fault, but a hazard: with
AVX-512 bitsandbytes (0.50) computes other values than those of the codes there.
"""

import contextlib
import json
import math
import struct
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from halfbyte.errors import InputError
from halfbyte.hf.models.check import check_finite, check_weights, part_of
from halfbyte.hf.models.checkpoint import INDEX, INT8_ROWS, INT8_STATE, STATES, Checkpoint, read_index, weight_files
from halfbyte.hf.models.configs import ADAPTER, config_at, json_of
from halfbyte.hf.models.fingerprint import FILE, Fingerprint, Row, quantized_digests, rounded_digest
from halfbyte.hf.models.foreign.packed import packing_of
from halfbyte.hf.models.hub import locate
from halfbyte.hf.models.quantize_files import Plan, on_disk, shapes_of, skeleton_of, tensors_of
from halfbyte.quant import QuantizedInt8, QuantizedWeight, codebook

HEADER = 100_000_000
"""Bytes of a header at most, as safetensors has it."""
BITS = {
    "BOOL": 8, "F4": 4, "F6_E2M3": 6, "F6_E3M2": 6, "U8": 8, "I8": 8, "F8_E5M2": 8, "F8_E4M3": 8, "F8_E8M0": 8,
    "F8_E4M3FNUZ": 8, "F8_E5M2FNUZ": 8, "I16": 16, "U16": 16, "F16": 16, "BF16": 16, "I32": 32, "U32": 32, "F32": 32,
    "C64": 64, "F64": 64, "I64": 64, "U64": 64,
}  # fmt: skip
"""Of safetensors' types."""


@dataclass(frozen=True)
class Finding:
    """Something that is wrong, or may go wrong elsewhere.

    Attributes:
        place: the tensor or the file.
        what: is the matter with it.
        is_fault: whether something is damaged.
    """

    place: str
    what: str
    is_fault: bool = True


@dataclass(frozen=True)
class Verified:
    """What was looked at and found.

    Attributes:
        files: how many.
        tensors: that were read, a quantized weight as one.
        nbytes: of the files.
        compared: tensors that were held against digests.
        findings: what was found, in the order of the files.
    """

    files: int
    tensors: int
    nbytes: int
    compared: int
    findings: tuple[Finding, ...]

    @property
    def faults(self) -> int:
        """How many findings are damage."""
        return sum(finding.is_fault for finding in self.findings)


def verify(
    path: str | Path,
    *,
    progress: Callable[[int, int], None] = lambda *_: None,
    seen: Callable[[str, Tensor], None] = lambda *_: None,
    trust_remote_code: bool = False,
) -> Verified:
    """Look at every tensor of a checkpoint.

    Args:
        path: folder of a model or of an adapter, a GGUF file, or a hub id.
        progress: called with tensors read and tensors in all.
        seen: called with each dense tensor without damage, and its name, for who wants to know more of it.
        trust_remote_code: build the model that its own code describes, to compare names and shapes.

    Raises:
        InputError: there is no checkpoint.
    """
    place = locate(path)
    folder = on_disk(place)
    if place.gguf:
        files = [place.gguf]
    elif (folder / ADAPTER).is_file():
        files = sorted(folder.glob("adapter_model*.safetensors"))
        if not files:
            raise InputError(f"{folder} holds no weights of an adapter (adapter_model.safetensors).")
    else:
        files = _files(folder)
    nbytes = sum(file.stat().st_size for file in files if file.is_file())
    findings = list(_of_files(folder, files))
    if findings:
        return Verified(len(files), 0, nbytes, 0, tuple(findings))
    look = _Look(folder, seen)
    checkpoint: Any = None
    if place.gguf or not (folder / ADAPTER).is_file():
        try:
            config = config_at(place, trust_remote_code)
            packing = None if place.gguf else packing_of(config)
            held = config.__dict__.pop("quantization_config", None)
            model = skeleton_of(config, torch.bfloat16, trust_remote_code)
            checkpoint = tensors_of(place, folder, config, model, packing)
            look.of_model(dict(Plan(model, checkpoint).places(shapes_of(model))))
            if not any(_misdescribed(checkpoint)):  # which is told where the weight is looked at
                check_weights(model, checkpoint, pre_quantized=held is not None and not packing)
        except InputError as error:
            if place.gguf:
                raise
            findings.append(Finding(str(folder / "config.json"), str(error)))
    checkpoint = checkpoint or Checkpoint(files)
    names = look.grouped(checkpoint)
    for done, (name, parts) in enumerate(names.items()):
        progress(done, len(names))
        findings += look.at(checkpoint, name, parts)
    progress(len(names), len(names))
    return Verified(len(files), len(names), nbytes, look.compared, tuple(findings))


class _Look:
    """Looks at tensors, one after the other.

    Attributes:
        compared: how many were held against digests.
    """

    def __init__(self, folder: Path, seen: Callable[[str, Tensor], None]) -> None:
        self.compared = 0
        self._seen = seen
        self._targets: dict[str, str] = {}
        self._rows: Mapping[str, Row] = {}
        with contextlib.suppress(OSError, ValueError):
            stored = Fingerprint.from_json((folder / FILE).read_text(encoding="utf-8"))
            self._rows = stored.rows if stored.files else {}  # else it is of an adapter's base

    def of_model(self, targets: dict[str, str]) -> None:
        """Take what the tensors are called in the model."""
        self._targets = targets

    def grouped(self, checkpoint: Any) -> dict[str, list[str]]:
        """Return each tensor, and of a weight in 4 or 8 bits all that belong to it."""
        packed = {name.partition(state)[0] for name in checkpoint.names for state in STATES if state in name}
        packed |= {f"{name.removesuffix(INT8_ROWS)}.weight" for name in checkpoint.names if name.endswith(INT8_ROWS)}
        parts: dict[str, list[str]] = {}
        for name in checkpoint.names:
            parts.setdefault(part_of(name, packed) or name, []).append(name)
        return parts

    def at(self, checkpoint: Any, name: str, parts: list[str]) -> Iterator[Finding]:
        """Yield what is found of a tensor."""
        if name not in parts:
            yield Finding(name, f"is not there, but {' and '.join(parts)}.")
            return
        try:
            state = {part: checkpoint.read(part) for part in parts}
            if len(parts) == 1:
                check_finite(name, state[name])
                self._seen(name, state[name])
                digests = rounded_digest(state[name])
            else:
                yield from _of_quantized(name, state)
                digests = quantized_digests(state, name)
        except InputError as error:
            yield Finding(name, str(error).removeprefix(f"{name} "))
            return
        row = self._rows.get(self._targets.get(name, ""))
        if row is not None:
            same = Row(row.shape, digests).is_as(row)
            self.compared += same is not None
            if same is False:
                yield Finding(name, f"holds other values than {FILE} says: it was changed after it was written.")


def _misdescribed(checkpoint: Any) -> Iterator[str]:
    """Yield the descriptions of quantized weights that are no JSON."""
    for name in checkpoint.names:
        if any(state in name for state in STATES):
            try:
                about = json.loads(bytes(checkpoint.read(name).view(torch.uint8).tolist()))
                about["blocksize" if name.endswith(INT8_STATE) else "shape"]
            except (ValueError, KeyError, TypeError):
                yield name


def _of_quantized(name: str, state: Mapping[str, Tensor]) -> Iterator[Finding]:
    """Yield what is found of a weight in 4 or 8 bits; what keeps it from being read is raised."""
    if state[name].dtype == torch.int8:
        weight = QuantizedInt8.from_state_dict(state, name)
        yield from _of_constants(f"{name}'s constants", weight.absmax)
        return
    packed = QuantizedWeight.from_state_dict(state, name)
    nested = packed.statistics.nested
    for key, tensor in packed.state_dict(name).items():
        if key not in state:
            yield Finding(name, f"is described by another key than {key}.")
        elif any(part in key for part in STATES):
            held, wanted = (json.loads(bytes(one.view(torch.uint8).tolist())) for one in (state[key], tensor))
            if odd := {entry for entry in held.keys() | wanted.keys() if held.get(entry) != wanted.get(entry)}:
                yield Finding(key, f"says something else of {', '.join(sorted(odd))} than it should.")
    if not torch.equal(packed.statistics.code.cpu(), codebook(packed.quant_type)):
        yield Finding(f"{name}.quant_map", f"is not the table of {packed.quant_type}.")
    if nested is None:
        yield from _of_constants(f"{name}.absmax", packed.statistics.absmax)
    else:
        yield from _of_constants(f"{name}.nested_absmax", nested.absmax)
        if not torch.equal(nested.code.cpu(), codebook("dynamic")):
            yield Finding(f"{name}.nested_quant_map", "is not bitsandbytes' dynamic map.")
        if not math.isfinite(nested.offset):
            yield Finding(name, f"has {nested.offset} for the mean of its block constants.")
    if packed.shape[-1] % packed.statistics.blocksize:
        blocks = f"{packed.shape[-1]:,} values, no multiple of the {packed.statistics.blocksize} of a block"
        yield Finding(name, f"has rows of {blocks}: bitsandbytes computes wrongly there with AVX-512.", is_fault=False)


def _of_constants(name: str, constants: Tensor) -> Iterator[Finding]:
    check_finite(name, constants)
    if constants.numel() and float(constants.min()) < 0:
        index = int((constants.flatten() < 0).nonzero()[0])
        yield Finding(name, f"holds {float(constants.flatten()[index])} at [{index}], where sizes are not negative.")


def _files(folder: Path) -> list[Path]:
    """Return the weight files of a model; one that the index names and that is not there among them."""
    index = next((file for file in sorted(folder.glob(f"*{INDEX}")) if file.name.startswith("model.safetensors")), None)
    if index is not None and not (folder / "model.safetensors").is_file():
        return [folder / name for name in sorted(set(read_index(index).values()))]
    return weight_files(folder, json_of(folder / "config.json").get("transformers_weights"))


def _of_files(folder: Path, files: list[Path]) -> Iterator[Finding]:
    """Yield what is wrong with files, before any tensor is read."""
    homes: dict[str, str] = {}
    for file in files:
        if not file.is_file():
            yield Finding(str(file), "is missing, though the index names it.")
        elif file.suffix == ".safetensors":
            try:
                header, room = _header(file)
            except ValueError as error:
                yield Finding(str(file), f"has no header that could be read ({error}).")
                continue
            homes |= dict.fromkeys(header, file.name)
            yield from _of_header(file, header, room)
    index = folder / f"model.safetensors{INDEX}"
    if index.is_file() and len(files) > 1:
        said = read_index(index)
        for name in sorted(said.keys() | homes.keys()):
            if name not in homes:
                yield Finding(name, f"is not in {said[name]}, where {index.name} has it.")
            elif name not in said:
                yield Finding(name, f"is in {homes[name]}, but {index.name} does not name it.")
            elif said[name] != homes[name]:
                yield Finding(name, f"is in {homes[name]}, but {index.name} says {said[name]}.")


def _header(file: Path) -> tuple[dict[str, Any], int]:
    """Return what a safetensors file says of its tensors, and the bytes that it has for them.

    Raises:
        ValueError: it says nothing that could be understood.
    """
    size = file.stat().st_size
    with file.open("rb") as opened:
        first = opened.read(8)
        if len(first) < 8:
            raise ValueError(f"it has {size} bytes")
        (length,) = struct.unpack("<Q", first)
        if length > min(HEADER, size - 8):
            raise ValueError(f"it would be {length:,} bytes long, in a file of {size:,}")
        try:
            header = json.loads(opened.read(length))
        except (UnicodeDecodeError, json.JSONDecodeError) as error:
            raise ValueError(f"{error}") from error
    if not isinstance(header, dict):
        raise ValueError("it is no object of JSON")
    header.pop("__metadata__", None)
    return header, size - 8 - length


def _of_header(file: Path, header: Mapping[str, Any], room: int) -> Iterator[Finding]:
    """Yield the tensors that are not where, or not as long as, a file says."""
    end = 0
    try:
        placed = sorted((about["data_offsets"][0], name, about) for name, about in header.items())
        for begin, name, about in placed:
            stop = about["data_offsets"][1]
            bits = BITS.get(about["dtype"])
            if bits is None:
                yield Finding(name, f"is of type {about['dtype']} in {file.name}, which there is not.")
            elif stop - begin != (needed := math.prod(about["shape"]) * bits // 8):
                form = f"{about['dtype']} {about['shape']}"
                yield Finding(name, f"has {stop - begin:,} bytes in {file.name}, where {form} needs {needed:,}.")
            if begin != end:
                yield Finding(name, f"begins at byte {begin:,} of {file.name}, where byte {end:,} is the next.")
            if stop > room:
                lost = f"{stop - max(begin, room):,} of its {stop - begin:,} bytes"
                yield Finding(name, f"is cut off: {lost} are beyond the end of {file.name}.")
            end = stop
    except (KeyError, TypeError, IndexError) as error:
        yield Finding(str(file), f"has a header that describes no tensors ({error!r}).")
        return
    if end < room:
        yield Finding(str(file), f"has {room - end:,} bytes behind its last tensor.")

"""What tells a base model from all others: digests of its tensors, kept beside the adapters that were trained on it.

    {"version": 1, "model": "SmolLM2-135M", "architecture": "LlamaForCausalLM", "digests": {"dense": "3f2a91...", ...},
     "tensors": {"model.norm.weight": {"shape": [576], "dense": "91bc0d4e..."}, ...}}

A tensor goes by its name in the model, so that neither files nor their order count, and has digests (the first 16 hex
digits of SHA-256) of the forms in which it is known:

    dense                    its values in 16 or 32 bits, whatever dtype holds them
    nf4-64-bfloat16          the packed codes: number format, values of a block, dtype that was quantized
    nf4-64-bfloat16-double   the block constants of the same, quantized or not (``-single``)
    bfloat16                 what stays dense in a folder of 4 or 8 bits, as it was rounded

Codes of nf4 are the same whoever makes them of bf16 or fp16: no ratio of two such numbers is so near to the middle of
two codes that bitsandbytes' kernels, which multiply by the reciprocal of a block's constant, take another one than
division does (all ratios tried). Not so those of fp32, of fp4, whose middles are such ratios, and of int8, which
bitsandbytes makes of fp16; and of constants that are quantized its CPU library (0.50) rounds 0.2 % otherwise. So those
codes by others have a form of their own, ``fp4-64-bfloat16-file``, and others' quantized constants none.

A tensor that is known as dense on both sides is compared so; else by all forms that both know. Two bases are the same
if no tensor differs, and that is known if some are equal.
"""

import functools
import hashlib
import json
import re
from collections import Counter, deque
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from halfbyte.errors import InputError, counted
from halfbyte.files import write_text
from halfbyte.hf.models.checkpoint import INT8_ROWS, STATES

FILE = "base_fingerprint.json"
VERSION = 1
DENSE = "dense"
THEIRS = "-file"
DIGITS = 16
THREADS = 4
"""So many tensors at most are hashed at a time, and are in memory where they are not mapped."""
CHUNK = 1 << 24
"""Values that are converted at a time."""


@dataclass(frozen=True)
class Row:
    """A tensor: the shape of it before it was quantized, and its digests by form."""

    shape: tuple[int, ...]
    digests: Mapping[str, str]

    def is_as(self, other: "Row") -> bool | None:
        """Whether both are of the same tensor; None where that cannot be told."""
        kinds = self.digests.keys() & other.digests.keys()
        kinds = {DENSE} if DENSE in kinds else kinds
        return all(self.digests[kind] == other.digests[kind] for kind in kinds) if kinds else None


@dataclass(frozen=True)
class Fingerprint:
    """See above.

    Attributes:
        architecture: the model's class.
        rows: its tensors.
        model: what it was called; the last part of a path.
        files: size and time of change, in nanoseconds, of the weight files that it was made with, if it lies in their
            folder.
    """

    architecture: str
    rows: Mapping[str, Row]
    model: str = ""
    files: Mapping[str, tuple[int, int]] = field(default_factory=dict)

    @functools.cached_property
    def digests(self) -> dict[str, str]:
        """A digest of all tensors of each form together, with their names and shapes."""
        whole: dict[str, Any] = {}
        for name in sorted(self.rows):
            row = self.rows[name]
            for kind, digest in row.digests.items():
                whole.setdefault(kind, hashlib.sha256()).update(f"{name} {list(row.shape)} {digest}\n".encode())
        return {kind: made.hexdigest()[:DIGITS] for kind, made in sorted(whole.items())}

    def __str__(self) -> str:
        kind = DENSE if DENSE in self.digests else next((kind for kind in self.digests if "-" in kind), None)
        digest = "" if kind is None else f", {kind} {self.digests[kind]}"
        return f"{self.model} ({self.architecture}{digest})"

    def difference(self, given: "Fingerprint") -> str | None:
        """Return what tells ``given`` from this one, as ``x.weight holds other values``; None if nothing does."""
        mine, theirs = ({name: row.shape for name, row in one.rows.items()} for one in (self, given))
        if mine != theirs:
            return None if self._is_renamed(given) else self._other_structure(given)
        apart = [name for name, row in self.rows.items() if row.is_as(given.rows[name]) is False]
        if not apart:
            return None
        more = f", as do {len(apart) - 1} more" if len(apart) > 1 else ""
        return f"of {counted(len(mine), 'tensor')} {apart[0]} holds other values{more}"

    def knows(self, given: "Fingerprint") -> bool:
        """Whether some tensor of both is known to be the same."""
        return self._is_renamed(given) or any(
            row.is_as(given.rows[name]) for name, row in self.rows.items() if name in given.rows
        )

    def is_copy(self, given: "Fingerprint") -> bool:
        """Whether both are the same in the same form, so that the same bits are computed with them."""
        return dict(self.rows) == dict(given.rows)

    def _is_renamed(self, given: "Fingerprint") -> bool:
        """Whether the tensors are the same by other names, as releases of transformers give them."""
        for kind in self.digests.keys() & given.digests.keys():
            held = [Counter((row.shape, row.digests.get(kind)) for row in one.rows.values()) for one in (self, given)]
            if held[0] == held[1] and all(kind in row.digests for row in self.rows.values()):
                return True
        return False

    def _other_structure(self, given: "Fingerprint") -> str:
        if self.architecture != given.architecture:
            return f"it is a {given.architecture} and not a {self.architecture}"
        counts = _experts(given.rows)
        for path, count in _experts(self.rows).items():
            if counts.get(path, count) != count:
                return f"{path} has {counts[path]} experts and not {count}"
        for name, row in self.rows.items():
            if name not in given.rows:
                return f"it has no {name}"
            if given.rows[name].shape != row.shape:
                return f"{name} is {list(given.rows[name].shape)} and not {list(row.shape)}"
        return f"it has {next(name for name in given.rows if name not in self.rows)} too"

    def save(self, folder: Path) -> None:
        """Write it into the folder of an adapter, or of a model."""
        write_text(folder / FILE, self.to_json())

    def to_json(self) -> str:
        """Return its text, a tensor a line."""
        about = {"version": VERSION, "model": self.model, "architecture": self.architecture, "digests": self.digests}
        about |= {"files": self.files} if self.files else {}
        head = "".join(f"  {json.dumps(key)}: {json.dumps(value)},\n" for key, value in about.items())
        lines = (
            f"    {json.dumps(name)}: {json.dumps({'shape': row.shape} | dict(row.digests))}"
            for name, row in self.rows.items()
        )
        return f'{{\n{head}  "tensors": {{\n' + ",\n".join(lines) + "\n  }\n}\n"

    @classmethod
    def from_json(cls, text: str) -> "Fingerprint":
        """Inverse of :meth:`to_json`.

        Raises:
            ValueError: it is none, or one of a newer halfbyte.
        """
        try:
            about = json.loads(text)
            if about["version"] > VERSION:
                raise ValueError(f"it is of a newer halfbyte, version {about['version']}")
            rows = {
                name: Row(tuple(row["shape"]), {kind: str(digest) for kind, digest in row.items() if kind != "shape"})
                for name, row in about["tensors"].items()
            }
            files = {name: (int(size), int(time)) for name, (size, time) in about.get("files", {}).items()}
            return cls(str(about["architecture"]), rows, str(about["model"]), files)
        except (KeyError, TypeError, AttributeError) as error:
            raise ValueError(f"it is none: {error!r}") from error

    @classmethod
    def of_adapter(cls, folder: Path) -> "Fingerprint | None":
        """Return that of the base which the adapter in ``folder`` was trained on, if there is one beside it.

        Raises:
            InputError: it cannot be read.
        """
        file = folder / FILE
        if not file.is_file():
            return None
        try:
            return cls.from_json(file.read_text(encoding="utf-8"))
        except (OSError, ValueError) as error:
            raise InputError(
                f"{file} does not say which base model the adapter was trained on ({error}); copy it again, or remove "
                "it to have no base compared."
            ) from error

    def called(self, model: str) -> "Fingerprint":
        """Return it with the model's name: of a path the last part, since adapters are given away."""
        path = Path(model).expanduser()
        return replace(self, model=path.absolute().name if path.exists() else model, files={})


def _experts(names: Iterable[str]) -> Counter[str]:
    """Return how many experts each mixture has among the tensors of a model."""
    members = {match[0] for name in names if (match := re.match(r".*\bexperts\.\d+(?=\.)", name))}
    return Counter(member.rpartition(".")[0] for member in members)


def dense_digest(tensor: Tensor) -> str:
    """Return a digest of a tensor's values: the same for the same values in fp32, fp16 or bf16."""
    flat = tensor.detach().cpu().flatten()
    dtype = _narrowest(flat)
    made = hashlib.sha256(str(dtype).encode())
    for part in _chunks(flat):
        made.update(_bytes(part.to(dtype)))
    return made.hexdigest()[:DIGITS]


def dense_digests(tensor: Tensor, name: str, made: Iterable[Mapping[str, Tensor] | Tensor] = ()) -> dict[str, str]:
    """Return the digests of a dense tensor and of what was made of it.

    Args:
        tensor: as it lies in the file.
        name: its.
        made: of it: weights in 4 or 8 bits, as files have them, or roundings.
    """
    if not tensor.is_floating_point():
        return rounded_digest(tensor)
    found = {DENSE: dense_digest(tensor)}
    for one in made:
        if not isinstance(one, Tensor):
            found |= quantized_digests(one, name)
        elif one.dtype == tensor.dtype:
            found[_name_of(one.dtype)] = found[DENSE]
        else:
            found |= rounded_digest(one)
    return found


def rounded_digest(tensor: Tensor) -> dict[str, str]:
    """Return the digest of what stays dense in a folder of 4 or 8 bits, by its form."""
    return {_name_of(tensor.dtype): dense_digest(tensor)}


def quantized_digests(state: Mapping[str, Tensor], name: str, theirs: bool = False) -> dict[str, str]:
    """Return digests of codes and of block constants by form.

    Args:
        state: the tensors of one weight in 4 or 8 bits, as a file has them.
        name: of the weight.
        theirs: whether others than halfbyte have made it.
    """
    key = next((key for key in state if any(part in key for part in STATES)), None)
    about = {} if key is None else json.loads(bytes(state[key].view(torch.uint8).tolist()))
    kind = about.get("quant_type", "int8")
    form = f"{kind}-row" if key is None else f"{kind}-{about['blocksize']}-{about['dtype']}"
    if theirs and (kind != "nf4" or about.get("dtype") == "float32"):
        form += THEIRS
    codes = {form: _short(_bytes(state[name]))}
    is_double = "nested_offset" in about
    if theirs and is_double:
        return codes
    beside = (f"{name.removesuffix('.weight')}{INT8_ROWS}", f"{name}.absmax", f"{name}.nested_absmax")
    made = hashlib.sha256(json.dumps([about.get("nested_blocksize"), about.get("nested_offset")]).encode())
    for part in beside:
        if part in state:
            made.update(_bytes(state[part]))
    return codes | {f"{form}-{'double' if is_double else 'single'}": made.hexdigest()[:DIGITS]}


def _narrowest(flat: Tensor) -> torch.dtype:
    """Return the first of bf16, fp16 and fp32 that holds all values as they are; another dtype stays."""
    if flat.dtype in (torch.float16, torch.float32, torch.float64):
        for dtype in (torch.bfloat16, torch.float16, torch.float32):
            if all(torch.equal(part.to(dtype).to(flat.dtype), part) for part in _chunks(flat)):
                return dtype
    return flat.dtype


def _chunks(flat: Tensor) -> Iterator[Tensor]:
    return (flat[begin : begin + CHUNK] for begin in range(0, len(flat), CHUNK))


def _name_of(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def _bytes(tensor: Tensor) -> memoryview:
    data: memoryview = tensor.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().data
    return data


def times(files: Iterable[Path]) -> dict[str, tuple[int, int]]:
    """Return what :attr:`Fingerprint.files` says of weight files."""
    held = ((file.name, file.stat()) for file in files)
    return {name: (about.st_size, about.st_mtime_ns) for name, about in held}


def _short(data: memoryview) -> str:
    return hashlib.sha256(data).hexdigest()[:DIGITS]


class Rows:
    """Collects rows whose digests are made in threads, beside what else is done with the tensors. A context manager."""

    def __init__(self) -> None:
        self._threads = min(THREADS, torch.get_num_threads())
        self._pool = ThreadPoolExecutor(self._threads)
        self._made: dict[str, tuple[tuple[int, ...], Future[dict[str, str]]]] = {}
        self._pending: deque[Future[dict[str, str]]] = deque()

    def add(self, name: str, shape: Sequence[int], make: Callable[[], dict[str, str]]) -> None:
        """Take a tensor, whose digests ``make`` returns; wait where many are being made."""
        if len(self._pending) >= self._threads:
            self._pending.popleft().result()
        future = self._pool.submit(make)
        self._pending.append(future)
        self._made[name] = tuple(shape), future

    def all(self) -> dict[str, Row]:
        """Return all rows, by name."""
        return {name: Row(shape, future.result()) for name, (shape, future) in sorted(self._made.items())}

    def taken(self) -> dict[str, Row]:
        """Return all rows and forget them."""
        rows = self.all()
        self._made.clear()
        return rows

    def __enter__(self) -> "Rows":
        return self

    def __exit__(self, *_: object) -> None:
        self._pool.shutdown(cancel_futures=True)

"""Weights in GPTQ's and AWQ's 4 bits, and 2 or 8 of GPTQ's, as dense ones; formulas and layouts from the papers' code.

    GPTQ (arXiv 2210.17323; AutoGPTQ, GPTQModel, AutoRound)      AWQ (arXiv 2306.00978; AutoAWQ, version gemm)

      W[n, k] = scales[g, n] (q[k, n] - z[g, n])                   the same, g = k // group_size
      g = g_idx[k], or else k // group_size

      qweight  int32 [K bits / 32, N]    along K                   int32 [K, N bits / 32]    along N
      qzeros   int32 [G, N bits / 32]    along N                   int32 [G, N bits / 32]    along N
      scales   fp16  [G, N]                                        fp16  [G, N]
      g_idx    int32 [K], if there is one

The lowest bits of an integer hold the first value; AWQ's eight are those of the columns 0 2 4 6 1 3 5 7. GPTQ's files
hold ``z - 1``, unless their format is ``gptq_v2`` or AutoRound's of GPTQModel: 1 is taken from each value of an integer
by one subtraction of integers (GPTQModel 7.7, ``convert_gptq_v2_to_v1_format_module``), so that a zero of 0 borrows
from the next, and is put back so. MXFP4, which is packed otherwise, is read in :mod:`halfbyte.hf.models.foreign.mxfp4`.
"""

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from halfbyte.errors import InputError, named
from halfbyte.hf.models.checkpoint import Checkpoint, Tensors
from halfbyte.hf.models.foreign.mxfp4 import BLOCK, Mxfp4Checkpoint

MXFP4 = "mxfp4"
METHODS = ("gptq", "awq", "auto-round", MXFP4)
"""What ``quant_method`` in config.json calls them."""
QUANTIZE_CONFIG = "quantize_config.json"
"""Where AutoGPTQ wrote what config.json says since."""
AWQ_ORDER = (0, 2, 4, 6, 1, 3, 5, 7)
PARTS = ("qweight", "qzeros", "scales", "g_idx")
BITS = {"gptq": (2, 4, 8), "awq": (4,)}
AUTO_ROUND = {
    "auto_round:auto_gptq": ("gptq", 1),
    "auto_round:gptqmodel": ("gptq", 0),
    "auto_round": ("gptq", 0),
    "auto_round:auto_awq": ("awq", 0),
}
"""AutoRound's (0.16) ``packing_format``: the method whose layout it is, and what was taken from its zeros."""


@dataclass(frozen=True)
class Packing:
    """How a folder's weights are packed.

    Attributes:
        method: ``gptq``, ``awq`` or ``mxfp4``.
        bits: of a code.
        group_size: values along K that share scale and zero; -1 is all.
        offset: what was taken from the zeros of the file.
    """

    method: str
    bits: int
    group_size: int
    offset: int

    @classmethod
    def of(cls, about: dict[str, Any]) -> "Packing":
        """Read the ``quantization_config`` of a GPTQ, AWQ, AutoRound or MXFP4 folder.

        Raises:
            InputError: it lacks a number, or says something that is not known here.
        """
        method, form = str(about.get("quant_method")), str(about.get("packing_format", ""))
        if method == MXFP4:
            return cls(MXFP4, 4, BLOCK, 0)
        offset = 1 if method == "gptq" and about.get("checkpoint_format") != "gptq_v2" else 0
        if method == "auto-round":
            kind = about.get("data_type", "int")
            if form not in AUTO_ROUND or kind != "int":
                raise InputError(
                    f"config.json has AutoRound's packing_format {form!r} with a data_type {kind!r}, which is not read "
                    f"here; read are {named(AUTO_ROUND)} with 'int'."
                )
            method, offset = AUTO_ROUND[form]
        numbers = [about.get("bits", about.get("w_bit")), about.get("group_size", about.get("q_group_size"))]
        try:
            bits, group_size = (int(str(number)) for number in numbers)
        except ValueError:
            raise InputError(
                "config.json does not say bits and group_size in its quantization_config: copy it again."
            ) from None
        if bits not in BITS[method] or group_size == 0 or group_size < -1:
            raise InputError(
                f"config.json has {bits} bits in groups of {group_size}; of {method} "
                f"{named(map(str, BITS[method]))} bits are read, in groups of 1 or more, or -1 for all."
            )
        version = str(about.get("version", "gemm")).lower()
        if method == "awq" and version != "gemm":
            raise InputError(
                f"config.json has AWQ's version {version!r}, but only gemm is read; take a folder of that."
            )
        return cls(method, bits, group_size, offset)

    def dequantize(self, name: str, parts: dict[str, Tensor]) -> Tensor:
        """Return the weight ``[N, K]``, fp32, of the layer ``name``.

        Raises:
            InputError: shapes do not fit each other.
        """
        qweight, scales = parts["qweight"], parts["scales"]
        groups, outputs = scales.shape
        if self.method == "gptq":
            codes = unpack(qweight.T, self.bits).T
            ones = sum(self.offset << place for place in range(0, 32, self.bits))
            held = parts["qzeros"].long() + ones  # beyond 32 bits nothing is read
            zeros = unpack((held << 32 >> 32).int(), self.bits)
        else:
            codes, zeros = (unpack(parts[key], self.bits, AWQ_ORDER) for key in ("qweight", "qzeros"))
        inputs = codes.shape[0]
        group_size = inputs if self.group_size == -1 else self.group_size
        index = parts["g_idx"].long() if "g_idx" in parts else torch.arange(inputs) // group_size
        counted = groups if "g_idx" in parts else -(-inputs // group_size)
        wanted = (groups, groups, len(index), outputs, True)
        found = (counted, zeros.shape[0], inputs, codes.shape[1], zeros.shape[1] >= outputs)
        if found != wanted or not 0 <= int(index.min()) <= int(index.max()) < groups:
            shapes = ", ".join(f"{key} {list(part.shape)}" for key, part in parts.items())
            raise InputError(
                f"{name} has {shapes}, which do not fit each other in {self.bits} bits and groups of {self.group_size} "
                f"({32 // self.bits} values an integer): the checkpoint is damaged, or its quantization_config "
                "another's."
            )
        weight: Tensor = (codes - zeros[:, :outputs][index]).float() * scales.float()[index]
        return weight.T.contiguous()


def _read(file: Path) -> dict[str, Any]:
    try:
        about: dict[str, Any] = dict(json.loads(file.read_text(encoding="utf-8")))
    except (OSError, ValueError, TypeError) as error:
        raise InputError(f"{file} cannot be read ({error}): copy it again.") from error
    return about


def packing_of(config: Any) -> Packing | None:
    """Return how the weights of a model with this configuration are packed, or None where they are not.

    Old folders say it in ``quantize_config.json`` alone, which is AutoGPTQ's.

    Raises:
        InputError: as :meth:`Packing.of`.
    """
    about = getattr(config, "quantization_config", None)
    if about is None:
        file = Path(getattr(config, "_name_or_path", "") or ".") / QUANTIZE_CONFIG
        about = _read(file) | {"quant_method": "gptq"} if file.is_file() else None
    about = about if about is None or isinstance(about, dict) else about.to_dict()
    return None if about is None or about.get("quant_method") not in METHODS else Packing.of(about)


def unpacked(held: Checkpoint, packing: Packing) -> Tensors:
    """Return the tensors of a folder that is packed as those of the dense model.

    Raises:
        InputError: parts of a weight are missing.
    """
    return Mxfp4Checkpoint(held) if packing.method == MXFP4 else PackedCheckpoint(held, packing)


def unpack(packed: Tensor, bits: int, order: Sequence[int] | None = None) -> Tensor:
    """Return the values in each integer of ``packed``, int32 ``[R, C]``, side by side: int32 ``[R, 32 C / bits]``.

    Args:
        packed: the lowest bits hold the first value.
        bits: of a value.
        order: which column of its group each value is of; None is as they come.
    """
    shifts = torch.arange(0, 32, bits, dtype=torch.int32)
    values: Tensor = (packed.unsqueeze(-1) >> shifts) & (2**bits - 1)
    if order is not None:
        values = values[..., torch.tensor(order).argsort()]
    return values.flatten(-2)


class PackedCheckpoint:
    """The tensors of a GPTQ or AWQ folder as those of the dense model, each made when it is read.

    It has what :class:`~halfbyte.hf.models.checkpoint.Checkpoint` has.
    """

    quantized: dict[str, torch.Size]

    def __init__(self, held: Checkpoint, packing: Packing) -> None:
        self.held, self.packing, self.quantized = held, packing, {}
        self.files, self.where = held.files, held.where
        self._layers: dict[str, list[str]] = {}
        known = set(held.names)
        for name in held.names:
            layer, _, part = name.rpartition(".")
            if part == "qweight":
                self._layers[f"{layer}.weight"] = [key for key in PARTS if f"{layer}.{key}" in known]
        for name, parts in self._layers.items():
            if missing := {"qzeros", "scales"}.difference(parts):
                raise InputError(
                    f"{name.removesuffix('.weight')}.{sorted(missing)[0]} is missing in {held.where}, beside its "
                    "qweight: copy the model's folder again."
                )
        used = {f"{name.removesuffix('weight')}{part}" for name, parts in self._layers.items() for part in parts}
        if not self._layers:
            raise InputError(f"The weights in {held.where} are not {packing.method}'s: no tensor is called qweight.")
        self.names = [*self._layers, *(name for name in held.names if name not in used)]

    def form(self, name: str) -> Tensor:
        """Return the tensor ``name`` on the meta device."""
        if name not in self._layers:
            return self.held.form(name)
        rows, columns = self.held.form(f"{name.removesuffix('weight')}qweight").shape
        per = 32 // self.packing.bits
        shape = (columns, rows * per) if self.packing.method == "gptq" else (columns * per, rows)
        return torch.empty(shape, dtype=torch.bfloat16, device="meta")

    def read(self, name: str) -> Tensor:
        """Return the tensor ``name``."""
        if name not in self._layers:
            return self.held.read(name)
        layer = name.removesuffix("weight")
        return self.packing.dequantize(name, {part: self.held.read(f"{layer}{part}") for part in self._layers[name]})

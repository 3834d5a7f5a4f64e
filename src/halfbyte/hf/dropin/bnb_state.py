"""The state that a packed tensor needs beside it (bitsandbytes 0.50 ``functional.QuantState``).

It is bitsandbytes' attribute for attribute, so that each library takes the other's, and what it writes are the same
bytes. :func:`as_weight` makes a packed tensor and its state a weight of ours; :meth:`QuantState.of` is its inverse.
"""

import json
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from halfbyte.kernels import Nested, Statistics
from halfbyte.quant import QuantizedWeight, codebook
from halfbyte.quant.weight import STATE

BLOCKSIZES = (32, 64, 128, 256, 512, 1024, 2048, 4096)
QUANT_TYPES = ("nf4", "fp4")
FLOATING = (torch.bfloat16, torch.float16, torch.float32)
KEY = STATE.removeprefix("quant_state.")
NESTED_FIELDS = ("nested_absmax", "nested_blocksize", "nested_quant_map", "nested_dtype", "nested_offset")
FIELDS = ("absmax", "quant_map", "quant_type", "blocksize", "dtype", "shape", *NESTED_FIELDS)


class QuantState:
    """Block constants, table and shape of a quantized tensor.

    Attributes:
        absmax: fp32 ``[blocks]``, or uint8 ``[blocks]`` where they are quantized in turn.
        shape: of the tensor before; None for one of bytes, which kept it.
        code: fp32 ``[16]`` or ``[256]``: the value of each code.
        blocksize: values per block.
        quant_type: ``nf4``, ``fp4``, or None for bytes.
        dtype: of the tensor before.
        offset: fp32 ``[]``: what was taken off ``absmax`` before it was quantized, or None.
        state2: the state of ``absmax``, or None.
    """

    valid_quant_types = QUANT_TYPES
    valid_qs_type_keys = tuple(f"{KEY}{name}" for name in QUANT_TYPES)
    valid_qs_keys = (*FIELDS, "quant_state")

    def __init__(
        self,
        absmax: Tensor,
        shape: Sequence[int] | None = None,
        code: Tensor | None = None,
        blocksize: int | None = None,
        quant_type: str | None = None,
        dtype: torch.dtype | None = None,
        offset: Tensor | None = None,
        state2: "QuantState | None" = None,
    ) -> None:
        self.absmax, self.shape, self.code, self.dtype = absmax, shape, code, dtype
        self.blocksize, self.quant_type, self.offset, self.state2 = blocksize, quant_type, offset, state2
        self.nested = state2 is not None

    def __getitem__(self, index: int) -> Any:
        """Return an item of the list that a state was in old versions."""
        second = [self.offset, self.state2] if self.nested else None
        return [self.absmax, self.shape, self.dtype, self.blocksize, second, self.quant_type][index]

    def __eq__(self, other: object) -> bool:
        if not isinstance(other, QuantState):
            return False
        mine, theirs = self.as_dict(), other.as_dict()
        return mine.keys() == theirs.keys() and all(
            torch.equal(x, theirs[key]) if isinstance(x, Tensor) else x == theirs[key] for key, x in mine.items()
        )

    __hash__ = None  # type: ignore[assignment]

    @classmethod
    def of(cls, weight: QuantizedWeight) -> "QuantState":
        """Return the state of a weight of ours; its tensors are shared."""
        statistics, nested = weight.statistics, weight.statistics.nested
        second, offset = None, None
        if nested is not None:
            second = cls(nested.absmax, code=nested.code, blocksize=nested.blocksize, dtype=torch.float32)
            offset = torch.tensor(nested.offset, dtype=torch.float32, device=statistics.absmax.device)
        return cls(
            statistics.absmax,
            weight.shape,
            statistics.code,
            statistics.blocksize,
            weight.quant_type,
            weight.dtype,
            offset,
            second,
        )

    @classmethod
    def from_dict(cls, qs_dict: dict[str, Any], device: torch.device | str) -> "QuantState":
        """Inverse of :meth:`as_dict`, packed or not, whatever prefixes the names have."""
        packed = [key for key, value in qs_dict.items() if "quant_state" in key and isinstance(value, Tensor)]
        if "quant_type" not in qs_dict and (
            len(packed) != 1 or packed[0].rsplit(".", 1)[-1] not in cls.valid_qs_type_keys
        ):
            raise ValueError(
                f"There should be exactly one quant_state item that ends with one of {cls.valid_qs_type_keys}; "
                f"there is {packed or 'none'}."
            )
        found = {key.rsplit(".", 1)[-1]: value for key, value in qs_dict.items() if key not in packed}
        for key in packed:
            found |= json.loads(bytes(qs_dict[key].cpu().numpy()))
        if unknown := found.keys() - set(cls.valid_qs_keys):
            raise ValueError(f"A quant_state has no {sorted(unknown)}; it has {', '.join(cls.valid_qs_keys)}.")
        second, offset = None, None
        if "nested_absmax" in found:
            offset = torch.tensor(float(found["nested_offset"]), dtype=torch.float32, device=device)
            second = cls(
                found["nested_absmax"].to(device),
                code=found["nested_quant_map"].to(device),
                blocksize=found["nested_blocksize"],
                dtype=getattr(torch, found["nested_dtype"]),
            )
        shape = found["shape"]
        return cls(
            found["absmax"].to(device),
            None if shape is None else torch.Size(shape),
            found["quant_map"].to(device),
            found["blocksize"],
            found["quant_type"],
            getattr(torch, found["dtype"]),
            offset,
            second,
        )

    def as_dict(self, packed: bool = False) -> dict[str, Any]:
        """Return what a file holds: with ``packed`` as tensors only, the rest in one of JSON."""
        about: dict[str, Any] = {
            "quant_type": self.quant_type,
            "absmax": self.absmax,
            "blocksize": self.blocksize,
            "quant_map": self.code,
            "dtype": str(self.dtype).removeprefix("torch."),
            "shape": None if self.shape is None else tuple(self.shape),
        }
        if self.state2 is not None and self.offset is not None:
            second = self.state2
            values = (
                second.absmax,
                second.blocksize,
                None if second.code is None else second.code.clone(),
                str(second.dtype).removeprefix("torch."),
                self.offset.item(),
            )
            about |= dict(zip(NESTED_FIELDS, values, strict=True))
        if not packed or self.quant_type is None:
            return about
        tensors = {key: value for key, value in about.items() if isinstance(value, Tensor)}
        rest = {key: value for key, value in about.items() if not isinstance(value, Tensor)}
        text = torch.frombuffer(bytearray(json.dumps(rest).encode()), dtype=torch.uint8)
        return tensors | {f"{STATE}{self.quant_type}": text}

    def to(self, device: torch.device | str | None) -> None:
        """Take the tensors to ``device``, in place."""
        self.absmax = self.absmax.to(device)
        self.code = None if self.code is None else self.code.to(device)
        self.offset = None if self.offset is None else self.offset.to(device)
        if self.state2 is not None:
            self.state2.to(device)


def as_weight(packed: Tensor, state: Any) -> QuantizedWeight:
    """Return the 4-bit weight that ``packed`` and its ``state``, ours or bitsandbytes', are; memory is shared.

    Raises:
        ValueError: a block size, type or dtype that bitsandbytes does not have.
    """
    check_4bit(state.blocksize, state.quant_type, state.dtype)
    nested = None
    if state.nested:
        second = state.state2
        nested = Nested(second.absmax, second.code, second.blocksize, float(state.offset))
    code = codebook(state.quant_type, packed.device)
    statistics = Statistics(state.absmax, code, state.blocksize, nested)
    codes = packed.detach().reshape(-1).view(torch.uint8).view(-1, 1)
    return QuantizedWeight(codes, statistics, torch.Size(state.shape), state.quant_type, state.dtype)


def check_4bit(blocksize: int | None, quant_type: str | None, dtype: torch.dtype | None) -> None:
    """Refuse what bitsandbytes refuses, as it does."""
    if blocksize not in BLOCKSIZES:
        raise ValueError(f"invalid blocksize {blocksize}; it must be one of {', '.join(map(str, BLOCKSIZES))}")
    if quant_type not in QUANT_TYPES:
        raise ValueError(f"quant_type must be 'nf4' or 'fp4', got {quant_type!r}")
    if dtype not in FLOATING:
        raise ValueError(f"Blockwise 4bit quantization only supports 16/32-bit floats, but got {dtype}")

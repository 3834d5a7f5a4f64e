"""A weight in 4 bits: packed codes and statistics, and their form in files, which is bitsandbytes'.

Layout (landmarks: arXiv 2305.14314, section 3; bitsandbytes 0.50 ``QuantState.as_dict``): the weight ``[out, in]``
is flattened row-major; byte ``k`` holds code ``2 k`` in its high half and code ``2 k + 1`` in its low half; the
packed tensor is uint8 ``[ceil(numel / 2), 1]``. In a state dict a weight ``w`` takes the keys

    w                                       packed codes (uint8, or the same bytes viewed as another dtype)
    w.absmax                                fp32, or uint8 with double quantization
    w.quant_map                             fp32 [16]
    w.nested_absmax, w.nested_quant_map     fp32, fp32 [256]; with double quantization only
    w.quant_state.bitsandbytes__nf4         uint8: JSON with quant_type, blocksize, dtype, shape, nested_*

and for e2m1, e3m0 and int4, which bitsandbytes does not know, ``w.quant_state.halfbyte__e2m1`` in its place.
"""

import dataclasses
import json
import math
from collections.abc import Mapping
from typing import Any

import torch
from pydantic import BaseModel, ConfigDict, Field, FiniteFloat, PositiveInt, ValidationError, model_validator
from torch import Tensor

from halfbyte import kernels
from halfbyte.choices import (
    BITSANDBYTES_TYPES,
    BLOCKSIZE,
    BLOCKSIZES,
    DOUBLE_QUANT,
    FLOAT_TYPES,
    QUANT_TYPE,
    TYPES_4BIT,
    FloatType,
    Type4bit,
)
from halfbyte.errors import InputError, nearest
from halfbyte.kernels import Nested, Statistics, Weight4bit
from halfbyte.quant.codebooks import codebook
from halfbyte.quant.double_quant import quantize_statistics

DTYPES: dict[str, torch.dtype] = {name: getattr(torch, name) for name in FLOAT_TYPES}
STATE = "quant_state.bitsandbytes__"
OWN_STATE = "quant_state.halfbyte__"
"""The same of what bitsandbytes has no name for."""


@dataclasses.dataclass(frozen=True, eq=False)
class QuantizedWeight(Weight4bit):
    """A tensor quantized block-wise to 4 bits; the kernels take it as it is.

    Attributes:
        packed: uint8 ``[ceil(numel / 2), 1]``.
        statistics: block constants and codebook.
        shape: that of the tensor.
        quant_type: the codebook's name.
        dtype: that of the tensor before it was quantized, and of :meth:`dequantize` by default.
    """

    shape: torch.Size
    quant_type: str
    dtype: torch.dtype

    @property
    def double_quant(self) -> bool:
        """Whether the block constants are quantized too."""
        return self.statistics.nested is not None

    @property
    def bits_per_parameter(self) -> float:
        """Stored bits per value: codes and both levels of constants, without what does not grow with the weight."""
        tensors = [self.packed, self.statistics.absmax]
        if self.statistics.nested:
            tensors.append(self.statistics.nested.absmax)
        return 8 * sum(t.nbytes for t in tensors) / self.numel()

    def dequantize(self, dtype: torch.dtype | None = None) -> Tensor:
        """Return the dense tensor in its shape, as ``dtype`` or else as it was before."""
        return kernels.dequantize_4bit(self, dtype or self.dtype)

    def rows(self, first: int, last: int) -> "QuantizedWeight":
        """Return the rows ``[first, last)`` of a matrix, as a view.

        Raises:
            ValueError: a statistic, or a byte, is shared between the first row and the one before.
        """
        columns = self.shape[1]
        begin, end, blocksize = first * columns, last * columns, self.statistics.blocksize
        nested = self.statistics.nested
        if begin % (blocksize * (nested.blocksize if nested else 1)) or begin % 2:
            raise ValueError(f"row {first} of {columns} values does not begin with a block of {blocksize}")
        blocks = slice(begin // blocksize, -(-end // blocksize))
        if nested:
            groups = slice(blocks.start // nested.blocksize, -(-blocks.stop // nested.blocksize))
            nested = dataclasses.replace(nested, absmax=nested.absmax[groups])
        statistics = dataclasses.replace(self.statistics, absmax=self.statistics.absmax[blocks], nested=nested)
        shape = torch.Size((last - first, columns))
        packed = self.packed[begin // 2 : -(-end // 2)]
        return dataclasses.replace(self, packed=packed, statistics=statistics, shape=shape)

    def to(self, device: torch.device | str) -> "QuantizedWeight":
        """Return the weight on ``device``."""
        return dataclasses.replace(self, packed=self.packed.to(device), statistics=self.statistics.to(device))

    def state_dict(self, prefix: str = "weight") -> dict[str, Tensor]:
        """Return the tensors that a file holds, in bitsandbytes' keys, the packed codes under ``prefix`` itself."""
        statistics, nested = self.statistics, self.statistics.nested
        about: dict[str, Any] = {
            "quant_type": self.quant_type,
            "blocksize": statistics.blocksize,
            "dtype": str(self.dtype).removeprefix("torch."),
            "shape": list(self.shape),
        }
        state = {
            prefix: self.packed,
            f"{prefix}.absmax": statistics.absmax,
            # A file holds every tensor of its own; the codebooks in memory are shared by all weights.
            f"{prefix}.quant_map": statistics.code.clone(),
        }
        if nested:
            about |= {
                "nested_blocksize": nested.blocksize,
                "nested_dtype": "float32",
                "nested_offset": nested.offset,
            }
            state |= {
                f"{prefix}.nested_absmax": nested.absmax,
                f"{prefix}.nested_quant_map": nested.code.clone(),
            }
        text = json.dumps(about).encode()
        kind = STATE if self.quant_type in BITSANDBYTES_TYPES else OWN_STATE
        state[f"{prefix}.{kind}{self.quant_type}"] = torch.frombuffer(bytearray(text), dtype=torch.uint8)
        return state

    @classmethod
    def from_state_dict(cls, state: Mapping[str, Tensor], prefix: str = "weight") -> "QuantizedWeight":
        """Inverse of :meth:`state_dict`. Takes the tensors as they are: what is mapped from a file stays mapped.

        Raises:
            InputError: a tensor is missing or not of its dtype, the JSON is not one of a 4-bit weight, or sizes do not
                agree with the recorded shape and block size.
        """
        packed = _entry(state, prefix)
        states = [key for key in state if key.startswith((f"{prefix}.{STATE}", f"{prefix}.{OWN_STATE}"))]
        if len(states) != 1:
            raise InputError(
                f"{prefix} should come with one entry {prefix}.{STATE}nf4 or ...fp4, but it comes with "
                f"{states or 'none'}: this is not a 4-bit weight in bitsandbytes' format."
            )
        about = _read_about(state, states[0])
        nested = None
        if about.nested_blocksize is not None:
            nested = Nested(
                _floats(state, f"{prefix}.nested_absmax"),
                _shared_code(_floats(state, f"{prefix}.nested_quant_map"), "dynamic"),
                about.nested_blocksize,
                about.nested_offset,
            )
        absmax = _entry(state, f"{prefix}.absmax") if nested else _floats(state, f"{prefix}.absmax")
        code = _shared_code(_floats(state, f"{prefix}.quant_map"), about.quant_type)
        shape = torch.Size(about.shape)
        packed = packed.view(torch.uint8).view(-1, 1)
        sizes = [
            ("packed bytes", packed.numel(), math.ceil(shape.numel() / 2)),
            ("block constants", absmax.numel(), math.ceil(shape.numel() / about.blocksize)),
            ("table values", code.numel(), 16),
        ]
        if nested:
            needed = math.ceil(absmax.numel() / nested.blocksize)
            sizes.append(("constants of block constants", nested.absmax.numel(), needed))
            sizes.append(("second table values", nested.code.numel(), 256))
        for name, found, needed in sizes:
            if found != needed:
                raise InputError(
                    f"{prefix} holds {found} {name}, but its shape {tuple(shape)} in blocks of "
                    f"{about.blocksize} needs {needed}: the checkpoint is damaged."
                )
        if nested and absmax.dtype != torch.uint8:
            raise InputError(
                f"{prefix}.absmax is {absmax.dtype}, but doubly quantized block constants are torch.uint8: the "
                "checkpoint is damaged."
            )
        statistics = Statistics(absmax, code, about.blocksize, nested)
        return cls(packed, statistics, shape, about.quant_type, DTYPES[about.dtype])


class _About(BaseModel):
    """The JSON of a weight's ``quant_state``."""

    model_config = ConfigDict(strict=True)

    quant_type: Type4bit
    blocksize: int = Field(ge=BLOCKSIZES[0], le=BLOCKSIZES[-1])
    dtype: FloatType
    shape: list[PositiveInt]
    nested_blocksize: PositiveInt | None = None
    nested_offset: FiniteFloat = 0.0

    @model_validator(mode="after")
    def _both_or_neither(self) -> "_About":
        if (self.nested_blocksize is None) != ("nested_offset" not in self.model_fields_set):
            raise ValueError("nested_blocksize and nested_offset come together")
        return self


def _read_about(state: Mapping[str, Tensor], key: str) -> _About:
    try:
        return _About.model_validate_json(bytes(state[key].cpu().view(torch.uint8).numpy()))
    except ValidationError as error:
        first = error.errors(include_url=False)[0]
        reason = ": ".join(filter(None, [".".join(map(str, first["loc"])), first["msg"]]))
        raise InputError(f"{key} does not describe a 4-bit weight ({reason}): the checkpoint is damaged.") from error


def check_format(quant_type: str, blocksize: int) -> None:
    """Refuse what no 4-bit weight can have.

    Raises:
        InputError: an unknown ``quant_type`` or an unsupported ``blocksize``.
    """
    if quant_type not in TYPES_4BIT:
        raise InputError(
            f"quant_type is {quant_type!r}{nearest(quant_type, TYPES_4BIT)}; it must be one of {', '.join(TYPES_4BIT)}."
        )
    if blocksize not in BLOCKSIZES:
        raise InputError(f"blocksize is {blocksize}; it must be {BLOCKSIZES[0]} to {BLOCKSIZES[-1]}.")


def quantize_4bit(
    tensor: Tensor, quant_type: str = QUANT_TYPE, blocksize: int = BLOCKSIZE, double_quant: bool = DOUBLE_QUANT
) -> QuantizedWeight:
    """Quantize ``tensor`` (any shape; fp32, bf16 or fp16) to 4 bits, as bitsandbytes does to the last bit.

    Args:
        tensor: the weight.
        quant_type: ``nf4``, ``fp4`` (both also in bitsandbytes), ``e2m1``, ``e3m0`` or ``int4``.
        blocksize: values per block, 32 to 4096; 64 in the paper.
        double_quant: quantize the block constants too.

    Raises:
        InputError: an unknown ``quant_type``, an unsupported ``blocksize`` or an empty tensor.
        TypeError: a dtype other than the three.
    """
    check_format(quant_type, blocksize)
    if tensor.numel() == 0:
        raise InputError(f"A tensor of shape {tuple(tensor.shape)} holds no value to quantize.")
    code = codebook(quant_type, tensor.device)
    packed, absmax = kernels.quantize_4bit(tensor.detach(), code, blocksize)
    nested = None
    if double_quant:
        absmax, nested = quantize_statistics(absmax)
    statistics = Statistics(absmax, code, blocksize, nested)
    return QuantizedWeight(packed.view(-1, 1), statistics, tensor.shape, quant_type, tensor.dtype)


def _entry(state: Mapping[str, Tensor], key: str) -> Tensor:
    if key not in state:
        raise InputError(f"{key} is missing: the 4-bit checkpoint is not complete.")
    return state[key]


def _floats(state: Mapping[str, Tensor], key: str) -> Tensor:
    tensor = _entry(state, key)
    if tensor.dtype != torch.float32:
        raise InputError(f"{key} is {tensor.dtype}, but it should be torch.float32: the checkpoint is damaged.")
    return tensor


def _shared_code(code: Tensor, name: str) -> Tensor:
    """Return the one shared codebook where the file's is the same, so that a thousand weights hold it once."""
    known = codebook(name, code.device)
    return known if torch.equal(known, code) else code

"""A weight in 4 bits: packed codes and statistics, and their form in files, which is bitsandbytes'.

Layout (landmarks: arXiv 2305.14314, section 3; bitsandbytes 0.50 ``QuantState.as_dict``): the weight ``[out, in]``
is flattened row-major; byte ``k`` holds code ``2 k`` in its high half and code ``2 k + 1`` in its low half; the
packed tensor is uint8 ``[ceil(numel / 2), 1]``. In a state dict a weight ``w`` takes the keys

    w                                       packed codes (uint8, or the same bytes viewed as another dtype)
    w.absmax                                fp32, or uint8 with double quantization
    w.quant_map                             fp32 [16]
    w.nested_absmax, w.nested_quant_map     fp32, fp32 [256]; with double quantization only
    w.quant_state.bitsandbytes__nf4         uint8: JSON with quant_type, blocksize, dtype, shape, nested_*
"""

import dataclasses
import json
import math
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from halfbyte import kernels
from halfbyte.errors import InputError, nearest
from halfbyte.kernels import Nested, Statistics
from halfbyte.quant.codebooks import FOUR_BIT, codebook
from halfbyte.quant.double_quant import quantize_statistics

BLOCKSIZES = range(32, 4097)
STATE = "quant_state.bitsandbytes__"


@dataclasses.dataclass(frozen=True, eq=False)
class QuantizedWeight:
    """A tensor quantized block-wise to 4 bits.

    Attributes:
        packed: uint8 ``[ceil(numel / 2), 1]``.
        statistics: block constants and codebook.
        quant_type: the codebook's name.
        shape: that of the tensor.
        dtype: that of the tensor before it was quantized, and of :meth:`dequantize` by default.
    """

    packed: Tensor
    statistics: Statistics
    quant_type: str
    shape: torch.Size
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
        return 8 * sum(t.nbytes for t in tensors) / self.shape.numel()

    def dequantize(self, dtype: torch.dtype | None = None) -> Tensor:
        """Return the dense tensor in its shape, as ``dtype`` or else as it was before."""
        return kernels.dequantize_4bit(self.packed, self.statistics, self.shape, dtype or self.dtype)

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
        state[f"{prefix}.{STATE}{self.quant_type}"] = torch.frombuffer(bytearray(text), dtype=torch.uint8)
        return state

    @classmethod
    def from_state_dict(cls, state: Mapping[str, Tensor], prefix: str = "weight") -> "QuantizedWeight":
        """Inverse of :meth:`state_dict`. Takes the tensors as they are: what is mapped from a file stays mapped.

        Raises:
            InputError: a tensor is missing, or sizes do not agree with the recorded shape and block size.
        """
        packed = _entry(state, prefix)
        states = [key for key in state if key.startswith(f"{prefix}.{STATE}")]
        if len(states) != 1:
            raise InputError(
                f"{prefix} should come with one entry {prefix}.{STATE}nf4 or ...fp4, but it comes with "
                f"{states or 'none'}: this is not a 4-bit weight in bitsandbytes' format."
            )
        about = json.loads(bytes(state[states[0]].cpu().numpy()))
        nested = None
        if "nested_blocksize" in about:
            nested = Nested(
                _entry(state, f"{prefix}.nested_absmax"),
                _shared_code(_entry(state, f"{prefix}.nested_quant_map"), "dynamic"),
                about["nested_blocksize"],
                about["nested_offset"],
            )
        statistics = Statistics(
            _entry(state, f"{prefix}.absmax"),
            _shared_code(_entry(state, f"{prefix}.quant_map"), about["quant_type"]),
            about["blocksize"],
            nested,
        )
        shape = torch.Size(about["shape"])
        packed = packed.view(torch.uint8).view(-1, 1)
        for name, found, needed in (
            ("packed bytes", packed.numel(), math.ceil(shape.numel() / 2)),
            ("block constants", statistics.absmax.numel(), math.ceil(shape.numel() / statistics.blocksize)),
        ):
            if found != needed:
                raise InputError(
                    f"{prefix} holds {found} {name}, but its shape {tuple(shape)} in blocks of "
                    f"{statistics.blocksize} needs {needed}: the checkpoint is damaged."
                )
        return cls(packed, statistics, about["quant_type"], shape, getattr(torch, about["dtype"]))


def check_format(quant_type: str, blocksize: int) -> None:
    """Refuse what no 4-bit weight can have.

    Raises:
        InputError: an unknown ``quant_type`` or an unsupported ``blocksize``.
    """
    if quant_type not in FOUR_BIT:
        raise InputError(
            f"quant_type is {quant_type!r}{nearest(quant_type, FOUR_BIT)}; it must be one of {', '.join(FOUR_BIT)}."
        )
    if blocksize not in BLOCKSIZES:
        raise InputError(f"blocksize is {blocksize}; it must be {BLOCKSIZES[0]} to {BLOCKSIZES[-1]}.")


def quantize_4bit(
    tensor: Tensor, quant_type: str = "nf4", blocksize: int = 64, double_quant: bool = True
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
    return QuantizedWeight(packed.view(-1, 1), statistics, quant_type, tensor.shape, tensor.dtype)


def _entry(state: Mapping[str, Tensor], key: str) -> Tensor:
    if key not in state:
        raise InputError(f"{key} is missing: the 4-bit checkpoint is not complete.")
    return state[key]


def _shared_code(code: Tensor, name: str) -> Tensor:
    """Return the one shared codebook where the file's is the same, so that a thousand weights hold it once."""
    known = codebook(name, code.device)
    return known if torch.equal(known, code) else code

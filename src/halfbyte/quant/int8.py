"""A weight in int8 and its form in files: evenly spaced integers, block-wise (LLM.int8(), arXiv 2208.07339).

Each value is ``code * (absmax / 127)``, absmax being the largest magnitude of its block, of so many values of the
flattened weight or of a whole row. In a state dict the weight of a layer ``X`` takes the keys

    X.weight                                int8 [out, in]
    X.SCB, X.weight_format                  rows: fp32 [out], uint8 (0, "row"); bitsandbytes' (0.50 ``Linear8bitLt``)
    X.weight.absmax                         blocks: fp32 [blocks]
    X.weight.quant_state.halfbyte__int8     blocks: uint8, JSON with blocksize and dtype
"""

import dataclasses
import json
from collections.abc import Mapping

import torch
from pydantic import BaseModel, ConfigDict, Field, ValidationError
from torch import Tensor

from halfbyte import kernels
from halfbyte.choices import BLOCKSIZE, BLOCKSIZES, ROW, FloatType
from halfbyte.errors import InputError
from halfbyte.kernels import WeightInt8
from halfbyte.options import base_format
from halfbyte.quant.weight import DTYPES, OWN_STATE

CONSTANTS, FORMAT = "SCB", "weight_format"
"""bitsandbytes' names of a layer's row constants, and of how its codes lie."""
STATE_INT8 = f"{OWN_STATE}int8"


@dataclasses.dataclass(frozen=True, eq=False)
class QuantizedInt8(WeightInt8):
    """A matrix quantized to int8; the kernels take it as it is.

    Attributes:
        codes: int8 ``[N, K]``.
        absmax: fp32, one per block.
        blocksize: values per block.
        by_row: whether each row is a block because rows are what blocks are.
        dtype: that of the matrix before it was quantized, and of :meth:`dequantize` by default.
    """

    by_row: bool
    dtype: torch.dtype

    @property
    def bits_per_parameter(self) -> float:
        """Stored bits per value."""
        return 8 * (self.codes.nbytes + self.absmax.nbytes) / self.codes.numel()

    def dequantize(self, dtype: torch.dtype | None = None) -> Tensor:
        """Return the dense matrix, as ``dtype`` or else as it was before."""
        return kernels.dequantize_int8(self, dtype or self.dtype)

    def rows(self, first: int, last: int) -> "QuantizedInt8":
        """Return the rows ``[first, last)``, as a view.

        Raises:
            ValueError: the first row shares a block with the one before.
        """
        columns = self.shape[1]
        if first * columns % self.blocksize:
            raise ValueError(f"row {first} of {columns} values does not begin with a block of {self.blocksize}")
        absmax = self.absmax[first * columns // self.blocksize : -(-last * columns // self.blocksize)]
        return dataclasses.replace(self, codes=self.codes[first:last], absmax=absmax)

    def to(self, device: torch.device | str) -> "QuantizedInt8":
        """Return the weight on ``device``."""
        return dataclasses.replace(self, codes=self.codes.to(device), absmax=self.absmax.to(device))

    def state_dict(self, prefix: str = "weight") -> dict[str, Tensor]:
        """Return the tensors that a file holds, the codes under ``prefix`` itself."""
        if self.by_row:
            layer = prefix.removesuffix("weight")
            return {
                prefix: self.codes,
                f"{layer}{CONSTANTS}": self.absmax,
                f"{layer}{FORMAT}": torch.tensor(0, dtype=torch.uint8),
            }
        about = {"blocksize": self.blocksize, "dtype": str(self.dtype).removeprefix("torch.")}
        text = torch.frombuffer(bytearray(json.dumps(about).encode()), dtype=torch.uint8)
        return {prefix: self.codes, f"{prefix}.absmax": self.absmax, f"{prefix}.{STATE_INT8}": text}

    @classmethod
    def from_state_dict(
        cls, state: Mapping[str, Tensor], prefix: str = "weight", dtype: torch.dtype = torch.float16
    ) -> "QuantizedInt8":
        """Inverse of :meth:`state_dict`. Takes the tensors as they are: what is mapped from a file stays mapped.

        Args:
            state: holds the tensors.
            prefix: the weight's name.
            dtype: what :meth:`dequantize` gives where the file does not say it (bitsandbytes').

        Raises:
            InputError: a tensor is missing, or not of its dtype or size, or rows lie in another order.
        """
        codes, layer = state.get(prefix), prefix.removesuffix("weight")
        if codes is None or codes.dtype != torch.int8 or codes.ndim != 2:
            found = "missing" if codes is None else f"{codes.dtype} {tuple(codes.shape)}"
            raise InputError(f"{prefix} is {found}, but an int8 weight is a matrix of torch.int8.")
        rows = f"{layer}{CONSTANTS}"
        by_row = rows in state
        if by_row:
            form = state.get(f"{layer}{FORMAT}")
            if form is not None and int(form) != 0:
                raise InputError(
                    f"{layer}{FORMAT} is {int(form)}, an order of bytes for one kind of GPU; save the model again with "
                    "bitsandbytes 0.45 or later, which writes rows."
                )
            absmax, blocksize = state[rows], max(codes.shape[1], 1)
        else:
            if f"{prefix}.absmax" not in state or f"{prefix}.{STATE_INT8}" not in state:
                raise InputError(f"{prefix} comes neither with {rows} nor with {prefix}.absmax: it is not complete.")
            about = _read_about(f"{prefix}.{STATE_INT8}", state[f"{prefix}.{STATE_INT8}"])
            absmax, blocksize, dtype = state[f"{prefix}.absmax"], about.blocksize, DTYPES[about.dtype]
        needed = -(-codes.numel() // blocksize)
        if absmax.dtype != torch.float32 or absmax.numel() != needed:
            raise InputError(
                f"{rows if by_row else f'{prefix}.absmax'} is {absmax.dtype} with {absmax.numel()} values, but a "
                f"weight of {tuple(codes.shape)} in blocks of {blocksize} needs torch.float32 with {needed}: the "
                "checkpoint is damaged."
            )
        return cls(codes, absmax.reshape(-1), blocksize, by_row, dtype)


class _About(BaseModel):
    """The JSON of a weight's ``quant_state``."""

    model_config = ConfigDict(strict=True)

    blocksize: int = Field(ge=BLOCKSIZES[0], le=BLOCKSIZES[-1])
    dtype: FloatType


def _read_about(key: str, text: Tensor) -> _About:
    try:
        return _About.model_validate_json(bytes(text.cpu().view(torch.uint8).numpy()))
    except ValidationError as error:
        first = error.errors(include_url=False)[0]
        reason = ": ".join(filter(None, [".".join(map(str, first["loc"])), first["msg"]]))
        raise InputError(f"{key} does not describe an int8 weight ({reason}): the checkpoint is damaged.") from error


def quantize_int8(tensor: Tensor, blocksize: int | str = BLOCKSIZE) -> QuantizedInt8:
    """Quantize the matrix ``tensor`` (fp32, bf16 or fp16) to int8.

    Args:
        tensor: the weight.
        blocksize: values per block, 32 to 4096, or ``row``: a block for each row, as bitsandbytes has it.

    Raises:
        InputError: an unsupported ``blocksize`` or an empty tensor.
        TypeError: a dtype other than the three.
    """
    base_format("int8", blocksize)
    if tensor.numel() == 0:
        raise InputError(f"A tensor of shape {tuple(tensor.shape)} holds no value to quantize.")
    values = tensor.shape[1] if isinstance(blocksize, str) else blocksize
    weight = kernels.quantize_int8(tensor.detach(), values)
    return QuantizedInt8(weight.codes, weight.absmax, values, blocksize == ROW, tensor.dtype)

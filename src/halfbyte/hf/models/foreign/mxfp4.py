"""Experts in MXFP4, as gpt-oss is published, as dense stacks; the format is that of OCP Microscaling (MX) v1.0.

    W[e, n, 32 g + i] = 2 ** (scales[e, n, g] - 127)  E2M1[code i of blocks[e, n, g]]

    blocks   uint8 [E, N, K / 32, 16]   two codes a byte, the lower four bits first
    scales   uint8 [E, N, K / 32]       E8M0: an exponent; 255 is NaN
    E2M1     sign, two bits of exponent, one of mantissa: 0, 0.5, 1, 1.5, 2, 3, 4, 6, and the same below zero

``gate_up_proj_blocks`` and ``gate_up_proj_scales`` are one stack ``gate_up_proj [E, K, N]``, which is what transformers
(5.23, ``integrations/mxfp4.py``) makes of them, transposed. Every value is one of bf16's. An expert's matrix is
made when it is read, alone.
"""

import torch
from torch import Tensor

from halfbyte.errors import InputError
from halfbyte.hf.models.checkpoint import Checkpoint

BLOCK = 32
"""Values that share a scale."""
BIAS = 127
"""Of the exponents."""
ROWS = 64
"""So many are made at once, since what their codes are looked up by takes as much room as they."""
MAGNITUDES = (0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0)
BLOCKS, SCALES = "_blocks", "_scales"


class Mxfp4Checkpoint:
    """The tensors of a folder with experts in MXFP4 as those of the dense model.

    It has what :class:`~halfbyte.hf.models.checkpoint.Checkpoint` has.

    Raises:
        InputError: blocks lack scales, or the other way round, or their shapes do not fit; or there are none.
    """

    quantized: dict[str, torch.Size]

    def __init__(self, held: Checkpoint) -> None:
        self.held, self.quantized = held, {}
        self.files, self.where = held.files, held.where
        known = set(held.names)
        parts = [name for name in held.names if name.endswith((BLOCKS, SCALES))]
        self._stacks = {name.removesuffix(BLOCKS).removesuffix(SCALES): None for name in parts}
        for stack in self._stacks:
            blocks, scales = stack + BLOCKS, stack + SCALES
            for part, other in ((blocks, scales), (scales, blocks)):
                if part not in known:
                    raise InputError(
                        f"{part} is missing in {held.where}, beside {other}, which is {list(held.form(other).shape)}: "
                        "copy the model's folder again."
                    )
            shape, wanted = held.form(blocks).shape, (*held.form(scales).shape, BLOCK // 2)
            if len(wanted) != 4 or tuple(shape) != wanted:
                raise InputError(
                    f"{blocks} is {list(shape)} and {scales} is {list(wanted[:-1])}, but MXFP4 has [experts, rows, "
                    "groups, 16] and [experts, rows, groups]: the checkpoint is damaged; copy the model's folder again."
                )
        if not self._stacks:
            raise InputError(
                f"The weights in {held.where} are not in MXFP4, as config.json says they are: no tensor's name ends in "
                "_blocks."
            )
        self.names = [*self._stacks, *(name for name in held.names if name not in parts)]

    def form(self, name: str) -> Tensor:
        """Return the tensor ``name`` on the meta device."""
        if name not in self._stacks:
            return self.held.form(name)
        experts, rows, groups = self.held.form(name + SCALES).shape
        return torch.empty((experts, groups * BLOCK, rows), dtype=torch.bfloat16, device="meta")

    def read(self, name: str) -> Tensor:
        """Return the tensor ``name``, of a stack all of it, bf16 ``[E, K, N]``."""
        if name not in self._stacks:
            return self.held.read(name)
        return torch.stack([self.read_row(name, number) for number in range(self.form(name).shape[0])])

    def read_row(self, name: str, number: int) -> Tensor:
        """Return ``tensor[number]`` of the tensor ``name``, of a stack bf16 ``[K, N]``, and read no more."""
        if name not in self._stacks:
            return self.held.read_row(name, number)
        blocks, scales = (self.held.read_row(name + part, number) for part in (BLOCKS, SCALES))
        if blocks.dtype != torch.uint8 or scales.dtype != torch.uint8:
            raise InputError(
                f"{name} has blocks in {blocks.dtype} and scales in {scales.dtype}, but MXFP4's are in torch.uint8: "
                "take the model's published files."
            )
        return dequantize(blocks, scales).T


def dequantize(blocks: Tensor, scales: Tensor) -> Tensor:
    """Return the values, bf16 ``[..., 32 G]``.

    Args:
        blocks: uint8 ``[..., G, 16]``.
        scales: uint8 ``[..., G]``.
    """
    codes = torch.tensor([*MAGNITUDES, *(-value for value in MAGNITUDES)], dtype=torch.bfloat16)
    pairs = torch.stack([codes.repeat(16), codes.repeat_interleave(16)], -1)  # [256, 2], by the byte
    powers = torch.ldexp(torch.ones(256), torch.arange(256) - BIAS).bfloat16()
    powers[-1] = torch.nan
    values = torch.empty((*blocks.shape[:-1], BLOCK), dtype=torch.bfloat16)
    for some, held, scale in zip(*(torch.split(x, ROWS) for x in (values, blocks, scales)), strict=True):
        torch.mul(pairs[held.int()].flatten(-2), powers[scale.int()].unsqueeze(-1), out=some)
    return values.flatten(-2)

"""A GGUF file of a mixture of experts as a checkpoint: each expert's matrices under their names in the model.

Names and orders of rows are those with which such files are written (:mod:`halfbyte.hf.models.gguf_form`), the other
way. Of the experts of a layer, which are one tensor, the one that is asked for is expanded.
"""

import logging
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from gguf.quants import dequantize
from torch import Tensor
from transformers import PreTrainedModel

from halfbyte.hf.models.checkpoint import Tensors
from halfbyte.hf.models.foreign.gguf import GgufCheckpoint, open_gguf
from halfbyte.hf.models.gguf_form.family import FORMS
from halfbyte.hf.models.gguf_form.mixtures import family_of
from halfbyte.hf.models.gguf_form.names import EXPERT, Names, plain_target

logger = logging.getLogger(__name__)


def gguf_tensors(file: Path, model: PreTrainedModel) -> Tensors:
    """Return the tensors of a GGUF file under their names in the model.

    Args:
        file: the GGUF file.
        model: what its configuration describes, without memory, its experts apart.

    Raises:
        InputError: as :func:`halfbyte.hf.models.foreign.gguf.open_gguf`, or it is a mixture that is not known.
    """
    is_known = family_of(open_gguf(file).fields) is not None
    return GgufMixture(file, model) if is_known else GgufCheckpoint(file, model)


class _Place(NamedTuple):
    """Where a tensor of the model lies: in which of the file's, as which expert of those, and its name without that."""

    parts: list[Any]
    expert: int | None
    target: str


class GgufMixture:
    """See above; it has what :class:`~halfbyte.hf.models.checkpoint.Checkpoint` has.

    Args:
        file: the GGUF file.
        model: what its configuration describes, without memory, its experts apart.
    """

    quantized: dict[str, torch.Size]

    def __init__(self, file: Path, model: PreTrainedModel) -> None:
        self.files, self.where, self.quantized = [file], file, {}
        text = model.config.get_text_config()
        self._names = Names(FORMS[text.model_type], text)
        held = {tensor.name: tensor for tensor in open_gguf(file).tensors}
        self._places: dict[str, _Place] = {}
        for name in model.state_dict():
            target, number = plain_target(name), None
            if expert := EXPERT.fullmatch(target):
                target, number = f"{expert[1]}.{expert[3]}", int(expert[2])
            parts = self._names.parts(target)
            if parts is not None and all(part in held for part in parts):
                self._places[name] = _Place([held[part] for part in parts], number, target)
        self.names = list(self._places)
        read = {part.name for place in self._places.values() for part in place.parts}
        if unused := sorted(held.keys() - read):
            logger.warning("%s has tensors that the model has no place for: %s.", file, ", ".join(unused[:6]))

    def form(self, name: str) -> Tensor:
        """Return the tensor ``name`` on the meta device."""

        def empty(part: Any, expert: int | None) -> Tensor:
            shape = [int(size) for size in reversed(part.shape)]
            return torch.empty(shape if expert is None else shape[1:], dtype=torch.bfloat16, device="meta")

        return self._made(name, empty)

    def read(self, name: str) -> Tensor:
        """Return the tensor ``name``, fp32."""

        def expanded(part: Any, expert: int | None) -> Tensor:
            values = dequantize(part.data if expert is None else part.data[expert], part.tensor_type)
            return torch.from_numpy(np.array(values, dtype=np.float32))

        return self._made(name, expanded).contiguous()

    def _made(self, name: str, piece: Callable[[Any, int | None], Tensor]) -> Tensor:
        place = self._places[name]
        return self._names.together(place.target, [piece(part, place.expert) for part in place.parts])

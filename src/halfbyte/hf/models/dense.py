"""The dense model that is exported, tensor by tensor: an adapter in its base, or a model as it lies.

Whatever a folder holds, what leaves it is the same: tensors by their names, made one at a time; a configuration;
and the files beside them, which say what texts become and where answers end. Those that lie with an adapter go before
those of its base.
"""

import contextlib
import math
import shutil
import tempfile
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor
from transformers import AutoTokenizer, PreTrainedTokenizerBase

from halfbyte.choices import Onto
from halfbyte.errors import InputError, named
from halfbyte.hf.models.adapter_files import BESIDE
from halfbyte.hf.models.base_weights import BaseWeights
from halfbyte.hf.models.check import check_finite
from halfbyte.hf.models.config import HalfbyteConfig
from halfbyte.hf.models.configs import ADAPTER, config_at, say_remote_code, sentence
from halfbyte.hf.models.foreign.packed import packing_of
from halfbyte.hf.models.hub import Place, locate
from halfbyte.hf.models.merging import Merged, Planned
from halfbyte.hf.models.quantize_files import copy_others
from halfbyte.hf.models.quantizer import dense_dtype

CARDS = ("README.md", ADAPTER, "converted.json")
"""Files beside a base that are not the exported model's."""


class Written(Protocol):
    """A model that is written to a folder."""

    config: Any

    @property
    def adapter(self) -> Path | None:
        """The folder of the adapter that is in it, or None."""

    @property
    def base(self) -> BaseWeights:
        """The weights of the base."""

    @property
    def architecture(self) -> str:
        """The class that opens it."""

    @property
    def values(self) -> int:
        """Values of all tensors."""

    @property
    def sizes(self) -> dict[str, int]:
        """Bytes of every tensor, by its name in the files."""


class Dense(Written, Protocol):
    """A dense model whose tensors are made when they are asked for."""

    @property
    def tensors(self) -> Mapping[str, Planned]:
        """What is to be made, by its name in the files."""

    def read(self, name: str) -> Tensor:
        """Return the tensor ``name``, rounded.

        Raises:
            InputError: a value is not finite, or too large for the dtype.
        """


class Plain:
    """A model without an adapter: 16 bits as they lie, 4 and 8 bits (GGUF, GPTQ, AWQ, MXFP4 too) as what they mean.

    Args:
        place: where it is.
        dtype: what its tensors are rounded to.
        trust_remote_code: run code that comes with the model.

    Raises:
        InputError: it cannot be read, or lacks tensors.
    """

    def __init__(self, place: Place, dtype: torch.dtype = torch.bfloat16, *, trust_remote_code: bool = False) -> None:
        self.adapter = None
        config = config_at(place, trust_remote_code)
        foreign = place.gguf is not None or packing_of(config) is not None
        packed = not foreign and getattr(config, "quantization_config", None) is not None
        as_it_lies = HalfbyteConfig(compute_dtype=torch.float32)
        self.base = BaseWeights(
            place, "quantized" if packed else "original", as_it_lies, dtype, trust_remote_code=trust_remote_code
        )
        if self.base.fit.new:
            raise InputError(f"{place.path} has no {named(self.base.fit.new)}: it is not a whole {self.architecture}.")
        self.config = self.base.model.config
        forms = self.base.model.state_dict()
        self.tensors: Mapping[str, Planned] = {
            name: Planned(target, forms[target].shape, self._dtype_of(target, forms[target], dtype))
            for target, name in self.base.names.items()
        }

    @property
    def sizes(self) -> dict[str, int]:
        """Bytes of every tensor, by its name in the files."""
        return {name: math.prod(shape) * dtype.itemsize for name, (_, shape, dtype) in self.tensors.items()}

    @property
    def values(self) -> int:
        """Values of all tensors."""
        return sum(math.prod(planned.shape) for planned in self.tensors.values())

    @property
    def architecture(self) -> str:
        """The class that opens it."""
        return type(self.base.model).__name__

    def read(self, name: str) -> Tensor:
        """Return the tensor ``name``, rounded.

        Raises:
            InputError: a value is not finite, or too large for the dtype.
        """
        planned = self.tensors[name]
        x = self.base.read(planned.target)
        rounded = x.to(planned.dtype) if x.is_floating_point() else x
        check_finite(planned.target, rounded)
        return rounded

    def _dtype_of(self, target: str, form: Tensor, dtype: torch.dtype) -> torch.dtype:
        return dense_dtype(self.base.model, target, dtype) if form.is_floating_point() else form.dtype


def dense_model(
    run: str | Path,
    onto: Onto = "quantized",
    dtype: torch.dtype = torch.bfloat16,
    *,
    base: str | Path | None = None,
    trust_remote_code: bool = False,
) -> Dense:
    """Return the dense model of a run, an adapter, or a model without one.

    Args:
        run: folder of a run, of a PEFT adapter or of a model; a GGUF file; or a hub id.
        onto: of an adapter, which weights of its base it is added to (:mod:`halfbyte.hf.models.base_weights`).
        dtype: what its tensors are rounded to, once.
        base: of an adapter, another place for the base than it names.
        trust_remote_code: run code that comes with the model.

    Raises:
        InputError: there is no such thing, or it cannot be read; or a base is named for what has no adapter.
    """
    place = locate(run)
    if adapter_of(place) is not None:
        return Merged(run, onto, dtype, base=base, trust_remote_code=trust_remote_code)
    if base is not None:
        raise InputError(f"{run} holds no adapter ({ADAPTER}), so there is no base to name for it; leave --base out.")
    return Plain(place, dtype, trust_remote_code=trust_remote_code)


def adapter_of(place: Place) -> Path | None:
    """Return the folder of the adapter that is at ``place``, or None."""
    folder = Path(place.path)
    return folder if place.is_folder and place.gguf is None and (folder / ADAPTER).is_file() else None


def sources(model: Written) -> list[Path]:
    """Return the folders that a dense model is made of."""
    return [folder for folder in (model.adapter, model.base.folder) if folder is not None]


def copy_beside(model: Written, folder: Path) -> None:
    """Copy what lies beside the weights: tokenizer, template, generation settings, licence, code."""
    copy_others(model.base.place, model.base.folder, folder, CARDS)
    for name in BESIDE:
        if model.adapter is not None and (model.adapter / name).is_file():
            shutil.copy(model.adapter / name, folder)


@contextlib.contextmanager
def beside(model: Written) -> Iterator[Path]:
    """Yield a temporary folder with all that lies beside the weights (:func:`copy_beside`)."""
    with tempfile.TemporaryDirectory(prefix="halfbyte-") as folder:
        copy_beside(model, Path(folder))
        yield Path(folder)


def tokenizer_of(model: Written, *, trust_remote_code: bool = False) -> PreTrainedTokenizerBase:
    """Open the tokenizer that goes with the model.

    Raises:
        InputError: there is none.
    """
    with beside(model) as folder:
        try:
            return AutoTokenizer.from_pretrained(folder, trust_remote_code=trust_remote_code)
        except (OSError, ValueError, KeyError) as error:
            say_remote_code(str(model.base.place.path), error)
            raise InputError(
                f"There is no tokenizer with {model.adapter or model.base.place.path}: {sentence(str(error))}"
            ) from error

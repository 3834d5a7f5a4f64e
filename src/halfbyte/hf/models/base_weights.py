"""The weights of a base model as dense tensors, one by one: as it was trained over, or as it was before.

    quantized     what the 4-bit or 8-bit weight stands for: an adapter is trained through that
    original      the weight before it was quantized

A base that lies in 16 bits is quantized here as :func:`halfbyte.load` quantizes it, a tensor at a time; of one that
lies in 4 or 8 bits there is no original.
"""

import re
from collections import Counter
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from halfbyte.choices import Onto
from halfbyte.errors import InputError
from halfbyte.hf.models.apart import ApartCheckpoint, apart, stacks_of
from halfbyte.hf.models.apart import Place as Part
from halfbyte.hf.models.check import Fit, check_weights
from halfbyte.hf.models.checkpoint import Checkpoint, Tensors, weight_files
from halfbyte.hf.models.config import HalfbyteConfig
from halfbyte.hf.models.configs import config_at
from halfbyte.hf.models.converted import converted
from halfbyte.hf.models.foreign.gguf_mixture import gguf_tensors
from halfbyte.hf.models.foreign.packed import packing_of, unpacked
from halfbyte.hf.models.hub import Place
from halfbyte.hf.models.quantize_files import Plan, on_disk, skeleton_of
from halfbyte.hf.models.quantizer import HalfbyteQuantizer, dense_dtype, quantized
from halfbyte.nn import QuantizedLinear
from halfbyte.quant import QuantizedInt8, QuantizedWeight


class BaseWeights:
    """See above.

    Args:
        place: where the base model is.
        onto: which of the two.
        form: how it was quantized for training; of a base that lies in 4 or 8 bits only the dtype counts.
        dtype: of the model that is described.
        auto_class: of the configuration, returns the transformers class to take it for, or None for its own.
        trust_remote_code: run code that comes with the model.
        settings: of the configuration, changed.

    Attributes:
        named: where the base is that was asked for.
        place, folder: where the files are that are read: of another format, those that halfbyte made of it.
        model: on the meta device, all layers dense.
        fit: what the checkpoint lacks.
        names: what each tensor of the model is called in the checkpoint; of tied weights one is there.
        tied: of tied weights, which other one each is.
        stacks: of tensors that hold all experts of a layer, the matrices that they are read as here.
        quantization: how its weights lie, or are quantized; None where all are dense.
        transposed: modules whose weight is ``[in, out]`` (``Conv1D``).

    Raises:
        InputError: it cannot be read, or the original is asked for where there is none.
    """

    def __init__(
        self,
        place: Place,
        onto: Onto,
        form: HalfbyteConfig,
        dtype: torch.dtype,
        *,
        auto_class: Callable[[Any], Any] = lambda _: None,
        trust_remote_code: bool = False,
        settings: Mapping[str, Any] | None = None,
    ) -> None:
        self.onto, self._form, self.named = onto, form, place
        config, self._checkpoint, self.place, self.folder, self.quantization = _opened(
            place, onto, form, trust_remote_code
        )
        for name, value in (settings or {}).items():
            setattr(config, name, value)
        kind = auto_class(config)
        self.model: PreTrainedModel = skeleton_of(config, dtype, trust_remote_code, kind)
        self._checkpoint = apart(self._checkpoint, self.model)
        self._packed = self._checkpoint.quantized
        self.fit: Fit = check_weights(self.model, self._checkpoint, bool(self._packed), head_follows=True)
        self._layers: dict[str, QuantizedLinear] = {}
        if onto == "quantized" and not self._packed and form.bits is not None:
            trained = skeleton_of(config, form.compute_dtype, trust_remote_code, kind)
            quantizer = HalfbyteQuantizer(form, pre_quantized=False)
            quantizer.preprocess_model(trained)
            plan = Plan(trained, self._checkpoint)
            self.quantization = quantizer.quantization_config
            self._layers = {plan.target[name]: layer for name, layer in plan.layers.items()}
        else:
            plan = Plan(self.model, self._checkpoint)
        there = self.model.state_dict()
        self.names = {plan.target[name]: name for name in plan.names if plan.target[name] in there}
        self.transposed = {name for name, module in self.model.named_modules() if isinstance(module, Conv1D)}
        self.tied: dict[str, str] = dict(self.model.all_tied_weights_keys)
        unread = plan.left_dense | self._not_one(plan)
        if unread:
            raise InputError(
                f"{type(self.model).__name__} does not have {min(unread)} from one tensor of its files, but from "
                "several or by a rule of its own, so that it cannot be read by itself; open it with halfbyte.load and "
                "call merge_and_unload()."
            )
        held = self._checkpoint.stacks if isinstance(self._checkpoint, ApartCheckpoint) else None
        self.stacks: Mapping[str, Mapping[str, Part]] = stacks_of(self.names, self.model) if held is None else held

    def read(self, target: str) -> Tensor:
        """Return a tensor by its name in the model: a weight that is quantized in fp32, another one as it lies there.

        What stays dense was rounded to the compute dtype for training, and so it is for ``quantized``; what lies in
        fewer bits has nothing to round, and stays as it lies.
        """
        weight = self.quantized(target)
        if weight is not None:
            dense = weight.dequantize(torch.float32)
            return dense.T.contiguous() if target.rpartition(".")[0] in self.transposed else dense
        x = self._checkpoint.read(self._name(target))
        if self.onto == "quantized" and x.is_floating_point():
            dtype = dense_dtype(self.model, target, self._form.compute_dtype)
            return x if torch.promote_types(x.dtype, dtype) == dtype else x.to(dtype)
        return x

    def quantized(self, target: str) -> QuantizedWeight | QuantizedInt8 | None:
        """Return a weight by its name in the model, ``[out, in]``, in 4 or 8 bits; None if it is dense."""
        name = self._name(target)
        if name in self._packed:
            return self._unpacked(name)
        if target not in self._layers or self.quantization is None:
            return None
        x = self._checkpoint.read(name).to(self._form.compute_dtype)
        weight: QuantizedWeight | QuantizedInt8 = quantized(name, x, self._layers[target], self.quantization)
        return weight

    @property
    def quantized_names(self) -> set[str]:
        """Names in the model of the weights in 4 or 8 bits."""
        return set(self._layers) | {target for target, name in self.names.items() if name in self._packed}

    @property
    def is_quantized(self) -> bool:
        """Whether some of it is what 4 or 8 bits stand for."""
        return bool(self._layers or self._packed)

    def _not_one(self, plan: Plan) -> set[str]:
        """Return the parameters that no tensor of the checkpoint is by itself, of those that it is to have."""
        sources = Counter(plan.target[name] for name in plan.names)
        ignored = [re.compile(pattern) for pattern in self.model._keys_to_ignore_on_load_missing or ()]
        found = set()
        for name, _ in self.model.named_parameters():
            first = self.tied.get(name, name)  # of weights that are one, one is there, or all are
            held = {sources[one] for one in (first, *(one for one, of in self.tied.items() if of == first))}
            is_ignored = name in self.fit.new or any(pattern.search(name) for pattern in ignored)
            if max(held) != 1 and not is_ignored:
                found.add(name)
        return found

    def _name(self, target: str) -> str:
        return self.names.get(target) or self.names[self.tied[target]]

    def _unpacked(self, name: str) -> QuantizedWeight | QuantizedInt8:
        stem = name.removesuffix("weight")
        parts = {key: self._checkpoint.read(key) for key in self._checkpoint.names if key.startswith(stem)}
        if self._checkpoint.form(name).shape == self._packed[name]:
            return QuantizedInt8.from_state_dict(parts, name, self._form.compute_dtype)
        return QuantizedWeight.from_state_dict(parts, name)


def _opened(
    place: Place, onto: Onto, form: HalfbyteConfig, trust_remote_code: bool
) -> tuple[Any, Tensors, Place, Path, HalfbyteConfig | None]:
    """Return configuration, tensors, place and folder of a base model, and how its weights lie, if in few bits."""
    config = config_at(place, trust_remote_code)
    packing = None if place.gguf else packing_of(config)
    if (place.gguf or packing) and onto == "quantized":
        place, _ = converted(place, packing, form, trust_remote_code)
        config, packing = config_at(place, trust_remote_code), None
    folder = on_disk(place)
    held = config.__dict__.pop("quantization_config", None)
    lies = None if held is None or packing else HalfbyteConfig.from_folder(_dict(held))
    if lies is not None and onto == "original":
        raise InputError(
            f"{place.path} lies in {lies.bits} bits itself, so there is no original "
            "to merge onto; name the 16-bit model that it was made of with --base, or merge onto the quantized one."
        )
    if place.gguf:
        skeleton = skeleton_of(config, torch.float32, trust_remote_code)
        return config, gguf_tensors(place.gguf, skeleton), place, folder, None
    files = Checkpoint(weight_files(folder, getattr(config, "transformers_weights", None)))
    return config, unpacked(files, packing) if packing else files, place, folder, lies


def _dict(held: Any) -> dict[str, Any]:
    about: dict[str, Any] = held if isinstance(held, dict) else held.to_dict()
    return about

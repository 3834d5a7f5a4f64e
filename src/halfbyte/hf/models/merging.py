"""The dense model that a base and an adapter are together, tensor by tensor.

    W' = W + s B A          LoRA; for other kinds what PEFT's own ``merge`` makes of W

in fp32, rounded once. PEFT (0.21) puts the adapter on the model without memory (the meta device), so that the adapter's
tensors alone are in memory, and a layer gets its weight when its turn comes: a model of any size takes a few tensors.

A weight that is one with another in the base (the head with the embedding) is so still if both get the same; else it
becomes a tensor of its own.
"""

import contextlib
import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import torch
from peft.tuners.lora.layer import ParamWrapper
from peft.tuners.tuners_utils import BaseTunerLayer
from peft.utils.other import AuxiliaryTrainingWrapper, ModulesToSaveWrapper, TrainableTokensWrapper
from torch import Tensor, nn

from halfbyte.choices import Onto
from halfbyte.errors import InputError, named
from halfbyte.hf.layers.expert_adapters import merged_weight
from halfbyte.hf.layers.experts import Experts
from halfbyte.hf.models.adapter_files import put_adapter
from halfbyte.hf.models.base_files import Source
from halfbyte.hf.models.base_format import base_format
from halfbyte.hf.models.base_weights import BaseWeights
from halfbyte.hf.models.check import check_finite
from halfbyte.hf.models.config import HalfbyteConfig
from halfbyte.hf.models.configs import ADAPTER, json_of, sentence
from halfbyte.hf.models.heads import adapter_classes, adapter_task, check_task, class_settings
from halfbyte.hf.models.hub import locate
from halfbyte.hf.models.loader import base_of_adapter
from halfbyte.hf.models.quantizer import dense_dtype

NAME = "default"


class Planned(NamedTuple):
    """A tensor that is to be made: its name in the model, and what it is like."""

    target: str
    shape: torch.Size
    dtype: torch.dtype


class Merged:
    """Base and adapter as one dense model, whose tensors are made when they are asked for.

    Args:
        adapter: folder of a run or of a PEFT adapter, or a hub id.
        onto: which weights it is added to (:mod:`halfbyte.hf.models.base_weights`).
        dtype: what sums are rounded to.
        base: another place for the base model than the adapter names.
        trust_remote_code: run code that comes with the model.

    Attributes:
        adapter: the folder of the adapter.
        base: the weights of the base.
        config: of the dense model.
        tensors: what is to be made, by its name in the files.

    Raises:
        InputError: there is no such adapter or base, they do not fit, or the adapter is part of no weight.
    """

    def __init__(
        self,
        adapter: str | Path,
        onto: Onto = "quantized",
        dtype: torch.dtype = torch.bfloat16,
        *,
        base: str | Path | None = None,
        trust_remote_code: bool = False,
    ) -> None:
        place = locate(adapter)
        self.adapter = folder = Path(place.path)
        if not (folder / ADAPTER).is_file():
            raise InputError(f"{adapter} holds no adapter ({ADAPTER}); give the folder of a run or of a PEFT adapter.")
        where = base_of_adapter(place) if base is None else locate(base)
        task = adapter_task(json_of(folder / ADAPTER))
        classes = adapter_classes(folder) if task == "classify" else None
        self.base = BaseWeights(
            where, onto, base_format(folder) or HalfbyteConfig(), dtype,
            auto_class=lambda config: check_task(config, task, where.path), trust_remote_code=trust_remote_code,
            settings=class_settings(classes) if classes else None,
        )  # fmt: skip
        self._model = model = self.base.model
        model.opened_from = Source(self.base.place, trust_remote_code)
        forms = {name: x for name, x in model.state_dict().items()}
        heads = {id(x) for x in (model.get_input_embeddings(), model.get_output_embeddings()) if x is not None}
        self._heads = {f"{name}.weight" for name, x in model.named_modules() if id(x) in heads}
        rows = model.config.get_text_config().vocab_size if self._heads else 0
        self._adapted = put_adapter(model, folder)
        self._check_kind()
        self.config = model.config
        self._grown = self.config.get_text_config().vocab_size if self._heads else 0
        self._is_grown = self._grown != rows
        for name, x in self._adapted.named_parameters():
            if not x.is_meta and x.is_floating_point():
                check_finite(f"The adapter's {name.removeprefix('base_model.model.')}", x)
                x.data = x.data.float()
        lacking = [name for name in self.base.fit.new if self._wrapper(name.rpartition(".")[0])[0] is None]
        if lacking:
            raise InputError(
                f"Neither the base {where.path} nor the adapter {folder} has {named(lacking)}; the model was trained "
                "with random values there, which are lost."
            )
        self._made: tuple[str, dict[str, Tensor]] = ("", {})
        self.tensors = dict(self._planned(forms, dtype))

    @property
    def sizes(self) -> dict[str, int]:
        """Bytes of every tensor, by its name in the files."""
        return {name: math.prod(shape) * dtype.itemsize for name, (_, shape, dtype) in self.tensors.items()}

    @property
    def targets(self) -> dict[str, str]:
        """What each tensor is called in the model, by its name in the files."""
        return {name: planned.target for name, planned in self.tensors.items()}

    def wrapper(self, target: str) -> nn.Module | None:
        """Return what PEFT has put around the module that a tensor belongs to, by the tensor's name in the model."""
        return self._wrapper(target.rpartition(".")[0])[0]

    @property
    def values(self) -> int:
        """Values of all tensors."""
        return sum(math.prod(planned.shape) for planned in self.tensors.values())

    @property
    def architecture(self) -> str:
        """The class that opens it."""
        return type(self._model).__name__

    def read(self, name: str) -> Tensor:
        """Return the tensor ``name``, rounded.

        Raises:
            InputError: a value is not finite, or too large for the dtype.
        """
        planned = self.tensors[name]
        x = self.exact(planned.target)
        rounded = x.to(planned.dtype) if x.is_floating_point() else x
        check_finite(planned.target, rounded)
        return rounded

    def exact(self, target: str) -> Tensor:
        """Return a tensor by its name in the model: the sum in fp32, or as the base has what no adapter touches."""
        path, _, key = target.rpartition(".")
        wrapper, inner = self._wrapper(path)
        return self._base(target) if wrapper is None else self._merged(path, wrapper, inner)[key]

    def _check_kind(self) -> None:
        kind = next(iter(self._adapted.peft_config.values()))
        if kind.is_prompt_learning or not hasattr(self._adapted.base_model, "merge_and_unload"):
            raise InputError(
                f"An adapter of the kind {kind.peft_type.value} changes no weights, so there is nothing to merge; open "
                "it beside its base."
            )
        for layer in (module for module in self._model.modules() if isinstance(module, BaseTunerLayer)):
            lacks = any(x.is_meta for name, x in layer.named_parameters() if not name.startswith("base_layer."))
            if lacks or not hasattr(layer, "merge"):
                raise InputError(
                    f"An adapter of the kind {kind.peft_type.value} is not merged from files; open it with "
                    "halfbyte.load and call merge_and_unload(), or serve it beside its base."
                )

    def _planned(self, forms: dict[str, Tensor], dtype: torch.dtype) -> Iterator[tuple[str, Planned]]:
        """Yield name and form of each tensor that is to be there."""
        untied = self._untied()
        if untied:
            for config in (self.config, self.config.get_text_config()):
                config.tie_word_embeddings = False
        for target in dict.fromkeys((*self.base.names, *untied, *self.base.fit.new)):
            x = forms[target]
            shape = x.shape
            if target in self._heads and self._is_grown:
                shape = torch.Size((self._grown, *shape[1:]))
            kind = dense_dtype(self._model, target, dtype) if x.is_floating_point() else x.dtype
            yield self.base.names.get(target, target), Planned(target, shape, kind)

    def _untied(self) -> list[str]:
        """Return the tensors that are one with another in the base, and no more with the adapter."""
        found = []
        for target, source in self.base.tied.items():
            paths = [name.rpartition(".")[0] for name in (target, source)]
            if target in self.base.names or all(self._wrapper(path)[0] is None for path in paths):
                continue
            if not torch.equal(self.exact(target).float(), self.exact(source).float()):
                found.append(target)
        return found

    def _wrapper(self, path: str) -> tuple[nn.Module | None, str]:
        """Return what PEFT has put around the module ``path``, or one that holds it, and the path within that."""
        module: nn.Module = self._model
        parts = path.split(".") if path else []
        for depth, part in enumerate(parts, 1):
            module = getattr(module, part)
            if isinstance(module, BaseTunerLayer | AuxiliaryTrainingWrapper):
                return module, ".".join(parts[depth:])
        return None, ""

    def _merged(self, path: str, wrapper: nn.Module, inner: str) -> dict[str, Tensor]:
        """Return the parameters of a module with the adapter in them, in fp32."""
        if self._made[0] == path:
            return self._made[1]
        self._made = "", {}
        if isinstance(wrapper, ModulesToSaveWrapper):
            module = wrapper.modules_to_save[NAME].get_submodule(inner)
            made = {key: x.detach() for key, x in module.named_parameters(recurse=False)}
        elif isinstance(wrapper, TrainableTokensWrapper):
            with self._filled(path, wrapper.token_adapter.base_layer):
                made = {"weight": wrapper.token_adapter.get_merged_weights([NAME]).detach().clone()}
        elif isinstance(wrapper, ParamWrapper) and isinstance(wrapper.get_base_layer(), Experts):
            number, _, name = inner.partition(".")
            weight = merged_weight(wrapper, int(number), name, self.base.read(f"{path}.weight").float(), [NAME])
            made = {"weight": weight}
            if f"{path}.bias" in self.base.names:
                made["bias"] = self.base.read(f"{path}.bias")
        else:
            layer: Any = wrapper
            base = layer.get_base_layer()
            with self._filled(path, base):
                try:
                    layer.merge(safe_merge=True, adapter_names=[NAME])
                except (RuntimeError, ValueError) as error:  # PEFT's own refusals, by kind of adapter
                    raise InputError(f"PEFT cannot merge the adapter into {path}: {sentence(str(error))}") from error
                made = {key: x.detach() for key, x in layer.get_base_layer().named_parameters(recurse=False)}
                if layer.get_base_layer() is base:
                    layer.merged_adapters.clear()
                else:  # PEFT has put another layer in its place
                    layer.unmerge()
        self._made = path, made
        return made

    @contextlib.contextmanager
    def _filled(self, path: str, module: nn.Module) -> Iterator[None]:
        """Let a module have its weights meanwhile, in fp32."""
        held = dict(module.named_parameters(recurse=False))
        for key, x in held.items():
            module._parameters[key] = nn.Parameter(self._full(f"{path}.{key}", x), requires_grad=False)
        try:
            yield
        finally:
            module._parameters.update(held)

    def _full(self, target: str, form: Tensor) -> Tensor:
        """Return a tensor of the base in fp32, with zeros for rows that were added: those are the adapter's."""
        own = self._base(target) if form.is_meta else form.detach()
        if own.shape == form.shape:
            return own.float()
        full = torch.zeros(form.shape, dtype=torch.float32)
        full[: len(own)] = own
        return full

    def _base(self, target: str) -> Tensor:
        """Return a tensor of the base; one that came with the adapter (biases, embeddings that grew) as it came."""
        path, _, key = target.rpartition(".")
        module: Any = self._model.get_submodule(path)
        module = module.get_base_layer() if isinstance(module, BaseTunerLayer) else module
        own = getattr(module, "_parameters", {}).get(key)
        return self.base.read(target) if own is None or own.is_meta else own.detach()

"""LoRA on experts: PEFT's (0.21) way of naming and saving it, our way of computing it.

PEFT adapts a stack of experts by its name (``target_parameters``): of all experts together it holds ``A [E·r, in]``, an
expert's rows together, and ``B [out, r·E]``, an expert's columns E apart, and computes with ``W + BA`` of all experts.
Here only the rows of an expert pass its A and B, after dropout, which PEFT refuses there; files are PEFT's.
PEFT's wrappers of the stacks of one module hold each other, ``down_proj``'s outermost, so that files call its A
``experts.lora_A`` and that of ``gate_up_proj``, if both are there, ``experts.base_layer.lora_A``.
"""

from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from peft import LoraConfig
from peft.tuners.lora.layer import LoraLayer, ParamWrapper
from peft.tuners.tuners_utils import check_target_module_exists
from peft.utils.other import get_pattern_key
from torch import Tensor, nn

from halfbyte.errors import InputError, named
from halfbyte.hf.layers.adapters import refuse_merge
from halfbyte.hf.layers.expert_targets import WEIGHT, has_experts
from halfbyte.hf.layers.experts import STACKS, Adapters, Experts
from halfbyte.nn.experts import StackedLowRank, turned

NESTED = ".base_layer"
"""What a file has in a name for each of PEFT's wrappers that are around."""


class Stack(NamedTuple):
    """A stack of experts that an adapter is on.

    Attributes:
        path: of the module that holds it.
        parameter: its name there.
        experts: how many matrices it has.
    """

    path: str
    parameter: str
    experts: int

    @property
    def name(self) -> str:
        """Of the parameter, as PEFT's patterns and ``target_parameters`` have it."""
        return f"{self.path}.{self.parameter}"

    @property
    def members(self) -> list[str]:
        """What each expert's matrix is called."""
        return [f"{self.path}.{number}.{self.parameter}" for number in range(self.experts)]


def apart(a: Tensor, b: Tensor, experts: int) -> tuple[Tensor, Tensor]:
    """Return views of a stack's A ``[E·r, in]`` and B ``[out, r·E]``: ``[E, r, in]``, ``[E, out, r]``."""
    return a.view(experts, -1, a.shape[1]), b.view(b.shape[0], -1, experts).permute(2, 0, 1)


def together(pairs: Iterable[tuple[Tensor, Tensor]]) -> tuple[Tensor, Tensor]:
    """Inverse of :func:`apart`, of ``[r, in]`` and ``[out, r]`` of each expert; all have one rank."""
    all_a, all_b = zip(*pairs, strict=True)
    return torch.cat(all_a), torch.stack(all_b, dim=2).flatten(1)


def stacks_of(folder: Path, config: LoraConfig, rows: Mapping[str, int]) -> dict[str, Stack]:
    """Return the stacks that an adapter is on, by what its file calls their A and B.

    Args:
        folder: of the adapter.
        config: as it lies beside the file.
        rows: of each A in the file, by its name without ``base_model.model.`` and ``.lora_A.weight``.

    Raises:
        InputError: names, rank and file are not of one adapter.
    """
    named_so = [*(config.target_parameters or ())]
    within: dict[str, list[str]] = {}
    for name in rows if named_so else ():
        within.setdefault(name.replace(NESTED, ""), []).append(name)
    found = {}
    for path, names in within.items():
        whole = {name.rpartition(".")[2] for name in named_so if "." in name and _is_of(path, name)}
        if not whole and (not config.target_modules or not check_target_module_exists(config, path)):
            whole = {name for name in named_so if "." not in name}
        of_one = {rank_of(config, path), rank_of(config, path + WEIGHT)}
        if not whole or (whole == {"weight"} and rows[names[0]] in of_one):  # a layer that is named by its parameter
            continue
        parameters = sorted(whole, key=lambda name: STACKS.index(name) if name in STACKS else -1)
        names = sorted(names, key=len, reverse=True)
        if len(names) != len(parameters) or len(whole - {*STACKS}) > 1:
            raise InputError(
                f"The adapter {folder} is on {named(parameters)} of {path} by its adapter_config.json "
                f"(target_parameters), and its file has {named(names)}, which PEFT does not write so; copy both again."
            )
        for name, parameter in zip(names, parameters, strict=True):
            rank = rank_of(config, f"{path}.{parameter}")
            if rows[name] % rank:
                raise InputError(
                    f"The adapter {folder} has {rows[name]} rows in A of {path}.{parameter}, no multiple of its rank, "
                    f"which adapter_config.json says is {rank}; copy both again."
                )
            found[name] = Stack(path, parameter, rows[name] // rank)
    return found


def names_in_file(stacks: Iterable[Stack]) -> dict[str, Stack]:
    """Inverse of :func:`stacks_of`: return what a file calls the A and B of stacks, all that an adapter is on."""
    found = {}
    around: dict[str, int] = {}
    for stack in sorted(stacks, key=lambda one: -STACKS.index(one.parameter) if one.parameter in STACKS else 1):
        depth = around.get(stack.path, 0)
        found[stack.path + NESTED * depth] = stack
        around[stack.path] = depth + 1
    return found


def rank_of(config: LoraConfig, name: str) -> int:
    """Return the rank of the module or parameter ``name``, as PEFT (0.21) has it."""
    patterns = config.rank_pattern or {}
    return int(patterns.get(get_pattern_key(list(patterns), name), config.r))


def _is_of(path: str, parameter: str) -> bool:
    """Whether ``parameter``, or the end of its name, is one of the module ``path``."""
    return f".{path}.{parameter.rpartition('.')[2]}".endswith(f".{parameter}")


def stack_misfits(
    model: nn.Module, folder: Path, config: Any, shapes: Mapping[str, tuple[Sequence[int], Sequence[int]]]
) -> list[str]:
    """Return what tells an adapter's stacks from those of a base model, a clause each.

    Args:
        model: the base model.
        folder: of the adapter.
        config: of the adapter.
        shapes: of each A and B in its file, by the name without ``base_model.model.`` and ``.lora_A.weight``.
    """
    if not isinstance(config, LoraConfig):
        return []
    modules = {name.replace(NESTED, ""): module for name, module in model.named_modules()}
    told = []
    for name, stack in stacks_of(folder, config, {name: a[0] for name, (a, _) in shapes.items()}).items():
        (_, width), (out, _) = shapes[name]
        experts = modules.get(stack.path)
        if isinstance(experts, Experts):
            count, *wanted = experts.shapes.get(stack.parameter, (0, 0, 0))
            given = [width, out] if experts.swapped else [out, width]
            if (stack.experts, given) != (count, wanted):
                theirs = f"{count} of {wanted}" if count else "no such matrix"
                told.append(f"{stack.name} has {stack.experts} experts of {given}, and the base model's {theirs}")
        elif experts is None and not has_experts(model):
            told.append(
                f"{stack.name} has {stack.experts} experts of {[out, width]}, and the base model has no experts there"
            )
    return told


class LoraExperts(ParamWrapper):
    """PEFT's wrapper of a stack of experts, with our forward; wrappers of several stacks hold each other."""

    def forward(self, x: Tensor, *args: Any, adapters: Adapters | None = None, **kwargs: Any) -> Tensor:
        """What :meth:`Experts.forward` returns, with the adapters that are active here too.

        Raises:
            InputError: adapters have another dropout each, or rows are to have an adapter each, as PEFT refuses too.
        """
        if kwargs.pop("adapter_names", None):
            raise InputError(
                "Rows cannot each have their adapter where it is on experts; activate one with set_adapter."
            )
        found = dict(adapters or {})
        names = [] if self.disable_adapters else [name for name in self.active_adapters if name in self.lora_A]
        if names:
            dropouts = {self._dropout(name) for name in names}
            if len(dropouts) > 1:
                raise InputError(f"The adapters {named(names)} of experts have another dropout each; activate one.")
            found[self.parameter_name] = ([low_rank(self, name) for name in names], dropouts.pop())
        y: Tensor = self.base_layer(x, *args, adapters=found, **kwargs)
        return y

    def merge(self, safe_merge: bool = False, adapter_names: list[str] | None = None) -> None:
        """Refuse, as other layers over 4-bit weights do."""
        refuse_merge()

    def _dropout(self, name: str) -> float:
        dropout = self.lora_dropout[name]
        return float(dropout.p) if isinstance(dropout, nn.Dropout) and dropout.training else 0.0


LoraExperts.__name__ = ParamWrapper.__name__
"""By which PEFT (0.21) tells that a stack has a wrapper, where one more adapter goes on it."""


def low_rank(wrapper: Any, name: str) -> StackedLowRank:
    """Return the adapter ``name`` of PEFT's wrapper of a stack, expert by expert; its tensors are views."""
    a, b = wrapper.lora_A[name].weight, wrapper.lora_B[name].weight
    a, bt = a.view(wrapper.num_experts, -1, a.shape[1]), turned(b, wrapper.num_experts)
    first, second = (bt, a) if wrapper.get_base_layer().swapped else (a, bt)
    return StackedLowRank(first, second, wrapper.scaling[name])


def merged_weight(wrapper: Any, expert: int, layer: str, weight: Tensor, names: Sequence[str] | None = None) -> Tensor:
    """Return a matrix of an expert with its adapters in it, fp32 ``[out, in]``.

    Args:
        wrapper: PEFT's outermost wrapper of a stack, which holds those of other stacks.
        expert: its number.
        layer: the name of its layer.
        weight: the matrix without adapters, fp32.
        names: of the adapters; None takes the active ones.
    """
    layers_of = wrapper.get_base_layer().layers_of
    while isinstance(wrapper, ParamWrapper):
        layers = layers_of[wrapper.parameter_name]
        if layer in layers:
            first = layers.index(layer) * len(weight)
            for name in names or wrapper.active_adapters:
                if name in wrapper.lora_A:
                    part = low_rank(wrapper, name)
                    rows = part.bt[expert, :, first : first + len(weight)].T.float()
                    weight = torch.addmm(weight, rows, part.a[expert].float(), alpha=part.scaling)
        wrapper = wrapper.base_layer
    return weight.detach()


def merged_experts(wrapper: LoraExperts, dtype: torch.dtype, names: Sequence[str] | None = None) -> Experts:
    """Return the experts below a wrapper with dense layers, each the sum of what it stands for and its adapters'.

    Args:
        wrapper: the outermost.
        dtype: of the dense layers where the experts' have no compute dtype.
        names: of the adapters; None takes the active ones.
    """
    experts: Experts = ParamWrapper.get_base_layer(wrapper)
    for number in range(experts.num_experts):
        for layer in [layer for layers in experts.layers_of.values() for layer in layers]:
            frozen: Any = experts.get_submodule(f"{number}.{layer}")
            weight = merged_weight(wrapper, number, layer, frozen.dequantize(torch.float32), names)
            dense = nn.Linear(frozen.in_features, frozen.out_features, bias=False, device="meta")
            dense.weight = nn.Parameter(weight.to(frozen.compute_dtype or dtype), requires_grad=False)
            dense.bias = frozen.bias
            experts.get_submodule(str(number)).add_module(layer, dense)
    return experts


def set_dropout(model: nn.Module, name: str, dropout: float) -> None:
    """Give the adapter ``name`` a dropout, on experts too, for which PEFT's configuration cannot have one."""
    for module in model.modules():
        if isinstance(module, LoraLayer) and name in module.lora_dropout:
            module.lora_dropout[name] = nn.Dropout(dropout) if dropout else nn.Identity()

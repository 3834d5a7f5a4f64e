"""A checkpoint that holds experts in stacks, read as if it held their matrices: one expert is in memory at a time."""

from collections.abc import Callable, Mapping
from itertools import product
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor
from transformers import PreTrainedModel
from transformers.conversion_mapping import get_model_conversion_mapping
from transformers.core_model_loading import Interleave, WeightConverter

from halfbyte.hf.layers.experts import Experts
from halfbyte.hf.layers.stacks import TakeApart, check_stack
from halfbyte.hf.models.check import Names
from halfbyte.hf.models.checkpoint import Checkpoint, Tensors
from halfbyte.hf.models.foreign.mxfp4 import Mxfp4Checkpoint

KINDS = {"weight": "", "bias": "_bias"}
"""Of a layer's parameters, how the names of their stacks end."""


class Place(NamedTuple):
    """Where a matrix lies.

    Attributes:
        stack: the name of the tensor that holds it.
        expert: its number there.
        part: which of ``parts`` of its rows.
        parts: gate and up, or one.
        of_inputs: whether the stack has it transposed.
        alternates: whether the rows of its parts take turns.
    """

    stack: str
    expert: int
    part: int
    parts: int
    of_inputs: bool
    alternates: bool = False


def apart(held: Tensors, model: PreTrainedModel) -> Tensors:
    """Return the tensors of a checkpoint, with stacks of experts taken apart.

    Args:
        held: the checkpoint.
        model: its, on the meta device, whose experts were taken apart.

    Raises:
        InputError: a stack has another shape than the model's configuration says.
    """
    mixtures = {path: module for path, module in model.named_modules() if isinstance(module, Experts)}
    if not mixtures:
        return held
    rules = Names(model)
    stacks: dict[str | None, tuple[str, bool]] = {}
    for entry in rules.converters:
        *before, last = entry.operations
        if isinstance(last, TakeApart) and all(isinstance(one, Interleave) and one.dim == 1 for one in before):
            stacks |= {source: (last.stack, bool(before)) for source in entry.source_patterns}
    found: dict[str, dict[str, Place]] = {}
    for name in held.names:
        target, source = rules.of(name)
        if source not in stacks:
            continue
        stack, alternates = stacks[source]
        path, _, first = target.rpartition(".0.")
        kind, experts = first.rpartition(".")[2], mixtures[path]
        check_stack(path, experts, stack, kind, held.form(name).shape)
        of_inputs = kind == "weight" and (experts.is_transposed or experts.swapped)
        layers = experts.layers_of[stack]
        found[name] = {
            f"{path}.{number}.{layer}.{kind}": Place(name, number, part, len(layers), of_inputs, alternates)
            for number in range(held.form(name).shape[0])
            for part, layer in enumerate(layers)
        }
    return ApartCheckpoint(held, found) if found else held


def stacks_of(names: Mapping[str, str], model: PreTrainedModel) -> dict[str, dict[str, Place]]:
    """Return the stacks to be written in the place of matrices of which transformers (5.23) puts none together itself.

    Such are gpt-oss' and Llama 4's, whose checkpoints have stacks; a copy in 4 bits holds their matrices.

    Args:
        names: what each tensor of the model is called in the checkpoint.
        model: its, on the meta device, whose experts were taken apart.
    """
    gathered = {
        entry.target_patterns[-1].rpartition(".")[2]
        for entry in get_model_conversion_mapping(model)
        if isinstance(entry, WeightConverter) and "*" in entry.source_patterns[0]
    }
    found: dict[str, dict[str, Place]] = {}
    for path, experts in model.named_modules():
        if not isinstance(experts, Experts):
            continue
        for stack, layers in experts.layers_of.items():
            for number, (part, layer), kind in product(range(experts.num_experts), enumerate(layers), KINDS):
                target, name = f"{path}.{number}.{layer}.{kind}", f"{path}.{stack}{KINDS[kind]}"
                if stack not in gathered and target in names:
                    of_inputs = kind == "weight" and (experts.is_transposed or experts.swapped)
                    found.setdefault(name, {})[names[target]] = Place(name, number, part, len(layers), of_inputs)
    return found


class ApartCheckpoint:
    """See above; it has what :class:`~halfbyte.hf.models.checkpoint.Checkpoint` has.

    Attributes:
        stacks: of each stack, the matrices that are read in its place.
    """

    def __init__(self, held: Tensors, stacks: dict[str, dict[str, Place]]) -> None:
        self.held, self.stacks = held, stacks
        self.files: list[Path] = held.files
        self.where, self.quantized = held.where, held.quantized
        self._places = {name: place for places in stacks.values() for name, place in places.items()}
        self.names = [part for name in held.names for part in stacks.get(name, (name,))]

    def form(self, name: str) -> Tensor:
        """Return the tensor ``name`` on the meta device."""
        place = self._places.get(name)
        return self.held.form(name) if place is None else _part(self.held.form(place.stack)[0], place)

    def read(self, name: str) -> Tensor:
        """Return the tensor ``name``; of a stack's file no more is read."""
        place = self._places.get(name)
        if place is None:
            return self.held.read(name)
        held: Any = self.held
        by_row = isinstance(held, Checkpoint | Mxfp4Checkpoint)
        whole = held.read_row if by_row else lambda stack, number: held.read(stack)[number]
        return _part(whole(place.stack, place.expert), place).contiguous()


def stacked(sizes: Mapping[str, int], stacks: Mapping[str, Mapping[str, Place]]) -> dict[str, int]:
    """Return the sizes of a model's tensors, in bytes, with stacks in the place of their matrices."""
    stack_of = {part: stack for stack, parts in stacks.items() for part in parts}
    found: dict[str, int] = {}
    for name, size in sizes.items():
        stack = stack_of.get(name, name)
        found[stack] = found.get(stack, 0) + size
    return found


def read_stack(parts: Mapping[str, Place], read: Callable[[str], Tensor]) -> Tensor:
    """Return a stack, its matrices as ``read`` gives them."""
    experts: dict[int, list[Tensor]] = {}
    for name, place in parts.items():
        experts.setdefault(place.expert, []).append(read(name))
    first = next(iter(parts.values()))
    join = (lambda each: torch.stack(each, 1).flatten(0, 1)) if first.alternates else torch.cat
    matrices = [join(matrices) for _, matrices in sorted(experts.items())]
    return torch.stack([matrix.T if first.of_inputs else matrix for matrix in matrices])


def _part(matrix: Tensor, place: Place) -> Tensor:
    rows = matrix.T if place.of_inputs else matrix
    part: Tensor = rows[place.part :: place.parts] if place.alternates else rows.chunk(place.parts)[place.part]
    return part

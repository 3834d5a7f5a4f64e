"""transformers' stacks of experts in models that are opened: taken apart to :class:`Experts`, and put together again.

Done on the meta device, before anything is read; a checkpoint's tensors are converted to match, whether it holds
matrices or stacks.
"""

import functools
from collections.abc import Sequence
from typing import Any

from torch import Tensor, nn
from transformers.core_model_loading import ConversionOps, WeightConverter, WeightRenaming

from halfbyte.errors import InputError
from halfbyte.hf.layers.experts import LLAMA4, Experts, Llama4Moe
from halfbyte.nn.frozen import QuantizedLinear


def take_apart(model: nn.Module) -> None:
    """Put :class:`Experts` in the place of every stack of experts in a model on the meta device.

    Raises:
        InputError: there are none, or fewer than each token is to go to, or groups do not divide them.
    """
    for name, module in list(model.named_modules()):
        if is_stacked(module):
            experts = Experts(module)
            check_numbers(name, experts.num_experts, model.get_submodule(name.rpartition(".")[0]))
            model.set_submodule(name, experts)
        elif type(module).__name__ == "Llama4TextMoe" and not isinstance(module, Llama4Moe):
            theirs: Any = type(module)
            module.__class__ = _llama4(theirs)


def check_numbers(path: str, many: int, block: nn.Module) -> None:
    """Check what a configuration says of the experts at ``path``.

    Args:
        path: of the stacks.
        many: experts that there are.
        block: the mixture that they are in.

    Raises:
        InputError: there are none, or fewer than each token is to go to, or groups do not divide them.
    """
    if many < 1:
        raise InputError(f"config.json has no experts in {path}: copy it from the model's source again.")
    for module in (block, *block.children()):
        chosen, groups = (getattr(module, name, None) for name in ("top_k", "num_group"))
        if isinstance(chosen, int) and not 1 <= chosen <= many:
            raise InputError(
                f"config.json has each token go to {chosen} of the {many} experts in {path}: copy it from the model's "
                "source again."
            )
        if isinstance(groups, int) and (groups < 1 or many % groups):
            raise InputError(
                f"config.json has the {many} experts in {path} in {groups} groups, which do not divide them: copy it "
                "from the model's source again."
            )


@functools.cache
def _llama4(theirs: Any) -> Any:
    """Return transformers' class with our forward; it is not imported before a model needs it."""
    return type(theirs.__name__, (Llama4Moe, theirs), {})


def is_stacked(module: nn.Module) -> bool:
    """Whether a module is transformers' (5.23) stacks of experts, of a kind that is known."""
    known = type(module).__name__ == LLAMA4 or hasattr(module, "_is_expert_parallel")
    down = getattr(module, "down_proj", None)
    return (
        known and isinstance(down, nn.Parameter) and down.ndim == 3 and not getattr(module, "has_post_expert_norm", 0)
    )


def conversions(found: Sequence[Any], model: nn.Module) -> list[Any]:
    """Return transformers' conversions of a checkpoint's tensors for a model whose experts were taken apart.

    What merges matrices to stacks becomes a renaming of the matrices; what finds or makes a stack takes it apart.
    """
    some = next((module for module in model.modules() if isinstance(module, Experts)), None)
    if some is None:
        return list(found)
    made: list[Any] = []
    for entry in found:
        target = entry.target_patterns[-1].rpartition(".")[2]
        if not isinstance(entry, WeightConverter) or target not in some.layers_of:
            made.append(entry)
            continue
        if "*" not in entry.source_patterns[0]:  # a stack already, in another order
            first = f"{entry.target_patterns[-1].removesuffix(target)}0.{some.layers_of[target][0]}.weight"
            made.append(WeightConverter(entry.source_patterns, first, [*entry.operations, TakeApart(target)]))
            continue
        for source, layer in zip(entry.source_patterns, some.layers_of[target], strict=True):
            theirs = source.split(".")[-2]
            if theirs != layer:
                made.append(WeightRenaming(rf"experts\.(\d+)\.{theirs}\.", rf"experts.\1.{layer}."))
    for stack, layers in some.layers_of.items():
        source = rf"(?<!\w)experts\.{stack}"  # not those of shared_experts, nor what a 4-bit weight takes beside
        made.append(WeightConverter(rf"{source}(?![\w.])", f"experts.0.{layers[0]}.weight", [TakeApart(stack)]))
        if any(name.endswith("bias") for name, _ in some.get_submodule("0").named_parameters()):
            made.append(WeightConverter(f"{source}_bias", f"experts.0.{layers[0]}.bias", [TakeApart(stack)]))
    return made


class TakeApart(ConversionOps):
    """A stack in, each expert's matrices out, under their whole names: views of it where they become others anyway."""

    def __init__(self, stack: str) -> None:
        self.stack = stack

    def convert(
        self, input_dict: dict[str, Any], model: nn.Module, full_layer_name: str, **kwargs: Any
    ) -> dict[str, Tensor]:
        """Take apart the stack whose first matrix is ``full_layer_name``.

        Raises:
            InputError: it has another shape than the model's configuration says.
        """
        ((_, value),) = input_dict.items()
        dense: Tensor = value[0] if isinstance(value, list) else value
        path, kind = full_layer_name.rpartition(".0.")[0], full_layer_name.rpartition(".")[2]
        experts: Any = model.get_submodule(path)
        check_stack(path, experts, self.stack, kind, dense.shape)
        of_inputs = experts.is_transposed or experts.swapped
        found = {}
        for number, matrix in enumerate(dense):
            rows = matrix.T if of_inputs and kind == "weight" else matrix
            layers = experts.layers_of[self.stack]
            for layer, part in zip(layers, rows.chunk(len(layers)), strict=True):
                becomes_other = (
                    isinstance(experts.get_submodule(f"{number}.{layer}"), QuantizedLinear) and kind == "weight"
                )
                found[f"{path}.{number}.{layer}.{kind}"] = part if becomes_other else part.clone().contiguous()
        return found


def check_stack(path: str, experts: Any, stack: str, kind: str, found: Sequence[int]) -> None:
    """Check that a checkpoint's stack has the shape that the model's configuration says.

    Args:
        path: of the experts.
        experts: they.
        stack: its name.
        kind: ``weight`` or ``bias``.
        found: its shape.

    Raises:
        InputError: it has another one.
    """
    shape = experts.shapes[stack]
    of_inputs = experts.is_transposed or experts.swapped
    wanted = shape[:2] if kind == "bias" else (shape[0], shape[2], shape[1]) if of_inputs else shape
    if tuple(found) != tuple(wanted):
        tensor = f"{stack}_bias" if kind == "bias" else stack
        raise InputError(
            f"{path}.{tensor} is {list(found)} in the checkpoint, but config.json makes it {list(wanted)}: copy both "
            "from the model's source again."
        )


def put_together(model: Any) -> None:
    """Undo :func:`take_apart`, in place: a dense model of transformers' own classes."""
    for path, module in list(model.named_modules()):
        if isinstance(module, Experts):
            model.set_submodule(path, module.restacked().train(module.training))
            model._weight_conversions = None  # those of the class, by which it is saved
        elif isinstance(module, Llama4Moe):
            module.__class__ = type(module).__bases__[1]

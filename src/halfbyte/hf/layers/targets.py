"""Which layers a LoRA adapter goes on, from what a user says to what PEFT takes, or refused where it matches nothing.

PEFT (0.21) takes a list of names (each a layer's last name or more of its path), a regular expression over whole paths,
or ``all-linear``. Of a list it leaves out what matches nothing, and a single name it reads as an expression.
"""

import re
from collections.abc import Iterable, Sequence

from torch import nn
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from halfbyte.errors import InputError, nearest

ALL = "all-linear"
ADAPTED = (nn.Linear, nn.Embedding, Conv1D, nn.Conv1d, nn.Conv2d, nn.Conv3d)
"""The layers that LoRA goes on."""
NAME = re.compile(r"[\w.\-]+")
SHOWN = 8


def check_targets(model: PreTrainedModel, target_modules: str | Sequence[str]) -> str | list[str]:
    """Return ``target_modules`` as PEFT's ``LoraConfig`` takes it.

    Args:
        model: the base model.
        target_modules: ``all-linear``, a name, names with commas between, a list of names, or a regular expression.

    Raises:
        InputError: a name or the expression matches no layer, or what LoRA does not go on, or the output head, whose
            adapter TRL's trainers (1.16) would not train; or the expression is none.
    """
    if target_modules == ALL or list(target_modules) == [ALL]:
        return ALL
    names = _names(target_modules)
    modules = {name: module for name, module in model.named_modules() if name}
    if names is None:
        return _checked_expression(model, modules, str(target_modules))
    if not names:
        raise InputError(f"target_modules names no layer; name some of the model's, {_known(model)}, or {ALL!r}.")
    for name in names:
        found = [path for path in modules if path == name or path.endswith(f".{name}")]
        if not found and name == target_modules and _by_expression(modules, name):
            return _checked_expression(model, modules, name)
        if not found:
            hint = nearest(name, [*_linear(model), ALL])
            raise InputError(f"target_modules {name!r} matches no layer of the model{hint}, {_known(model)}.")
        _refuse_unfit(model, name, found, modules)
    return names


def _names(target_modules: str | Sequence[str]) -> list[str] | None:
    """Return the names, or None where it is an expression."""
    if not isinstance(target_modules, str):
        return list(dict.fromkeys(name.strip() for name in target_modules))
    parts = [part.strip() for part in target_modules.split(",") if part.strip()]
    return list(dict.fromkeys(parts)) if all(NAME.fullmatch(part) for part in parts) else None


def _checked_expression(model: PreTrainedModel, modules: dict[str, nn.Module], expression: str) -> str:
    found = _by_expression(modules, expression)
    if not found:
        raise InputError(f"target_modules {expression!r} matches no layer of the model, {_known(model)}.")
    _refuse_unfit(model, expression, found, modules)
    return expression


def _by_expression(modules: dict[str, nn.Module], expression: str) -> list[str]:
    try:
        pattern = re.compile(expression)
    except re.error as error:
        raise InputError(
            f"target_modules {expression!r} is neither a list of names nor a regular expression ({error}); for every "
            f"linear layer say {ALL!r}."
        ) from error
    return [path for path in modules if pattern.fullmatch(path)]


def _refuse_unfit(model: PreTrainedModel, word: str, found: Iterable[str], modules: dict[str, nn.Module]) -> None:
    for path in found:
        module = modules[path]
        if module is model.get_output_embeddings():
            raise InputError(
                f"target_modules {word!r} matches the output head {path}, whose weight TRL's loss (1.16) reads past an "
                "adapter, so that it would never be trained; leave it out, or train it whole (modules_to_save "
                f"{path!r})."
            )
        if not isinstance(module, ADAPTED):
            raise InputError(
                f"target_modules {word!r} matches {path} ({type(module).__name__}), which is no layer that LoRA goes "
                f"on; name layers of the model, {_known(model)}."
            )


def _known(model: PreTrainedModel) -> str:
    names = _linear(model)
    return f"which has {', '.join(names[:SHOWN])}{' and more' if len(names) > SHOWN else ''}"


def _linear(model: PreTrainedModel) -> list[str]:
    """Return the last names of the linear layers, but for the output head."""
    head = model.get_output_embeddings()
    paths = [p for p, layer in model.named_modules() if isinstance(layer, (nn.Linear, Conv1D)) and layer is not head]
    return list(dict.fromkeys(path.rsplit(".", 1)[-1] for path in paths))

"""A frozen base that does not fit into memory: its layers are read from their file ahead of use, and dropped behind it.

The weights of a 4-bit folder are mapped, so a model larger than memory runs as it is; but then its pages come when they
are touched, in small pieces, and the system drops those that are wanted next. Here :mod:`halfbyte.hf.models.pager`
knows the order, and hooks of the layers tell it where a pass is.

Results are those of a base in memory to the last bit: the weights are where they were, and whoever touches a page that
is not there waits for it. Several processes share what is read: it is the system's page cache.
"""

import contextlib
import functools
import logging
import weakref
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from halfbyte import mapped
from halfbyte.errors import size_text
from halfbyte.hf.layers.activations import AROUND, recomputable_layers
from halfbyte.hf.layers.adapters import CHANGES_NOTHING
from halfbyte.hf.layers.head import base_of
from halfbyte.hf.models.pager import Pager, Unit, least_of
from halfbyte.memory import free_memory
from halfbyte.nn import QuantizedLinear
from halfbyte.quant import QuantizedInt8, QuantizedWeight

logger = logging.getLogger(__name__)

SHARE = 0.8
"""Of the memory that is free, what a model that only runs may take of a base that is larger."""


def units_of(model: nn.Module) -> list[Unit]:
    """Return what of each decoder layer of ``model``, and last of its head, lies in mapped files.

    A head that is the embedding too is none of them: it is looked up in all the time.
    """
    layers = recomputable_layers(model)
    units = [_unit(_tensors(layer)) for layer in layers]
    head, tied = _head(model)
    if layers and head is not None and not tied:
        units.append(_unit(_tensors(head)))
    return units


def mapped_bytes(model: nn.Module) -> int:
    """Return the bytes of the layers and the head of ``model`` that are views of files: what can be paged."""
    return sum(unit.nbytes for unit in units_of(model)) if mapped.available() else 0


def least_bytes(model: nn.Module) -> int:
    """Return how many of them must have room in memory."""
    return least_of(units_of(model)) if mapped.available() else 0


def beside_bytes(model: nn.Module) -> int:
    """Return the bytes of a head that is the embedding too, as far as they are views of files."""
    head, tied = _head(model)
    return _unit(_tensors(head)).nbytes if head is not None and tied and mapped.available() else 0


def _head(model: nn.Module) -> tuple[nn.Module | None, bool]:
    """Return the head, if there is one, and whether it is the embedding too."""
    base: Any = base_of(model)
    head, embedding = (getattr(base, f"get_{side}put_embeddings", lambda: None)() for side in ("out", "in"))
    if not isinstance(head, nn.Module):
        return None, False
    return head, getattr(head, "weight", None) is getattr(embedding, "weight", None)


def _unit(tensors: list[Tensor]) -> Unit:
    pieces = tuple(mapped.pieces_of(tensors))
    return Unit(pieces, sum(piece.nbytes for piece in pieces))


def _tensors(module: nn.Module) -> list[Tensor]:
    """Return the tensors that a module holds, block constants included."""
    found = [*module.parameters(), *module.buffers()]
    for layer in module.modules():
        if isinstance(layer, QuantizedLinear):
            weight = layer.quantized_weight
            if isinstance(weight, QuantizedWeight):
                nested = weight.statistics.nested
                found += [weight.packed, weight.statistics.absmax, *([nested.absmax] if nested else [])]
            elif isinstance(weight, QuantizedInt8):
                found += [weight.codes, weight.absmax]
    return found


def attach(model: nn.Module, budget: int) -> Pager | None:
    """Let the layers of ``model`` be paged from now on, if they take more than ``budget`` bytes; undo it before.

    Args:
        model: of which layers are views of files; in place.
        budget: bytes of them that may be in memory at a time.

    Returns:
        What pages them, until :func:`detach` or until the model is gone; None if they fit, or lie in no file.

    Raises:
        InputError: the budget is less than two layers.
    """
    detach(model)
    units = units_of(model) if mapped.available() else []
    if sum(unit.nbytes for unit in units) <= budget:
        return None
    pager = Pager(units, budget)
    hooks: list[Any] = []
    layers = recomputable_layers(model)
    for number, layer in enumerate(layers):
        around = functools.partial(_around, pager, number)
        setattr(layer, AROUND, around)
        before, after = (functools.partial(hook, pager, number) for hook in (_before, _after))
        for hook in (before, after):
            setattr(hook, CHANGES_NOTHING, True)
        hooks += [layer.register_forward_pre_hook(before), layer.register_forward_hook(after)]
    _attached[base_of(model)] = _Attached(pager, hooks, layers)
    weakref.finalize(base_of(model), pager.close)
    return pager


def attach_if_needed(model: nn.Module) -> None:
    """Let a model be paged that was opened in less memory than it takes.

    Raises:
        InputError: there is not even room for two layers.
    """
    room, beside = int(SHARE * free_memory()), beside_bytes(model)
    if mapped_bytes(model) + beside <= room:
        return
    room = max(room - beside, min(room, least_bytes(model)))
    if attach(model, room):
        logger.info("The base is read from its file as it is used, %s of it in memory at a time.", size_text(room))


def following(model: nn.Module, at: int) -> contextlib.AbstractContextManager[None]:
    """Return :meth:`Pager.follow` of what pages the layers of ``model``; if nothing does, what does nothing."""
    pager = pager_of(model)
    return pager.follow(at) if pager else contextlib.nullcontext()


def detach(model: nn.Module) -> None:
    """Undo :func:`attach`; what lies in memory then is the system's choice."""
    if (found := _attached.pop(base_of(model), None)) is not None:
        for hook in found.hooks:
            hook.remove()
        for layer in found.layers:
            delattr(layer, AROUND)
        found.pager.close()


def pager_of(model: nn.Module) -> Pager | None:
    """Return what pages the layers of ``model``, if something does."""
    found = _attached.get(base_of(model))
    return found.pager if found else None


class _Attached(NamedTuple):
    pager: Pager
    hooks: list[Any]
    layers: Sequence[nn.Module]


_attached: "weakref.WeakKeyDictionary[nn.Module, _Attached]" = weakref.WeakKeyDictionary()


def _around(pager: Pager, number: int, forward: Callable[..., Any], *args: Any) -> Any:
    """Run a layer that is recomputed, in its forward pass or once more in its backward pass."""
    pager.enter(number, backward=_is_backward(), training=True)
    output = forward(*args)
    _tell_of_gradient(pager, number, output)
    return output


def _before(pager: Pager, number: int, layer: Any, _: Any) -> None:
    if not _is_recomputed(layer):
        pager.enter(number, backward=False, training=torch.is_grad_enabled())


def _after(pager: Pager, number: int, layer: Any, _: Any, output: Any) -> None:
    if not _is_recomputed(layer):
        _tell_of_gradient(pager, number, output)


def _is_recomputed(layer: Any) -> bool:
    return bool(layer.gradient_checkpointing and layer.training)


def _tell_of_gradient(pager: Pager, number: int, output: Any) -> None:
    """Have a layer in memory when the gradient of what it returned is there: then its backward pass begins."""
    if isinstance(output, Tensor) and output.requires_grad and not _is_backward():
        soon = functools.partial(pager.enter, number, backward=True, training=True)
        output.register_hook(lambda _: soon())  # type: ignore[no-untyped-call]


def _is_backward() -> bool:
    return bool(torch._C._current_graph_task_id() != -1)  # what torch (2.13) asks in its own checkpoint

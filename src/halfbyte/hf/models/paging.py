"""A frozen base that does not fit into memory: its layers are read from their file ahead of use, and dropped behind it.

The weights of a 4-bit folder are mapped, so a model larger than memory runs as it is; but then its pages come when they
are touched, in small pieces, and the system drops those that are wanted next. Here :mod:`halfbyte.hf.models.pager`
knows the order, and hooks of the layers tell it where a pass is. Where few tokens leave most of a mixture's experts
without rows, those are read that the router has chosen; a hook of :class:`halfbyte.hf.layers.experts.Experts` tells.

Results are those of a base in memory to the last bit: the weights are where they were, and whoever touches a page that
is not there waits for it. Several processes share what is read: it is the system's page cache.
"""

import contextlib
import functools
import logging
import weakref
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from halfbyte import mapped
from halfbyte.errors import size_text
from halfbyte.hf.layers.activations import AROUND, recomputable_layers
from halfbyte.hf.layers.adapters import CHANGES_NOTHING
from halfbyte.hf.layers.experts import Experts
from halfbyte.hf.layers.head import base_of
from halfbyte.hf.models.pager import Pager, Part, Unit, least_of
from halfbyte.memory import free_memory
from halfbyte.nn import QuantizedLinear
from halfbyte.quant import QuantizedInt8, QuantizedWeight

logger = logging.getLogger(__name__)

SHARE = 0.8
"""Of the memory that is free, what a model that only runs may take of a base that is larger."""
MANY = 2
"""Choices of tokens for each expert from which on a layer is read whole: 86 % of experts that are drawn evenly."""


def units_of(model: nn.Module) -> list[Unit]:
    """Return what of each decoder layer of ``model``, and last of its head, lies in mapped files.

    A head that is the embedding too is none of them: it is looked up in all the time.
    """
    layers, maps = recomputable_layers(model), mapped.Maps()
    units = [_unit(layer, maps) for layer in layers]
    head, tied = _head(model)
    if layers and head is not None and not tied:
        units.append(_unit(head, maps))
    return units


def mapped_bytes(model: nn.Module) -> int:
    """Return the bytes of the layers and the head of ``model`` that are views of files: what can be paged."""
    return sum(unit.nbytes for unit in units_of(model)) if mapped.available() else 0


def least_bytes(model: nn.Module) -> int:
    """Return how many of them must have room in memory."""
    return least_of([unit.nbytes for unit in units_of(model)]) if mapped.available() else 0


def beside_bytes(model: nn.Module) -> int:
    """Return the bytes of a head that is the embedding too, as far as they are views of files."""
    head, tied = _head(model)
    return _unit(head, mapped.Maps()).nbytes if head is not None and tied and mapped.available() else 0


def _head(model: nn.Module) -> tuple[nn.Module | None, bool]:
    """Return the head, if there is one, and whether it is the embedding too."""
    base: Any = base_of(model)
    head, embedding = (getattr(base, f"get_{side}put_embeddings", lambda: None)() for side in ("out", "in"))
    if not isinstance(head, nn.Module):
        return None, False
    return head, getattr(head, "weight", None) is getattr(embedding, "weight", None)


def _table(model: nn.Module) -> nn.Module | None:
    """Return the embedding, unless it is the head too, which is read from end to end."""
    base: Any = base_of(model)
    embedding = None if _head(model)[1] else base.get_input_embeddings()
    return embedding if isinstance(embedding, nn.Module) else None


def _experts(layer: nn.Module) -> Experts | None:
    return next((module for module in layer.modules() if isinstance(module, Experts)), None)


def _unit(module: nn.Module, maps: mapped.Maps) -> Unit:
    experts = _experts(module)
    each = []
    if experts is not None:
        each = [_tensors(experts.get_submodule(str(number))) for number in range(experts.num_experts)]
    apart = {id(tensor) for tensors in each for tensor in tensors}
    always = [tensor for tensor in _tensors(module) if id(tensor) not in apart]
    return Unit(_part(always, maps), tuple(_part(tensors, maps) for tensors in each))


def _part(tensors: list[Tensor], maps: mapped.Maps) -> Part:
    pieces = tuple(mapped.pieces_of(tensors, maps))
    return Part(pieces, sum(piece.nbytes for piece in pieces))


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
    table = _table(model)
    pager = Pager(units, budget, [] if table is None else mapped.pieces_of(_tensors(table)))
    if table is not None and not any(parameter.requires_grad for parameter in table.parameters()):
        pager.drop_table()  # which whoever looks for tokens that were never trained has read
    hooks: list[Any] = []
    layers = recomputable_layers(model)
    few = _few(model)
    for number, layer in enumerate(layers):
        around = functools.partial(_around, pager, number)
        setattr(layer, AROUND, around)
        if (experts := _experts(layer)) is not None:
            experts.before_use = functools.partial(pager.choose, number)
        before = functools.partial(_before, pager, number, few)
        after = functools.partial(_after, pager, number)
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


@contextlib.contextmanager
def following(model: nn.Module, decoder: Any) -> Iterator[None]:
    """If the layers of ``model`` are paged, read them ahead of a native call, and note which experts it used.

    What each token needs is read ahead; the experts of a layer come when they are chosen.

    Args:
        model: whose layers may be paged.
        decoder: that is called (:class:`halfbyte.kernels.Decoder`): where it is, and which experts it chose.
    """
    pager = pager_of(model)
    decoder.advise(pager is not None)
    if pager is None:
        yield
        return
    with pager.follow(decoder.at):
        yield
    for layer, experts in enumerate(decoder.chosen()):
        if experts:
            pager.used(layer, experts)


def detach(model: nn.Module) -> None:
    """Undo :func:`attach`; what lies in memory then is the system's choice."""
    if (found := _attached.pop(base_of(model), None)) is not None:
        for hook in found.hooks:
            hook.remove()
        for layer in found.layers:
            delattr(layer, AROUND)
            if (experts := _experts(layer)) is not None:
                experts.before_use = None
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


def _before(pager: Pager, number: int, few: float, layer: Any, args: Any) -> None:
    """Tell that a layer is to compute; with fewer tokens than ``few``, and no gradients, its experts are chosen."""
    if not _is_recomputed(layer):
        training = torch.is_grad_enabled()
        tokens = args[0].shape[:-1].numel() if args else few
        pager.enter(number, backward=False, training=training, few=not training and tokens < few)


def _after(pager: Pager, number: int, layer: Any, _: Any, output: Any) -> None:
    if not _is_recomputed(layer):
        _tell_of_gradient(pager, number, output)


def _few(model: nn.Module) -> float:
    """Return how many tokens leave many experts without rows if they are fewer: 0 of a model that has no experts."""
    experts = _experts(model)
    if experts is None:
        return 0.0
    config: Any = base_of(model).config
    choices = getattr(config.get_text_config(), "num_experts_per_tok", None) or 1  # some have another word for it
    return float(MANY * experts.num_experts / choices)


def _is_recomputed(layer: Any) -> bool:
    return bool(layer.gradient_checkpointing and layer.training)


def _tell_of_gradient(pager: Pager, number: int, output: Any) -> None:
    """Have a layer in memory when the gradient of what it returned is there: then its backward pass begins."""
    if isinstance(output, Tensor) and output.requires_grad and not _is_backward():
        soon = functools.partial(pager.enter, number, backward=True, training=True)
        output.register_hook(lambda _: soon())  # type: ignore[no-untyped-call]


def _is_backward() -> bool:
    return bool(torch._C._current_graph_task_id() != -1)  # what torch (2.13) asks in its own checkpoint

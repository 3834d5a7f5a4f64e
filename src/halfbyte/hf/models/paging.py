"""A frozen base that does not fit into memory: its layers are read from their file ahead of use, and dropped behind it.

The weights of a 4-bit folder are mapped, so a model larger than memory runs as it is; but then its pages come when they
are touched, in small pieces, and the system drops those that are wanted next. Here a thread knows the order:

    forward              0, 1, ..., n-1, head
    backward of a step   n-1, ..., 1, 0, and the next step begins with 0 again

As many layers as the budget holds stay (they are *pinned*, the first ones); of the others there is the one that
computes, and those that come after it, which are read while it does. What the forward leaves in memory is what the
backward wants first, and the other way round. A step so reads ``2 (size - what stays)`` from the disk.

Results are those of a base in memory to the last bit: the weights are where they were, and whoever touches a page that
is not there waits for it. Several processes share what is read: it is the system's page cache.

Left out: reading past the page cache (``O_DIRECT``) into memory of our own; each process would then read for itself,
and a weight that is used at the wrong time would be another layer's.
"""

import contextlib
import ctypes
import functools
import itertools
import logging
import threading
import time
import weakref
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from halfbyte import mapped
from halfbyte.errors import InputError, size_text
from halfbyte.hf.layers.activations import AROUND, recomputable_layers
from halfbyte.hf.layers.head import base_of
from halfbyte.mapped import Files, Piece
from halfbyte.memory import free_memory
from halfbyte.nn import QuantizedLinear
from halfbyte.quant import QuantizedInt8, QuantizedWeight

logger = logging.getLogger(__name__)

SHARE = 0.8
"""Of the memory that is free, what a model that only runs may take of a base that is larger."""
LEAST = 2
"""Layers that are in memory at least: the one that computes, and the next."""
LOOK = 1e-3
"""Seconds between two looks at how far a native call has come."""
PATIENCE = 30.0
"""Seconds of waiting for the disk after which it is told."""


@dataclass(frozen=True)
class Unit:
    """A decoder layer, or the head: what of it lies in mapped files.

    Attributes:
        pieces: of the files.
        nbytes: of them.
    """

    pieces: tuple[Piece, ...]
    nbytes: int


@dataclass
class Traffic:
    """What was read since the pager began.

    Attributes:
        read: bytes that were asked of the page cache, whether the disk had to give them or not.
        waited: seconds that computing stood still for them.
    """

    read: int = 0
    waited: float = 0.0


def units_of(model: nn.Module) -> list[Unit]:
    """Return what of each decoder layer of ``model``, and last of its head, lies in mapped files.

    A head that is the embedding too is none of them: it is looked up in all the time.
    """
    layers = recomputable_layers(model)
    units = [_unit(_tensors(layer)) for layer in layers]
    base: Any = base_of(model)
    head, embedding = (getattr(base, f"get_{side}put_embeddings", lambda: None)() for side in ("out", "in"))
    if layers and isinstance(head, nn.Module) and _weight(head) is not _weight(embedding):
        units.append(_unit(_tensors(head)))
    return units


def mapped_bytes(model: nn.Module) -> int:
    """Return the bytes of the layers and the head of ``model`` that are views of files: what can be paged."""
    return sum(unit.nbytes for unit in units_of(model)) if mapped.available() else 0


def least_bytes(model: nn.Module) -> int:
    """Return how many of them must have room in memory."""
    return _least(units_of(model)) if mapped.available() else 0


def _least(units: Sequence[Unit]) -> int:
    """Layers follow each other, so it is the largest run of so many."""
    sizes = [unit.nbytes for unit in units]
    return max((sum(sizes[i : i + LEAST]) for i in range(max(len(sizes) - LEAST + 1, 1))), default=0)


def _weight(module: Any) -> Any:
    return getattr(module, "weight", None)


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


class Pager:
    """Has the layers of a model in memory when they compute, within a budget.

    Args:
        units: of the model, in the order of its forward.
        budget: bytes of them that may be in memory at a time.

    Attributes:
        pinned: numbers of the units that stay once they were read.
        traffic: what was read, and waited for.

    Raises:
        InputError: the budget is less than two layers, or a file is gone.
    """

    def __init__(self, units: Sequence[Unit], budget: int) -> None:
        least = _least(units)
        if budget < least:
            raise InputError(
                f"Of the base model {size_text(least)} must be in memory at a time ({LEAST} layers), but "
                f"{size_text(max(budget, 0))} are left for it: raise memory by {size_text(least - budget)}."
            )
        self._units = units
        self.budget = budget
        self.pinned: set[int] = set()
        self._window = budget
        for number, unit in enumerate(units):
            if self._window - unit.nbytes < least:
                break
            self.pinned.add(number)
            self._window -= unit.nbytes
        self.traffic = Traffic()
        self._files = Files(piece for unit in units for piece in unit.pieces)
        self._changed = threading.Condition()
        self._here: set[int] = set()
        self._wanted: list[int] = []
        self._followed: ctypes.c_int64 | None = None
        self._error: BaseException | None = None
        self._closed = False
        self._thread = threading.Thread(target=self._read_on, name="halfbyte-pager", daemon=True)
        self._thread.start()

    def enter(self, number: int, *, backward: bool, training: bool) -> None:
        """Have a unit in memory, and those that come next on their way.

        Args:
            number: of the unit that is to compute now.
            backward: whether it is its backward pass.
            training: whether a backward pass will follow.

        Raises:
            InputError: its file cannot be read any more.
        """
        with self._changed:
            self._wanted = self._ahead(number, backward, training)
            self._changed.notify_all()
            if number in self._here:
                return
            begun, told = time.perf_counter(), False
            while number not in self._here:
                if self._error is not None:
                    raise self._error
                self._changed.wait(1.0)
                if not told and time.perf_counter() - begun > PATIENCE:
                    logger.warning("Waiting for the disk: layer %d does not come for %.0f s.", number, PATIENCE)
                    told = True
            self.traffic.waited += time.perf_counter() - begun

    @contextlib.contextmanager
    def follow(self, at: int) -> Iterator[None]:
        """Meanwhile read ahead of a native call over all layers, which nobody waits in.

        Args:
            at: address of an int64, in which the call writes the number of the unit that it is at.
        """
        place = ctypes.c_int64.from_address(at)
        place.value = 0
        with self._changed:
            self._followed = place
            self._changed.notify_all()
        try:
            yield
        finally:
            with self._changed:
                self._followed = None

    def close(self) -> None:
        """Read and drop no more; the system decides from now on."""
        with self._changed:
            self._closed = True
            self._changed.notify_all()
        if threading.current_thread() is not self._thread:
            self._thread.join()
            self._files.close()

    def _ahead(self, number: int, backward: bool, training: bool) -> list[int]:
        """Return the units that shall be in memory, in the order in which they are used."""
        wanted: list[int] = []
        room = self._window
        for unit in _order(number, len(self._units), backward, training):
            if unit in wanted:
                continue
            if unit not in self.pinned:
                room -= self._units[unit].nbytes
                if room < 0:
                    break
            wanted.append(unit)
        return wanted

    def _read_on(self) -> None:
        """Read what is wanted and drop what is not, until the pager is closed."""
        try:
            while (number := self._next()) is not None:
                for nbytes in self._files.read(self._units[number].pieces):
                    self.traffic.read += nbytes
                    if self._closed:
                        return
                with self._changed:
                    self._here.add(number)
                    self._changed.notify_all()
        except BaseException as error:
            with self._changed:
                self._error = error
                self._changed.notify_all()

    def _next(self) -> int | None:
        """Wait for a unit to be read, drop what it takes the place of, and return it; None at the end."""
        with self._changed:
            while not self._closed:
                if self._followed is not None:
                    self._wanted = self._ahead(self._followed.value, False, False)
                for number in self._wanted:
                    if number not in self._here:
                        gone = self._here - self.pinned - set(self._wanted)
                        self._here -= gone
                        self._files.drop(piece for unit in gone for piece in self._units[unit].pieces)
                        return number
                self._changed.wait(None if self._followed is None else LOOK)
        return None


def _order(number: int, count: int, backward: bool, training: bool) -> Iterator[int]:
    """Yield the units from ``number`` on as they are used, and again."""
    down, up = range(count - 1, -1, -1), range(count)
    if backward:
        return itertools.chain(range(number, -1, -1), up)
    if training:
        return itertools.chain(range(number, count), down)
    return itertools.chain(range(number, count), up)


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
        hooks.append(layer.register_forward_pre_hook(functools.partial(_before, pager, number)))
        hooks.append(layer.register_forward_hook(functools.partial(_after, pager, number)))
    _attached[base_of(model)] = _Attached(pager, hooks, layers)
    weakref.finalize(base_of(model), pager.close)
    return pager


def attach_if_needed(model: nn.Module) -> None:
    """Let a model be paged that was opened in less memory than it takes.

    Raises:
        InputError: there is not even room for two layers.
    """
    room = int(SHARE * free_memory())
    if mapped_bytes(model) > room and attach(model, room):
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

"""What becomes of each decoder layer's activations between its forward and its backward pass, by a memory budget.

A layer's activations are

    kept         all that its backward reads stays in memory;
    recomputed   only its input stays, and the forward runs again in the backward (arXiv 1604.06174);
    offloaded    recomputed, and the input waits in an unnamed file (:mod:`halfbyte.optim.paged`); not on a GPU.

A step is ``2 N T`` forward and ``2 N T`` backward operations of matrix work over the frozen weights (N parameters,
T tokens), so recomputing k of n layers costs ``k / (2 n)`` more of it. As few layers as possible are recomputed, the
first ones: their turn in the backward comes when everything else has been freed.

What a layer keeps is measured: one sequence goes forward, and the tensors that autograd saves are counted and dropped.
The seam is transformers' ``GradientCheckpointingLayer`` (5.23): each layer asks its own ``gradient_checkpointing`` and
calls its own ``_gradient_checkpointing_func``. Models without it keep everything.

Left out: sending a kept layer's activations to the file without recomputing. They are some twenty times the input, and
writing and reading them takes longer than the forward that makes them again.
"""

import functools
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, NamedTuple
from weakref import WeakSet

import torch
from torch import Tensor, nn
from torch.autograd.graph import saved_tensors_hooks
from torch.distributed.tensor import DTensor
from torch.utils.checkpoint import checkpoint
from transformers.modeling_layers import GradientCheckpointingLayer

from halfbyte.errors import InputError, size_text
from halfbyte.nn import QuantizedLinear
from halfbyte.nn.cross_entropy import GPU_CHUNK
from halfbyte.nn.lora import draw_seed
from halfbyte.optim import paged

SEAM = ("gradient_checkpointing", "_gradient_checkpointing_func")
AROUND = "around_forward"
"""Attribute of a layer: called with its forward and arguments, in its place, where it is recomputed."""
CACHED = 2**28
"""Bytes of other files that the system keeps beside a paged base: libraries, data, what was written."""
RISK = 1.1
"""A base is paged where that is so much faster: the disk may be slower than it was measured, or wanted by others."""
MOST_DRAWS = 64
"""Seeds that a layer draws at most; one that draws more draws whole tensors."""
GRADIENT = 4
"""Bytes of a trained parameter's gradient."""
MOMENTS = 8
"""Bytes of two moments in fp32, the most that an optimizer keeps of a trained parameter."""
WORKSPACE = 2**30 // 5
"""Bytes that a step takes beside what autograd saves: scratch of libraries and kernels, small tensors, gaps."""


@dataclass(frozen=True)
class Costs:
    """What one decoder layer holds between its passes, in bytes.

    Attributes:
        kept: all that its backward reads.
        input: its input alone.
        draws: seeds that its forward draws from torch's generator; None if it, or what is around it, draws others.
    """

    kept: int
    input: int
    draws: int | None = 0


class Base(NamedTuple):
    """What of a frozen base lies in files, mapped, in bytes.

    Attributes:
        all: of its layers and its head.
        least: of them in memory at a time (:mod:`halfbyte.hf.models.paging`).
        beside: of an embedding that is the head too, which every pass reads and the system keeps or drops.
    """

    all: int = 0
    least: int = 0
    beside: int = 0


class Pace(NamedTuple):
    """How fast a machine computes and reads.

    Attributes:
        forward: seconds of a pass forward through the layers; its backward is taken to be as long.
        reading: seconds of reading all that can be paged of the base.
    """

    forward: float = 0.0
    reading: float = 1.0


@dataclass(frozen=True)
class Policy:
    """How many layers are treated how: the first ``offloaded``, then ``recomputed``, then ``kept``.

    Attributes:
        bytes: memory expected at the step's peak, beyond what is taken now; a mapped base included.
        free: memory that may be taken beyond that, as the budget says.
        paged: bytes of the base that are in memory at a time; None: all of it, or all that the system likes.
        draws: seeds that the layers draw in a forward, None if they draw something else.
        together: whether the micro-batches of a step go through each layer of a paged base together.
    """

    offloaded: int
    recomputed: int
    kept: int
    bytes: int
    free: int
    paged: int | None = None
    draws: int | None = 0
    together: bool = False

    def __str__(self) -> str:
        text = self._activations()
        if self.paged is not None:
            text += f"; the base is read from its file as it is used, {size_text(self.paged)} of it in memory at a time"
        return text

    def _activations(self) -> str:
        layers = self.offloaded + self.recomputed + self.kept
        share = f"{size_text(self.bytes)} of the {size_text(self.free)} that may be used"
        if not layers or self.kept == layers:
            return f"Activations are kept, {share}"
        again = self.offloaded + self.recomputed
        text = f"Activations of {again} of {layers} layers are recomputed"
        if self.offloaded:
            text += f", the inputs of {self.offloaded} of them wait on the disk"
        return f"{text}: {share}, for {again / layers / 2:.0%} more matrix work"


def choose(
    layers: Sequence[Costs], fixed: int, free: int, batch_size: int = 1, disk: bool = True, again: bool = False
) -> Policy:
    """Return the policy with the least recomputation, then the least on the disk, that fits.

    Args:
        layers: what each layer holds, first to last.
        fixed: bytes that the step needs whatever the policy is.
        free: bytes that there are for all.
        batch_size: sequences that the layers hold this for.
        disk: whether inputs may wait on the disk.
        again: whether every layer is to be recomputed, whatever there is free.

    Raises:
        InputError: nothing fits; it names what would.
    """
    count = len(layers)
    on_disk = ((o, count - o) for o in range(1, count + 1)) if disk else ()
    for offloaded, recomputed in [*((0, r) for r in range(count if again else 0, count + 1)), *on_disk]:
        needed = _needed(layers, fixed, offloaded, recomputed)
        if needed <= free:
            return Policy(offloaded, recomputed, count - offloaded - recomputed, needed, free)
    fitting = (free - fixed) * batch_size // (needed - fixed) if needed > fixed else 0
    remedy = f"lower batch_size from {batch_size} to {fitting}" if fitting > 0 else "lower max_length"
    either = "recomputed or on the disk" if disk else "recomputed"
    raise InputError(
        f"A step needs {size_text(needed)} of memory even with every activation {either}, but {size_text(free)} may "
        f"be used: {remedy}, or raise memory by {size_text(needed - free)}."
    )


def apply(model: nn.Module, policy: Policy, folder: Path | None = None) -> None:
    """Treat the layers of ``model`` as ``policy`` says.

    Args:
        model: any model; in place.
        policy: for as many layers as it has.
        folder: of the file for offloaded inputs; None takes the temporary folder, as for paged optimizer state.
    """
    offload = functools.partial(_offload, paged.choose_folder(folder)) if policy.offloaded else _recompute
    for index, layer in enumerate(recomputable_layers(model)):
        layer.gradient_checkpointing = index < policy.offloaded + policy.recomputed
        layer._gradient_checkpointing_func = offload if index < policy.offloaded else _recompute


class _Saved:
    """What autograd holds in place of a tensor that it saved."""

    def __init__(self, storage: torch.UntypedStorage) -> None:
        self.storage: torch.UntypedStorage | None = storage


def measure(model: nn.Module, length: int, batch_size: int) -> list[Costs]:
    """Return what each decoder layer of ``model`` holds for a batch of ``batch_size`` sequences of ``length`` tokens.

    One sequence goes forward through the base model in training mode; nothing of it stays, and no random number that
    the run will draw is used up.
    """
    layers = recomputable_layers(model)
    found: list[Costs] = []
    before = [{name: vars(layer)[name] for name in SEAM if name in vars(layer)} for layer in layers]

    def count(forward: Callable[..., Any], *args: Any) -> Any:
        here = (p.to_local() if isinstance(p, DTensor) else p for p in model.parameters())
        own = {p.untyped_storage().data_ptr() for p in here}
        saved: WeakSet[_Saved] = WeakSet()  # what is dropped before the layer is through leaves it

        def pack(tensor: Tensor) -> _Saved:
            one = _Saved(tensor.untyped_storage())
            saved.add(one)
            return one

        random = torch.get_rng_state()
        with saved_tensors_hooks(pack, lambda one: one):
            output = _within(forward)(*args)
        held = {one.storage.data_ptr(): one.storage.nbytes() for one in saved if one.storage is not None}
        kept = sum(size for address, size in held.items() if address not in own)
        for one in saved:  # as long as the graph lives autograd keeps them
            one.storage = None
        given = sum(x.nbytes for x in args if isinstance(x, Tensor))
        found.append(Costs(kept * batch_size, given * batch_size, draws_between(random, torch.get_rng_state())))
        return output

    trained = model.training
    try:
        for layer in layers:
            layer.gradient_checkpointing = True
            layer._gradient_checkpointing_func = count
        device = next(model.parameters()).device
        ids = torch.zeros(1, length, dtype=torch.long, device=device)
        config: Any = model.config
        names = ("input_ids", "decoder_input_ids") if config.is_encoder_decoder else ("input_ids",)
        with torch.random.fork_rng(), torch.enable_grad():
            random = torch.get_rng_state()
            _base(model.train())(**dict.fromkeys(names, ids), use_cache=False)
            in_layers = sum(layer.draws or 0 for layer in found)
            if draws_between(random, torch.get_rng_state(), in_layers) is None:  # others draw too, as GPT-2's embedding
                found = [replace(layer, draws=None) for layer in found]
    finally:
        model.train(trained)
        for layer, attributes in zip(layers, before, strict=True):
            for name in SEAM:
                vars(layer).pop(name, None)
            vars(layer).update(attributes)
    return found


def draws_between(begin: Tensor, end: Tensor, most: int = MOST_DRAWS) -> int | None:
    """Return how many seeds, ``most`` at most, lie between two states of torch's generator; None if it is not they."""
    generator = torch.Generator()
    generator.set_state(begin)
    for count in range(most + 1):
        if torch.equal(generator.get_state(), end):
            return count
        draw_seed(generator)
    return None


def plan(
    model: nn.Module,
    *,
    length: int,
    batch_size: int,
    free: int,
    recompute: bool | None = None,
    base: Base | None = None,
    passes: int = 1,
    state: int | None = None,
    pace: Pace | None = None,
) -> Policy:
    """Measure ``model`` and choose a policy; of a base that lies in files the fastest of what fits:

        in memory    with as much recomputed as that takes
        paged        for each micro-batch, with less recomputed: a long pass computes while the next layers are read
        together     paged, but the micro-batches of a step go through each layer together, all of which are recomputed:
                     the base is read twice a step, however many there are

    A paged base has what the activations leave.

    Args:
        model: ready to train.
        length: tokens of the longest sequence.
        batch_size: sequences per forward pass.
        free: bytes that training may take beyond what the process has now.
        recompute: True recomputes every layer and False none, whatever there is free; None chooses.
        base: what of the model lies in files.
        passes: micro-batches that go through a paged base together, layer by layer
            (:mod:`halfbyte.hf.trainers.layer_major`); all that they need is recomputed.
        state: bytes of the optimizer's state in memory; None: the most that it can be.
        pace: of this machine, for a pass of this size; None: as if reading took all the time.

    Raises:
        InputError: nothing fits.
    """
    trained = sum(p.numel() for p in model.parameters() if p.requires_grad)
    disk = next(model.parameters()).device.type == "cpu"
    more = 0 if disk else gpu_workspace(model)
    costs = measure(model, length, batch_size)
    return decide(costs, trained, free, batch_size, recompute, base, passes, state, pace, more, disk)


def decide(
    layers: Sequence[Costs],
    trained: int,
    free: int,
    batch_size: int,
    recompute: bool | None = None,
    base: Base | None = None,
    passes: int = 1,
    state: int | None = None,
    pace: Pace | None = None,
    more: int = 0,
    disk: bool = True,
) -> Policy:
    """Choose a policy for layers whose costs are known, as :func:`plan` does; the planner knows them by a formula.

    Args:
        layers: what each holds.
        trained: parameters that are trained.
        free: as for :func:`plan`, with the next four.
        batch_size: sequences per forward pass.
        recompute: all layers, none, or as memory decides.
        base: what of the model lies in files.
        passes: that may go through a paged base together.
        state: of the optimizer in memory.
        pace: of the machine.
        more: bytes that a step takes beside :data:`WORKSPACE`.
        disk: whether inputs may wait on the disk.

    Raises:
        InputError: nothing fits.
    """
    base = base or Base()
    fixed = WORKSPACE + GRADIENT * trained + (MOMENTS * trained if state is None else state) + more

    def chosen(layers: Sequence[Costs], fixed: int, again: bool = False) -> Policy:
        if recompute is None:
            return choose(layers, fixed, free, batch_size, disk, again)
        recomputed = len(layers) if recompute else 0
        return Policy(0, recomputed, len(layers) - recomputed, _needed(layers, fixed, 0, recomputed), free)

    def paged(policy: Policy, together: bool = False) -> Policy:
        left = min(max(policy.free - policy.bytes - base.beside - CACHED, 0), base.all - base.least)
        return replace(policy, paged=base.least + left, bytes=policy.bytes + left, together=together)

    ways: list[Callable[[], Policy]] = [lambda: chosen(layers, fixed + base.all + base.beside)]
    if base.all > base.least:
        ways.append(lambda: paged(chosen(layers, fixed + base.least)))
        if passes > 1 and recompute is not False and all(layer.draws is not None for layer in layers):
            waiting = [replace(layer, input=layer.input * passes) for layer in layers]
            ways.append(lambda: paged(chosen(waiting, fixed + base.least, again=True), together=True))
    found: list[Policy] = []
    errors: list[InputError] = []
    for way in ways:
        try:
            found.append(way())
        except InputError as error:
            errors.append(error)
    if not found:
        raise errors[min(1, len(errors) - 1)]
    fitting = [one for one in found if one.bytes <= free] or found[-1:]
    at_once = [one for one in fitting if one.paged is not None or not one.offloaded] or fitting
    policy = min(at_once, key=lambda one: _seconds(one, base, passes, pace or Pace()))
    draws = [layer.draws for layer in layers]
    return replace(policy, draws=None if None in draws else sum(draw or 0 for draw in draws))


def _seconds(policy: Policy, base: Base, passes: int, pace: Pace) -> float:
    """Return how long a step takes, about: computing, or reading if that is longer."""
    layers = policy.offloaded + policy.recomputed + policy.kept
    again = (policy.offloaded + policy.recomputed) / layers if layers else 0.0
    computing = passes * pace.forward * (2 + again)
    if policy.paged is None:
        return computing
    reading = 2 * pace.reading * (1 - policy.paged / base.all) * (1 if policy.together else passes)
    return RISK * max(computing, reading)


def gpu_workspace(model: nn.Module) -> int:
    """Return the bytes that a step takes on a GPU beside :data:`WORKSPACE`, where the CPU's kernels need none.

    The largest quantized weight is there densely, twice where one is still in use as the next is made, and the head
    works on a chunk of logits and fp32 values of it (:data:`halfbyte.nn.cross_entropy.GPU_CHUNK`).
    """
    quantized = [module for module in model.modules() if isinstance(module, QuantizedLinear)]
    dense = (m.in_features * m.out_features * (m.compute_dtype or torch.float32).itemsize for m in quantized)
    return 2 * max(dense, default=0) + 6 * torch.float32.itemsize * GPU_CHUNK


def recomputable_layers(model: nn.Module) -> list[GradientCheckpointingLayer]:
    """Return the layers of ``model`` whose activations can be recomputed, first to last."""
    return [module for module in model.modules() if isinstance(module, GradientCheckpointingLayer)]


def _needed(layers: Sequence[Costs], fixed: int, offloaded: int, recomputed: int) -> int:
    """Return the bytes at a step's peak: a layer whose backward runs takes what its forward kept, and as much again."""
    busy = 2 * max((layer.kept for layer in layers), default=0)
    again = offloaded + recomputed
    return fixed + busy + sum(c.input for c in layers[offloaded:again]) + sum(c.kept for c in layers[again:])


def _base(model: nn.Module) -> Callable[..., Any]:
    inner: Any = getattr(model, "get_base_model", lambda: model)()
    base: Callable[..., Any] = inner.base_model
    return base


def _recompute(forward: Callable[..., Any], *args: Any) -> Any:
    return checkpoint(_within(forward), *args, use_reentrant=False)


def _within(forward: Callable[..., Any]) -> Callable[..., Any]:
    """Return a layer's forward with what is to run around it each time, in the backward pass too.

    transformers (5.23) hands over a partial whose first argument is the layer, and runs hooks outside of what it hands.
    """
    layer, *_ = getattr(forward, "args", ()) or (None,)
    around = getattr(layer, AROUND, None)
    return forward if around is None else functools.partial(around, forward)


def _offload(folder: Path, forward: Callable[..., Any], hidden: Tensor, *args: Any) -> Any:
    """Recompute from an input that waits in a file: the backward needs its values, not the tensor that held them."""
    source = [hidden]
    run = _within(forward)
    output = checkpoint(lambda *args: run(source[0], *args), *args, use_reentrant=False)
    (place,) = paged.zeros([(hidden.dtype, hidden.shape)], folder)
    source[0] = place.copy_(hidden.detach()).requires_grad_(hidden.requires_grad)
    return output

"""Which layers keep their activations for the backward pass, and which compute them again, by a memory budget.

What a layer keeps is measured: one sequence of the greatest length runs forward once, and every tensor that autograd
saves is counted, each memory once, weights left out. That grows with the number of sequences. A layer that is computed
again (transformers' ``GradientCheckpointingLayer``, non-reentrant) keeps its input alone, and what it saves lives only
while its own backward runs. The first layers are those computed again, since theirs would wait longest; numbers come
out the same, bit for bit.

    bytes(k kept of n) = sequences (Σ kept + (n - k) input + one layer + the rest) + the head's chunk
                         + 12 bytes for each trained number: its gradient and two moments

Left out: activations in a file.
"""

import functools
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint
from transformers.modeling_layers import GradientCheckpointingLayer

from halfbyte.errors import InputError
from halfbyte.hf.head import base_of
from halfbyte.nn import cross_entropy


@dataclass(frozen=True)
class Activations:
    """What one sequence of the greatest length keeps from the forward to the backward pass, in bytes.

    Attributes:
        layers: each layer in order, if it keeps all.
        inputs: a layer's input.
        rest: what is saved outside of the layers.
        fixed: what does not grow with the sequences: the head's chunk, gradients and moments.
    """

    layers: tuple[int, ...]
    inputs: int
    rest: int
    fixed: int

    def needed(self, sequences: int, kept: int) -> int:
        """Return the bytes of a step with the last ``kept`` layers' activations kept."""
        again = len(self.layers) - kept
        held = sum(self.layers[again:]) + again * self.inputs
        return sequences * (held + max(self.layers, default=0) + self.rest) + self.fixed

    def fitting(self, sequences: int, free: int, most: int) -> int | None:
        """Return how many layers, up to ``most``, can keep theirs in ``free`` bytes; None if not even none fits."""
        counts = range(most, -1, -1)
        return next((kept for kept in counts if self.needed(sequences, kept) <= free), None)


def fit_activations(
    model: nn.Module, ids: list[int], length: int, sequences: int, free: int, *, keep: bool = True
) -> str:
    """Choose the layers of ``model`` that are computed again, so that a step fits into ``free`` bytes.

    Args:
        model: prepared for training.
        ids: a sequence of tokens to measure with, repeated up to ``length``.
        length: tokens of the longest sequence.
        sequences: sequences of a batch.
        free: bytes that activations, gradients and moments may take.
        keep: whether any layer may keep its activations.

    Returns:
        The choice and its cost in a sentence without its full stop.

    Raises:
        InputError: not even with all layers computed again does a step fit; says what would.
    """
    measured = measure_activations(model, (ids * length)[:length])
    kept = measured.fitting(sequences, free, len(measured.layers) if keep else 0)
    if kept is None:
        raise InputError(_refusal(measured, length, sequences, free))
    again = len(measured.layers) - kept
    recompute_first(model, again)
    size = f"about {_gib(measured.needed(sequences, kept))} for a step of up to {sequences} x {length} tokens"
    if not again:
        return f"Keeping the activations of all layers: {size}"
    share = round(100 * again / len(measured.layers))
    return (
        f"Keeping the activations of {kept} of {len(measured.layers)} layers: {size}; "
        f"{share} % of the forward pass is computed twice"
    )


def recompute_first(model: nn.Module, count: int) -> None:
    """Let the first ``count`` decoder layers of ``model`` be computed again in the backward pass, and no others.

    Layer by layer: the model's own switch (transformers 5.23, ``activation_checkpointing_enable``) knows no single
    layers, and under PEFT makes the embeddings' output require a gradient, which only reentrant checkpointing needs.
    """
    for i, layer in enumerate(_layers(base_of(model))):
        layer._gradient_checkpointing_func = functools.partial(checkpoint, use_reentrant=False)
        layer.gradient_checkpointing = i < count


def measure_activations(model: nn.Module, ids: list[int]) -> Activations:
    """Run ``ids`` through the layers of ``model`` as in training and count what is saved; the model stays as it is."""
    base: Any = base_of(model)
    layers = _layers(base)
    device = next(model.parameters()).device
    saved = [0] * (len(layers) + 1)  # the last: outside of the layers
    place = [len(layers)]
    known = {x.untyped_storage().data_ptr() for x in (*model.parameters(), *model.buffers())}
    inputs = [0]

    def enter(index: int) -> Any:
        def hook(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            place[0] = index
            inputs[0] = max(inputs[0], next(x.nbytes for x in (*args, *kwargs.values()) if isinstance(x, Tensor)))

        return hook

    def leave(*_: Any) -> None:
        place[0] = len(layers)

    def count(x: Tensor) -> Tensor:
        storage = x.untyped_storage()
        if storage.data_ptr() not in known:
            known.add(storage.data_ptr())
            saved[place[0]] += storage.nbytes()
        return x

    was_training = {module: module.training for module in model.modules()}
    flags = [layer.gradient_checkpointing for layer in layers]
    hooks = [layer.register_forward_pre_hook(enter(i), with_kwargs=True) for i, layer in enumerate(layers)]
    hooks += [layer.register_forward_hook(leave) for layer in layers]
    try:
        model.train()
        for layer in layers:
            layer.gradient_checkpointing = False
        with _same_random_numbers(), torch.enable_grad(), torch.autograd.graph.saved_tensors_hooks(count, lambda x: x):
            base.base_model(input_ids=torch.tensor([ids], device=device), use_cache=False)
    finally:
        for hook in hooks:
            hook.remove()
        for layer, flag in zip(layers, flags, strict=True):
            layer.gradient_checkpointing = flag
        for module, training in was_training.items():
            module.training = training
    trained = sum(p.numel() for p in model.parameters() if p.requires_grad)
    chunk = cross_entropy.ROWS * (2 * cross_entropy.WIDTH + 12 * base.config.get_text_config().hidden_size)
    return Activations(tuple(saved[:-1]), inputs[0], saved[-1], chunk + 12 * trained)


def _layers(base: nn.Module) -> list[GradientCheckpointingLayer]:
    return [module for module in base.modules() if isinstance(module, GradientCheckpointingLayer)]


@contextmanager
def _same_random_numbers() -> Iterator[None]:
    devices = range(torch.cuda.device_count())
    with torch.random.fork_rng(devices):
        yield


def _refusal(measured: Activations, length: int, sequences: int, free: int) -> str:
    needed = measured.needed(sequences, 0)
    smaller = next((n for n in range(sequences - 1, 0, -1) if measured.needed(n, 0) <= free), None)
    single = f"one sequence alone needs {_gib(measured.needed(1, 0))}: allow more memory or lower max_length"
    advice = single if smaller is None else f"a batch_size of {smaller} would fit"
    return (
        f"A step of {sequences} x {length} tokens needs about {_gib(needed)} with every layer computed again, and "
        f"{_gib(max(free, 0))} are left for it; {advice}."
    )


def _gib(size: int) -> str:
    return f"{size / 2**30:.2f} GiB" if size >= 2**30 // 10 else f"{size / 2**20:.1f} MiB"

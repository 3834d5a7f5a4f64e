"""An optimizer step of several micro-batches, layer by layer: all of them through one layer before the next.

Where the base does not fit into memory (:mod:`halfbyte.hf.models.paging`), micro-batches one after the other would read
it from the disk ``2 M`` times a step. Layer by layer it is read twice, however many tokens a step has:

    forward     h[m] = layer_i(h[m]) for all m, then the next i
    backward    of the sum of the losses: autograd runs what was made last first, so it goes layer by layer too

The model's own forward runs twice for each micro-batch, with the layers' places taken: the first time they note what
they are given (masks, rotary angles) and hand on their input; the second time the last of them returns ``h[m]``, and
the trainer's own loss follows. The seam is that of :mod:`halfbyte.hf.layers.activations`; every layer is recomputed.

The result is that of one micro-batch after the other to the last bit: gradients are summed in the same order, and each
layer draws the random numbers (LoRA's dropout) that it would have drawn.
"""

import contextlib
import functools
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from transformers.modeling_layers import GradientCheckpointingLayer

from halfbyte.hf.layers.activations import recomputable_layers
from halfbyte.nn.lora import draw_seed

Loss = Callable[[], Tensor]
"""Runs the model once, in training mode, on one micro-batch."""
Call = tuple[Callable[..., Any], tuple[Any, ...]]
"""What a layer was called with: its forward, with named arguments, and the others, the hidden states first."""


class _Noted(Exception):
    """All layers have noted what they were given: the rest of the forward is not wanted."""


class LayerMajor:
    """Runs the micro-batches of a step layer by layer.

    Args:
        model: whose layers are all recomputed.
        draws: random numbers that a forward draws (:class:`halfbyte.hf.layers.activations.Costs`).
    """

    def __init__(self, model: nn.Module, draws: int) -> None:
        self._layers = recomputable_layers(model)
        self._recompute = [layer._gradient_checkpointing_func for layer in self._layers]
        self._draws = draws

    def losses(self, micro_batches: Sequence[Loss]) -> list[Tensor]:
        """Return the loss of each, differentiable.

        Args:
            micro_batches: in their order; each runs the model exactly once.
        """
        states = self._states(len(micro_batches))
        calls, losses = [], []
        for number, loss in enumerate(micro_batches):
            torch.set_rng_state(states[number])
            calls.append(self._noted(loss))
            states[number] = torch.get_rng_state()
        hidden = [call[0][1][0] for call in calls]
        # the last first, so that the backward begins with the first, and sums gradients in their order
        backwards = range(len(micro_batches) - 1, -1, -1)
        for place, recompute in enumerate(self._recompute):
            for number in backwards:
                torch.set_rng_state(states[number])
                forward, (_, *more) = calls[number][place]
                hidden[number] = recompute(forward, hidden[number], *more)
                states[number] = torch.get_rng_state()
        for number in backwards:
            torch.set_rng_state(states[number])
            with self._places_taken(functools.partial(_returned, hidden[number], self._layers[-1])):
                losses.append(micro_batches[number]())
        torch.set_rng_state(states[-1])
        return losses[::-1]

    def _noted(self, loss: Loss) -> list[Call]:
        """Return what each layer is called with; of hidden states only the first layer's are true."""
        calls: list[Call] = []

        def note(layer: nn.Module, forward: Callable[..., Any], *args: Any) -> Any:
            calls.append((forward, args))
            if layer is self._layers[-1]:
                raise _Noted
            return args[0]

        with self._places_taken(note), contextlib.suppress(_Noted):
            loss()
        assert len(calls) == len(self._layers), "a layer is called more than once, or not at all"
        return calls

    def _states(self, count: int) -> list[Tensor]:
        """Return where the random numbers of each micro-batch begin, if they are drawn one after the other."""
        generator = torch.Generator()
        generator.set_state(torch.get_rng_state())
        states = [generator.get_state()]
        for _ in range(count - 1):
            for _ in range(self._draws):
                draw_seed(generator)
            states.append(generator.get_state())
        return states

    @contextlib.contextmanager
    def _places_taken(self, instead: Callable[..., Any]) -> Iterator[None]:
        """Let ``instead(layer, forward, *args)`` be called for each layer."""
        for layer in self._layers:
            layer._gradient_checkpointing_func = functools.partial(instead, layer)
        try:
            yield
        finally:
            for layer, recompute in zip(self._layers, self._recompute, strict=True):
                layer._gradient_checkpointing_func = recompute


def _returned(
    hidden: Tensor, last: GradientCheckpointingLayer, layer: nn.Module, _: Callable[..., Any], *args: Any
) -> Any:
    return hidden if layer is last else args[0]

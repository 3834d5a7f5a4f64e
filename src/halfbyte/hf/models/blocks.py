"""The layers of a model run one after the other over some texts, in two streams: as they are, and rounded.

    exact      X ← L(X)      the model before rounding
    rounded    X̂ ← L̂(X̂)      its layers as they come to be, each rounded when its inputs are known

A layer is in memory when its turn comes, in fp32, and so are the hidden states of all texts: a model of any size takes
one layer and some hundred bytes for each token and channel. What else a layer is given (masks, angles) is recorded
before, in a pass of the whole model in which each layer hands on what it gets.

Within a layer the weights are rounded in the order in which they are used, those with the same inputs together, so that
each sees what the ones before it have become.
"""

import inspect
from collections.abc import Callable, Sequence
from typing import Any

import torch
from accelerate import init_empty_weights
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from halfbyte.errors import InputError
from halfbyte.hf.layers.experts import Experts
from halfbyte.hf.layers.stacks import take_apart
from halfbyte.quant.rounding import Compensation

Round = Callable[[str, Tensor, Compensation | None], Tensor]
"""From the name of a weight, its values ``[out, in]`` and its inputs (None: no text came there) to what it becomes."""


class _Enough(Exception):
    """The inputs that were wanted are there."""


class Blocks:
    """The layers of a model, to be rounded one by one.

    Args:
        cls: the model's class.
        config: its configuration.
        exact: returns a tensor of the model before rounding by its name.
        names: of the weights that are to be rounded; those outside of the layers are left as they are.
        texts: token ids, int64 ``[length]`` each.
        round_one: rounds one of them.
        corrected: whether what it is told of inputs compares both streams, or knows the rounded one alone.

    Attributes:
        path: of the list of layers in the model.

    Raises:
        InputError: the weights are not in one stack of layers.
    """

    def __init__(
        self,
        cls: type[PreTrainedModel],
        config: Any,
        exact: Callable[[str], Tensor],
        names: set[str],
        texts: Sequence[Tensor],
        round_one: Round,
        *,
        corrected: bool = True,
    ) -> None:
        self._exact, self._round, self._names, self._corrected = exact, round_one, names, corrected
        with init_empty_weights(include_buffers=False):
            self._model = cls._from_config(config, dtype=torch.float32)
            take_apart(self._model)
        self._model.eval()
        self.path, layers = self._found()
        self._layers: list[nn.Module] = list(layers)
        self._returns_tuple = False
        self._states: list[list[Tensor]] = []
        self._given: list[list[tuple[tuple[Any, ...], dict[str, Any]]]] = [[] for _ in self._layers]
        self._record(texts)
        self._done = 0

    def index_of(self, name: str) -> int | None:
        """Return the number of the layer that a tensor is in; None for what is outside."""
        rest = name.removeprefix(f"{self.path}.")
        number = rest.partition(".")[0]
        return int(number) if rest != name and number.isdigit() else None

    @torch.no_grad()
    def advance(self) -> None:
        """Round the next layer, and take both streams through it."""
        number = self._done
        layer, prefix = self._layers[number], f"{self.path}.{number}."
        self._fill(layer, prefix)
        modules = {
            name: module
            for name, module in layer.named_modules()
            if isinstance(module, nn.Linear | Conv1D) and f"{prefix}{name}.weight" in self._names
        }
        exact, rounded = self._states
        groups, inputs = self._see(layer, modules, exact, number)
        for name in modules.keys() - {name for group in groups for name in group}:
            self._become(modules[name], f"{prefix}{name}.weight", None)
        routed = tuple(f"{path}." for path, module in layer.named_modules() if isinstance(module, Experts))
        for first, *others in groups:
            before, now = inputs.pop(first), self._inputs(layer, modules[first], rounded, number)
            if routed and first.startswith(routed):  # other tokens may come to an expert in the rounded stream
                compensation = Compensation(before)
            else:
                compensation = Compensation(before, now) if self._corrected else Compensation(now)
            for name in (first, *others):
                self._become(modules[name], f"{prefix}{name}.weight", compensation)
        for text, state in enumerate(rounded):
            rounded[text] = self._through(layer, number, text, state)
        _empty(layer)
        self._given[number].clear()
        self._done += 1

    def _become(self, module: Any, name: str, inputs: Compensation | None) -> None:
        transposed = isinstance(module, Conv1D)
        made = self._round(name, module.weight.T if transposed else module.weight, inputs)
        module.weight.copy_(made.T if transposed else made)

    def _found(self) -> tuple[str, nn.ModuleList]:
        lists = {
            name: module
            for name, module in self._model.named_modules()
            if isinstance(module, nn.ModuleList) and any(weight.startswith(f"{name}.") for weight in self._names)
        }
        outer = {name: x for name, x in lists.items() if not any(name.startswith(f"{other}.") for other in lists)}
        if len(outer) != 1:
            raise InputError(
                f"{type(self._model).__name__} has {len(outer)} stacks of layers, so that they cannot be rounded one "
                "after the other; round at random (--rounding random)."
            )
        return next(iter(outer.items()))

    def _fill(self, module: nn.Module, prefix: str, but: str | None = None) -> None:
        """Give the parameters of a module their values."""
        for name, parameter in list(module.named_parameters(remove_duplicate=False)):
            if but is not None and f"{prefix}{name}".startswith(f"{but}."):
                continue
            owner = module.get_submodule(name.rpartition(".")[0])
            if parameter.is_meta:
                values = self._exact(f"{prefix}{name}").detach().to(torch.float32, copy=True)
                owner._parameters[name.rpartition(".")[2]] = nn.Parameter(values, requires_grad=False)

    def _look_up(self, inner: nn.Module, start: str, texts: Sequence[Tensor]) -> None:
        """Give the embedding the rows of the tokens that come, which are memory; the others are not touched."""
        embedding: Any = self._model.get_input_embeddings()
        name = next((name for name, module in inner.named_modules() if module is embedding), None)
        if name is None or not isinstance(embedding, nn.Embedding) or not texts:
            return
        rows = torch.tensor(sorted({token for text in texts for token in text.reshape(-1).tolist()}))
        given = self._exact(f"{start}{name}.weight").detach()
        values = torch.zeros(embedding.weight.shape, dtype=torch.float32)
        values[rows] = given[rows].float()
        embedding.weight = nn.Parameter(values, requires_grad=False)

    @torch.no_grad()
    def _record(self, texts: Sequence[Tensor]) -> None:
        """Have the states in front of the first layer, and what each layer is given beside them."""
        base = self._model.base_model_prefix
        inner: nn.Module = getattr(self._model, base) if base and hasattr(self._model, base) else self._model
        start = f"{base}." if inner is not self._model else ""
        self._look_up(inner, start, texts)
        self._fill(inner, start, but=self.path)
        self._fill(self._layers[0], f"{self.path}.0.")
        states: list[Tensor] = []

        def recorder(number: int, forward: Callable[..., Any]) -> Callable[..., Any]:
            def record(*args: Any, **kwargs: Any) -> Any:
                if args:
                    state, args = args[0], args[1:]
                else:
                    state = kwargs.pop("hidden_states")
                if number == 0:
                    if not states:
                        self._returns_tuple = isinstance(forward(state, *args, **kwargs), tuple)
                    states.append(state)
                self._given[number].append((args, kwargs))
                return (state,) if self._returns_tuple else state

            return record

        for number, layer in enumerate(self._layers):
            layer.forward = recorder(number, layer.forward)
        options = {"use_cache": False} if "use_cache" in inspect.signature(inner.forward).parameters else {}
        try:
            for text in texts:
                inner(input_ids=text.unsqueeze(0), **options)
        finally:
            for layer in self._layers:
                del layer.forward
        _empty(inner)
        self._states = [states, list(states)]
        if any(len(given) != len(texts) for given in self._given):
            raise InputError(
                f"{type(self._model).__name__} does not run its layers once each and in their order; round at random "
                "(--rounding random)."
            )

    def _through(self, layer: nn.Module, number: int, text: int, state: Tensor) -> Tensor:
        args, kwargs = self._given[number][text]
        result = layer(state, *args, **kwargs)
        made: Tensor = result[0] if isinstance(result, tuple) else result
        return made

    def _see(
        self, layer: nn.Module, modules: dict[str, nn.Module], states: list[Tensor], number: int
    ) -> tuple[list[list[str]], dict[str, list[Tensor]]]:
        """Take the exact stream through a layer; return which weights share their inputs, in order, and the inputs."""
        first_of: dict[str, str] = {}
        seen: dict[str, list[Tensor]] = {}
        last: tuple[str, Tensor] | None = None

        def hook(name: str) -> Callable[..., None]:
            def see(_: nn.Module, args: tuple[Any, ...]) -> None:
                nonlocal last
                if name not in first_of:
                    first_of[name] = first_of[last[0]] if last and last[1] is args[0] else name
                last = name, args[0]
                if first_of[name] == name:
                    seen.setdefault(name, []).append(args[0].reshape(-1, args[0].shape[-1]))

            return see

        handles = [module.register_forward_pre_hook(hook(name)) for name, module in modules.items()]
        try:
            for text, state in enumerate(states):
                states[text] = self._through(layer, number, text, state)
        finally:
            for handle in handles:
                handle.remove()
        groups = [[name for name, first in first_of.items() if first == one] for one in seen]
        return groups, seen

    def _inputs(self, layer: nn.Module, module: nn.Module, states: list[Tensor], number: int) -> list[Tensor]:
        """Return what a weight gets in the rounded stream, text by text; the layer runs no further."""
        parts: list[Tensor] = []

        def see(_: nn.Module, args: tuple[Any, ...]) -> None:
            parts.append(args[0].reshape(-1, args[0].shape[-1]))
            raise _Enough

        handle = module.register_forward_pre_hook(see)
        try:
            for text, state in enumerate(states):
                try:
                    self._through(layer, number, text, state)
                except _Enough:
                    continue
        finally:
            handle.remove()
        return parts


def _empty(module: nn.Module) -> None:
    """Take the memory of a module's parameters away; its buffers stay."""
    for owner in module.modules():
        for key, parameter in owner._parameters.items():
            if parameter is None:
                continue
            owner._parameters[key] = nn.Parameter(torch.empty_like(parameter, device="meta"), requires_grad=False)

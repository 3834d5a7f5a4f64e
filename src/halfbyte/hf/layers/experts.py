"""Experts of a mixture as linear layers: transformers' stacks of matrices taken apart, their products done together.

transformers (5.23) holds the experts of a layer as stacks, ``gate_up_proj [E, 2I, H]`` and ``down_proj [E, H, I]``, and
puts them together from a checkpoint's matrices. Here each expert has linear layers of its own again, under the names
that most checkpoints give them (``experts.3.gate_proj.weight``): so they are quantized one by one while they are read,
to bitsandbytes' bytes, and whatever knows linear layers knows them. Their forward is shared
(:mod:`halfbyte.nn.experts`). Known are the stacks of ``use_experts_implementation`` (Mixtral, Qwen, OLMoE, DeepSeek,
GLM, Granite, Phi and others; gpt-oss with biases, a gate of its own, and gate and up interleaved) and Llama 4's.
"""

import types
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from transformers.integrations.moe import ExpertsInterface

from halfbyte.errors import InputError
from halfbyte.hf.layers.fusion import ACTIVATIONS
from halfbyte.kernels.terms import FEW
from halfbyte.nn import gated_halves
from halfbyte.nn.experts import Routes, StackedLowRank, experts_linear, routes_of, sum_rows, take_rows, weigh_rows
from halfbyte.nn.frozen import FrozenLinear

STACKS = ("gate_up_proj", "up_proj", "down_proj")
"""transformers' names of the stacks; ``up_proj`` where there is no gate."""
NAME = "halfbyte"
"""What our forward of dense stacks is called in transformers' registry."""
LLAMA4 = "Llama4TextExperts"
HALVES = ("gate_proj", "up_proj")
"""The layers of ``gate_up_proj`` where gate and up do not alternate."""

Adapters = Mapping[str, tuple[Sequence[StackedLowRank], float]]
"""Of each stack, the adapters that are active, and the dropout before them."""


class Experts(nn.Module):
    """The experts of a layer, ``"0"``, ``"1"`` …, each with its linear layers.

    Attributes:
        num_experts: how many there are.
        layers_of: by the name of a stack, the layers of an expert that hold its rows.
        shapes: of each stack, ``(experts, out, in)``.
        apply_gate: makes of the results of ``gate_up_proj`` what ``down_proj`` reads; the family's own.
        is_transposed: whether PEFT finds the stack as ``[experts, in, out]``.
        has_bias: whether its layers have one.
        rows: how many each expert was given in training since :func:`load_of` looked.
        before_use: called with the experts that have rows, before their weights are read; None: nobody wants to know.
        swapped: whether PEFT (0.21) takes that for ``[experts, out, in]``, so that its A and B are the other way round.
    """

    before_use: Callable[[Sequence[int]], None] | None = None

    def __init__(self, stacks: Any) -> None:
        super().__init__()
        self._theirs = (stacks,)  # not a module of this one
        first = next(stacks.parameters())
        self.is_transposed: bool = getattr(stacks, "is_transposed", False)
        self.swapped = type(stacks).__name__ == LLAMA4
        names = [name for name in STACKS if isinstance(getattr(stacks, name, None), nn.Parameter)]
        self.shapes: dict[str, tuple[int, int, int]] = {}
        for name in names:
            experts, out, width = getattr(stacks, name).shape
            self.shapes[name] = (experts, width, out) if self.is_transposed or self.swapped else (experts, out, width)
        self.num_experts = self.shapes["down_proj"][0]
        halved = getattr(stacks, "is_concatenated", True)
        self.layers_of = {name: HALVES if name == "gate_up_proj" and halved else (name,) for name in names}
        self.act_fn = getattr(stacks, "act_fn", None)
        self.apply_gate = _gate_of(stacks, self.act_fn)
        self.has_bias = hasattr(stacks, "down_proj_bias")
        self.rows = [0] * self.num_experts
        for number in range(self.num_experts):
            expert = nn.Module()
            for stack, layers in self.layers_of.items():
                _, out, width = self.shapes[stack]
                for layer in layers:
                    made = nn.Linear(width, out // len(layers), self.has_bias, device="meta", dtype=first.dtype)
                    expert.add_module(layer, made)
            self.add_module(str(number), expert)

    def forward(
        self,
        hidden_states: Tensor,
        top_k_index: Tensor,
        top_k_weights: Tensor,
        *,
        adapters: Adapters | None = None,
        before: bool = False,
    ) -> Tensor:
        """``[tokens, width]`` to the same: the sum of what each token's experts make of it, by their weights.

        Args:
            hidden_states: ``[tokens, width]``.
            top_k_index: int64 ``[tokens, k]``; the number of experts stands for none.
            top_k_weights: ``[tokens, k]``.
            adapters: of the stacks that have any.
            before: whether the weights multiply what the experts read and not what they give (Llama 4).

        Raises:
            InputError: a weight is not finite, or there is no such expert.
        """
        routes = _checked_routes(top_k_index, top_k_weights, self.num_experts)
        if not routes.bounds:
            return hidden_states * 0
        if self.training:
            for number, begin, end in routes.bounds:
                self.rows[number] += end - begin
        if self.before_use is not None:
            self.before_use([number for number, _, _ in routes.bounds])
        x = take_rows(hidden_states, routes)
        shares = top_k_weights.to(hidden_states.dtype)
        if before:
            x = weigh_rows(x, shares, routes)
        for stack in self.layers_of:
            if stack == "down_proj" and not before and not self.has_bias:  # fewer values here than after it
                x = weigh_rows(x, shares, routes)
            x = self._project(stack, x, routes, adapters or {})
            if stack != "down_proj":
                x = self.apply_gate(x)
        if self.has_bias and not before:
            x = weigh_rows(x, shares, routes)
        return sum_rows(x, routes)

    def _project(self, stack: str, x: Tensor, routes: Routes, adapters: Adapters) -> Tensor:
        names = self.layers_of[stack]
        layers: dict[int, list[Any]] = {}
        for number, _, _ in routes.bounds:
            expert: Any = self._modules[str(number)]
            layers[number] = [expert._modules[name] for name in names]
        low_rank, dropout = adapters.get(stack, ((), 0.0))
        if not all(isinstance(layer, FrozenLinear) for each in layers.values() for layer in each):
            if low_rank:
                raise InputError(f"The experts' layers have adapters of their own, and {stack} another; keep one kind.")
            return torch.cat([torch.cat([layer(x[i:j]) for layer in layers[e]], -1) for e, i, j in routes.bounds])
        some = next(iter(layers.values()))[0]
        biases = None
        if some.bias is not None:
            biases = {number: torch.cat([layer.bias for layer in each]) for number, each in layers.items()}
        weights = {number: [layer.frozen_weight for layer in each] for number, each in layers.items()}
        # as dense layers: what is read of a text does not depend on what else is read, but for few tokens
        as_many = not self.training and routes.firsts.numel() > FEW
        x_given = x.to(some.compute_dtype or x.dtype)
        y = experts_linear(x_given, routes, weights, biases, low_rank, dropout, as_many=as_many)
        return y.to(x.dtype)

    def restacked(self) -> nn.Module:
        """Return transformers' stacks with what the layers stand for, whose memory is used up, expert by expert."""
        (theirs,) = self._theirs
        for stack, layers in self.layers_of.items():
            for suffix, kind in (("", "weight"), ("_bias", "bias")):
                if not isinstance(getattr(theirs, stack + suffix, None), nn.Parameter):
                    continue
                matrices = []
                for number in range(self.num_experts):
                    held: list[Any] = [self.get_submodule(f"{number}.{layer}") for layer in layers]
                    rows = torch.cat([_dense(layer) if kind == "weight" else layer.bias.detach() for layer in held])
                    is_of_inputs = kind == "weight" and (self.is_transposed or self.swapped)
                    matrices.append(rows.T if is_of_inputs else rows)
                setattr(theirs, stack + suffix, nn.Parameter(torch.stack(matrices), requires_grad=False))
        made: nn.Module = theirs
        return made

    def __getattr__(self, name: str) -> Any:
        """What PEFT looks at of a stack, its shape, dtype and device: one value, which has the stack's shape."""
        if name in self.__dict__.get("shapes", ()):
            experts, out, width = self.shapes[name]
            shape = (experts, width, out) if self.is_transposed or self.swapped else (experts, out, width)
            some: Any = next(self.parameters())
            return torch.zeros((), device=some.device).expand(shape)
        return super().__getattr__(name)

    def named_parameters(
        self, prefix: str = "", recurse: bool = True, remove_duplicate: bool = True
    ) -> Iterator[tuple[str, nn.Parameter]]:
        """As ever; asked for what is directly here, the stacks, which PEFT looks for by their names."""
        if recurse:
            yield from super().named_parameters(prefix, recurse, remove_duplicate)
        else:
            yield from ((f"{prefix}{'.' if prefix else ''}{name}", getattr(self, name)) for name in self.shapes)


class Llama4Moe(nn.Module):
    """Llama 4's mixture: the router's scores multiply what an expert reads, and only those chosen compute."""

    hidden_dim: int
    top_k: int
    router: nn.Module
    experts: nn.Module
    shared_expert: nn.Module

    def forward(self, hidden_states: Tensor) -> tuple[Tensor, Tensor]:
        """``[batch, length, width]`` to ``[tokens, width]`` and the router's logits, as transformers' own."""
        hidden_states = hidden_states.reshape(-1, self.hidden_dim)
        scores, logits = self.router(hidden_states)
        chosen = logits.topk(self.top_k, dim=1).indices
        routed = self.experts(hidden_states, chosen, scores.gather(1, chosen), before=True)
        return self.shared_expert(hidden_states) + routed, logits


def load_of(model: nn.Module) -> float | None:
    """Return how many rows the busiest expert of a layer was given, over the mean, and forget them.

    Returns:
        the mean over layers, 1 where all get as many; None where there are no experts, or none was given any.
    """
    loads = []
    for module in model.modules():
        if isinstance(module, Experts) and any(module.rows):
            loads.append(max(module.rows) * module.num_experts / sum(module.rows))
            module.rows = [0] * module.num_experts
    return sum(loads) / len(loads) if loads else None


def stacked_forward(self: Any, hidden_states: Tensor, top_k_index: Tensor, top_k_weights: Tensor) -> Tensor:
    """What transformers' own module of dense stacks computes, by our products: ``experts_implementation="halfbyte"``.

    Args:
        self: a module of ``use_experts_implementation`` (5.23), its stacks ``[E, out, in]``, or transposed.
        hidden_states: ``[tokens, width]``.
        top_k_index: int64 ``[tokens, k]``; the number of experts stands for none.
        top_k_weights: ``[tokens, k]``.

    Raises:
        InputError: a stack is to be trained; a weight is not finite, or there is no such expert.
    """
    names = ("gate_up_proj" if self.has_gate else "up_proj", "down_proj")
    stacks: dict[str, Tensor] = {name: getattr(self, name) for name in names}
    for name, stack in stacks.items():
        if stack.requires_grad and torch.is_grad_enabled():
            raise InputError(
                f"{type(self).__name__}'s {name} is to be trained, but experts_implementation 'halfbyte' computes with "
                "frozen experts: call requires_grad_(False), or take another implementation."
            )
    experts = stacks["down_proj"].shape[0]
    routes = _checked_routes(top_k_index, top_k_weights, experts)
    if not routes.bounds:
        return hidden_states * 0
    x = take_rows(hidden_states, routes)
    for name, stack in stacks.items():
        held = {number: stack[number].detach() for number, _, _ in routes.bounds}
        weights = {number: [matrix.T.contiguous() if self.is_transposed else matrix] for number, matrix in held.items()}
        biases = {number: getattr(self, f"{name}_bias")[number] for number in held} if self.has_bias else None
        x = experts_linear(x, routes, weights, biases)
        if name != "down_proj":
            x = self._apply_gate(x) if self.has_gate else self.act_fn(x)
    if self.has_post_expert_norm:
        x = self.post_expert_norm(x)
    return sum_rows(weigh_rows(x, top_k_weights.to(x.dtype), routes), routes)


def _checked_routes(chosen: Tensor, weights: Tensor, experts: int) -> Routes:
    """Return the rows of each expert, as a router chose.

    Raises:
        InputError: a weight is not finite, or there is no such expert.
    """
    first, last = chosen.aminmax()
    if first < 0 or last > experts:
        raise InputError(
            f"A router chooses expert {int(first if first < 0 else last)}, and its layer has {experts}, counted from "
            "0: config.json and the weights are not of one model; copy both from its source again."
        )
    if not bool(torch.isfinite(weights.detach()).all()):
        raise InputError(
            f"A router gives weights that are not finite to the {experts} experts of a layer: the model is damaged, "
            "or its values overflow; take an undamaged copy, or another compute dtype."
        )
    return routes_of(chosen, experts)


def _dense(layer: Any) -> Tensor:
    if isinstance(layer, FrozenLinear):
        return layer.dequantize(layer.compute_dtype)
    weight: Tensor = layer.weight.detach()
    return weight


def _gate_of(stacks: Any, act_fn: Any) -> Callable[[Tensor], Tensor]:
    own = getattr(type(stacks), "_apply_gate", None)
    name = ACTIVATIONS.get(type(act_fn))
    if not isinstance(getattr(stacks, "gate_up_proj", None), nn.Parameter):
        gate: Callable[[Tensor], Tensor] = act_fn
        return gate
    if own is not None and own.__name__ != "_default_apply_gate":  # transformers' for whoever has none
        numbers = types.SimpleNamespace(**{k: v for k, v in vars(stacks).items() if isinstance(v, int | float)})
        numbers.act_fn = act_fn
        return types.MethodType(own, numbers)
    return (lambda y: gated_halves(y, name)) if name else lambda y: _gated(y, act_fn)


def _gated(y: Tensor, act_fn: Any) -> Tensor:
    gate, up = y.chunk(2, dim=-1)
    product: Tensor = act_fn(gate) * up
    return product


ExpertsInterface.register(NAME, stacked_forward)

"""Decoder layers of known families of transformers with the fused pieces of :mod:`halfbyte.nn`.

:func:`fuse` swaps the class of each decoder layer, of its attention and its MLP, and of every norm for a subclass of
the family's own class with our forward; parameters, names, files, hooks and the output recorder see no difference, and
:func:`unfuse` swaps back. Ours does what the family's forward does, with one pass over memory each for residual and
RMSNorm, for the rotation of queries and keys, and for activation and product of a gated MLP, and with projections of
one input sharing its work. Attention itself goes through transformers' attention interface as the family calls it.

Which families are known stands in :mod:`halfbyte.hf.layers.families`; this file relies on their private layout
(transformers 5.23). At a call a norm, projection or activation with hooks or with a forward of its own runs as it is,
and so does everything under autocast or on a device other than a CPU or a CUDA GPU.
"""

import inspect
import sys
from collections import Counter
from typing import Any

import torch
from torch import Tensor, nn, sigmoid
from transformers.activations import ACT2FN
from transformers.modeling_layers import GradientCheckpointingLayer
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from halfbyte.hf.layers.adapters import project, untouched
from halfbyte.hf.layers.families import FAMILIES, FUSED_ON, Family, recognise
from halfbyte.nn import gated, gated_halves, rms_norm, rotary
from halfbyte.nn.recomputed import flattened

_DTYPES = (torch.float32, torch.bfloat16, torch.float16)
ACTIVATIONS = {type(ACT2FN["silu"]): "silu", nn.SiLU: "silu", type(ACT2FN["gelu_pytorch_tanh"]): "gelu_tanh"}


def fuse(model: nn.Module) -> str:
    """Swap the decoder layers of known families in ``model`` for fused ones, in place.

    Returns:
        What :func:`describe_layers` does.
    """
    layers: list[Any] = [module for module in model.modules() if type(module).__name__ in FAMILIES]
    families = {cls: recognise(cls) for cls in {type(layer) for layer in layers}}
    for layer in layers:
        family = families[type(layer)]
        if family is None or not family.fits(layer):
            continue
        layer.self_attn.__class__ = _fused(_Attention, type(layer.self_attn), family)
        if family.is_mixture(layer.mlp):
            layer.mlp.__class__ = _fused(FusedMixture, type(layer.mlp), family)
        for mlp in [layer.mlp, shared_expert_of(layer.mlp)]:
            if type(mlp) is family.of(f"{family.name}MLP") and type(activation_of(mlp)) in ACTIVATIONS:
                mlp.__class__ = _fused(_Mlp, type(mlp), family)
        layer.__class__ = _fused(_LAYERS[family.norms], type(layer), family)
    norms = {
        layer.family.of(f"{layer.family.name}RMSNorm"): layer.family for layer in layers if isinstance(layer, Fused)
    }
    for module in model.modules():
        if type(module) in norms and module.weight.device.type in FUSED_ON:
            module.__class__ = _fused(FusedNorm, type(module), norms[type(module)])
    return describe_layers(model)


def unfuse(model: nn.Module) -> None:
    """Undo :func:`fuse`, in place."""
    fused: list[Any] = [module for module in model.modules() if isinstance(module, Fused)]
    for module in fused:
        module.__class__ = module.unfused


def describe_layers(model: nn.Module) -> str:
    """Return which way the decoder layers of ``model`` run, for a run's log.

    For example ``fused: 30 Llama layers`` or ``unfused: GPTNeoXLayer is not known``.
    """
    layers = [module for module in model.modules() if isinstance(module, GradientCheckpointingLayer)]
    fused = Counter(layer.family.name for layer in layers if isinstance(layer, Fused))
    lines = [f"fused: {count} {name} layer{'s' * (count > 1)}" for name, count in fused.items()]
    for name in sorted({type(layer).__name__ for layer in layers if not isinstance(layer, Fused)}):
        reason = "is not the one that is known, or not on a CPU or CUDA GPU" if name in FAMILIES else "is not known"
        lines.append(f"unfused: {name} {reason}")
    return "; ".join(lines) or "unfused: there is no decoder layer"


def foretell_layers(model: nn.Module) -> list[tuple[str, int, str]]:
    """Return what will be fused of a model that is not loaded (on the meta device).

    Returns:
        Of each class of decoder layers its name, how many there are, and why they will not be fused, as the end of a
        sentence: empty where they will.
    """
    layers = [module for module in model.modules() if isinstance(module, GradientCheckpointingLayer)]
    counted = Counter((type(layer).__name__, _obstacle(layer)) for layer in layers)
    return [(name, count, obstacle) for (name, obstacle), count in counted.items()]


def _obstacle(layer: Any) -> str:
    if type(layer).__name__ not in FAMILIES:
        return "are of no family that is known"
    family = recognise(type(layer))
    if family is None:
        return f"are not those of transformers' {FAMILIES[type(layer).__name__].name} as it is known"
    return "" if family.is_own(layer) else f"have parts that are not {family.name}'s own"


class Fused(nn.Module):
    """What the swapped classes share; they are made by :func:`_fused`."""

    family: "Family"
    unfused: type[nn.Module]


class _Layer(Fused):
    """A decoder layer: its named arguments go on to attention, as in every family here."""

    defaults: dict[str, Any]
    self_attn: nn.Module
    mlp: nn.Module

    def forward(self, hidden_states: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        """``[batch, length, width]`` to the same."""
        if args or not _plain(hidden_states):
            theirs: Tensor = super().forward(hidden_states, *args, **kwargs)
            return theirs
        return self.pieces(hidden_states, self.defaults | kwargs)

    def pieces(self, x: Tensor, arguments: dict[str, Any]) -> Tensor:
        raise NotImplementedError

    def norm(self, name: str, x: Tensor, residual: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """Return ``x + residual`` and its norm by the module ``name``."""
        return _after_sum(getattr(self, name), x, residual)


class _PreNorm(_Layer):
    """Norms before attention and MLP: Llama and most others. Phi-3 has dropout on both results."""

    resid_attn_dropout: nn.Module
    resid_mlp_dropout: nn.Module

    def pieces(self, x: Tensor, arguments: dict[str, Any]) -> Tensor:
        x, y = self.norm("input_layernorm", x)
        y, _ = self.self_attn(hidden_states=y, **arguments)
        if hasattr(self, "resid_attn_dropout"):
            y = self.resid_attn_dropout(y)
        x, y = self.norm("post_attention_layernorm", y, x)
        y = self.mlp(y)
        if hasattr(self, "resid_mlp_dropout"):
            y = self.resid_mlp_dropout(y)
        x = x + y
        return x


class _BothNorms(_Layer):
    """Norms before and after attention and MLP: Gemma 2 and 3."""

    def pieces(self, x: Tensor, arguments: dict[str, Any]) -> Tensor:
        x, y = self.norm("input_layernorm", x)
        y, _ = self.self_attn(hidden_states=y, **arguments)
        _, y = self.norm("post_attention_layernorm", y)
        x, y = self.norm("pre_feedforward_layernorm", y, x)
        return x + self.norm("post_feedforward_layernorm", self.mlp(y))[1]


class _PostNorm(_Layer):
    """Norms after attention and MLP: OLMo 2."""

    def pieces(self, x: Tensor, arguments: dict[str, Any]) -> Tensor:
        y, _ = self.self_attn(hidden_states=x, **arguments)
        x = x + self.norm("post_attention_layernorm", y)[1]
        return x + self.norm("post_feedforward_layernorm", self.mlp(x))[1]


class _Attention(Fused):
    """Projections, norms of queries and keys, rotation, cache, attention, projection."""

    config: Any
    layer_idx: int
    head_dim: int
    num_key_value_heads: int
    attention_dropout: float
    scaling: float
    q_proj: nn.Module
    k_proj: nn.Module
    v_proj: nn.Module
    qkv_proj: nn.Module
    o_proj: nn.Module
    q_norm: nn.Module
    k_norm: nn.Module

    def forward(
        self,
        hidden_states: Tensor,
        position_embeddings: tuple[Tensor, Tensor] | None = None,
        attention_mask: Tensor | None = None,
        past_key_values: Any = None,
        **kwargs: Any,
    ) -> tuple[Tensor, Tensor | None]:
        """``[batch, length, width]`` to the same, and the attention's weights if its implementation gives them."""
        if not _plain(hidden_states) or not self.family.turns(hidden_states, position_embeddings):
            theirs: tuple[Tensor, Tensor | None] = super().forward(
                hidden_states, position_embeddings, attention_mask, past_key_values, **kwargs
            )
            return theirs
        shape = hidden_states.shape[:-1]
        query, key, value = self.projections(hidden_states)
        if hasattr(self, "q_norm"):
            query, key = self.norm(self.q_norm, query), self.norm(self.k_norm, key)
        query, key, value = (x.view(*shape, -1, self.head_dim) for x in (query, key, value))
        if position_embeddings is not None and getattr(self, "use_rope", True):
            query, key = rotary(query, key, *position_embeddings)
        query, key, value = (x.transpose(1, 2) for x in (query, key, value))
        if past_key_values is not None:
            key, value = past_key_values.update(key, value, self.layer_idx)
        attend = ALL_ATTENTION_FUNCTIONS.get_interface(
            self.config._attn_implementation, vars(sys.modules[self.unfused.__module__])["eager_attention_forward"]
        )
        y, weights = attend(
            self,
            query,
            key,
            value,
            attention_mask,
            dropout=self.attention_dropout if self.training else 0.0,
            scaling=self.scaling,
            **self.family.extras(self),
            **kwargs,
        )
        return self.o_proj(y.reshape(*shape, -1).contiguous()), weights

    def projections(self, x: Tensor) -> list[Tensor]:
        """Return queries, keys and values, ``[batch, length, heads * head_dim]``."""
        if not hasattr(self, "qkv_proj"):
            return project([self.q_proj, self.k_proj, self.v_proj], x)
        of_queries = self.config.num_attention_heads * self.head_dim
        of_keys = self.num_key_value_heads * self.head_dim
        return list(self.qkv_proj(x).split([of_queries, of_keys, of_keys], dim=-1))

    def norm(self, module: Any, x: Tensor) -> Tensor:
        """Normalize by head or, where the norm is that wide (OLMo 2), all heads together."""
        return _after_sum(module, x.view(*x.shape[:-1], -1, len(module.weight)))[1].flatten(-2)


class _Mlp(Fused):
    """A gated MLP, gate and up projected together or, in Phi-3, by one layer."""

    gate_proj: nn.Module
    up_proj: nn.Module
    gate_up_proj: nn.Module
    down_proj: nn.Module

    def forward(self, x: Tensor) -> Tensor:
        """``[batch, length, width]`` to the same."""
        activation = activation_of(self)
        if not _plain(x) or not untouched(activation):
            theirs: Tensor = super().forward(x)
            return theirs
        name = ACTIVATIONS[type(activation)]
        if hasattr(self, "gate_up_proj"):
            y: Tensor = self.down_proj(gated_halves(self.gate_up_proj(x), name))
        else:
            gate, up = project([self.gate_proj, self.up_proj], x)
            y = self.down_proj(gated(gate, up, name))
        return y


class FusedMixture(Fused):
    """A mixture of experts, with one that all tokens take or without."""

    gate: nn.Module
    experts: nn.Module
    shared_expert_gate: nn.Module

    def forward(self, x: Tensor) -> Tensor:
        """``[batch, length, width]`` to the same."""
        if not _plain(x):
            theirs: Tensor = super().forward(x)
            return theirs
        rows = flattened(x)
        _, shares, chosen = self.gate(rows)
        y = self.experts(rows, chosen, shares)
        if (shared := shared_expert_of(self)) is not None:
            of_all = shared(rows)
            if hasattr(self, "shared_expert_gate"):
                of_all = sigmoid(self.shared_expert_gate(rows)) * of_all
            y = y + of_all
        mixed: Tensor = y.view(x.shape)
        return mixed


def shared_expert_of(mixture: nn.Module) -> Any:
    """Return the MLP of a mixture that all tokens take, or None."""
    return getattr(mixture, "shared_expert", None) or getattr(mixture, "shared_experts", None)


class FusedNorm(Fused):
    """An RMSNorm, whose ``eps`` has one name or the other."""

    weight: Tensor
    eps: float
    variance_epsilon: float

    def forward(self, x: Tensor) -> Tensor:
        """``[..., width]`` to the same."""
        if not _plain(x) or self.weight.dtype != x.dtype:
            theirs: Tensor = super().forward(x)
            return theirs
        return self.after_sum(x)[1]

    def after_sum(self, x: Tensor, residual: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """Return ``x + residual`` and its norm."""
        eps = self.eps if hasattr(self, "eps") else self.variance_epsilon
        return rms_norm(x, self.weight, residual, eps=eps, offset=self.family.offset, rounded=self.family.rounded)


def _after_sum(module: Any, x: Tensor, residual: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """Return ``x + residual`` and its norm; by calling ``module`` if it is not the family's plain RMSNorm."""
    alike = residual is None or residual.dtype == x.dtype  # not where a script has cast the norms to fp32
    if isinstance(module, FusedNorm) and untouched(module) and module.weight.dtype == x.dtype and alike:
        return module.after_sum(x, residual)
    h = x if residual is None else residual + x
    return h, module(h)


def activation_of(mlp: Any) -> nn.Module:
    activation: nn.Module = mlp.activation_fn if hasattr(mlp, "activation_fn") else mlp.act_fn
    return activation


def _plain(x: Tensor) -> bool:
    """Whether the fused pieces give what the family's own give: without autocast."""
    return x.device.type in FUSED_ON and x.dtype in _DTYPES and not torch.is_autocast_enabled(x.device.type)


_LAYERS = {"before": _PreNorm, "around": _BothNorms, "after": _PostNorm}
_made: dict[type[nn.Module], type[Fused]] = {}


def _fused(kind: type[Fused], cls: type[nn.Module], family: Family) -> type[Fused]:
    """Return the subclass of ``cls`` that runs as ``kind``, under the same name (FSDP wraps layers by it)."""
    if cls not in _made:
        members: dict[str, Any] = {"family": family, "unfused": cls, "__module__": __name__}
        if issubclass(kind, _Layer):
            parameters = inspect.signature(inspect.unwrap(cls.forward)).parameters.values()
            members["defaults"] = {p.name: p.default for p in parameters if p.default is not p.empty}
        _made[cls] = type(cls.__name__, (kind, cls), members)
    return _made[cls]

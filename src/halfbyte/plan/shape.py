"""What a model is to the planner: the sizes of its layers, from its configuration alone.

The model is built on torch's meta device, where tensors have shapes and no memory, and looked at: so a hub id whose
configuration is here, a folder and a configuration that nobody has weights for are all the same.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from transformers import AutoModelForCausalLM
from transformers.modeling_layers import GradientCheckpointingLayer

from halfbyte.errors import InputError, named
from halfbyte.hf.layers.experts import HALVES, STACKS
from halfbyte.hf.layers.families import FAMILIES, Family, recognise
from halfbyte.hf.layers.stacks import check_numbers, is_stacked
from halfbyte.hf.models.linears import ROUTERS

QKV = ("q_proj", "k_proj", "v_proj", "qkv_proj")
GATES = ("gate_proj", "up_proj", "gate_up_proj")
MOST_LAYERS = 1000
"""Layers that no model has; to build more takes minutes, if in shape alone."""
SHARED = (QKV, GATES)
"""Projections that are one operation, since they read one input (:mod:`halfbyte.hf.layers.fusion`)."""


@dataclass(frozen=True)
class Linear:
    """A linear layer of a decoder layer, or one of each of its experts.

    Attributes:
        name: its last name, such as ``q_proj``.
        path: within the decoder layer, such as ``self_attn.q_proj``; of experts that of their stack.
        inputs: values that it reads a token.
        outputs: values that it writes a token.
        count: how many there are, one for each expert.
        taken: how many of them a token passes.
        parts: of experts, the layers that are one here: gate and up, which have one adapter together.
    """

    name: str
    path: str
    inputs: int
    outputs: int
    count: int = 1
    taken: int = 1
    parts: tuple[str, ...] = ()

    @property
    def weights(self) -> int:
        """Values of all its weights."""
        return self.count * self.inputs * self.outputs

    @property
    def active_weights(self) -> int:
        """Values of the weights that a token passes."""
        return self.taken * self.inputs * self.outputs

    @property
    def values(self) -> int:
        """Values that it reads and writes a token."""
        return self.taken * (self.inputs + self.outputs)

    @property
    def matrices(self) -> tuple[int, int, int]:
        """Of the matrices that are quantized one by one: how many, their rows and columns."""
        pieces = max(len(self.parts), 1)
        return self.count * pieces, self.outputs // pieces, self.inputs


@dataclass(frozen=True)
class Mixture:
    """What of a decoder layer is a mixture of experts.

    Attributes:
        experts: how many.
        taken: of them by a token.
        inner: width within an expert.
        shared: width within the expert that all tokens pass; 0: there is none.
        shared_gate: whether that one's result is multiplied by how much it counts (Qwen2-MoE).
        normalized: whether the shares of a token's experts are divided by their sum.
        fp32: whether they are chosen by an fp32 copy of the weights that choose (GLM-4).
    """

    experts: int
    taken: int
    inner: int
    shared: int
    shared_gate: bool
    normalized: bool
    fp32: bool


@dataclass(frozen=True)
class Layer:
    """A decoder layer.

    Attributes:
        linears: of it.
        inner: width within the MLP; of a mixture, of all experts that a token passes together.
        dense_weights: values of its norms, biases, and of what chooses experts; they are never quantized.
        rotated: whether it turns queries and keys.
        window: the keys before its own that a query reads, or None for all.
        mixture: of experts, or None.
    """

    linears: tuple[Linear, ...]
    inner: int
    dense_weights: int
    rotated: bool
    window: int | None
    mixture: Mixture | None = None

    @property
    def weights(self) -> int:
        """Values of all weights that are quantized: those of its linears."""
        return sum(linear.weights for linear in self.linears)

    @property
    def active_weights(self) -> int:
        """Those of them that a token passes."""
        return sum(linear.active_weights for linear in self.linears)

    @property
    def values(self) -> int:
        """Values that its linears read and write a token."""
        return sum(linear.values for linear in self.linears)

    @property
    def experts(self) -> tuple[Linear, ...]:
        """Those of its linears that experts have."""
        return tuple(linear for linear in self.linears if linear.parts)

    @property
    def groups(self) -> list[tuple[Linear, ...]]:
        """The linears by the operations that compute them: those of one module that read one input are one."""
        grouped: dict[tuple[str, tuple[str, ...]], list[Linear]] = {}
        for linear in self.linears:
            names = next((names for names in SHARED if linear.name in names), (linear.name,))
            grouped.setdefault((linear.path.rpartition(".")[0], names), []).append(linear)
        return [tuple(together) for together in grouped.values()]


@dataclass(frozen=True)
class Shape:
    """A decoder of a family whose layers are fused.

    Attributes:
        family: its name in :data:`halfbyte.hf.layers.families.FAMILIES`.
        norms: where a layer has its norms: ``before``, ``around`` or ``after`` attention and MLP.
        plain_norms: whether they are LayerNorms without weights (OLMo), which are torch's.
        prefix: of the layers' names, such as ``model.layers``.
        layers: first to last.
        hidden: width of the residual stream.
        heads: of queries.
        kv_heads: of keys and of values.
        head_dim: values of a head.
        head_norms: whether queries and keys are normalized, ``head`` by head, ``all`` heads together, or not (None).
        turned: values of a head that rotary embedding turns.
        angle_bytes: of a cosine, where that is not the compute dtype's (fp32 in OLMo), else 0.
        vocabulary: rows of the embeddings.
        tied: whether the output head is the embeddings.
        last_norm: values of the norm behind the layers.
        most_positions: tokens that the configuration allows, or None.
    """

    family: str
    norms: str
    plain_norms: bool
    prefix: str
    layers: tuple[Layer, ...]
    hidden: int
    heads: int
    kv_heads: int
    head_dim: int
    head_norms: str | None
    turned: int
    angle_bytes: int
    vocabulary: int
    tied: bool
    last_norm: int
    most_positions: int | None = None

    @property
    def linear_weights(self) -> int:
        """Values of all weights that are quantized: those of the layers' linears."""
        return sum(layer.weights for layer in self.layers)

    @property
    def active_weights(self) -> int:
        """Those of them that a token passes."""
        return sum(layer.active_weights for layer in self.layers)

    @property
    def embedding_weights(self) -> int:
        """Values of embeddings and output head, which stay in 16 bits; once where they are tied."""
        return self.vocabulary * self.hidden * (1 if self.tied else 2)

    @property
    def dense_weights(self) -> int:
        """Those of all layers, and of the norm behind them."""
        return sum(layer.dense_weights for layer in self.layers) + self.last_norm

    @property
    def parameters(self) -> int:
        """All of the model's parameters."""
        return self.linear_weights + self.embedding_weights + self.dense_weights

    @property
    def active_parameters(self) -> int:
        """Those of them that are at work for a token."""
        return self.parameters - self.linear_weights + self.active_weights

    @property
    def inner(self) -> int:
        """Width within the widest MLP."""
        return max(layer.inner for layer in self.layers)

    @property
    def mixtures(self) -> list[Mixture]:
        """Of the layers that have one."""
        return [layer.mixture for layer in self.layers if layer.mixture]

    @property
    def expert_rows(self) -> int:
        """Values of the residual stream that a token's experts read in a layer; 0 where there are none."""
        return max((mixture.taken for mixture in self.mixtures), default=0) * self.hidden

    @property
    def queries(self) -> int:
        """Values of a token's queries."""
        return self.heads * self.head_dim

    @property
    def keys(self) -> int:
        """Values of a token's keys."""
        return self.kv_heads * self.head_dim


def shape_of(config: Any, name: str = "The model") -> Shape:
    """Return the shape of the model that a configuration describes.

    Args:
        config: transformers'; of a causal language model.
        name: what errors call the model.

    Raises:
        InputError: it is no decoder of a family whose layers are known.
    """
    if getattr(config, "is_encoder_decoder", False) or type(config) not in AutoModelForCausalLM._model_mapping:
        raise _unknown(name, f"a {config.model_type} model, no decoder of language")
    if getattr(config, "quantization_config", None) is not None:
        config = type(config).from_dict({k: v for k, v in config.to_dict().items() if k != "quantization_config"})
    layers = getattr(config.get_text_config(), "num_hidden_layers", None) or 0
    if layers > MOST_LAYERS:
        raise InputError(f"{name} has {layers:,} layers by its configuration, which no model has; mend config.json.")
    try:
        with torch.device("meta"):
            model = AutoModelForCausalLM.from_config(config)
    except Exception as error:  # nothing but the configuration's numbers is at work here
        raise InputError(f"No model can be made as {name} is configured ({error}); mend config.json.") from error
    return shape_from(model, name)


def shape_from(model: Any, name: str = "The model") -> Shape:
    """Return the shape of ``model``, which may lie on the meta device; as :func:`shape_of`."""
    layers = [
        (path, module) for path, module in model.named_modules() if isinstance(module, GradientCheckpointingLayer)
    ]
    kinds = {type(layer) for _, layer in layers}
    if len(kinds) != 1 or next(iter(kinds)).__name__ not in FAMILIES or recognise(next(iter(kinds))) is None:
        found = named(sorted(kind.__name__ for kind in kinds)) if kinds else "no decoder layer"
        raise _unknown(name, f"{type(model).__name__} with {found}")
    text = model.config.get_text_config()
    family: Family = FAMILIES[next(iter(kinds)).__name__]
    first: Any = layers[0][1]
    attention = first.self_attn
    head_dim = int(attention.head_dim)
    embeddings, head = model.get_input_embeddings(), model.get_output_embeddings()
    outside = {id(p) for p in (embeddings.weight, head.weight)}
    outside |= {id(p) for _, layer in layers for p in layer.parameters()}
    q_norm = getattr(attention, "q_norm", None)
    frequencies = [b for n, b in model.named_buffers() if n.endswith("inv_freq") and "original" not in n]
    return Shape(
        family=family.name,
        norms=family.norms,
        plain_norms=not list(getattr(first, "post_attention_layernorm", first).parameters(recurse=False)),
        prefix=layers[0][0].rpartition(".")[0],
        layers=tuple(_layer(layer, text, family) for _, layer in layers),
        hidden=int(text.hidden_size),
        heads=int(text.num_attention_heads),
        kv_heads=int(getattr(text, "num_key_value_heads", None) or text.num_attention_heads),
        head_dim=head_dim,
        head_norms=None if q_norm is None else "head" if q_norm.weight.numel() == head_dim else "all",
        turned=2 * max((int(b.numel()) for b in frequencies), default=head_dim // 2),
        angle_bytes=4 if family.fp32_angles else 0,
        vocabulary=int(embeddings.weight.shape[0]),
        tied=bool(getattr(text, "tie_word_embeddings", False)) or head.weight is embeddings.weight,
        last_norm=sum(p.numel() for p in model.parameters() if id(p) not in outside),
        most_positions=getattr(text, "max_position_embeddings", None),
    )


def _unknown(name: str, what: str) -> InputError:
    families = named(sorted({family.name for family in FAMILIES.values()}))
    return InputError(f"{name} is {what}; steps are foretold of the families {families} alone.")


def _layer(layer: Any, text: Any, family: Family) -> Layer:
    linears = _linears(layer)
    gates = [linear for linear in linears if linear.name in ("up_proj", "gate_up_proj")]
    return Layer(
        linears=linears,
        inner=sum(gate.taken * gate.outputs // (2 if gate.name == "gate_up_proj" else 1) for gate in gates),
        dense_weights=sum(p.numel() for p in layer.parameters()) - sum(linear.weights for linear in linears),
        rotated=bool(getattr(layer.self_attn, "use_rope", True)),
        window=_window(layer.self_attn, text, family),
        mixture=_mixture(layer.mlp, linears),
    )


def _linears(layer: nn.Module) -> tuple[Linear, ...]:
    found = []
    for path, module in layer.named_modules():
        name = path.rpartition(".")[2]
        if is_stacked(module):
            stacks: Any = module
            mixture: Any = layer.get_submodule(path.rpartition(".")[0])
            check_numbers(path, len(stacks.down_proj), mixture)
            found += _stacks(path, module, int(mixture.gate.top_k))
        elif _is_linear(name, module):
            found.append(Linear(name, path, module.in_features, module.out_features))
    return tuple(found)


def _stacks(path: str, experts: nn.Module, taken: int) -> list[Linear]:
    """Return the linears of experts, which are transformers' stacks ``[experts, outputs, inputs]``."""
    stacks = [(name, stack.shape) for name, stack in experts.named_parameters() if name in STACKS]
    return [
        Linear(name, f"{path}.{name}", width, out, count, taken, HALVES if name == "gate_up_proj" else (name,))
        for name, (count, out, width) in stacks
    ]


def _mixture(mlp: Any, linears: Sequence[Linear]) -> Mixture | None:
    down = next((linear for linear in linears if linear.parts == ("down_proj",)), None)
    if down is None:
        return None
    return Mixture(
        experts=down.count,
        taken=down.taken,
        inner=down.inputs,
        shared=sum(linear.outputs for linear in linears if linear.name == "up_proj"),
        shared_gate=hasattr(mlp, "shared_expert_gate"),
        normalized=bool(getattr(mlp.gate, "norm_topk_prob", True)),  # Mixtral's does without being asked
        fp32=hasattr(mlp.gate, "e_score_correction_bias"),
    )


def _is_linear(name: str, module: nn.Module) -> bool:
    return isinstance(module, nn.Linear) and name not in ROUTERS


def _window(attention: Any, text: Any, family: Family) -> int | None:
    own = family.extras(attention).get("sliding_window")
    kinds = getattr(text, "layer_types", None)
    if kinds and kinds[attention.layer_idx] == "full_attention":
        return None
    return None if own is None else int(own)

"""A model of transformers as the parts that decode by one native call a token (:mod:`halfbyte.kernels.decode`).

What is read here are models whose decoder layers are fused (:mod:`halfbyte.hf.layers.fusion`: known families,
prepared), with adapters of plain LoRA or DoRA. The rest of the family's model (embeddings, angles, last norm, head) is
known by its attributes as they are in transformers 5.23. That all of it is what the model computes is not believed but
tried: :func:`agrees` runs a few made-up tokens both ways. Anything else is refused by :class:`NotNative`, with the
reason, and decodes through transformers.
"""

import inspect
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from peft import PeftModel
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from transformers import PreTrainedModel

from halfbyte.hf.layers import dora, starts
from halfbyte.hf.layers.adapters import LoraLinear4bit, is_frozen, untouched
from halfbyte.hf.layers.expert_adapters import LoraExperts, low_rank
from halfbyte.hf.layers.experts import HALVES, Experts
from halfbyte.hf.layers.fusion import ACTIVATIONS, Fused, FusedMixture, FusedNorm, activation_of, shared_expert_of
from halfbyte.hf.layers.head import base_of, head_of
from halfbyte.kernels import DecodeLayer, DecodeNorm, DecoderParts, LowRankPart, Products, can_decode
from halfbyte.kernels.decode import MLP, DecodeMixture, DecodeMLP, Place
from halfbyte.nn import DenseLinear, LowRank
from halfbyte.quant import quantize_4bit, quantize_int8

Angles = Callable[[int, int], tuple[Tensor, Tensor]]
"""Of the positions from the first to before the last: cosines and sines, fp32 ``[positions, turned]``."""
CHANGING = ("dynamic", "longrope")
"""Rotary embeddings whose angles depend on how long the text is."""


class NotNative(Exception):
    """A model, or an adapter, that the native decoder does not know; the message says why."""


@dataclass
class Reading:
    """What a model is to the native decoder.

    Attributes:
        parts: of the base, without adapters.
        angles: for each table of cosines and sines what computes it.
        linears: of each layer and place its layers, in the order of their results.
    """

    parts: DecoderParts
    angles: list[Angles]
    linears: dict[tuple[int, Place], list[nn.Module]] = field(default_factory=dict)


def read(model: PreTrainedModel | PeftModel, *, head: str | None = None) -> Reading:
    """Return what ``model`` is to the native decoder.

    Args:
        model: on the CPU, prepared (:func:`halfbyte.hf.layers.prepare.prepare`) or fused.
        head: what the output head is quantized to: ``int8``, ``nf4``, or None as it is.

    Raises:
        NotNative: it is not known.
    """
    if not can_decode():
        raise NotNative("there are no native products here")
    base: Any = base_of(model)
    if any(parameter.device.type != "cpu" for parameter in model.parameters()):
        raise NotNative("the model is not on the CPU")
    if any(isinstance(parameter, DTensor) for parameter in model.parameters()):
        raise NotNative("the model is divided over processes")
    backbone = base.base_model
    layers = list(getattr(backbone, "layers", ()))
    if not layers or not all(isinstance(layer, Fused) and untouched(layer) for layer in layers):
        raise NotNative(f"{type(base).__name__} has decoder layers that are not known, or changed")
    linears = linears_of(model)
    dtype = _dtype(linears, base.dtype)
    rotary = _Rotary(backbone, dtype)
    decode_layers = [_layer(layer, number, linears, dtype, rotary) for number, layer in enumerate(layers)]
    attention = layers[0].self_attn
    embedding = backbone.get_input_embeddings()
    extras = [layer.family.extras(layer.self_attn) for layer in layers]
    caps = {extra.get("softcap") for extra in extras}
    scales = {layer.self_attn.scaling for layer in layers}
    sizes = {layer.self_attn.head_dim for layer in layers}
    activations = {name for layer in layers for name in _activations(layer)}
    if len(caps) > 1 or len(scales) > 1 or len(sizes) > 1 or len(activations) > 1:
        raise NotNative("its layers differ in scale, soft cap, activation or size of heads")
    logits = head_of(base)
    if logits is None:
        raise NotNative("its head is not known")
    output = base.get_output_embeddings()
    if not (is_frozen(output) or type(output) is nn.Linear) or not untouched(output):
        raise NotNative("its head has an adapter, or is no plain linear layer")
    config = base.config.get_text_config()
    parts = DecoderParts(
        dtype=dtype,
        embedding=_embedding(embedding),
        layers=decode_layers,
        last_norm=_norm(backbone.norm),
        head=Products([_head_weight(output, head, dtype)], _bias([output])),
        heads=config.num_attention_heads,
        kv_heads=config.num_key_value_heads,
        size=attention.head_dim,
        activation=activations.pop(),
        scale=float(scales.pop()),
        cap=caps.pop(),
        embedding_factor=float(embedding.embed_scale.to(embedding.weight.dtype))
        if hasattr(embedding, "embed_scale")
        else 1.0,
        logit_factor=logits.scale,
        logit_cap=logits.cap,
    )
    return Reading(parts, rotary.tables, linears)


def linears_of(model: PreTrainedModel | PeftModel) -> dict[tuple[int, Place], list[nn.Module]]:
    """Return of each layer and place its linear layers, as they are now: an adapter that is added wraps some.

    Raises:
        NotNative: a layer is not known.
    """
    layers: Any = getattr(base_of(model).base_model, "layers", ())
    return {
        (number, place): modules for number, layer in enumerate(layers) for place, modules in _linears(layer).items()
    }


def adapter_parts(
    reading: Reading, model: PreTrainedModel | PeftModel, name: str
) -> dict[tuple[int, Place], list[LowRankPart]]:
    """Return what the adapter ``name`` adds at each layer and place.

    Raises:
        NotNative: it is no plain LoRA or DoRA of layers that are known.
    """
    if not isinstance(model, PeftModel) or name not in model.peft_config:
        raise NotNative(f"there is no adapter {name}")
    dtype = reading.parts.dtype
    found = {at: list(_low_ranks(modules, name, dtype)) for at, modules in reading.linears.items()}
    known = {id(module) for modules in reading.linears.values() for module in modules}
    layers: Any = getattr(base_of(model).base_model, "layers", ())
    for number, layer in enumerate(layers):
        for wrapper in _wrappers(layer):
            known.add(id(wrapper))
            place: Any = "down" if wrapper.parameter_name == "down_proj" else "gate_up"
            for expert, part in enumerate(_of_experts(wrapper, name, dtype)):
                found[number, (expert, place)].append(part)
    for module in model.modules():
        held = any(name in vars(module).get("_modules", {}).get(kind, {}) for kind in _HOLDERS)
        if held and id(module) not in known:
            raise NotNative(f"the adapter {name} is at {type(module).__name__}, which is not known")
    if str(getattr(model.peft_config[name].peft_type, "value", "")) != "LORA":
        raise NotNative(f"the adapter {name} is of the kind {model.peft_config[name].peft_type}")
    return found


_HOLDERS = ("lora_A", "lora_embedding_A", "modules_to_save", "trainable_tokens_delta")


def agrees(model: PreTrainedModel | PeftModel, logits: Tensor, ids: Sequence[int], *, exact: bool = True) -> bool:
    """Whether ``logits`` ``[tokens, vocabulary]``, found natively for ``ids``, are those of the model's own forward.

    The bound is a multiple of what the dtype rounds, or, where head or cache are quantized and nothing is ``exact``, of
    what 4 bits round: wrong formulas are off by far more.
    """
    with torch.no_grad():
        theirs = model(input_ids=torch.tensor([list(ids)]), use_cache=False).logits[0].float()
    spread = float(theirs.std())
    off = float((theirs - logits).abs().mean())
    bound = 1e-3 if exact and base_of(model).dtype == torch.float32 else 0.15 if exact else 0.3
    return bool(torch.isfinite(logits).all()) and off <= bound * spread


def _linears(layer: Any) -> dict[Place, list[Any]]:
    attention = layer.self_attn
    if not (isinstance(attention, Fused) and untouched(attention)):
        raise NotNative(f"{type(layer).__name__} has an attention that is not known")
    qkv = ["qkv_proj"] if hasattr(attention, "qkv_proj") else ["q_proj", "k_proj", "v_proj"]
    found: dict[Place, list[Any]] = {"qkv": [getattr(attention, name) for name in qkv], "o": [attention.o_proj]}
    for number, mlp in enumerate(_mlps(layer)):
        gate_up = ["gate_up_proj"] if hasattr(mlp, "gate_up_proj") else [*HALVES]
        of: dict[str, list[Any]] = {"gate_up": [getattr(mlp, name) for name in gate_up], "down": [mlp.down_proj]}
        for name in MLP:
            found[(number, name) if isinstance(layer.mlp, FusedMixture) else name] = of[name]
    return found


def _mlps(layer: Any) -> list[Any]:
    """Return the MLP of a layer, or all of its mixture's, the shared one last."""
    mlp = layer.mlp
    if not isinstance(mlp, FusedMixture):
        return [mlp]
    experts, shared = _experts(mlp), shared_expert_of(mlp)
    return [experts.get_submodule(str(e)) for e in range(experts.num_experts)] + ([] if shared is None else [shared])


def _activations(layer: Any) -> set[str]:
    """Return the activations in a layer, all of them known."""
    mlp = layer.mlp
    plain = [shared_expert_of(mlp)] if isinstance(mlp, FusedMixture) else [mlp]
    plain = [one for one in plain if one is not None]
    if not untouched(mlp) or not all(isinstance(one, Fused) and untouched(one) for one in plain):
        raise NotNative(f"{type(layer).__name__} has an MLP that is not known")
    found: list[Any] = [activation_of(one) for one in plain]
    found += [_experts(mlp).act_fn] if isinstance(mlp, FusedMixture) else []
    if not all(type(activation) in ACTIVATIONS and untouched(activation) for activation in found):
        raise NotNative("its activation is not known")
    return {ACTIVATIONS[type(activation)] for activation in found}


def _experts(mixture: Any) -> Experts:
    """Return the experts of a mixture, below their adapters."""
    module = mixture.experts
    experts = module.get_base_layer() if isinstance(module, LoraExperts) else module
    if not isinstance(experts, Experts) or experts.layers_of.get("gate_up_proj") != HALVES or not untouched(experts):
        raise NotNative(f"{type(mixture).__name__} has experts that are not known")
    return experts


def _wrappers(layer: Any) -> list[LoraExperts]:
    """Return what holds the adapters of a layer's experts, of each stack one."""
    found = []
    module = getattr(layer.mlp, "experts", None)
    while isinstance(module, LoraExperts):
        found.append(module)
        module = module.base_layer
    return found


def _mixture(mixture: Any, mlps: Sequence[DecodeMLP], dtype: torch.dtype) -> DecodeMixture:
    """Return a mixture with these MLPs; which formula the router's is, its attributes tell in each known family."""
    router, shared_gate = mixture.gate, getattr(mixture, "shared_expert_gate", None)
    if not mixture.family.is_router(router) or not untouched(router):
        raise NotNative("its router has an adapter, or is changed")
    weights = [router.weight.detach().to(dtype).contiguous()]
    if shared_gate is not None:
        if not (is_frozen(shared_gate) or type(shared_gate) is nn.Linear) or not untouched(shared_gate):
            raise NotNative("the gate of its shared expert has an adapter, or is changed")
        weights.append(_weight(shared_gate, dtype))
    bias = getattr(router, "e_score_correction_bias", None)
    return DecodeMixture(
        router=Products(weights),
        chosen=router.top_k,
        experts=mlps,
        sigmoid=bias is not None,
        normalized=getattr(router, "norm_topk_prob", True),
        factor=float(getattr(router, "routed_scaling_factor", 1.0)),
        bias=None if bias is None else bias.detach().float().contiguous(),
        groups=getattr(router, "num_group", 1),
        groups_kept=getattr(router, "topk_group", 1),
        shared=shared_expert_of(mixture) is not None,
        shared_gate=shared_gate is not None,
    )


def _layer(
    layer: Any, number: int, linears: dict[tuple[int, Place], list[nn.Module]], dtype: torch.dtype, rotary: "_Rotary"
) -> DecodeLayer:
    attention = layer.self_attn
    products = {
        place: Products([_weight(m, dtype) for m in modules], _bias(modules))
        for (of_layer, place), modules in linears.items()
        if of_layer == number
    }
    mixes = isinstance(layer.mlp, FusedMixture)
    mlps = [DecodeMLP(*(products[(i, name) if mixes else name] for name in MLP)) for i in range(len(_mlps(layer)))]
    around = {
        "before": ("input_layernorm", None, "post_attention_layernorm", None),
        "around": (
            "input_layernorm", "post_attention_layernorm", "pre_feedforward_layernorm", "post_feedforward_layernorm",
        ),
        "after": (None, "post_attention_layernorm", None, "post_feedforward_layernorm"),
    }[layer.family.norms]  # fmt: skip
    norms = [None if name is None else _norm(getattr(layer, name)) for name in around]
    q_norm, k_norm = (
        _norm(getattr(attention, name)) if hasattr(attention, name) else None for name in ("q_norm", "k_norm")
    )
    whole = q_norm is not None and q_norm.weight is not None and len(q_norm.weight) != attention.head_dim
    window = layer.family.extras(attention).get("sliding_window")
    if window is None and getattr(attention, "sliding_window", None):
        raise NotNative("the window of its attention is not known")
    return DecodeLayer(
        qkv=products["qkv"],
        o=products["o"],
        mlp=None if mixes else mlps[0],
        mixture=_mixture(layer.mlp, mlps, dtype) if mixes else None,
        before_attention=norms[0],
        after_attention=norms[1],
        before_mlp=norms[2],
        after_mlp=norms[3],
        q_norm=q_norm,
        k_norm=k_norm,
        whole_norms=whole,
        window=window,
        angles=rotary.table_of(number, attention),
    )


class _Rotary:
    """Tables of cosines and sines of a model: one, or one for each type of layer."""

    def __init__(self, backbone: Any, dtype: torch.dtype) -> None:
        self._module = backbone.rotary_emb
        self._types: Any = getattr(backbone.config, "layer_types", None)
        self._by_type = "layer_type" in inspect.signature(inspect.unwrap(type(self._module).forward)).parameters
        self._like = torch.empty(0, dtype=dtype)
        kinds = self._module.rope_type
        if any(word in kind for kind in (kinds.values() if isinstance(kinds, dict) else [kinds]) for word in CHANGING):
            raise NotNative("its rotary embedding depends on how long the text is")
        self.tables: list[Angles] = []
        self._known: dict[str | None, int] = {}

    def table_of(self, number: int, attention: Any) -> int | None:
        """Return the index of the table for a layer."""
        if not getattr(attention, "use_rope", True):
            return None
        kind = self._types[number] if self._by_type else None
        if kind not in self._known:
            self._known[kind] = len(self.tables)
            self.tables.append(lambda first, last: self._angles(first, last, kind))
        return self._known[kind]

    def _angles(self, first: int, last: int, kind: str | None) -> tuple[Tensor, Tensor]:
        positions = torch.arange(first, last)[None]
        more = {} if kind is None else {"layer_type": kind}
        cos, sin = self._module(self._like, positions, **more)
        return cos[0].float().contiguous(), sin[0].float().contiguous()


def _dtype(linears: dict[tuple[int, Place], list[nn.Module]], otherwise: torch.dtype) -> torch.dtype:
    """Return what all products read."""
    found = set()
    for modules in linears.values():
        for module in modules:
            base = _base(module)
            found.add(base.compute_dtype or otherwise)
    if len(found) != 1:
        raise NotNative("its layers compute in several dtypes")
    dtype: torch.dtype = found.pop()
    return dtype


def _base(module: nn.Module) -> Any:
    """Return the frozen layer under an adapter, or the layer itself."""
    base = module.base_layer if isinstance(module, LoraLinear4bit) else module
    if not is_frozen(base) or not untouched(base) or not untouched(module):
        raise NotNative(f"{type(module).__name__} is no frozen layer with plain adapters")
    return base


def _weight(module: nn.Module, dtype: torch.dtype) -> Any:
    if type(module) is nn.Linear:
        return module.weight.detach().to(dtype).contiguous()
    base = _base(module)
    weight = base.frozen_weight
    return weight.detach().to(dtype).contiguous() if isinstance(base, DenseLinear) else weight


def _head_weight(module: nn.Module, quantized: str | None, dtype: torch.dtype) -> Any:
    weight = _weight(module, dtype)
    if quantized is None or not isinstance(weight, Tensor):
        return weight
    return quantize_int8(weight) if quantized == "int8" else quantize_4bit(weight, quantized, double_quant=True)


def _bias(modules: Sequence[nn.Module]) -> Tensor | None:
    """Return the biases of some layers, fp32, one after the other."""
    bases = [module if type(module) is nn.Linear else _base(module) for module in modules]
    if all(base.bias is None for base in bases):
        return None
    return torch.cat(
        [
            torch.zeros(base.out_features, dtype=torch.float32) if base.bias is None else base.bias.detach().float()
            for base in bases
        ]
    )


def _norm(module: Any) -> DecodeNorm:
    if not untouched(module):
        raise NotNative(f"{type(module).__name__} is changed")
    if isinstance(module, FusedNorm):
        eps = module.eps if hasattr(module, "eps") else module.variance_epsilon
        weight = module.weight.detach().float() + module.family.offset
        return DecodeNorm(weight.contiguous(), float(eps), module.family.rounded)
    if type(module).__name__ == "OlmoLayerNorm" and type(module).__module__.startswith("transformers.models.olmo."):
        return DecodeNorm(None, 1e-5, rounded=False, centered=True)
    raise NotNative(f"{type(module).__name__} is not known")


def _embedding(module: Any) -> Tensor:
    plain = type(module) is nn.Embedding or type(module).__name__.endswith("ScaledWordEmbedding")
    if not plain or not untouched(module) or type(module.weight) is not nn.Parameter:
        raise NotNative("its embedding has an adapter, or is no plain one")
    weight: Tensor = module.weight.detach()
    return weight.contiguous()


def _of_experts(wrapper: LoraExperts, name: str, dtype: torch.dtype) -> Iterator[LowRankPart]:
    """Yield what the adapter ``name`` adds to a stack's results, expert by expert."""
    if name in wrapper.lora_A:
        part = low_rank(wrapper, name)
        with torch.no_grad():
            for a, bt in zip(part.a, part.bt, strict=True):
                yield LowRankPart(0, (a * part.scaling).to(dtype).contiguous(), bt.to(dtype).contiguous())


def _low_ranks(modules: Sequence[nn.Module], name: str, dtype: torch.dtype) -> Iterator[LowRankPart]:
    """Yield what the adapter ``name`` adds to the results of some layers of one input."""
    first = 0
    for layer in modules:
        base: Any = _base(layer)
        width = base.out_features
        if isinstance(layer, LoraLinear4bit) and name in layer.lora_A:
            is_dora = dora.is_dora(layer, [name])
            if name in layer.lora_variant and not is_dora:
                raise NotNative(f"the adapter {name} is a variant of LoRA that is not known")
            a, b = layer.lora_A[name], layer.lora_B[name]
            scaling = layer.scaling[name]
            terms = [LowRank(a.weight, b.weight, scaling), *starts.starts_of(layer, [name])]
            with torch.no_grad():
                yield LowRankPart(
                    first,
                    torch.cat([(term.a * term.scaling).to(dtype) for term in terms]).contiguous(),
                    torch.cat([term.b.T.to(dtype) for term in terms]).contiguous(),
                    dora.factors(layer, name, base).float().contiguous() if is_dora else None,
                    None if b.bias is None else (b.bias.float() * scaling).contiguous(),
                )
        first += width

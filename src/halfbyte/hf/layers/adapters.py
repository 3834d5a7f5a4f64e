"""PEFT's LoRA layers over frozen weights in 4, 8 or 16 bits: theirs to configure, save and load, ours to run.

PEFT (0.21) wraps a :class:`~halfbyte.nn.FrozenLinear` in its ``lora.Linear``, which over 4 bits would compute the
low-rank part in fp32 and, asked to merge, add floats to packed bytes. :mod:`halfbyte.hf.layers.prepare` turns each of
those, by class swap, into :class:`LoraLinear4bit`; parameters, names and files stay PEFT's.
"""

from collections.abc import Sequence
from typing import Any, NamedTuple, TypeGuard

import torch
from peft import PeftModel
from peft.tuners.lora import Linear as LoraLinear
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import Tensor, nn
from transformers import AutoConfig

from halfbyte.errors import InputError, named
from halfbyte.hf.layers import dora, starts
from halfbyte.nn import (
    DenseLinear,
    FrozenLinear,
    Linear4bit,
    Linear8bit,
    LowRank,
    Projection,
    QuantizedLinear,
    lora_linear,
)  # fmt: skip
from halfbyte.nn.dora import rescale

CHANGES_NOTHING = "_halfbyte_changes_nothing"
"""An attribute of hooks of ours, which look and leave what passes as it is."""
KINDS = (
    *("LORA", "ADALORA", "ADAPTION_PROMPT", "BEFT", "BOFT", "C3A", "CARTRIDGE", "CPT", "FOURIERFT", "GRALORA", "IA3"),
    *("LILY", "LN_TUNING", "MISS", "OFT", "PREFIX_TUNING", "PROMPT_TUNING", "PVERA", "P_TUNING", "RANDLORA", "ROAD"),
    *("SHADOW", "TRAINABLE_TOKENS", "VBLORA", "VERA", "WAVEFT"),
)
"""PEFT's names (0.21) of the kinds of adapters that run over 4-bit weights as over dense ones: each was compared.

Others (LoHa, LoKr, HRA, HiRA, SHiRA, DeLoRA, ...) compute with the dense weight itself."""


def check_kind(kind: Any) -> None:
    """Refuse a kind of adapter that does not run over 4-bit weights.

    Raises:
        InputError: it names the kind and those that do.
    """
    name = str(getattr(kind, "value", kind))
    if name not in KINDS:
        raise InputError(
            f"Adapters of the kind {name} do not run over 4-bit weights; use one of {', '.join(KINDS)}, or put it on "
            "the 16-bit model."
        )


class LoraLinear4bit(LoraLinear):
    """PEFT's ``lora.Linear`` with our forward for plain LoRA and DoRA; other variants run as PEFT wrote them."""

    def forward(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        """``y = x dequant(W)ᵀ + b + Σ s (dropout(x) Aᵀ) Bᵀ`` over the active adapters, ``[..., out]``."""
        projection = None if args or kwargs else _projection(self)
        if projection is None and not args and not kwargs and (names := _dropped_dora(self)):
            base, dtype = self.base_layer, self.base_layer.compute_dtype or x.dtype
            bias = None if base.bias is None else base.bias.to(dtype)
            dropout = self.lora_dropout[names[0]]
            return dora.dropped(self, names[0], base, bias, x.to(dtype), dropout).to(x.dtype)
        if projection is None:
            theirs: Tensor = super().forward(x, *args, **kwargs)
            return theirs if self.disable_adapters else self._less_starts(theirs, x, kwargs)
        return _project([projection], x)[0]

    def _less_starts(self, y: Tensor, x: Tensor, kwargs: dict[str, Any]) -> Tensor:
        """Return ``y``, without what the adapters began with (:mod:`halfbyte.hf.layers.starts`)."""
        if kwargs.get("adapter_names") and starts.starts_of(self, [*self.lora_A]):
            raise InputError(
                "Rows cannot each have their adapter where one subtracts what it began with: save it, open it."
            )
        part = starts.subtracted(self, [name for name in self.active_adapters if name in self.lora_A], x)
        return y if part is None else y + part

    def merge(self, safe_merge: bool = False, adapter_names: list[str] | None = None) -> None:
        """Refuse: the sum of a 4-bit weight and an adapter is not a 4-bit weight. Into a dense one PEFT merges."""
        if not isinstance(self.base_layer, DenseLinear):
            refuse_merge()
        super().merge(safe_merge, adapter_names)


def refuse_merge(*_: Any, **__: Any) -> None:
    """What stands for ``merge`` of an adapter's layer over a 4-bit weight; PEFT's would write floats over its bytes."""
    raise InputError(
        "An adapter cannot be merged into 4-bit weights, nor into 8-bit ones, which could not be undone; "
        "merge_and_unload() makes a dense model of both, and halfbyte merge writes one."
    )


def project(layers: Sequence[nn.Module], x: Tensor) -> list[Tensor]:
    """Return ``[layer(x) for layer in layers]``, the work shared between them where that is the same.

    It is for 4-bit layers, with plain LoRA or without, whose compute dtype and LoRA dropout agree. Others, and layers
    with hooks or with somebody else's forward, are called one by one.
    """
    projections = [_projection(layer) if untouched(layer) else None for layer in layers]
    shared = [p for p in projections if p is not None]
    dtypes = {p.compute_dtype for p in shared}
    dropouts = {p.dropout for p in shared if p.projection.adapters}
    if len(shared) < len(layers) or len(dtypes) != 1 or len(dropouts) > 1:
        return [layer(x) for layer in layers]
    return _project(shared, x)


class _Projection(NamedTuple):
    """What a layer computes, if it is plain."""

    projection: Projection
    compute_dtype: torch.dtype | None
    dropout: float
    rescaled: tuple[Tensor, Tensor | None] | None = None
    """For DoRA: what multiplies the rows of the result, and the bias, which is added after it."""
    whole: tuple[LowRank, ...] = ()
    """Terms that see all of the input where the adapters' loses values: what they began with, subtracted."""


def _project(projections: Sequence[_Projection], x: Tensor) -> list[Tensor]:
    compute_dtype, dropout = projections[0].compute_dtype, max(p.dropout for p in projections)
    taken = x.to(compute_dtype or x.dtype)
    ys = lora_linear(taken, [p.projection for p in projections], dropout)
    parts = [starts.summed(p.whole, taken) for p in projections]
    ys = [y if part is None else y + part for y, part in zip(ys, parts, strict=True)]
    ys = [y if p.rescaled is None else rescale(y, *p.rescaled) for y, p in zip(ys, projections, strict=True)]
    return [y.to(x.dtype) for y in ys]


def _projection(layer: nn.Module) -> _Projection | None:
    """Return what ``layer`` computes, or None where it is anything but a frozen layer with plain LoRA, DoRA or none.

    Of PEFT 0.21's ``lora.Linear`` this reads what its own forward reads.
    """
    if is_frozen(layer):
        return _Projection(Projection(layer.frozen_weight, layer.bias, ()), layer.compute_dtype, 0.0)
    if type(layer) is not LoraLinear4bit or layer.disable_adapters or layer.merged:
        return None
    base = layer.base_layer
    names = [name for name in layer.active_adapters if name in layer.lora_A]
    dropouts = {_probability(layer.lora_dropout[name]) for name in names} or {0.0}
    dropout = dropouts.pop()
    is_dora = dora.is_dora(layer, names) and not dropout
    varied = any(name in layer.lora_variant for name in names) and not is_dora
    if varied or dropouts or dropout is None or not untouched(base):
        return None
    if not is_frozen(base):
        return None
    bias, adapters = base.bias, []
    for name in names:
        a, b, scaling = layer.lora_A[name], layer.lora_B[name], layer.scaling[name]
        adapters.append(LowRank(a.weight, b.weight, scaling))
        if b.bias is not None:
            bias = b.bias * scaling if bias is None else bias + b.bias * scaling
    begun = starts.starts_of(layer, names)
    if not dropout:
        adapters, begun = [*adapters, *begun], []
    if is_dora:
        rescaled = (dora.factors(layer, names[0], base), bias)
        return _Projection(Projection(base.frozen_weight, None, adapters), base.compute_dtype, dropout, rescaled)
    projection = Projection(base.frozen_weight, bias, adapters)
    return _Projection(projection, base.compute_dtype, dropout, whole=tuple(begun))


def is_frozen(layer: nn.Module) -> TypeGuard[FrozenLinear]:
    """Return whether ``layer`` computes as ours do, with a weight that gets no gradient."""
    kinds = (Linear4bit, Linear8bit, DenseLinear)
    plain = any(isinstance(layer, kind) and type(layer).forward is kind.forward for kind in kinds)
    return plain and not layer.weight.requires_grad


def _dropped_dora(layer: LoraLinear4bit) -> list[str] | None:
    """Return the active adapters if they are a single DoRA whose input loses values now, else None."""
    names = [name for name in layer.active_adapters if name in layer.lora_A]
    plain = type(layer) is LoraLinear4bit and is_frozen(layer.base_layer) and untouched(layer.base_layer)
    if not plain or layer.disable_adapters or not dora.is_dora(layer, names):
        return None
    return names if _probability(layer.lora_dropout[names[0]]) else None


def _probability(dropout: nn.Module) -> float | None:
    """Return the probability with which ``dropout`` drops a value now, or None where it is no plain dropout."""
    if type(dropout) is nn.Identity:
        return 0.0
    if type(dropout) is not nn.Dropout:
        return None
    return dropout.p if dropout.training else 0.0


def untouched(module: nn.Module) -> bool:
    """Return whether calling ``module`` is its class's forward and no more; what torch 2.13's ``__call__`` asks.

    Hooks with :data:`CHANGES_NOTHING` set do not count.
    """
    hooks = (module._forward_hooks, module._forward_pre_hooks, module._backward_hooks, module._backward_pre_hooks)
    changing = any(not hasattr(hook, CHANGES_NOTHING) for some in hooks for hook in some.values())
    everywhere = nn.modules.module._has_any_global_hook()  # type: ignore[no-untyped-call]
    return "forward" not in vars(module) and not changing and not everywhere


def active_adapter(model: PeftModel) -> str | None:
    """Return the adapter that a model is computed with, or None where adapters are off.

    Raises:
        InputError: there are several at once.
    """
    layer = next((module for module in model.modules() if isinstance(module, BaseTunerLayer)), None)
    if layer is not None and layer.disable_adapters:
        return None
    names = list(model.active_adapters)
    if len(names) > 1:
        raise InputError(f"The adapters {named(names)} are active at once; combine them into one, or activate one.")
    return str(names[0]) if names else None


class Counts:
    """PEFT's ``get_nb_trainable_parameters`` for packed weights, which would count two 4-bit values as one."""

    def __init__(self, model: nn.Module) -> None:
        self.model = model

    def __call__(self) -> tuple[int, int]:
        return count_parameters(self.model)


def count_parameters(model: nn.Module) -> tuple[int, int]:
    """Return how many parameters are trained and how many there are, a quantized weight counted by its values."""
    packed = {
        id(module.weight): module.out_features * module.in_features
        for module in model.modules()
        if isinstance(module, QuantizedLinear)
    }
    parameters = list(model.parameters())
    trained = sum(p.numel() for p in parameters if p.requires_grad)
    return trained, sum(packed.get(id(p), p.numel()) for p in parameters)


def vocabulary_resized(model: PeftModel) -> bool:
    """Return whether embeddings have to be saved whole: rows were added, or taken away, that no adapter holds.

    PEFT's own ``save_pretrained`` asks this too, but over the network if need be. Rows that are trained one by one
    (``trainable_token_indices``) are in the adapter.
    """
    base = model.get_base_model()
    path = getattr(base.config, "_name_or_path", "")
    if not path or model.get_input_embeddings() is None:
        return False
    try:
        before = AutoConfig.from_pretrained(path, local_files_only=True)
    except (OSError, ValueError):
        return True  # nothing to compare with, and rows that are saved in vain do no harm
    rows: int = before.get_text_config().vocab_size
    now: int = base.config.get_text_config().vocab_size
    return now < rows or not all({*range(rows, now)} <= held_everywhere(c, base) for c in model.peft_config.values())


def held_everywhere(config: Any, base: Any) -> set[int]:
    """Return the rows that an adapter of this configuration holds, of the input embedding and of the output head."""
    indices = getattr(config, "trainable_token_indices", None) or []
    lists = [*indices.values()] if isinstance(indices, dict) else [indices]
    tied = getattr(base.config.get_text_config(), "tie_word_embeddings", False)
    return set.intersection(*map(set, lists)) if tied or len(lists) > 1 else set()

"""PEFT's DoRA layers (0.21) over 4-bit weights, as :mod:`halfbyte.nn.dora` computes them.

PEFT expands the weight and multiplies B by A in full for each call; here a layer's lengths are computed from its 4-bit
weight and kept until A or B changes. Dropout is PEFT's: the length's change goes to the dropped input, the base product
to the whole one,

    y = x Wᵀ + b + (m / n - 1) ∘ x' Wᵀ + (m / n) ∘ s x' Aᵀ Bᵀ = (x - x') Wᵀ + b + (m / n) ∘ z(x')

so that it takes a second base product.
"""

from typing import Any

from peft.tuners.lora.dora import DoraLinearLayer
from peft.tuners.lora.variants import DoraLinearVariant
from torch import Tensor, nn

from halfbyte.nn import FrozenLinear, LowRank, Projection, lora_linear
from halfbyte.nn.dora import lengths, rescale, squared_lengths

_KEPT = "_halfbyte_lengths"


def is_dora(layer: Any, names: list[str]) -> bool:
    """Whether the active adapters ``names`` of PEFT's ``layer`` are a single plain DoRA."""
    if len(names) != 1 or type(layer.lora_variant.get(names[0])) is not DoraLinearVariant:
        return False
    return type(layer.lora_magnitude_vector[names[0]]) is DoraLinearLayer and layer.lora_B[names[0]].bias is None


def factors(layer: Any, name: str, base: FrozenLinear) -> Tensor:
    """Return ``m / n`` of the adapter ``name``, fp32 ``[out]``, differentiable in the magnitude ``m``."""
    adapter = LowRank(layer.lora_A[name].weight, layer.lora_B[name].weight, layer.scaling[name])
    magnitude: Tensor = layer.lora_magnitude_vector[name].weight
    return magnitude.float() / _lengths(layer, name, base, adapter)


def dropped(layer: Any, name: str, base: FrozenLinear, bias: Tensor | None, x: Tensor, dropout: nn.Module) -> Tensor:
    """Return what the layer computes where ``dropout`` takes values of its input: the formula above.

    Args:
        layer: PEFT's, with one active adapter, ``name``.
        base: its base layer, and ``bias`` in the dtype to compute in.
        x: ``[..., in]`` in the dtype to compute in.
        dropout: drops values.
    """
    less = dropout(x)
    adapter = LowRank(layer.lora_A[name].weight, layer.lora_B[name].weight, layer.scaling[name])
    [z] = lora_linear(less, [Projection(base.frozen_weight, None, [adapter])])
    [rest] = lora_linear(x - less, [Projection(base.frozen_weight, bias, ())])
    return rest + rescale(z, factors(layer, name, base), None)


def _lengths(layer: nn.Module, name: str, base: FrozenLinear, adapter: LowRank) -> Tensor:
    """Return ``n``, computed again only where a value that it depends on has changed since."""
    a, b, _ = adapter
    weight: Any = base.frozen_weight
    if a.is_inference() or b.is_inference():  # which have no version to go by
        return lengths(weight, squared_lengths(weight), adapter)
    kept: dict[str, Any] = vars(layer).setdefault(_KEPT, {})
    known = kept.get(name, {})
    if known.get("of_base") is not base.weight:
        known = {"of_base": base.weight, "squared": squared_lengths(weight)}
    of = (a._version, a.data_ptr(), b._version, b.data_ptr(), adapter.scaling)
    if known.get("of") != of:
        known |= {"of": of, "lengths": lengths(weight, known["squared"], adapter)}
    kept[name] = known
    result: Tensor = known["lengths"]
    return result

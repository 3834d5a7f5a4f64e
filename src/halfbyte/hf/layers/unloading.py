"""PEFT's ``merge_and_unload`` over quantized weights: a dense model of transformers' own classes.

The adapter is merged onto what the 4-bit or 8-bit weights stand for, which is what it was trained over, by PEFT's own
``merge`` (0.21) of each layer over fp32; the sum is rounded once, to the compute dtype. Layers without an adapter
become dense too. The quantized model is used up.
"""

import logging
from typing import Any

import torch
from peft import PeftModel
from peft.tuners.lora import Linear as LoraLinear
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from halfbyte.hf.layers.adapters import LoraLinear4bit
from halfbyte.hf.layers.expert_adapters import LoraExperts, merged_experts
from halfbyte.hf.layers.fusion import unfuse
from halfbyte.hf.layers.head import base_of, unbind_head
from halfbyte.hf.layers.stacks import put_together
from halfbyte.hf.layers.starts import starts_of
from halfbyte.nn import FrozenLinear, QuantizedLinear

logger = logging.getLogger(__name__)


class MergeAndUnload:
    """What stands for ``merge_and_unload`` of a model that was prepared."""

    def __init__(self, model: PeftModel) -> None:
        self.model = model

    def __call__(
        self, progressbar: bool = False, safe_merge: bool = False, adapter_names: list[str] | None = None
    ) -> PreTrainedModel:
        """Return the dense model, with the active adapters or those named in its weights; arguments are PEFT's."""
        model = self.model
        tuner: Any = model.base_model
        tuner._check_merge_allowed()
        base: Any = base_of(model)
        is_quantized = any(isinstance(module, QuantizedLinear) for module in base.modules())
        unfuse(base)
        unbind_head(base)
        for path, layer in list(base.named_modules()):
            if isinstance(layer, BaseTunerLayer) and isinstance(getattr(layer, "base_layer", None), FrozenLinear):
                base.set_submodule(path, _merged(layer, base.dtype, safe_merge, adapter_names))
            elif isinstance(layer, LoraExperts) and not path.endswith(".base_layer"):
                base.set_submodule(path, merged_experts(layer, base.dtype, adapter_names))
        _untie(base)
        merged: PreTrainedModel = tuner.merge_and_unload(progressbar, safe_merge, adapter_names)
        for path, layer in list(merged.named_modules()):
            if isinstance(layer, FrozenLinear):
                merged.set_submodule(path, dense_layer(layer, layer.dequantize(layer.compute_dtype or merged.dtype)))
        put_together(merged)
        quantizer = getattr(merged, "hf_quantizer", None)
        if quantizer is not None:
            quantizer.remove_quantization_config(merged)
        if is_quantized:
            logger.warning(
                "The adapter was merged onto the dequantized weights, which it was trained over; the model is in %s.",
                str(merged.dtype).removeprefix("torch."),
            )
        return merged


def _untie(model: Any) -> None:
    """Give an embedding or a head with an adapter a weight of its own, where it would be merged into both."""
    ends = [model.get_input_embeddings(), model.get_output_embeddings()]
    if None in ends:
        return
    one, other = (end.get_base_layer() if isinstance(end, BaseTunerLayer) else end for end in ends)
    for end, layer in zip(ends, (one, other), strict=True):
        if isinstance(end, BaseTunerLayer) and getattr(one, "weight", None) is getattr(other, "weight", None):
            layer.weight = nn.Parameter(layer.weight.detach().clone(), requires_grad=False)


def _merged(layer: Any, dtype: torch.dtype, safe_merge: bool, names: list[str] | None) -> nn.Module:
    frozen: FrozenLinear = layer.base_layer
    weight = frozen.dequantize(torch.float32)
    if isinstance(layer, LoraLinear):
        for a, b, scaling in starts_of(
            layer, [name for name in names or layer.active_adapters if name in layer.lora_A]
        ):
            weight = torch.addmm(weight, b.float(), a.float(), alpha=scaling)
    dense = nn.Linear(frozen.in_features, frozen.out_features, bias=False, device="meta")
    dense.weight = nn.Parameter(weight, requires_grad=False)
    dense.bias = None if frozen.bias is None else nn.Parameter(frozen.bias.detach().float(), requires_grad=False)
    layer.base_layer = dense
    if type(layer) is LoraLinear4bit:
        layer.__class__ = LoraLinear
    vars(layer).pop("merge", None)
    layer.merge(safe_merge=safe_merge, adapter_names=names)
    made = layer.get_base_layer()
    dtype = frozen.compute_dtype or dtype
    bias = None if made.bias is None else made.bias.detach().to(dtype)
    return dense_layer(frozen, made.weight.detach().to(dtype), bias)


def dense_layer(frozen: FrozenLinear, weight: Tensor, bias: Tensor | None = None) -> nn.Module:
    """Return the layer that ``frozen`` is in a dense model.

    Args:
        frozen: in its place.
        weight: ``[out_features, in_features]``.
        bias: another one than its own.
    """
    bias = frozen.bias if bias is None else nn.Parameter(bias)
    if frozen.transposed:
        with torch.device("meta"):
            conv: nn.Module = Conv1D(frozen.out_features, frozen.in_features)
        conv.weight = nn.Parameter(weight.T.contiguous())
        conv.bias = bias
        return conv
    dense = nn.Linear(frozen.in_features, frozen.out_features, bias=False, device="meta")
    dense.weight = nn.Parameter(weight)
    dense.bias = bias
    return dense

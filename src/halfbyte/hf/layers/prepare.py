"""A PEFT model over 4-bit weights, made ready: our LoRA layers and fused decoder layers, by class swap, and our head.

The model's output head is bound too (:mod:`halfbyte.hf.layers.head`): while training with labels it returns no logits.
"""

import logging
from typing import TypeVar, cast

from peft import PeftModel
from peft.tuners.lora import Linear as LoraLinear
from peft.tuners.lora.layer import ParamWrapper
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import nn
from transformers import PreTrainedModel

from halfbyte.errors import InputError
from halfbyte.hf.layers.adapters import Counts, LoraLinear4bit, check_kind, refuse_merge
from halfbyte.hf.layers.expert_adapters import LoraExperts
from halfbyte.hf.layers.experts import Experts
from halfbyte.hf.layers.fusion import fuse, unfuse
from halfbyte.hf.layers.head import base_of, bind_head, unbind_head
from halfbyte.hf.layers.starts import has_starts
from halfbyte.hf.layers.unloading import MergeAndUnload
from halfbyte.nn import FrozenLinear, QuantizedLinear

Model = TypeVar("Model", bound=nn.Module)
logger = logging.getLogger(__name__)


def prepare(model: Model) -> Model:
    """Make a PEFT model over 4-bit weights ready, to train and to run alike, and fuse its decoder layers.

    The same over 8-bit weights, and over dense ones of a model that was opened with ``quant_type`` ``none``.

    LoRA layers over such weights compute as :mod:`halfbyte.hf.layers.adapters` says; adapters of other kinds (IA³,
    prompts, ...) run as PEFT wrote them. ``merge_and_unload`` makes a dense model of both
    (:mod:`halfbyte.hf.layers.unloading`); to be merged into 4-bit weights, which could not be undone, is an error.
    Decoder layers of families that are not known stay as they are;
    :func:`halfbyte.hf.layers.fusion.describe_layers` tells.

    Args:
        model: what ``get_peft_model`` or ``PeftModel.from_pretrained`` returned; changed in place.

    Returns:
        The same model.

    Raises:
        InputError: there is no adapter, or no 4-bit weight in it, or the adapter is of a kind that needs dense weights.
    """
    if not any(isinstance(module, BaseTunerLayer) for module in model.modules()) and not isinstance(model, PeftModel):
        raise InputError(
            f"{type(model).__name__} has no adapter: call peft.get_peft_model(model, "
            "LoraConfig(target_modules='all-linear', ...)) first."
        )
    if not any(isinstance(module, FrozenLinear) for module in model.modules()):
        raise InputError(f"{type(model).__name__} has no 4-bit weight: load the model with HalfbyteConfig first.")
    layers = [
        module
        for module in model.modules()
        if isinstance(module, BaseTunerLayer) and isinstance(getattr(module, "base_layer", None), FrozenLinear)
    ]
    quantized = any(isinstance(layer.base_layer, QuantizedLinear) for layer in layers)
    if quantized and isinstance(model, PeftModel):
        for config in model.peft_config.values():
            check_kind(config.peft_type)
    for layer in layers:
        if type(layer) is LoraLinear:
            layer.__class__ = LoraLinear4bit
        elif (
            hasattr(layer, "merge")
            and not isinstance(layer, LoraLinear4bit)
            and isinstance(layer.base_layer, QuantizedLinear)
        ):
            layer.merge = refuse_merge
    if any(isinstance(part, BaseTunerLayer) for experts in _experts_of(model) for part in experts.modules()):
        logger.warning(
            "The adapter is on each matrix of the experts by itself, which is slow, and opens over no other model: "
            "name their stacks, LoraConfig(target_modules=[...], target_parameters=['experts.gate_up_proj', "
            "'experts.down_proj'])."
        )
    for module in model.modules():
        if type(module) is ParamWrapper and isinstance(cast(ParamWrapper, module).get_base_layer(), Experts):
            module.__class__ = LoraExperts
    base = base_of(model)
    if isinstance(base, PreTrainedModel):
        bind_head(base)
    if isinstance(model, PeftModel):
        model.get_nb_trainable_parameters = Counts(model)
        if hasattr(model.base_model, "merge_and_unload"):
            model.merge_and_unload = MergeAndUnload(model)
    fuse(model)
    return model


def _experts_of(model: nn.Module) -> list[Experts]:
    return [module for module in model.modules() if isinstance(module, Experts)]


prepare_for_training = prepare
"""The older name of :func:`prepare`, which serves running as well."""


def unprepare(model: Model) -> Model:
    """Undo :func:`prepare`: PEFT's and transformers' own classes again, in place; returns the model.

    But for adapters of experts, over whose matrices PEFT's own classes do not compute.

    Raises:
        InputError: the adapter subtracts what it began with, which PEFT's classes do not.
    """
    if has_starts(model):
        raise InputError(
            "The adapter subtracts what it began with (pissa, olora), which PEFT's own layers do not: save it with "
            "save_pretrained, which makes plain LoRA of it, and open that."
        )
    unfuse(model)
    for module in model.modules():
        if isinstance(module, LoraLinear4bit):
            module.__class__ = LoraLinear
        if vars(module).get("merge") is refuse_merge:
            del module.merge
    base = base_of(model)
    if isinstance(base, PreTrainedModel):
        unbind_head(base)
    for name in ("get_nb_trainable_parameters", "merge_and_unload"):
        vars(model).pop(name, None)
    return model

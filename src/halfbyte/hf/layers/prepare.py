"""A PEFT model over 4-bit weights, made ready: our LoRA layers and fused decoder layers, by class swap, and our head.

The model's output head is bound too (:mod:`halfbyte.hf.layers.head`): while training with labels it returns no logits.
"""

from typing import TypeVar

from peft import PeftModel
from peft.tuners.lora import Linear as LoraLinear
from torch import nn
from transformers import PreTrainedModel

from halfbyte.errors import InputError
from halfbyte.hf.layers.adapters import Counts, LoraLinear4bit
from halfbyte.hf.layers.fusion import fuse, unfuse
from halfbyte.hf.layers.head import base_of, bind_head, unbind_head
from halfbyte.nn import Linear4bit

Model = TypeVar("Model", bound=nn.Module)


def prepare_for_training(model: Model) -> Model:
    """Make a PEFT model over 4-bit weights ready to train (and to run) with our LoRA layers and fused decoder layers.

    Decoder layers of families that are not known stay as they are;
    :func:`halfbyte.hf.layers.fusion.describe_layers` tells.

    Args:
        model: what ``get_peft_model`` or ``PeftModel.from_pretrained`` returned; changed in place.

    Returns:
        The same model.

    Raises:
        InputError: there is no LoRA layer over a 4-bit weight in it.
    """
    layers = [module for module in model.modules() if isinstance(module, LoraLinear)]
    ours = [layer for layer in layers if isinstance(layer.base_layer, Linear4bit)]
    if not ours:
        raise InputError(
            f"{type(model).__name__} has no LoRA layer over a 4-bit weight: load the model with HalfbyteConfig and "
            "call peft.get_peft_model(model, LoraConfig(target_modules='all-linear', ...)) first."
        )
    for layer in ours:
        layer.__class__ = LoraLinear4bit
    base = base_of(model)
    if isinstance(base, PreTrainedModel):
        bind_head(base)
    if isinstance(model, PeftModel):
        model.get_nb_trainable_parameters = Counts(model)
    fuse(model)
    return model


def unprepare(model: Model) -> Model:
    """Undo :func:`prepare_for_training`: PEFT's and transformers' own classes again, in place; returns the model."""
    unfuse(model)
    for module in model.modules():
        if isinstance(module, LoraLinear4bit):
            module.__class__ = LoraLinear
    base = base_of(model)
    if isinstance(base, PreTrainedModel):
        unbind_head(base)
    vars(model).pop("get_nb_trainable_parameters", None)
    return model

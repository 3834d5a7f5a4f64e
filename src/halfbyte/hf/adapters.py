"""PEFT's LoRA layers over 4-bit weights: theirs to configure, save and load, ours to run.

PEFT (0.21) wraps a :class:`~halfbyte.nn.Linear4bit` in its ``lora.Linear``, which would compute the low-rank part in
fp32 and, asked to merge, add floats to packed bytes. :func:`prepare_for_training` turns each of those, by class swap,
into :class:`LoraLinear4bit`; parameters, names and files stay PEFT's, and :func:`unprepare` turns them back. The
model's output head is bound too (:mod:`halfbyte.hf.head`): while training with labels it returns no logits.
"""

from typing import Any, TypeVar

from peft import PeftModel
from peft.tuners.lora import Linear as LoraLinear
from torch import Tensor, nn
from transformers import PreTrainedModel

from halfbyte.errors import InputError
from halfbyte.hf.head import base_of, bind_head, unbind_head
from halfbyte.nn import Linear4bit, lora_delta

Model = TypeVar("Model", bound=nn.Module)


class LoraLinear4bit(LoraLinear):
    """PEFT's ``lora.Linear`` with our forward for plain LoRA; variants (DoRA and others) run as PEFT wrote them."""

    def forward(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        """``y = x dequant(W)ᵀ + b + Σ s (dropout(x) Aᵀ) Bᵀ`` over the active adapters, ``[..., out]``."""
        adapters = [name for name in self.active_adapters if name in self.lora_A]
        plain = not (args or kwargs or self.disable_adapters or any(name in self.lora_variant for name in adapters))
        if not plain:
            theirs: Tensor = super().forward(x, *args, **kwargs)
            return theirs
        base: Linear4bit = self.base_layer
        y: Tensor = base(x)
        inner = x.to(base.compute_dtype or x.dtype)
        for name in adapters:
            a, b = self.lora_A[name], self.lora_B[name]
            delta = lora_delta(self.lora_dropout[name](inner), a.weight, b.weight, self.scaling[name])
            if b.bias is not None:
                delta = delta + (b.bias * self.scaling[name]).to(delta.dtype)
            y = y + delta.to(y.dtype)
        return y

    def merge(self, safe_merge: bool = False, adapter_names: list[str] | None = None) -> None:
        """Refuse: the sum of a 4-bit weight and an adapter is not a 4-bit weight."""
        raise InputError(
            "An adapter cannot be merged into 4-bit weights; load the 16-bit base model with transformers, put the "
            "adapter on it with PeftModel.from_pretrained, and call merge_and_unload() there."
        )


def prepare_for_training(model: Model) -> Model:
    """Make a PEFT model over 4-bit weights ready to train (and to run) with our LoRA layers.

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
        model.get_nb_trainable_parameters = _Counts(model)
    return model


def unprepare(model: Model) -> Model:
    """Undo :func:`prepare_for_training`: PEFT's own classes again, in place; returns the same model."""
    for module in model.modules():
        if isinstance(module, LoraLinear4bit):
            module.__class__ = LoraLinear
    base = base_of(model)
    if isinstance(base, PreTrainedModel):
        unbind_head(base)
    vars(model).pop("get_nb_trainable_parameters", None)
    return model


class _Counts:
    """PEFT's ``get_nb_trainable_parameters`` for packed weights, which would count two 4-bit values as one."""

    def __init__(self, model: nn.Module) -> None:
        self.model = model

    def __call__(self) -> tuple[int, int]:
        return count_parameters(self.model)


def count_parameters(model: nn.Module) -> tuple[int, int]:
    """Return how many parameters are trained and how many there are, a 4-bit weight counted by its values."""
    packed = {
        id(module.weight): module.out_features * module.in_features
        for module in model.modules()
        if isinstance(module, Linear4bit)
    }
    parameters = list(model.parameters())
    trained = sum(p.numel() for p in parameters if p.requires_grad)
    return trained, sum(packed.get(id(p), p.numel()) for p in parameters)

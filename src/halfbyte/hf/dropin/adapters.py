"""PEFT over our layers as a script writes it: adapters are ready without ``halfbyte.prepare``.

``prepare_model_for_kbit_training`` (peft 0.21) freezes the base, makes all that is dense fp32, and turns activation
checkpointing on. Over our layers it freezes, and asks for checkpointing, which is the memory plan's wish: what a
trainer has memory for is kept (:mod:`halfbyte.hf.dropin.memory`). The fp32 copies are not made: norms and head compute
in fp32 here whatever their weights' dtype is.
"""

import functools
import inspect
import types
from collections.abc import Callable
from typing import Any

import peft
from torch import nn

from halfbyte.hf.dropin.beginnings import check_beginning, complete
from halfbyte.hf.dropin.said import say
from halfbyte.hf.layers.prepare import prepare
from halfbyte.hf.replacement import Replacement
from halfbyte.nn import FrozenLinear


def is_ours(model: Any) -> bool:
    """Whether ``model`` has frozen weights of ours."""
    return isinstance(model, nn.Module) and any(isinstance(module, FrozenLinear) for module in model.modules())


def prepare_for_kbit(
    model: Any,
    use_gradient_checkpointing: bool = True,
    gradient_checkpointing_kwargs: dict[str, Any] | None = None,
    auto_clear_cache: bool = True,
) -> Any:
    """Freeze the base and ask for checkpointing, over our weights; over others what PEFT does."""
    if not is_ours(model):
        return _theirs[0](model, use_gradient_checkpointing, gradient_checkpointing_kwargs, auto_clear_cache)
    model.requires_grad_(False)
    if use_gradient_checkpointing:
        model.activation_checkpointing_enable({"use_reentrant": False})
    return model


_theirs: list[Callable[..., Any]] = []


def _kbit(old: types.CodeType) -> types.CodeType:
    """The code of PEFT's function, so that the name serves wherever and whenever it was imported."""
    held = peft.utils.other.prepare_model_for_kbit_training
    _theirs[:] = [types.FunctionType(old, held.__globals__, held.__name__, held.__defaults__)]

    def code(model, use_gradient_checkpointing, gradient_checkpointing_kwargs, auto_clear_cache):  # type: ignore
        from halfbyte.hf.dropin.adapters import prepare_for_kbit  # it runs in PEFT's module

        return prepare_for_kbit(model, use_gradient_checkpointing, gradient_checkpointing_kwargs, auto_clear_cache)

    return code.__code__


def _int8(kbit: Any) -> Any:
    def prepare_model_for_int8_training(model: Any, *args: Any, **kwargs: Any) -> Any:
        say("prepare_model_for_int8_training is prepare_model_for_kbit_training now.")
        return peft.prepare_model_for_kbit_training(model, *args, **kwargs)

    return prepare_model_for_int8_training


def _preparing(old: Any) -> Any:
    """A method after which ``self`` has an adapter: it is made ready, if the base is ours."""
    signature = inspect.signature(old)

    @functools.wraps(old)
    def method(self: Any, *args: Any, **kwargs: Any) -> Any:
        given = signature.bind(self, *args, **kwargs).arguments
        config, base = given.get("peft_config", given.get("adapter_config")), given.get("model", self)
        if is_ours(base):
            check_beginning(None if base is not self else self, config)
        result = old(self, *args, **kwargs)
        if is_ours(self):
            if isinstance(self, peft.PeftModel) and config is not None:
                complete(self, given.get("adapter_name", "default"))
            prepare(self)
        return result

    return method


def rows() -> list[Replacement]:
    """What adapters replace."""
    library = ("peft", ">=0.21,<0.22")
    kbit = "the base is frozen, but stays as it is: nothing is copied to fp32, and memory is planned"
    ready = "an adapter is ready for our kernels when it is made, without halfbyte.prepare"
    return [
        Replacement("peft.utils.other:prepare_model_for_kbit_training.__code__", _kbit, kbit, *library),
        Replacement(
            "peft:prepare_model_for_int8_training",
            _int8,
            "the same by its name of 2023",
            *library,
        ),
        Replacement("peft.peft_model:PeftModel.__init__", _preparing, ready, *library),
        Replacement("peft.peft_model:PeftModel.add_adapter", _preparing, ready, *library),
        Replacement(
            "transformers.integrations.peft:PeftAdapterMixin.add_adapter",
            _preparing,
            "model.add_adapter(LoraConfig(...)) of transformers, likewise",
            "transformers",
            ">=5.23,<5.24",
        ),
        Replacement(
            "transformers.integrations.peft:PeftAdapterMixin.load_adapter",
            _preparing,
            "model.load_adapter(folder) of transformers, likewise",
            "transformers",
            ">=5.23,<5.24",
        ),
    ]

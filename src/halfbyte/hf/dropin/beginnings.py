"""``LoraConfig(init_lora_weights=...)`` over our layers: PEFT's (0.21) beginnings that look at the weight, as ours.

PEFT gives each layer its start in a method of the layer, which reads the base layer's weight and may write another one
into it. Over a frozen layer of ours each of those is :func:`halfbyte.hf.layers.starts.begin`, which leaves the base as
it is; over other layers it is PEFT's. LoftQ needs the weights before they were quantized, which the layer has not:
they are read again, from the folder that the model came from, once the model has its adapter.

    pissa, pissa_niter_N, olora   subtracted in the forward, saved as plain LoRA of twice the rank
    orthogonal, gaussian, eva     as PEFT has them (eva: its own code runs over our layers)
    loftq                         one iteration, since the base stays
    corda, lora_ga, mica          refused, with a TypeError as PEFT's over packed weights

``save_pretrained(path_initial_model_for_weight_conversion=...)`` asks for the plain LoRA that is saved anyhow.
"""

import functools
import importlib.util
import types
from collections.abc import Callable
from typing import Any

import peft
import torch
from peft import LoraConfig, PeftModel
from torch import nn

from halfbyte.choices import STARTS_REFUSED
from halfbyte.hf.dropin.said import say
from halfbyte.hf.layers import starts
from halfbyte.hf.models.loftq import begin_from_files
from halfbyte.hf.replacement import Replacement
from halfbyte.nn import FrozenLinear
from halfbyte.options import check_start, is_subtracted

PEFT = ("peft", ">=0.21,<0.22")
LAYER = "peft.tuners.lora.layer:LoraLayer"


def check_beginning(model: Any, config: Any) -> None:
    """Refuse what a script asks of a new adapter over our layers and cannot have, before anything is changed.

    Raises:
        TypeError: there is no such beginning over frozen weights.
        InputError: a ValueError too, of those that PEFT does not know either, or of what does not go together.
    """
    start = getattr(config, "init_lora_weights", None)
    if not isinstance(config, LoraConfig) or not isinstance(start, str):
        return
    if start in STARTS_REFUSED:
        raise _refusal(start)
    check_start(start.lower() if start.lower() in ("gaussian", "olora") else start)
    if is_subtracted(start.lower()) and not isinstance(model, PeftModel | None):
        raise TypeError(
            f"init_lora_weights {start!r} over 4-bit weights is saved as LoRA of twice the rank, which transformers' "
            "own add_adapter cannot do; use peft.get_peft_model(model, LoraConfig(...))."
        )


def complete(model: PeftModel, adapter: str) -> None:
    """Do what is left to do for a new adapter over our layers when the model has it."""
    config = model.peft_config[adapter]
    start = getattr(config, "init_lora_weights", None)
    if start == "loftq" and not config.inference_mode:
        options = config.loftq_config or {}
        if options.get("loftq_iter", 1) != 1:
            say(f"loftq_iter={options['loftq_iter']}: the base stays as it is, so there is one iteration.")
        begin_from_files(model, adapter, seed=_seed())
        config.init_lora_weights, config.loftq_config = True, {}  # whoever opens the adapter has its values
    if starts.has_starts(model):
        model.save_pretrained = _Saving(model)


class _Saving(starts.Whole):
    """Saves plain LoRA, asked for it or not."""

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        if kwargs.pop("path_initial_model_for_weight_conversion", None) is not None:
            say("path_initial_model_for_weight_conversion: over a 4-bit base an adapter is saved as plain LoRA anyhow.")
        return super().__call__(*args, **kwargs)


def _refusal(name: str) -> TypeError:
    return TypeError(f"init_lora_weights {name!r} does not run over 4-bit weights: {STARTS_REFUSED[name]}.")


def _seed() -> int:
    """A seed from torch's own generator, as PEFT's draws are."""
    return int(torch.randint(2**31, ()))


def _over_ours(layer: Any) -> bool:
    return isinstance(layer.get_base_layer(), FrozenLinear)


def _beginning(old: Any) -> Any:
    """``pissa_init(adapter_name, init_lora_weights)``, ``olora_init(adapter_name)``, ``orthogonal_init`` of a layer."""
    own = old.__name__.removesuffix("_init")

    @functools.wraps(old)
    def init(self: Any, adapter_name: str, init_lora_weights: str = own) -> Any:
        if not _over_ours(self):
            return old(self, adapter_name, *([init_lora_weights] if own == "pissa" else []))
        return starts.begin(self, init_lora_weights, adapter=adapter_name, seed=_seed(), as_peft=True)

    return init


def _later(old: Any) -> Any:
    """``loftq_init``: a plain start for now; :func:`complete` has the model."""

    @functools.wraps(old)
    def init(self: Any, adapter_name: str, *args: Any) -> Any:
        if not _over_ours(self):
            return old(self, adapter_name, *args)
        return self.reset_lora_parameters(adapter_name, True)

    return init


def _refused(old: Any) -> Any:
    """``corda_init``, ``mica_init``, ``lora_ga_init``."""
    name = old.__name__.removesuffix("_init")

    @functools.wraps(old)
    def init(self: Any, *args: Any) -> Any:
        if _over_ours(self):
            raise _refusal(name)
        return old(self, *args)

    return init


def _refusing(name: str) -> Callable[[Any], Any]:
    """What ``preprocess_corda`` and ``preprocess_loraga`` ask first, so that nothing is computed in vain."""

    def make(old: Any) -> Any:
        @functools.wraps(old)
        def targets(model: nn.Module, *args: Any) -> Any:
            if any(isinstance(module, FrozenLinear) for module in model.modules()):
                raise _refusal(name)
            return old(model, *args)

        return targets

    return make


def _loading(old: Any) -> Any:
    """Let a model that subtracts take its own file back: ``load_best_model_at_end``, a checkpoint."""

    @functools.wraps(old)
    def set_peft_model_state_dict(
        model: Any, peft_model_state_dict: Any, adapter_name: str = "default", **more: Any
    ) -> Any:
        if starts.has_starts(model):
            peft_model_state_dict = starts.split(model, peft_model_state_dict, adapter_name)
        return old(model, peft_model_state_dict, adapter_name=adapter_name, **more)

    return set_peft_model_state_dict


def replace_with_loftq(
    peft_model: Any, model_path: str | None = None, adapter_name: str = "default", callback: Any = None
) -> None:
    """PEFT's ``replace_lora_weights_loftq``, over our layers by :func:`begin_from_files`."""
    if not any(isinstance(module, FrozenLinear) for module in peft_model.modules()):
        _theirs[0](peft_model, model_path, adapter_name, callback)
        return
    begin_from_files(peft_model, adapter_name, source=model_path, seed=_seed(), keep=callback)


_theirs: list[Callable[..., Any]] = []


def _replacing(old: types.CodeType) -> types.CodeType:
    """The code of PEFT's function, so that the name serves wherever and whenever it was imported."""
    held = peft.utils.loftq_utils.replace_lora_weights_loftq.__wrapped__  # in torch.no_grad()
    _theirs[:] = [types.FunctionType(old, held.__globals__, held.__name__, held.__defaults__)]

    def code(peft_model, model_path, adapter_name, callback):  # type: ignore
        from halfbyte.hf.dropin.beginnings import replace_with_loftq  # it runs in PEFT's module

        return replace_with_loftq(peft_model, model_path, adapter_name, callback)

    return code.__code__


def rows() -> list[Replacement]:
    """What beginnings replace."""
    ours = "init_lora_weights={!r} begins over a base that stays as it is"
    none = "init_lora_weights={!r} is refused in a sentence over our layers"
    return [
        *(
            Replacement(f"{LAYER}.{name}_init", _beginning, ours.format(name), *PEFT)
            for name in ("pissa", "olora", "orthogonal")
        ),
        Replacement(f"{LAYER}.loftq_init", _later, ours.format("loftq"), *PEFT),
        *(
            Replacement(f"{LAYER}.{name}_init", _refused, none.format(name), *PEFT)
            for name in ("corda", "mica", "lora_ga")
        ),
        *(
            Replacement("peft.tuners.lora.corda:target_modules", _refusing("corda"), none.format("corda"), *PEFT)
            for _ in range(importlib.util.find_spec("attr") is not None)  # PEFT's module needs it
        ),
        Replacement("peft.tuners.lora.loraga:get_target_modules", _refusing("lora_ga"), none.format("lora_ga"), *PEFT),
        Replacement(
            "peft.peft_model:set_peft_model_state_dict",
            _loading,
            "a model whose adapter subtracts what it began with takes back what it has saved",
            *PEFT,
        ),
        Replacement(
            "peft.utils.loftq_utils:replace_lora_weights_loftq.__wrapped__.__code__",
            _replacing,
            "LoftQ's start over our layers, from the 16-bit files",
            *PEFT,
        ),
    ]

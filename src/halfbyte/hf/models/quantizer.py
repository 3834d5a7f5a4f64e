"""How transformers builds a model with linear layers in 4 or 8 bits: ours as a quantizer of its registry.

transformers (5.23) makes the model on the meta device, lets the quantizer replace modules, and hands over each tensor
as it is read: a dense one is quantized at once (peak memory: the 4-bit model and one tensor), and the tensors of a
4-bit checkpoint are put together as they are, so that what is mapped from the file stays mapped. Where weights are to
stay as they are (``none``), only the layers' class is ours, and nothing says afterwards that the model is quantized.
"""

import contextlib
import contextvars
import copy
import logging
import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from transformers.core_model_loading import ConversionOps, WeightConverter, build_glob_alternation
from transformers.modeling_utils import PreTrainedModel
from transformers.quantizers.auto import register_quantizer
from transformers.quantizers.base import HfQuantizer
from transformers.quantizers.quantizers_utils import get_module_from_name
from transformers.utils.generic import is_flash_attention_requested

from halfbyte import devices
from halfbyte.choices import BITSANDBYTES_TYPES, BLOCKSIZE, SAVEABLE_TYPES
from halfbyte.errors import InputError
from halfbyte.hf.layers.attention_choice import choose_attention
from halfbyte.hf.layers.stacks import TakeApart, conversions, put_together, take_apart
from halfbyte.hf.layers.unloading import dense_layer
from halfbyte.hf.models.check import Names, check_finite, check_weights
from halfbyte.hf.models.checkpoint import Checkpoint
from halfbyte.hf.models.config import QUANT_METHOD, HalfbyteConfig
from halfbyte.hf.models.linears import left_dense, replace_linears
from halfbyte.kernels import pool
from halfbyte.nn import Linear4bit, QuantizedLinear
from halfbyte.quant import QuantizedInt8, QuantizedWeight, quantize_4bit, quantize_int8
from halfbyte.quant.int8 import CONSTANTS, FORMAT, STATE_INT8
from halfbyte.quant.weight import OWN_STATE, STATE

READ_AT_ONCE = 1 << 20
"""Bytes up to which a tensor of a 4-bit folder is read, to look at its values, when the folder is opened."""


@dataclass
class Failures:
    """Why a model could not be loaded.

    Attributes:
        error: the first that an operation of ours raised.
        resized: tensors of a head that have another shape, which is an error or not as the caller chose.
        head_follows: whether an adapter brings the head that the checkpoint lacks.
    """

    error: Exception | None = None
    resized: list[str] = field(default_factory=list)
    head_follows: bool = False


_failures: contextvars.ContextVar[Failures | None] = contextvars.ContextVar("failures", default=None)


Watcher = Callable[[nn.Module, str, Tensor, QuantizedWeight], None]
"""Is told of the model, a weight's name, its dense values ``[out, in]``, and what became of them."""
_watcher: contextvars.ContextVar[Watcher | None] = contextvars.ContextVar("watcher", default=None)


@contextlib.contextmanager
def watched(watcher: Watcher) -> Iterator[None]:
    """Tell ``watcher`` of every weight that is quantized meanwhile, while both its forms are there."""
    token = _watcher.set(watcher)
    try:
        yield
    finally:
        _watcher.reset(token)


def is_watched() -> bool:
    """Return whether somebody is to be told of every weight that is quantized now."""
    return _watcher.get() is not None


@contextlib.contextmanager
def kept_failures(head_follows: bool = False) -> Iterator[Failures]:
    """Keep the reasons of failures meanwhile, of which transformers (5.23) makes text in an error of its own.

    Its table of what did not fit is not logged: whoever asks for the failures tells them.
    """
    failures = Failures(head_follows=head_follows)
    token = _failures.set(failures)
    report = logging.getLogger("transformers.modeling_utils")
    report.addFilter(_is_no_report)
    try:
        yield failures
    finally:
        report.removeFilter(_is_no_report)
        _failures.reset(token)


def _is_no_report(record: logging.LogRecord) -> bool:
    return "LOAD REPORT" not in record.getMessage()


@contextlib.contextmanager
def _failing() -> Iterator[None]:
    failures = _failures.get()
    if failures is not None and failures.error is not None:
        raise RuntimeError("an operation before failed")  # nothing more needs to be read
    try:
        yield
    except Exception as error:
        if failures is not None:
            failures.error = error
        raise


@register_quantizer(QUANT_METHOD)
class HalfbyteQuantizer(HfQuantizer):
    """Holds no model and no tensor: transformers copies it deeply for every weight."""

    quantization_config: HalfbyteConfig

    def __init__(self, quantization_config: HalfbyteConfig, **kwargs: Any) -> None:
        # A copy: what is learned about one model is not written into the user's object.
        super().__init__(copy.copy(quantization_config), **kwargs)
        self.on_cpu = False
        self.choose_attention = False

    @property
    def serialized_names(self) -> dict[str, list[str]]:
        """The tensors that one quantized weight takes in a file, by the name of the parameter that they become."""
        quant_type = self.quantization_config.quant_type
        if quant_type == "none":
            return {}
        if quant_type == "int8":
            names = ["weight", CONSTANTS, FORMAT, "weight.absmax", f"weight.{STATE_INT8}"]
            return {"weight": names[:3] if self.quantization_config.is_bitsandbytes else [names[0], *names[3:]]}
        types = BITSANDBYTES_TYPES if self.quantization_config.is_bitsandbytes else (quant_type,)
        kind = STATE if self.quantization_config.is_bitsandbytes else OWN_STATE
        parts = ("nested_absmax", "nested_quant_map", "quant_map", "absmax", *(f"{kind}{name}" for name in types))
        return {"weight": ["weight", *(f"weight.{part}" for part in parts)]}

    @property
    def quantized_element_size(self) -> float | None:
        """Bytes per value, for device maps."""
        bits = self.quantization_config.bits
        return None if bits is None else bits / 8

    def is_serializable(self) -> bool:
        """Whether a folder can hold the format."""
        return self.quantization_config.quant_type in SAVEABLE_TYPES

    @property
    def is_trainable(self) -> bool:
        """LoRA adapters can be trained over the model."""
        return True

    def update_dtype(self, dtype: torch.dtype) -> torch.dtype:
        """What stays dense takes the compute dtype: an fp32 folder must not leave fp32 norms and residuals."""
        return self.quantization_config.compute_dtype

    def update_device_map(self, device_map: Any) -> Any:
        """Without a wish: the GPU if there is one."""
        if device_map is None:
            device_map = {"": str(devices.choose("auto"))}
        places = device_map.values() if isinstance(device_map, dict) else [device_map]
        self.on_cpu = not torch.cuda.is_available() or all(str(place) == "cpu" for place in places)
        if not self.on_cpu:
            config = self.quantization_config
            config.compute_dtype = devices.dtype_on(config.compute_dtype, devices.choose("auto"))
        return device_map

    def update_attn_implementation(self, config: Any) -> Any:
        """Attention is ours where the caller left the choice or, on a CPU, wished for flash attention."""
        wish = config._attn_implementation
        flash = wish is not None and is_flash_attention_requested(requested_attention_implementation=wish)
        self.choose_attention = wish is None or (self.on_cpu and flash)
        if self.choose_attention and flash:
            config._attn_implementation = None  # transformers would look for the package
        return config

    def param_needs_quantization(self, model: PreTrainedModel, param_name: str, **kwargs: Any) -> bool:
        """Whether ``param_name`` is the weight of a layer that was chosen for 4 or 8 bits."""
        module, name = get_module_from_name(model, param_name)
        return isinstance(module, QuantizedLinear) and name == "weight"

    def _process_model_before_weight_loading(
        self, model: PreTrainedModel, checkpoint_files: list[str] | None = None, **kwargs: Any
    ) -> None:
        if self.choose_attention:
            choose_attention(model)
        take_apart(model)
        config, new, packed = self.quantization_config, set(), None
        if checkpoint_files:
            checkpoint = Checkpoint(checkpoint_files)
            failures = _failures.get()
            fit = check_weights(model, checkpoint, self.pre_quantized, bool(failures and failures.head_follows))
            new = {name.rpartition(".")[0] for name in fit.new}  # to be trained
            if failures:
                failures.resized = fit.resized
            if self.pre_quantized:
                names = Names(model)
                packed = {names.of(name)[0] for name in checkpoint.quantized}
        skip = self.get_modules_to_not_convert(model, config.skip_modules, model._keep_in_fp32_modules)
        if not self.pre_quantized and config.skip_modules is None:
            # Recorded, so that whoever opens the saved model makes the same choice.
            config.skip_modules = sorted({*skip, *left_dense(model), *new})
        elif new:
            config.skip_modules = sorted({*(config.skip_modules or []), *new})
        skipped = sorted({*skip, *(config.skip_modules or [])})
        bits = config.bits
        if not replace_linears(model, skipped, config.compute_dtype, packed, bits) and bits is not None:
            raise InputError(
                f"{type(model).__name__} has no linear layer that could be held in {bits} bits"
                f"{' beside those to be skipped' if config.skip_modules else ''}: there is nothing to gain here, so "
                "open it with transformers."
            )

    def _process_model_after_weight_loading(self, model: PreTrainedModel, **kwargs: Any) -> PreTrainedModel:
        # transformers would try to reverse our reading of 4-bit weights when it saves; the layers themselves know how.
        model._weight_conversions = [
            conversion
            for conversion in model._weight_conversions
            if not isinstance(conversion, WeightConverter)
            or not isinstance(conversion.operations[-1], Deserialize | TakeApart)
        ]
        for name, parameter in model.named_parameters():
            # What is large in a 4-bit folder stays mapped and unread; it was looked at when the folder was made.
            if not self.pre_quantized or parameter.nbytes <= READ_AT_ONCE:
                check_finite(name, parameter.detach())
        if self.quantization_config.bits is None:
            self.remove_quantization_config(model)
            for module in model.modules():
                if isinstance(module, PreTrainedModel):
                    module.config._is_quantized = False
        return model

    def update_weight_conversions(self, weight_conversions: list[Any], model: PreTrainedModel) -> list[Any]:
        """The model's converters, and ours of 4-bit weights; what would stack experts leaves them apart."""
        found: list[Any] = super().update_weight_conversions(conversions(weight_conversions, model), model)
        return found

    def get_quantize_ops(self) -> ConversionOps:
        """Return the operation that quantizes a dense weight as it is read."""
        return Quantize(self)

    def get_load_operations(self) -> dict[str, type[ConversionOps]]:
        """Return the operation that puts together a 4-bit weight from a file's tensors."""
        return {"deserialize": Deserialize}

    def _dequantize(self, model: PreTrainedModel, dtype: torch.dtype | None = None) -> PreTrainedModel:
        for name, module in list(model.named_modules()):
            if isinstance(module, QuantizedLinear):
                model.set_submodule(name, dense_layer(module, module.dequantize(dtype)))
        put_together(model)
        return model


class Quantize(ConversionOps):
    """Dense weight in, quantized weight out."""

    def __init__(self, hf_quantizer: HalfbyteQuantizer) -> None:
        self.hf_quantizer = hf_quantizer

    def convert(self, input_dict: dict[str, Any], model: nn.Module, **kwargs: Any) -> dict[str, Tensor]:
        """Quantize the one tensor of ``input_dict``, by its full name."""
        result = {}
        with _failing():
            for name, value in input_dict.items():
                layer, _ = get_module_from_name(model, name)
                dense = value[0] if isinstance(value, list) else value
                layer.set_quantized_weight(quantized(name, dense, layer, self.hf_quantizer.quantization_config))
                result[name] = layer.weight
                if watcher := _watcher.get():
                    watcher(model, name, dense.T if layer.transposed else dense, layer.quantized_weight)
        return result


class Deserialize(ConversionOps):
    """The tensors of one quantized weight in, the weight out."""

    def __init__(self, hf_quantizer: HalfbyteQuantizer) -> None:
        self.hf_quantizer = hf_quantizer

    def convert(
        self, input_dict: dict[str, Any], model: PreTrainedModel, full_layer_name: str, **kwargs: Any
    ) -> dict[str, Tensor]:
        """Put together the weight of layer ``full_layer_name``; a single dense tensor takes its dtype in the model."""
        with _failing():
            layer, _ = get_module_from_name(model, full_layer_name)
            if (len(input_dict) > 1) != isinstance(layer, QuantizedLinear):
                bits = f"{self.hf_quantizer.quantization_config.bits}-bit"
                held, chosen = ("dense", bits) if len(input_dict) == 1 else (bits, "dense")
                raise InputError(
                    f"{full_layer_name} is {held} in the checkpoint, but its configuration makes it {chosen}: "
                    "llm_int8_skip_modules in config.json does not fit the weights."
                )
            state = {key: value[0] if isinstance(value, list) else value for key, value in input_dict.items()}
            if not isinstance(layer, QuantizedLinear):
                dtype = dense_dtype(model, full_layer_name, self.hf_quantizer.quantization_config.compute_dtype)
                return {key: value.to(dtype) if value.is_floating_point() else value for key, value in state.items()}
            prefix = full_layer_name.removesuffix("weight")
            own = {f"{prefix}{key}": value for key, value in state.items()}
            weight: QuantizedInt8 | QuantizedWeight
            if isinstance(layer, Linear4bit):
                weight = QuantizedWeight.from_state_dict(own, full_layer_name)
                nested = weight.statistics.nested
                kind, constants = (
                    ("absmax", weight.statistics.absmax) if nested is None else ("nested_absmax", nested.absmax)
                )
            else:
                compute_dtype = self.hf_quantizer.quantization_config.compute_dtype
                weight = QuantizedInt8.from_state_dict(own, full_layer_name, compute_dtype)
                kind, constants = "absmax", weight.absmax
            if constants.nbytes <= READ_AT_ONCE:
                check_finite(f"{full_layer_name}.{kind}", constants)
            layer.set_quantized_weight(weight)
            return {"weight": layer.weight}


def quantized(
    name: str, dense: Tensor, layer: QuantizedLinear, config: HalfbyteConfig
) -> QuantizedInt8 | QuantizedWeight:
    """Return the ``dense`` weight of ``layer`` in 4 or 8 bits, as a checkpoint holds it (``Conv1D``'s transposed).

    Raises:
        InputError: a value is not finite; the sentence has the tensor's ``name`` and the index.
    """
    values = dense.T if layer.transposed else dense
    if not values.is_contiguous():  # in the heap each copy, between weights that stay, would leave a gap of its size
        values = pool.empty(values.shape, values.dtype, values.device).copy_(values)
    weight: QuantizedInt8 | QuantizedWeight
    # A block's constant is its largest magnitude, NaN if there is one, and the offset is the constants' mean.
    if config.bits == 8:
        weight = quantize_int8(values, config.blocksize or BLOCKSIZE)
        finite = bool(torch.isfinite(weight.absmax).all())
    else:
        weight = quantize_4bit(values, config.quant_type, int(config.blocksize or BLOCKSIZE), config.double_quant)
        nested = weight.statistics.nested
        finite = math.isfinite(nested.offset) if nested else bool(torch.isfinite(weight.statistics.absmax).all())
    if not finite:
        check_finite(name, dense)
        raise InputError(f"{name} holds values too large to be quantized: the model is damaged.")
    return weight


def dense_dtype(model: PreTrainedModel, name: str, compute_dtype: torch.dtype) -> torch.dtype:
    """Return the dtype that transformers (5.23) wants for the dense parameter ``name``; some stay in fp32."""
    plan = model._get_dtype_plan(compute_dtype)
    if not plan:
        return compute_dtype
    patterns, by_group, _ = build_glob_alternation(list(plan))
    match = patterns.search(name)
    return plan[by_group[match.lastgroup]] if match else compute_dtype

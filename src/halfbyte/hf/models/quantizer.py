"""How transformers builds a model with 4-bit linear layers: ours as a quantizer of its registry.

transformers (5.23) makes the model on the meta device, lets the quantizer replace modules, and hands over each tensor
as it is read: a dense one is quantized at once (peak memory: the 4-bit model and one tensor), and the tensors of a
4-bit checkpoint are put together as they are, so that what is mapped from the file stays mapped.
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

from halfbyte.choices import SAVEABLE_TYPES
from halfbyte.errors import InputError
from halfbyte.hf.layers.attention_choice import choose_attention
from halfbyte.hf.models.check import Names, check_finite, check_weights
from halfbyte.hf.models.checkpoint import Checkpoint
from halfbyte.hf.models.config import QUANT_METHOD, HalfbyteConfig
from halfbyte.hf.models.linears import left_dense, replace_linears
from halfbyte.nn import Linear4bit
from halfbyte.quant import QuantizedWeight, quantize_4bit

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

    # The tensors that one 4-bit weight takes in a file, by the name of the parameter that they become.
    serialized_names = {  # noqa: RUF012 (an instance attribute in transformers' eyes)
        "weight": [
            "weight",
            "weight.nested_absmax",
            "weight.nested_quant_map",
            "weight.quant_map",
            "weight.absmax",
            *(f"weight.quant_state.bitsandbytes__{name}" for name in SAVEABLE_TYPES),
        ]
    }

    def __init__(self, quantization_config: HalfbyteConfig, **kwargs: Any) -> None:
        # A copy: what is learned about one model is not written into the user's object.
        super().__init__(copy.copy(quantization_config), **kwargs)
        self.on_cpu = False
        self.choose_attention = False

    @property
    def quantized_element_size(self) -> float:
        """Bytes per value, for device maps."""
        return 0.5

    def is_serializable(self) -> bool:
        """Whether bitsandbytes' format has a name for the codebook."""
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
            device_map = {"": torch.cuda.current_device() if torch.cuda.is_available() else "cpu"}
        devices = device_map.values() if isinstance(device_map, dict) else [device_map]
        self.on_cpu = not torch.cuda.is_available() or all(str(device) == "cpu" for device in devices)
        return device_map

    def update_attn_implementation(self, config: Any) -> Any:
        """On a CPU, attention is ours where the caller left the choice, or wished for flash attention."""
        wish = config._attn_implementation
        flash = wish is not None and is_flash_attention_requested(requested_attention_implementation=wish)
        self.choose_attention = self.on_cpu and (wish is None or flash)
        if self.choose_attention and flash:
            config._attn_implementation = None  # transformers would look for the package
        return config

    def param_needs_quantization(self, model: PreTrainedModel, param_name: str, **kwargs: Any) -> bool:
        """Whether ``param_name`` is the weight of a layer that was chosen for 4 bits."""
        module, name = get_module_from_name(model, param_name)
        return isinstance(module, Linear4bit) and name == "weight"

    def _process_model_before_weight_loading(
        self, model: PreTrainedModel, checkpoint_files: list[str] | None = None, **kwargs: Any
    ) -> None:
        if self.choose_attention:
            choose_attention(model)
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
                packed = {names.of(name)[0] for name in checkpoint.in_4_bits}
        skip = self.get_modules_to_not_convert(model, config.skip_modules, model._keep_in_fp32_modules)
        if not self.pre_quantized and config.skip_modules is None:
            # Recorded, so that whoever opens the saved model makes the same choice.
            config.skip_modules = sorted({*skip, *left_dense(model), *new})
        elif new:
            config.skip_modules = sorted({*(config.skip_modules or []), *new})
        if not replace_linears(model, sorted({*skip, *(config.skip_modules or [])}), config.compute_dtype, packed):
            raise InputError(
                f"{type(model).__name__} has no linear layer that could be held in 4 bits"
                f"{' beside those to be skipped' if config.skip_modules else ''}: there is nothing to gain here, so "
                "open it with transformers."
            )

    def _process_model_after_weight_loading(self, model: PreTrainedModel, **kwargs: Any) -> PreTrainedModel:
        # transformers would try to reverse our reading of 4-bit weights when it saves; the layers themselves know how.
        model._weight_conversions = [
            conversion
            for conversion in model._weight_conversions
            if not (isinstance(conversion, WeightConverter) and isinstance(conversion.operations[0], Deserialize))
        ]
        for name, parameter in model.named_parameters():
            # What is large in a 4-bit folder stays mapped and unread; it was looked at when the folder was made.
            if not self.pre_quantized or parameter.nbytes <= READ_AT_ONCE:
                check_finite(name, parameter.detach())
        return model

    def get_quantize_ops(self) -> ConversionOps:
        """Return the operation that quantizes a dense weight as it is read."""
        return Quantize(self)

    def get_load_operations(self) -> dict[str, type[ConversionOps]]:
        """Return the operation that puts together a 4-bit weight from a file's tensors."""
        return {"deserialize": Deserialize}

    def _dequantize(self, model: PreTrainedModel, dtype: torch.dtype | None = None) -> PreTrainedModel:
        for name, module in list(model.named_modules()):
            if isinstance(module, Linear4bit):
                dense = nn.Linear(module.in_features, module.out_features, bias=False, device="meta")
                dense.weight = nn.Parameter(module.quantized_weight.dequantize(dtype))
                dense.bias = module.bias
                model.set_submodule(name, dense)
        return model


class Quantize(ConversionOps):
    """Dense weight in, 4-bit weight out."""

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
    """The tensors of one 4-bit weight in, the weight out."""

    def __init__(self, hf_quantizer: HalfbyteQuantizer) -> None:
        self.hf_quantizer = hf_quantizer

    def convert(
        self, input_dict: dict[str, Any], model: PreTrainedModel, full_layer_name: str, **kwargs: Any
    ) -> dict[str, Tensor]:
        """Put together the weight of layer ``full_layer_name``; a single dense tensor takes its dtype in the model."""
        with _failing():
            layer, _ = get_module_from_name(model, full_layer_name)
            if (len(input_dict) > 1) != isinstance(layer, Linear4bit):
                held, chosen = ("dense", "4-bit") if len(input_dict) == 1 else ("4-bit", "dense")
                raise InputError(
                    f"{full_layer_name} is {held} in the checkpoint, but its configuration makes it {chosen}: "
                    "llm_int8_skip_modules in config.json does not fit the weights."
                )
            state = {key: value[0] if isinstance(value, list) else value for key, value in input_dict.items()}
            if not isinstance(layer, Linear4bit):
                dtype = dense_dtype(model, full_layer_name, self.hf_quantizer.quantization_config.compute_dtype)
                return {key: value.to(dtype) if value.is_floating_point() else value for key, value in state.items()}
            own = {f"{full_layer_name}{key.removeprefix('weight')}": value for key, value in state.items()}
            weight = QuantizedWeight.from_state_dict(own, full_layer_name)
            nested = weight.statistics.nested
            kind, constants = (
                ("absmax", weight.statistics.absmax) if nested is None else ("nested_absmax", nested.absmax)
            )
            if constants.nbytes <= READ_AT_ONCE:
                check_finite(f"{full_layer_name}.{kind}", constants)
            layer.set_quantized_weight(weight)
            return {"weight": layer.weight}


def quantized(name: str, dense: Tensor, layer: Linear4bit, config: HalfbyteConfig) -> QuantizedWeight:
    """Return the ``dense`` weight of ``layer`` in 4 bits, as a checkpoint holds it (``Conv1D``'s transposed).

    Raises:
        InputError: a value is not finite; the sentence has the tensor's ``name`` and the index.
    """
    weight = quantize_4bit(
        dense.T if layer.transposed else dense, config.quant_type, config.blocksize, config.double_quant
    )
    # A block's constant is its largest magnitude, NaN if there is one, and the offset is the constants' mean.
    nested = weight.statistics.nested
    if not (torch.isfinite(weight.statistics.absmax).all() if nested is None else math.isfinite(nested.offset)):
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

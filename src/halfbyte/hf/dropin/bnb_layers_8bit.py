"""bitsandbytes' 8-bit layer (0.50 ``bitsandbytes.nn.Linear8bitLt``): its constructor and parameter, our product.

The weight is rounded to fp16, then row by row to int8 (LLM.int8(), arXiv 2208.07339), when it is sent to a device. The
product here takes the activations as they are, where bitsandbytes rounds them to int8 too and takes out outliers
(``threshold``) because of that: it is the more exact, and ``threshold`` means nothing. With ``has_fp16_weights=True``
nothing is stored in int8, and so the layer is a dense one.
"""

import copy
from collections.abc import Callable
from typing import Any, Self

import torch
from torch import Tensor, nn
from torch.nn.functional import linear

from halfbyte import kernels
from halfbyte.hf.dropin.bnb_functional import int8_vectorwise_quant
from halfbyte.hf.dropin.bnb_layers import OursToo, parsed
from halfbyte.hf.dropin.said import say
from halfbyte.kernels import WeightInt8

CONSTANTS, FORMAT = "SCB", "weight_format"


class Int8Params(nn.Parameter):
    """A weight that is quantized to int8 when it is sent to a device: ``CB`` its codes, ``SCB`` fp32, one a row."""

    CB: Tensor | None
    SCB: Tensor | None
    has_fp16_weights: bool

    def __new__(
        cls,
        data: Tensor | None = None,
        requires_grad: bool = True,
        has_fp16_weights: bool = False,
        CB: Tensor | None = None,
        SCB: Tensor | None = None,
        **kwargs: Any,
    ) -> Self:
        """Return a parameter over ``data``; other arguments as of bitsandbytes'."""
        self = torch.Tensor._make_subclass(cls, torch.empty(0) if data is None else data, requires_grad)
        self.CB, self.SCB, self.has_fp16_weights = CB, SCB, has_fp16_weights
        return self

    def _quantize(self, device: torch.device | str) -> Self:
        with torch.no_grad():
            codes, constants, _ = int8_vectorwise_quant(self.data.to(device, torch.float16).contiguous())
        self.requires_grad = False
        self.data, self.CB, self.SCB = codes, codes, constants
        return self

    def to(self, *args: Any, **kwargs: Any) -> "Int8Params":
        """``Tensor.to``; a device other than ``meta`` quantizes what is not."""
        device, dtype, non_blocking = parsed(args, kwargs)
        quantized = self.data.dtype == torch.int8
        if not quantized and not self.has_fp16_weights and device is not None and device.type != "meta":
            return self._quantize(device)
        moved = super().to(device=device, dtype=None if quantized else dtype, non_blocking=non_blocking)
        constants = self.SCB if self.SCB is None or device is None else self.SCB.to(device)
        return type(self)(moved, self.requires_grad, self.has_fp16_weights, moved if quantized else None, constants)

    def cpu(self) -> "Int8Params":  # type: ignore[override]
        """``to("cpu")``."""
        return self.to("cpu")

    def cuda(self, device: Any = None, non_blocking: bool = False) -> "Int8Params":  # type: ignore[override]
        """``to("cuda")``."""
        return self.to("cuda" if device is None else device, non_blocking=non_blocking)

    def __deepcopy__(self, memo: dict[int, Any]) -> "Int8Params":
        data = self.data.clone()
        codes = data if self.CB is not None else None
        new = type(self)(data, self.requires_grad, self.has_fp16_weights, codes, copy.deepcopy(self.SCB, memo))
        memo[id(self)] = new
        return new

    def __reduce_ex__(self, protocol: Any) -> Any:
        return type(self), (self.data, self.requires_grad, self.has_fp16_weights, self.CB, self.SCB)


class MatmulLtState:
    """What a layer says of its product; only ``has_fp16_weights`` means something here."""

    def __init__(self) -> None:
        self.threshold, self.has_fp16_weights, self.is_training = 0.0, True, True
        self.CB: Tensor | None = None
        self.SCB: Tensor | None = None


class _OursIn8Bits(OursToo):
    kind = "Linear8bit"


class Linear8bitLt(nn.Linear, metaclass=_OursIn8Bits):
    """``y = x Wᵀ + b`` with ``W`` in int8 from when it is sent to a device."""

    def __init__(
        self,
        input_features: int,
        output_features: int,
        bias: bool = True,
        has_fp16_weights: bool = True,
        threshold: float = 0.0,
        index: Any = None,
        device: torch.device | str | None = None,
    ) -> None:
        super().__init__(input_features, output_features, bias, device)
        self.state = MatmulLtState()
        self.state.threshold, self.state.has_fp16_weights = threshold, has_fp16_weights
        self.index = index
        self.weight: Any = Int8Params(self.weight.data, has_fp16_weights, has_fp16_weights)
        if has_fp16_weights:
            say(
                "Linear8bitLt(has_fp16_weights=True) keeps its weight dense and trains it; it multiplies unquantized "
                "here. has_fp16_weights=False holds it in int8."
            )

    def forward(self, x: Tensor) -> Tensor:
        """``[..., in_features]`` to ``[..., out_features]`` in the dtype of ``x``."""
        weight = self.weight
        bias = None if self.bias is None else self.bias.to(x.dtype)
        if self.state.has_fp16_weights:
            return linear(x, weight.to(x.dtype), bias)
        if weight.dtype != torch.int8:
            weight._quantize(weight.device)
        return kernels.matmul_int8(x, WeightInt8(weight.detach(), weight.SCB, self.in_features), bias)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Self:
        constants = self.weight.SCB
        super()._apply(fn, recurse)  # type: ignore[no-untyped-call]
        if self.weight.SCB is constants and constants is not None and constants.device != self.weight.device:
            self.weight.SCB = constants.to(self.weight.device)
        return self

    def _save_to_state_dict(self, destination: dict[str, Any], prefix: str, keep_vars: bool) -> None:
        super()._save_to_state_dict(destination, prefix, keep_vars)
        if self.weight.SCB is not None:
            destination[f"{prefix}{CONSTANTS}"] = self.weight.SCB
            destination[f"{prefix}{FORMAT}"] = torch.tensor(0, dtype=torch.uint8)

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *args: Any) -> None:
        constants = state_dict.pop(f"{prefix}{CONSTANTS}", None)
        form = state_dict.pop(f"{prefix}{FORMAT}", None)
        if form is not None and int(form) != 0:
            raise ValueError(f"Only 'row' weight format is supported, got {int(form)}")
        if constants is not None and self.state.has_fp16_weights:
            raise RuntimeError(
                "Loading a quantized checkpoint into a Linear8bitLt with has_fp16_weights=True is not supported."
            )
        if constants is not None and self.weight.dtype != torch.int8:
            self.weight._quantize(self.weight.device)
        super()._load_from_state_dict(state_dict, prefix, *args)
        if constants is not None:
            self.weight.SCB = constants.to(self.weight.device, torch.float32, copy=True)

"""Linear layers over frozen weights: what those in 4 bits, in 8 bits and in 16 bits share.

    y = x Wᵀ + b       dx = dy W       db = Σ_rows dy

``W`` is never trained and, where it is quantized, never dense for longer than a product. Each layer is an ``nn.Linear``
to whoever looks for one (PEFT's ``all-linear`` does), and the same in training and in evaluation.
"""

from collections.abc import Callable
from typing import Any, Self

import torch
from torch import Tensor, nn
from torch.nn.functional import linear

from halfbyte import kernels
from halfbyte.errors import InputError
from halfbyte.kernels import Weight4bit, WeightInt8


class FrozenLinear(nn.Linear):
    """A linear layer over a frozen weight, differentiable in its input and its bias.

    Attributes:
        compute_dtype: dtype of the product; None takes that of the input.
    """

    compute_dtype: torch.dtype | None = None
    # Whether dense checkpoints hold the weight as [in_features, out_features] (transformers' Conv1D).
    transposed = False

    @property
    def frozen_weight(self) -> Weight4bit | WeightInt8 | Tensor:
        """The weight, ``[out_features, in_features]``, as the kernels take it."""
        raise NotImplementedError

    def dequantize(self, dtype: torch.dtype | None = None) -> Tensor:
        """Return the dense weight, ``[out_features, in_features]``, as ``dtype`` or else as it was before."""
        raise NotImplementedError


class DenseLinear(FrozenLinear):
    """A frozen weight in the dtype that it has, for comparison with quantized ones on the same way."""

    @classmethod
    def taking(cls, layer: nn.Linear, compute_dtype: torch.dtype | None = None) -> "DenseLinear":
        """Make ``layer``, whose class is ``nn.Linear``, one of this class, in place."""
        layer.__class__ = cls
        assert isinstance(layer, DenseLinear)
        layer.compute_dtype = compute_dtype
        return layer

    @property
    def frozen_weight(self) -> Tensor:
        """The parameter itself."""
        return self.weight

    def dequantize(self, dtype: torch.dtype | None = None) -> Tensor:
        """Return the weight as ``dtype``."""
        return self.weight.detach().to(dtype or self.weight.dtype)

    def forward(self, x: Tensor) -> Tensor:
        """``[..., in_features]`` to ``[..., out_features]`` in the dtype of ``x``."""
        dtype = self.compute_dtype or x.dtype
        bias = None if self.bias is None else self.bias.to(dtype)
        return linear(x.to(dtype), self.weight.to(dtype), bias).to(x.dtype)


class QuantizedLinear(FrozenLinear):
    """A frozen weight in fewer bits: the parameter ``weight`` holds its codes, the constants hang beside it.

    The constants are neither parameters nor buffers: they follow the codes to a device, but no cast can round them and
    nothing sends them between processes.
    """

    quant_type: str
    weight_dtype: torch.dtype
    _codes_as: tuple[torch.dtype, torch.Size] | None = None

    def _build(
        self,
        in_features: int,
        out_features: int,
        codes: Tensor,
        bias: bool,
        compute_dtype: torch.dtype | None,
        dtype: torch.dtype | None,
    ) -> None:
        nn.Module.__init__(self)
        self.in_features = in_features
        self.out_features = out_features
        self.compute_dtype = compute_dtype
        self.weight = nn.Parameter(codes, requires_grad=False)
        dense_bias = nn.Parameter(torch.zeros(out_features, device=codes.device, dtype=dtype)) if bias else None
        self.register_parameter("bias", dense_bias)

    @property
    def quantized_weight(self) -> Any:
        """The weight, ``[out_features, in_features]``, which shares the layer's memory."""
        raise NotImplementedError

    def set_quantized_weight(self, weight: Any) -> None:
        """Take ``weight`` as it is, without a copy."""
        raise NotImplementedError

    def hold_bytes_as(self, dtype: torch.dtype) -> None:
        """Have the parameter hold the bytes of the codes as ``dtype``, which whoever divides it can send.

        bitsandbytes' ``quant_storage``: nobody computes with these values. Where a row of codes has no whole number of
        them the parameter stays as it is.
        """
        codes = self._codes
        flat = codes.view(-1) if codes.shape[-1] == 1 else codes
        if flat.shape[-1] * codes.itemsize % dtype.itemsize == 0:
            self._codes_as = (codes.dtype, codes.shape)
            self.weight = nn.Parameter(flat.view(dtype), requires_grad=False)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Self:
        weight = self.weight

        def uncast(x: Tensor) -> Tensor:  # a cast would round the bytes
            y = fn(x)
            return y if x is not weight or y.dtype == x.dtype else x.to(y.device)

        return super()._apply(fn if self._codes_as is None else uncast, recurse)  # type: ignore[no-untyped-call,no-any-return]

    @property
    def _codes(self) -> Tensor:
        """The codes as the kernels take them, whatever the parameter holds them as."""
        if self._codes_as is None:
            return self.weight
        dtype, shape = self._codes_as
        return self.weight.view(dtype).view(shape)

    @property
    def frozen_weight(self) -> Weight4bit | WeightInt8:
        """What :attr:`quantized_weight` is."""
        weight: Weight4bit | WeightInt8 = self.quantized_weight
        return weight

    def forward(self, x: Tensor) -> Tensor:
        """``[..., in_features]`` to ``[..., out_features]`` in the dtype of ``x``."""
        dtype = self.compute_dtype or x.dtype
        bias = None if self.bias is None else self.bias.to(dtype)
        weight = self.frozen_weight
        multiply: Any = kernels.matmul_4bit if isinstance(weight, Weight4bit) else kernels.matmul_int8
        y: Tensor = multiply(x.to(dtype), weight, bias)
        return y.to(x.dtype)

    def dequantize(self, dtype: torch.dtype | None = None) -> Tensor:
        """Return the dense weight, ``[out_features, in_features]``, as ``dtype`` or else as it was before."""
        dense: Tensor = self.quantized_weight.dequantize(dtype)
        return dense

    @property
    def W_q(self) -> Tensor:
        """PEFT 0.21 asks a layer that has ``W_q`` to dequantize itself where it needs the dense weight (DoRA)."""
        return self.weight

    def _check_shape(self, kind: str, shape: tuple[int, ...]) -> None:
        if tuple(shape) != (self.out_features, self.in_features):
            raise InputError(
                f"{kind} weight of shape {tuple(shape)} does not fit a layer of shape "
                f"({self.out_features}, {self.in_features})."
            )

    def _has_weight(self) -> bool:
        """Whether the codes mean anything yet."""
        raise NotImplementedError

    def _read(self, state: dict[str, Tensor], key: str) -> Any:
        """Return the weight ``key`` of a state dict."""
        raise NotImplementedError

    def _names(self, names: list[str], prefix: str) -> list[str]:
        """Return which ``names`` of a state dict are of the weight of the layer ``prefix``."""
        key = f"{prefix}weight"
        return [name for name in names if name == key or name.startswith(f"{key}.")]

    def _save_to_state_dict(self, destination: dict[str, Any], prefix: str, keep_vars: bool) -> None:
        super()._save_to_state_dict(destination, prefix, keep_vars)
        if self._has_weight():
            state = self.quantized_weight.state_dict(f"{prefix}weight")
            del state[f"{prefix}weight"]
            destination.update(state)

    def _load_from_state_dict(
        self,
        state_dict: dict[str, Any],
        prefix: str,
        local_metadata: dict[str, Any],
        strict: bool,
        missing_keys: list[str],
        unexpected_keys: list[str],
        error_msgs: list[str],
    ) -> None:
        key = f"{prefix}weight"
        own = {name: state_dict.pop(name) for name in self._names(list(state_dict), prefix)}
        super()._load_from_state_dict(
            state_dict, prefix, local_metadata, strict, missing_keys, unexpected_keys, error_msgs
        )
        if not own:
            return
        if strict:
            missing_keys.remove(key)
        if not local_metadata.get("assign_to_params_buffers", False):
            own = {name: tensor.to(self.weight.device, copy=True) for name, tensor in own.items()}
        try:
            self.set_quantized_weight(self._read(own, key))
        except InputError as error:
            error_msgs.append(str(error))

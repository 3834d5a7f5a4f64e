"""The frozen 4-bit linear layer: ``y = x Wᵀ + b`` with ``W`` in 4 bits (QLoRA, arXiv 2305.14314, equation 5).

The packed codes are the parameter ``weight`` (uint8, frozen); the statistics are a plain attribute beside it, neither
parameters nor buffers, so that they follow the weight to a device but no cast can round them and nothing sends them
between processes. The layer is an ``nn.Linear`` to whoever looks for one (PEFT's ``all-linear`` does), it is the same
in training and in evaluation, and its state dict is bitsandbytes' (:mod:`halfbyte.quant.weight`).
"""

import copy
from collections.abc import Callable
from typing import Self

import torch
from torch import Tensor, nn

from halfbyte.choices import BLOCKSIZE, DOUBLE_QUANT, QUANT_TYPE
from halfbyte.kernels import Statistics
from halfbyte.nn.frozen import QuantizedLinear
from halfbyte.quant import QuantizedWeight, quantize_4bit


class Linear4bit(QuantizedLinear):
    """A linear layer over a frozen weight in 4 bits, differentiable in its input and its bias.

    A new layer has no weight yet: it comes from :meth:`from_linear`, :meth:`set_quantized_weight` or a state dict.

    Args:
        in_features: K.
        out_features: N.
        bias: whether there is one; it stays dense.
        compute_dtype: dtype of the product, and of ``W`` while it lasts; None takes that of the input.
        device: of the empty weight and the bias.
        dtype: of the bias.
    """

    statistics: Statistics | None

    def __init__(
        self,
        in_features: int,
        out_features: int,
        bias: bool = True,
        *,
        compute_dtype: torch.dtype | None = None,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        packed = torch.empty(-(-in_features * out_features // 2), 1, dtype=torch.uint8, device=device)
        self._build(in_features, out_features, packed, bias, compute_dtype, dtype)
        self.statistics = None
        self.quant_type = ""
        self.weight_dtype = torch.float32
        self._quantized_weight: QuantizedWeight | None = None
        self._known_of: tuple[Tensor | None] = (None,)  # the parameter that it was made of; bare, it would be one more

    @classmethod
    def from_linear(
        cls,
        linear: nn.Linear,
        quant_type: str = QUANT_TYPE,
        blocksize: int = BLOCKSIZE,
        double_quant: bool = DOUBLE_QUANT,
        compute_dtype: torch.dtype | None = None,
    ) -> Self:
        """Quantize ``linear``, which stays as it is; arguments as for :func:`halfbyte.quant.quantize_4bit`."""
        # Without a bias in the constructor: the new layer takes a copy of the old one's.
        layer = cls(linear.in_features, linear.out_features, bias=False, compute_dtype=compute_dtype)
        layer.bias = copy.deepcopy(linear.bias)
        layer.set_quantized_weight(quantize_4bit(linear.weight, quant_type, blocksize, double_quant))
        return layer.train(linear.training)

    @property
    def quantized_weight(self) -> QuantizedWeight:
        """The weight, ``[out_features, in_features]``, as the kernels take it; it shares the layer's memory."""
        # Kept, since making it anew in each call would show in decoding.
        packed, statistics, known = self.weight, self.statistics, self._quantized_weight
        if known is not None and self._known_of[0] is packed and known.statistics is statistics:
            return known
        if statistics is None:
            raise RuntimeError("This Linear4bit has no weight yet: load a state dict or call set_quantized_weight.")
        shape = torch.Size((self.out_features, self.in_features))
        self._quantized_weight = QuantizedWeight(self._codes, statistics, shape, self.quant_type, self.weight_dtype)
        self._known_of = (packed,)
        return self._quantized_weight

    def set_quantized_weight(self, weight: QuantizedWeight) -> None:
        """Take ``weight`` as it is, without a copy.

        Raises:
            InputError: its shape is not ``[out_features, in_features]``.
        """
        self._check_shape("A 4-bit", weight.shape)
        self._quantized_weight = self._codes_as = None
        self.weight = nn.Parameter(weight.packed, requires_grad=False)
        self.statistics = weight.statistics
        self.quant_type = weight.quant_type
        self.weight_dtype = weight.dtype

    def extra_repr(self) -> str:
        """Return what :func:`repr` shows."""
        quantization = ""
        if self.statistics:
            double = ", double_quant" if self.statistics.nested else ""
            quantization = f", {self.quant_type}, blocksize={self.statistics.blocksize}{double}"
        return f"{super().extra_repr()}, compute_dtype={self.compute_dtype}{quantization}"

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Self:
        self._quantized_weight = None
        super()._apply(fn, recurse)
        if self.statistics is not None and self.statistics.absmax.device != self.weight.device:
            self.statistics = self.statistics.to(self.weight.device)
        return self

    def _read(self, state: dict[str, Tensor], key: str) -> QuantizedWeight:
        return QuantizedWeight.from_state_dict(state, key)

    def _has_weight(self) -> bool:
        return self.statistics is not None

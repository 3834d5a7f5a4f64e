"""The frozen linear layer in int8: ``y = x Wᵀ + b``, each value of ``W`` a code times a 127th of its block's constant.

The weight is that of LLM.int8() (arXiv 2208.07339), the product is not: activations stay in the compute dtype, and no
outlier has to be taken out of them. Its state dict is that of :mod:`halfbyte.quant.int8`.
"""

import copy
from collections.abc import Callable
from typing import Self

import torch
from torch import Tensor, nn

from halfbyte.choices import BLOCKSIZE
from halfbyte.nn.frozen import QuantizedLinear
from halfbyte.quant.int8 import CONSTANTS, FORMAT, QuantizedInt8, quantize_int8


class Linear8bit(QuantizedLinear):
    """A linear layer over a frozen weight in int8, differentiable in its input and its bias.

    A new layer has no weight yet: it comes from :meth:`from_linear`, :meth:`set_quantized_weight` or a state dict.

    Args:
        in_features: K.
        out_features: N.
        bias: whether there is one; it stays dense.
        compute_dtype: dtype of the product; None takes that of the input.
        device: of the empty weight and the bias.
        dtype: of the bias.
    """

    quant_type = "int8"

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
        codes = torch.empty(out_features, in_features, dtype=torch.int8, device=device)
        self._build(in_features, out_features, codes, bias, compute_dtype, dtype)
        self.absmax: Tensor | None = None
        self.blocksize = 0
        self.by_row = False
        self.weight_dtype = torch.float32
        self._quantized_weight: QuantizedInt8 | None = None
        self._known_of: tuple[Tensor | None] = (None,)  # the parameter that it was made of; bare, it would be one more

    @classmethod
    def from_linear(
        cls, linear: nn.Linear, blocksize: int | str = BLOCKSIZE, compute_dtype: torch.dtype | None = None
    ) -> Self:
        """Quantize ``linear``, which stays as it is; ``blocksize`` as for :func:`halfbyte.quant.quantize_int8`."""
        layer = cls(linear.in_features, linear.out_features, bias=False, compute_dtype=compute_dtype)
        layer.bias = copy.deepcopy(linear.bias)
        layer.set_quantized_weight(quantize_int8(linear.weight, blocksize))
        return layer.train(linear.training)

    @property
    def quantized_weight(self) -> QuantizedInt8:
        """The weight, ``[out_features, in_features]``, as the kernels take it; it shares the layer's memory."""
        codes, absmax, known = self.weight, self.absmax, self._quantized_weight
        if known is not None and self._known_of[0] is codes and known.absmax is absmax:
            return known
        if absmax is None:
            raise RuntimeError("This Linear8bit has no weight yet: load a state dict or call set_quantized_weight.")
        self._quantized_weight = QuantizedInt8(self._codes, absmax, self.blocksize, self.by_row, self.weight_dtype)
        self._known_of = (codes,)
        return self._quantized_weight

    def set_quantized_weight(self, weight: QuantizedInt8) -> None:
        """Take ``weight`` as it is, without a copy.

        Raises:
            InputError: its shape is not ``[out_features, in_features]``.
        """
        self._check_shape("An int8", weight.shape)
        self._quantized_weight = self._codes_as = None
        self.weight = nn.Parameter(weight.codes, requires_grad=False)
        self.absmax, self.blocksize, self.by_row = weight.absmax, weight.blocksize, weight.by_row
        self.weight_dtype = weight.dtype

    def extra_repr(self) -> str:
        """Return what :func:`repr` shows."""
        blocks = "" if self.absmax is None else f", int8, blocksize={'row' if self.by_row else self.blocksize}"
        return f"{super().extra_repr()}, compute_dtype={self.compute_dtype}{blocks}"

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Self:
        self._quantized_weight = None
        super()._apply(fn, recurse)
        if self.absmax is not None and self.absmax.device != self.weight.device:
            self.absmax = self.absmax.to(self.weight.device)
        return self

    def _has_weight(self) -> bool:
        return self.absmax is not None

    def _read(self, state: dict[str, Tensor], key: str) -> QuantizedInt8:
        return QuantizedInt8.from_state_dict(state, key, self.compute_dtype or self.weight_dtype)

    def _names(self, names: list[str], prefix: str) -> list[str]:
        rows = [name for name in (f"{prefix}{CONSTANTS}", f"{prefix}{FORMAT}") if name in names]
        return super()._names(names, prefix) + rows

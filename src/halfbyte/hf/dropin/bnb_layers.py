"""bitsandbytes' layers (0.50 ``bitsandbytes.nn``): its constructors and parameters, our weights and products.

A layer begins dense, takes a dense ``load_state_dict``, and is quantized when it is sent to a device, or else by its
first forward. What is quantized is the parameter, as there: a ``Params4bit`` with its ``quant_state``; the layer reads
both anew each time, so that either may be put in place of the other's.

A model that was opened with ``BitsAndBytesConfig`` has layers of :mod:`halfbyte.nn`. They count as instances of these
classes, since scripts look for them that way (qlora.py's ``find_all_linear_names``), and :func:`show_quant_states`
gives their weights the ``quant_state`` that scripts which dequantize a model by hand read.
"""

import copy
from collections.abc import Callable
from typing import Any, Self

import torch
from torch import Tensor, nn

import halfbyte.nn
from halfbyte.hf.dropin.bnb_functional import quantize_4bit
from halfbyte.hf.dropin.bnb_state import QuantState, as_weight
from halfbyte.quant import QuantizedWeight


def parsed(args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[torch.device | None, torch.dtype | None, bool]:
    """Return the device, the dtype and ``non_blocking`` of the arguments of ``to``, read as torch (2.13) reads them."""
    if args and isinstance(args[0], int):  # the number of a GPU, of which torch would ask whether there is any
        args = (torch.device("cuda", args[0]), *args[1:])
    device, dtype, non_blocking, _ = torch._C._nn._parse_to(*args, **kwargs)
    return device, dtype, non_blocking


class _Packed(type(nn.Parameter)):  # type: ignore[misc]
    """The class of packed parameters: those that :func:`show_quant_states` has been over count as instances."""

    def __instancecheck__(cls, instance: Any) -> bool:
        if super().__instancecheck__(instance):
            return True
        return cls.__module__ == __name__ and type(instance) is nn.Parameter and hasattr(instance, "quant_state")


class Params4bit(nn.Parameter, metaclass=_Packed):
    """A weight that is quantized to 4 bits when it is sent to a device: ``[ceil(n / 2), 1]`` bytes from then on."""

    blocksize: int
    compress_statistics: bool
    quant_type: str
    quant_state: QuantState | None
    quant_storage: torch.dtype
    bnb_quantized: bool
    module: nn.Module | None

    def __new__(
        cls,
        data: Tensor | None = None,
        requires_grad: bool = False,
        quant_state: QuantState | None = None,
        blocksize: int | None = None,
        compress_statistics: bool = True,
        quant_type: str = "fp4",
        quant_storage: torch.dtype = torch.uint8,
        module: nn.Module | None = None,
        bnb_quantized: bool = False,
        **kwargs: Any,
    ) -> Self:
        """Return a parameter over ``data``; other arguments as of bitsandbytes'."""
        self = torch.Tensor._make_subclass(cls, torch.empty(0) if data is None else data, requires_grad)
        self.blocksize = 64 if blocksize is None else blocksize
        self.compress_statistics = compress_statistics
        self.quant_type = quant_type
        self.quant_state = quant_state
        self.quant_storage = quant_storage
        self.bnb_quantized = bnb_quantized
        self.module = module
        return self

    @classmethod
    def from_prequantized(
        cls,
        data: Tensor,
        quantized_stats: dict[str, Any],
        requires_grad: bool = False,
        device: torch.device | str = "cuda",
        module: nn.Module | None = None,
        **kwargs: Any,
    ) -> Self:
        """Return the parameter of packed ``data`` and what a file holds of its state."""
        data = data.to(device)
        state = QuantState.from_dict(quantized_stats, data.device)
        self = cls(data, requires_grad, **cls._options(state), quant_storage=data.dtype, module=module)
        return self._share()

    @classmethod
    def of(cls, weight: QuantizedWeight) -> Self:
        """Return the parameter of a weight of ours; its memory is shared."""
        return cls(weight.packed, **cls._options(QuantState.of(weight)))

    @staticmethod
    def _options(state: QuantState) -> dict[str, Any]:
        return {
            "quant_state": state,
            "blocksize": state.blocksize,
            "compress_statistics": state.nested,
            "quant_type": state.quant_type,
            "bnb_quantized": True,
        }

    def _share(self) -> Self:
        if self.module is not None:
            self.module.quant_state = self.quant_state  # type: ignore[assignment]
        return self

    def _quantize(self, device: torch.device | str) -> Self:
        """Quantize in place, on ``device``."""
        with torch.no_grad():
            self.data, self.quant_state = quantize_4bit(
                self.data.to(device).contiguous(),
                blocksize=self.blocksize,
                compress_statistics=self.compress_statistics,
                quant_type=self.quant_type,
                quant_storage=self.quant_storage,
            )
        self.bnb_quantized = True
        return self._share()

    def to(self, *args: Any, **kwargs: Any) -> "Params4bit":
        """``Tensor.to``; a device other than ``meta`` quantizes what is not."""
        device, dtype, non_blocking = parsed(args, kwargs)
        if device is not None and device.type != "meta" and not self.bnb_quantized:
            return self._quantize(device)
        if self.quant_state is not None and device is not None and device.type != "meta":
            self.quant_state.to(device)
        moved = super().to(device=device, dtype=dtype, non_blocking=non_blocking)
        return self._like(moved, self.quant_state)

    def cpu(self) -> "Params4bit":  # type: ignore[override]
        """``to("cpu")``."""
        return self.to("cpu")

    def cuda(self, device: Any = None, non_blocking: bool = False) -> "Params4bit":  # type: ignore[override]
        """``to("cuda")``."""
        return self.to("cuda" if device is None else device, non_blocking=non_blocking)

    def _like(self, data: Tensor, state: QuantState | None) -> "Params4bit":
        return type(self)(
            data,
            self.requires_grad,
            state,
            self.blocksize,
            self.compress_statistics,
            self.quant_type,
            self.quant_storage,
            self.module,
            self.bnb_quantized,
        )

    def __deepcopy__(self, memo: dict[int, Any]) -> "Params4bit":
        new = self._like(self.data.clone(), copy.deepcopy(self.quant_state, memo))
        memo[id(self)] = new
        new.module = copy.deepcopy(self.module, memo)
        return new

    def __reduce_ex__(self, protocol: Any) -> Any:
        options = (self.requires_grad, self.quant_state, self.blocksize, self.compress_statistics, self.quant_type)
        return type(self), (self.data, *options, self.quant_storage, None, self.bnb_quantized)


class OursToo(type):
    """The classes of layers: what :mod:`halfbyte.nn` has of the kind counts as an instance."""

    kind = "Linear4bit"
    quant_type: str | None = None

    def __instancecheck__(cls, instance: Any) -> bool:
        if super().__instancecheck__(instance):
            return True
        ours = vars(halfbyte.nn).get(cls.kind)
        return (
            cls.__module__ == __name__  # not what a script derives from one
            and ours is not None
            and isinstance(instance, ours)
            and not isinstance(type(instance), OursToo)
            and cls.quant_type in (None, instance.quant_type)
        )


class Linear4bit(halfbyte.nn.Linear4bit, metaclass=OursToo):
    """``y = x Wᵀ + b`` with ``W`` in 4 bits from when it is sent to a device."""

    weight: Any
    quant_state: QuantState | None

    def __init__(
        self,
        input_features: int,
        output_features: int,
        bias: bool = True,
        compute_dtype: torch.dtype | None = None,
        compress_statistics: bool = True,
        quant_type: str = "fp4",
        quant_storage: torch.dtype = torch.uint8,
        device: torch.device | str | None = None,
    ) -> None:
        nn.Linear.__init__(self, input_features, output_features, bias, device)
        self.weight = Params4bit(
            self.weight.data,
            compress_statistics=compress_statistics,
            quant_type=quant_type,
            quant_storage=quant_storage,
            module=self,
        )
        self.compute_dtype = compute_dtype
        self.quant_state = None
        self.quant_storage = quant_storage

    @property
    def quantized_weight(self) -> QuantizedWeight:
        """The weight as the kernels take it; quantized now, where it was not."""
        weight = self.weight
        if not isinstance(weight, Params4bit):  # somebody's own parameter over the same bytes
            state = getattr(weight, "quant_state", None) or self.quant_state
            if state is None:
                raise RuntimeError(
                    "The weight of this Linear4bit is no Params4bit: give it one, and send it to a device."
                )
            return as_weight(weight, state)
        if weight.quant_state is None:
            if weight.bnb_quantized and self.quant_state is not None:
                weight.quant_state = self.quant_state
            else:
                weight._quantize(weight.device)
        return as_weight(weight, weight.quant_state)

    def set_quantized_weight(self, weight: QuantizedWeight) -> None:
        """Take ``weight`` as it is, without a copy."""
        self.weight = Params4bit.of(weight)
        self.weight.module = self
        self.weight._share()

    def extra_repr(self) -> str:
        """Return what :func:`repr` shows."""
        return f"{nn.Linear.extra_repr(self)}, compute_dtype={self.compute_dtype}, {self.weight.quant_type}"

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Self:
        weight = self.weight
        nn.Module._apply(self, fn, recurse)  # type: ignore[no-untyped-call]
        if self.weight is weight and isinstance(weight, Params4bit) and weight.quant_state is not None:
            weight.quant_state.to(weight.device)
        return self

    def _save_to_state_dict(self, destination: dict[str, Any], prefix: str, keep_vars: bool) -> None:
        nn.Module._save_to_state_dict(self, destination, prefix, keep_vars)
        state = getattr(self.weight, "quant_state", None)
        if state is not None:
            destination.update({f"{prefix}weight.{key}": value for key, value in state.as_dict(packed=True).items()})

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *args: Any) -> None:
        stored = {key: state_dict[key] for key in state_dict if key.startswith(f"{prefix}weight.")}
        if not stored:
            nn.Module._load_from_state_dict(self, state_dict, prefix, *args)
            return
        halfbyte.nn.Linear4bit._load_from_state_dict(self, state_dict, prefix, *args)


class LinearNF4(Linear4bit):
    """:class:`Linear4bit` in nf4."""

    quant_type = "nf4"

    def __init__(
        self,
        input_features: int,
        output_features: int,
        bias: bool = True,
        compute_dtype: torch.dtype | None = None,
        compress_statistics: bool = True,
        quant_storage: torch.dtype = torch.uint8,
        device: torch.device | str | None = None,
    ) -> None:
        super().__init__(
            input_features, output_features, bias, compute_dtype, compress_statistics, "nf4", quant_storage, device
        )


class LinearFP4(Linear4bit):
    """:class:`Linear4bit` in fp4."""

    quant_type = "fp4"

    def __init__(
        self,
        input_features: int,
        output_features: int,
        bias: bool = True,
        compute_dtype: torch.dtype | None = None,
        compress_statistics: bool = True,
        quant_storage: torch.dtype = torch.uint8,
        device: torch.device | str | None = None,
    ) -> None:
        super().__init__(
            input_features, output_features, bias, compute_dtype, compress_statistics, "fp4", quant_storage, device
        )


def show_quant_states(model: nn.Module) -> None:
    """Give the weight of each 4-bit layer of ours the attributes of a ``Params4bit``; it counts as one then."""
    for layer in model.modules():
        if isinstance(layer, halfbyte.nn.Linear4bit) and not isinstance(type(layer), OursToo):
            weight: Any = layer.weight
            weight.quant_state = QuantState.of(layer.quantized_weight)
            weight.quant_type, weight.blocksize = layer.quant_type, weight.quant_state.blocksize
            weight.compress_statistics, weight.quant_storage = weight.quant_state.nested, torch.uint8
